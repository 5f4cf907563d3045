"""A layer with copies of experts computes what it does without, with its devices' loads evened out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import expert_axes, fetch, mesh_named, put_on_mesh

from jax_deepep import flax as ep_flax
from jax_deepep.balancing import imbalance, plan_experts
from jax_deepep.flax import linen
from jax_deepep.moe import MoEConfig, build_config, moe, physical_parameters

pytestmark = pytest.mark.filterwarnings("ignore:jax_deepep.flax.linen.MoE. no logical axis rule")

E, K, H, F, TOKENS = 16, 2, 8, 4, 128


def config_of(
    mesh_name: str, num_physical: int | None = None, axis_types: Any = AxisType.Auto, **choices
) -> MoEConfig:
    mesh = mesh_named(mesh_name, axis_types)
    sizes = {"axis_name": expert_axes(mesh_name), "max_tokens": TOKENS, "num_physical_experts": num_physical}
    return build_config(E, K, H, F, mesh=mesh, **sizes, **choices)


def inputs(config: MoEConfig) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return parameters and tokens, most of which choose the same few experts."""
    rng = np.random.default_rng(0)
    parameters = {name: rng.normal(size=shape) / 2 for name, (shape, _) in config.parameters.items()}
    parameters["gate"][0] = np.linspace(2, 0, E) ** 2
    x = rng.normal(size=(TOKENS, H))
    x[:, 0] = 1
    specs = {name: P() if name == "gate" else config.spec(name) for name in parameters}
    placed = {
        name: put_on_mesh(value.astype(np.float32), config.mesh, specs[name])
        for name, value in parameters.items()
    }
    return placed, put_on_mesh(x.astype(np.float32), config.mesh, P(config.token_axes))


@functools.cache
def without_copies(mesh_name: str) -> tuple[Any, Any, np.ndarray]:
    """Return (output and gradients of a layer without copies, parameters, load)."""
    config = config_of(mesh_name)
    parameters, x = inputs(config)

    def loss(parameters, x):
        out, aux = moe(config, parameters, x)
        return (out * jnp.sin(out)).sum(), (out, aux.expert_load)

    gradients, (out, load) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
    return fetch((out, gradients)), fetch(load)


def check(mesh_name: str, *, own_first: bool = True, is_traced: bool, **choices) -> None:
    expected, load = without_copies(mesh_name)
    size = config_of(mesh_name).comm.size
    config = config_of(mesh_name, E + 2 * size, **choices)
    parameters, x = inputs(config)
    placement = plan_experts(load, num_physical=E + 2 * size, num_devices=size, own_first=own_first)
    assert imbalance(load, placement, size) < imbalance(load, np.arange(E), size)

    def loss(parameters, x, placement):
        of_slots = physical_parameters(config, parameters, placement, own_first=own_first)
        out, aux = moe(config, of_slots, x, placement)
        return (out * jnp.sin(out)).sum(), (out, aux.expert_load)

    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if is_traced:
        gradients, (out, load_with) = jax.jit(step)(parameters, x, put_on_mesh(placement, config.mesh, P()))
    else:
        gradients, (out, load_with) = jax.jit(lambda parameters, x: step(parameters, x, placement))(
            parameters, x
        )
    np.testing.assert_array_equal(fetch(load_with), load)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, fetch((out, gradients)), expected)


@pytest.mark.parametrize("is_traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("own_first", [True, False], ids=["own first", "anywhere"])
def test_output_and_gradients_are_those_without_copies(own_first: bool, is_traced: bool) -> None:
    check("expert", own_first=own_first, is_traced=is_traced)


@pytest.mark.parametrize(
    ("mesh_name", "choices"),
    [
        ("data × expert", {}),
        ("node × expert", {"num_chunks": 2}),
        ("data × expert", {"axis_types": AxisType.Explicit}),
        ("data × expert", {"fsdp_axis": "data"}),
    ],
    ids=["two groups", "two axes, in chunks", "explicit axes", "fsdp"],
)
def test_on_other_meshes(mesh_name: str, choices: dict[str, Any]) -> None:
    check(mesh_name, is_traced=True, **choices)


def module_of(kind: str, **sizes: Any):
    """Return (parameters, a compiled function of them, x and a placement) of a Flax module."""
    if kind == "nnx":
        graph, parameters = nnx.split(ep_flax.MoE(E, K, H, F, rngs=nnx.Rngs(0), **sizes))
        return nnx.to_pure_dict(parameters), jax.jit(
            lambda parameters, x, placement: nnx.merge(graph, parameters)(x, placement)
        )
    layer = linen.MoE(E, K, H, F, **sizes)
    x, placement = jnp.zeros((TOKENS, H)), jnp.arange(sizes["num_physical_experts"]) % E
    variables = jax.jit(layer.init)(jax.random.key(0), x, placement)
    parameters = nn.unbox(variables)["params"]
    return parameters, jax.jit(lambda parameters, *args: layer.apply({"params": parameters}, *args))


def test_matrices_of_slots_are_fetched_by_one_program() -> None:
    config = config_of("expert", 2 * E)
    parameters, _ = inputs(config)
    own = np.arange(E).reshape(config.comm.size, -1)
    placement = np.concatenate([own, own[::-1]], axis=1).ravel().astype(np.int32)
    once = fetch(physical_parameters(config, parameters, placement))
    with compilations() as compiled:
        again = fetch(physical_parameters(config, parameters, placement))
    assert not compiled
    jax.tree.map(np.testing.assert_array_equal, again, once)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_copies_keep_rows_that_would_be_dropped(kind: str) -> None:
    """In the modules, with a capacity; the placement changes from step to step, in one program."""
    size = jax.device_count()
    sizes = {"num_physical_experts": 2 * E, "mesh": mesh_named("expert"), "max_tokens": TOKENS}
    parameters, apply = module_of(kind, capacity_factor=1.6, alignment=1, **sizes)
    own, x = inputs(config_of("expert"))
    assert parameters.keys() == own.keys()
    # Every expert twice on its device: as good as no copies.
    first = np.arange(E).reshape(size, -1)
    placement = np.concatenate([first, first], axis=1).ravel().astype(np.int32)
    _, aux = apply(own, x, put_on_mesh(placement, config_of("expert").mesh, P()))
    before, load = int(fetch(aux.num_dropped)), fetch(aux.expert_load)
    placement = plan_experts(load, num_physical=2 * E, num_devices=size)
    _, aux = apply(own, x, put_on_mesh(placement, config_of("expert").mesh, P()))
    np.testing.assert_array_equal(fetch(aux.expert_load), load)
    assert before > 0
    assert int(fetch(aux.num_dropped)) == 0
    assert apply._cache_size() == 1


LAYERS = 2
NO_AXIS = {nn.PARTITION_NAME: None}


def nnx_layers(config: MoEConfig) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """Return (stacked parameters, a scan over the layers, one layer); with copies if `config` has them."""
    arguments = {"comm": config.comm, "num_physical_experts": config.num_physical_experts}

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=NO_AXIS)
    def stacked(rngs: nnx.Rngs) -> ep_flax.MoE:
        return ep_flax.MoE(E, K, H, F, rngs=rngs, **arguments)

    @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0), transform_metadata=NO_AXIS)
    @nnx.remat
    def scan(layer: ep_flax.MoE, x: jax.Array, placement: Any) -> tuple[jax.Array, jax.Array]:
        out, aux = layer(x, placement)
        return x + out, aux.expert_load

    graph, state = nnx.split(stacked(nnx.Rngs(0)))

    def one(parameters, x):
        out, aux = nnx.merge(graph, parameters)(x)
        return x + out, aux.expert_load

    return state, lambda parameters, *args: scan(nnx.merge(graph, parameters), *args), one


def linen_layers(config: MoEConfig) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """Return what `nnx_layers` does."""
    arguments = {"comm": config.comm, "num_physical_experts": config.num_physical_experts}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, placement=None):
            out, aux = linen.MoE(E, K, H, F, name="moe", **arguments)(x, placement)
            return x + out, aux.expert_load

    layers = nn.scan(
        nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True},
        length=LAYERS, metadata_params=NO_AXIS,
    )()  # fmt: skip
    of_layers = None
    if config.num_physical_experts is not None:
        of_layers = jnp.zeros((LAYERS, config.num_physical_experts), jnp.int32)
    variables = nn.unbox(jax.jit(layers.init)(jax.random.key(0), inputs(config)[1], of_layers))
    return variables, layers.apply, Layer().apply


@pytest.mark.parametrize("layers_of", [nnx_layers, linen_layers], ids=["nnx", "linen"])
def test_scanned_layers_with_copies_are_a_loop_over_layers_without(layers_of: Callable[..., Any]) -> None:
    """Rematerialised, each with a placement of its own, which is traced."""
    size = jax.device_count()
    with_copies, plain = config_of("expert", E + 2 * size), config_of("expert")
    x = inputs(plain)[1]
    parameters, in_a_scan, _ = layers_of(with_copies)
    _, _, one = layers_of(plain)
    # All but the first weight of every gate stay as they were: most tokens choose the same few experts.
    popular = jnp.linspace(2, 0, E) ** 2

    def skew(path, value):
        is_gate = "gate" in jax.tree_util.keystr(path)
        return value.at[:, 0].set(popular) if is_gate else value

    parameters = jax.jit(lambda tree: jax.tree_util.tree_map_with_path(skew, tree))(parameters)

    def in_a_loop(parameters, x, placement):
        loads = []
        for number in range(LAYERS):
            x, load = one(jax.tree.map(lambda value, number=number: value[number], parameters), x)
            loads.append(load)
        return x, jnp.stack(loads)

    def gradients_of(layers, placement):
        def loss(parameters, x, placement):
            out, loads = layers(parameters, x, placement)
            return (out * jnp.sin(out)).sum(), (out, loads)

        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        gradients, (out, loads) = fetch(step(parameters, x, placement))
        return (jax.tree.leaves(gradients), out), loads

    expected, loads = gradients_of(in_a_loop, None)
    placement = plan_experts(loads, num_physical=E + 2 * size, num_devices=size)
    assert placement.shape == (LAYERS, E + 2 * size)
    assert (placement[0] != placement[1]).any()
    got, loads_with = gradients_of(in_a_scan, put_on_mesh(placement, plain.mesh, P()))
    np.testing.assert_array_equal(loads_with, loads)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, expected)


def test_wrong_placements() -> None:
    size = jax.device_count()
    config = config_of("expert", E + size)
    parameters, x = inputs(config)
    right = plan_experts(np.ones(E), num_physical=E + size, num_devices=size)
    wrong = [
        (
            None,
            ValueError,
            rf"placement: got None with num_physical_experts={E + size}; takes the int32 array",
        ),
        (right[1:], ValueError, rf"placement: got shape \({E + size - 1},\); takes \[num_physical_experts\]"),
        (right.astype(np.int64), TypeError, "placement: got dtype int64; takes int32"),
        (
            np.where(right == 3, 4, right),
            ValueError,
            r"placement: has no slot for experts \[3\]; takes every",
        ),
        (np.append(right[:-1], np.int32(E)), ValueError, rf"placement: got entries outside of \[0, {E}\)"),
        (right[::-1], ValueError, "placement: does not begin with the own experts of every device"),
    ]
    for placement, error, words in wrong:
        with pytest.raises(error, match=words):
            physical_parameters(config, parameters, placement)
    with pytest.raises(ValueError, match=r"placement: got one for a layer without copies of experts"):
        moe(config_of("expert"), parameters, x, right)
    with pytest.raises(
        ValueError, match=r"wi_0: got shape \(16, 8, 4\); takes \[exp, embed, mlp\] = \[24, 8, 4\]"
    ):
        moe(config_of("expert", 24), parameters, x, np.arange(24, dtype=np.int32) % E)
    with pytest.raises(ValueError, match=rf"num_experts: got {E} with {size} slots on {size} devices; takes"):
        config_of("expert", size)


def test_slots_that_devices_cannot_share_evenly() -> None:
    size = jax.device_count()
    with pytest.raises(
        ValueError,
        match=rf"num_physical_experts: got {E + 1} for {size} devices along \('expert',\); takes a multiple "
        rf"of {size}, the same number of slots on each, for example {E + size}\.",
    ):
        config_of("expert", E + 1)
    with pytest.raises(TypeError, match=r"num_physical_experts: got 24\.0; takes a Python integer"):
        config_of("expert", 24.0)
