"""A layer with replicas computes the same as without, with its devices' loads evened out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import expert_axes, fetch, mesh_named, put_on_mesh

from jax_deepep import flax as ep_flax
from jax_deepep.balancing import imbalance, plan_experts
from jax_deepep.moe import MoEConfig, build_config, moe, physical_parameters

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
    sharded = {
        name: put_on_mesh(value.astype(np.float32), config.mesh, specs[name])
        for name, value in parameters.items()
    }
    return sharded, put_on_mesh(x.astype(np.float32), config.mesh, P(config.token_axes))


@functools.cache
def without_replicas() -> tuple[Any, np.ndarray]:
    """Return (output and gradients of a layer without replicas, which depend on no mesh; its load)."""
    config = config_of("expert")
    parameters, x = inputs(config)

    def loss(parameters, x):
        out, aux = moe(config, parameters, x)
        return (out * jnp.sin(out)).sum(), (out, aux.expert_load)

    gradients, (out, load) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
    return fetch((out, gradients)), fetch(load)


@pytest.mark.parametrize(
    ("mesh_name", "choices"),
    [
        ("expert", {}),
        ("node × expert", {"num_chunks": 2}),
        ("data × expert", {"axis_types": AxisType.Explicit}),
        ("data × expert", {"fsdp_axis": "data", "keep_home": False}),
    ],
    ids=["home", "two axes, in chunks", "two groups, explicit axes", "anywhere, two groups, fsdp"],
)
def test_output_and_gradients_are_those_without_replicas(mesh_name: str, choices: dict[str, Any]) -> None:
    """With a traced expert map; one of NumPy gives the same matrices, without compiling again."""
    keep_home = choices.get("keep_home", True)
    expected, load = without_replicas()
    size = config_of(mesh_name).comm.size
    config = config_of(mesh_name, E + 2 * size, **{k: v for k, v in choices.items() if k != "keep_home"})
    parameters, x = inputs(config)
    expert_map = plan_experts(load, num_physical=E + 2 * size, num_devices=size, keep_home=keep_home)
    assert imbalance(load, expert_map, size) < imbalance(load, np.arange(E), size)

    def loss(parameters, x, expert_map):
        of_physical = physical_parameters(config, parameters, expert_map, keep_home=keep_home)
        out, aux = moe(config, of_physical, x, expert_map)
        return (out * jnp.sin(out)).sum(), (out, aux.expert_load, of_physical)

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, (out, load_with, of_physical) = step(parameters, x, put_on_mesh(expert_map, config.mesh, P()))
    np.testing.assert_array_equal(fetch(load_with), load)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, fetch((out, gradients)), expected)
    if mesh_name == "expert":
        fetch_physical = functools.partial(physical_parameters, config, parameters, keep_home=keep_home)
        jax.tree.map(np.testing.assert_array_equal, fetch(fetch_physical(expert_map)), fetch(of_physical))
        with compilations() as compiled:
            fetch_physical(expert_map)
        assert not compiled


def test_replicas_avoid_drops() -> None:
    """In a module with a capacity; the expert map changes from step to step, in one program."""
    size = jax.device_count()
    comm = config_of("expert", 2 * E).comm
    sizes = {"comm": comm, "num_physical_experts": 2 * E, "capacity_factor": 1.6, "alignment": 1}
    graph, state = nnx.split(nnx.eval_shape(lambda: ep_flax.MoE(E, K, H, F, rngs=nnx.Rngs(0), **sizes)))
    parameters = nnx.to_pure_dict(state)
    apply = jax.jit(lambda parameters, x, expert_map: nnx.merge(graph, parameters)(x, expert_map))
    own, x = inputs(config_of("expert"))
    assert parameters.keys() == own.keys()
    # Every expert twice on its device: no better than without replicas.
    first = np.arange(E).reshape(size, -1)
    expert_map = np.concatenate([first, first], axis=1).ravel().astype(np.int32)
    _, aux = apply(own, x, put_on_mesh(expert_map, comm.mesh, P()))
    before, load = int(fetch(aux.num_dropped)), fetch(aux.expert_load)
    expert_map = plan_experts(load, num_physical=2 * E, num_devices=size)
    _, aux = apply(own, x, put_on_mesh(expert_map, comm.mesh, P()))
    np.testing.assert_array_equal(fetch(aux.expert_load), load)
    assert before > 0
    assert int(fetch(aux.num_dropped)) == 0
    assert apply._cache_size() == 1


def test_wrong_expert_maps() -> None:
    size = jax.device_count()
    config = config_of("expert", E + size)
    parameters, x = inputs(config)
    right = plan_experts(np.ones(E), num_physical=E + size, num_devices=size)
    wrong = [
        (
            None,
            ValueError,
            rf"expert_map: expected int32 \[num_physical_experts\] = \[{E + size}\], got None",
        ),
        (right[1:], ValueError, rf"expert_map: expected shape .*, got \[{E + size - 1}\]"),
        (right.astype(np.int64), TypeError, "expert_map: expected dtype int32, got int64"),
        (
            np.where(right == 3, 4, right),
            ValueError,
            r"expert_map: expected every expert at least once, got none of \[3\]",
        ),
        (
            np.append(right[:-1], np.int32(E)),
            ValueError,
            rf"expert_map: expected experts in \[0, {E}\), got others",
        ),
        (right[::-1], ValueError, "expert_map: expected every device's own experts first, got others"),
    ]
    for expert_map, error, words in wrong:
        with pytest.raises(error, match=words):
            physical_parameters(config, parameters, expert_map)
    with pytest.raises(
        ValueError, match="expert_map: expected None for a layer without replicas, got an array"
    ):
        moe(config_of("expert"), parameters, x, right)
    with pytest.raises(
        ValueError, match=r"wi_0: expected shape \[exp, embed, mlp\] = \[24, 8, 4\], got \[16, 8, 4\]"
    ):
        moe(config_of("expert", 24), parameters, x, np.arange(24, dtype=np.int32) % E)
    with pytest.raises(ValueError, match=rf"num_experts: expected .* the {size} physical experts, got {E}"):
        config_of("expert", size)


def test_physical_experts_that_do_not_divide() -> None:
    size = jax.device_count()
    with pytest.raises(
        ValueError,
        match=rf"num_physical_experts: expected a multiple of the {size} devices along \('expert',\), got "
        rf"{E + 1}; pass the same number for each device, for example {E + size}\.",
    ):
        config_of("expert", E + 1)
    with pytest.raises(TypeError, match=r"num_physical_experts: expected a Python integer.*, got 24\.0"):
        config_of("expert", 24.0)
