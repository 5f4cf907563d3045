"""The NNX and the Linen module: the same layer, under what Flax does with modules."""

import dataclasses
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from dense_moe import E, F, H, K, config_of, loss_of, numbers
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import fetch, put_on_mesh
from process_exchange import all_gather

from jax_deepep import flax as ep_flax
from jax_deepep.flax import linen
from jax_deepep.gating import update_bias
from jax_deepep.moe import MoEConfig, build_config

pytestmark = pytest.mark.filterwarnings("ignore:jax_deepep.flax.linen.MoE. no logical axis rule")

MESH = "fsdp × expert × tensor"
SIZES = (E, K, H, F)
CHOICES: dict[str, Any] = {
    "use_bias_correction": True,
    "shared_intermediate_size": 8,
    "score_function": "sigmoid",
}
COMM = config_of(MESH, **CHOICES).comm


def batch() -> jax.Array:
    return put_on_mesh(numbers(8, 6, H), COMM.mesh, P(COMM.axis_names))


def nnx_layer(seed: int = 0, **choices: Any) -> ep_flax.MoE:
    return ep_flax.MoE(*SIZES, comm=COMM, rngs=nnx.Rngs(seed), **{**CHOICES, **choices})


def test_the_modules_agree() -> None:
    """Bitwise, given the same parameters, which both name and annotate alike."""
    layer = nnx_layer()
    other = linen.MoE(*SIZES, comm=COMM, **CHOICES)
    x = batch()
    variables = jax.eval_shape(other.init, jax.random.key(0), x)
    state = nnx.state(layer)
    shapes = {**variables["params"], **variables["router"]}
    assert {name: leaf.value.shape for name, leaf in shapes.items()} == {
        name: leaf.shape for name, leaf in nnx.to_pure_dict(state).items()
    }
    assert {name: leaf.names for name, leaf in shapes.items()} == {
        name: leaf.out_sharding for name, leaf in state.items()
    }

    parameters = nnx.to_pure_dict(state)
    collections = {"router": {"gate_bias": parameters.pop("gate_bias")}, "params": parameters}
    out, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
    jax.tree.map(
        np.testing.assert_array_equal, fetch(jax.jit(other.apply)(collections, x)), fetch((out, aux))
    )


def test_linen_keeps_the_output_of_the_layer_alone_as_an_intermediate() -> None:
    layer, x = linen.MoE(*SIZES, comm=COMM, **CHOICES), batch()
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    apply = functools.partial(
        layer.apply,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, linen.MoE),
    )
    out, kept = jax.eval_shape(apply, variables, x)
    assert kept["intermediates"] == {"__call__": (out,)}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_initializers_and_dtype_of_the_user(kind: str) -> None:
    constant = nn.initializers.constant
    choices = {"gate_init": constant(0.5), "kernel_init": constant(0.25), "param_dtype": jnp.bfloat16}
    if kind == "nnx":
        parameters = nnx.to_pure_dict(nnx.state(nnx_layer(**choices)))
    else:
        layer = linen.MoE(*SIZES, comm=COMM, **CHOICES, **choices)
        variables = nn.unbox(jax.jit(layer.init)(jax.random.key(0), batch()))
        parameters = {**variables["params"], **variables["router"]}
    assert {"gate", "gate_bias", "wi_0", "wo", "shared_wi_0", "shared_wo"} <= parameters.keys()
    for name, value in fetch(parameters).items():
        assert value.dtype == (jnp.float32 if name == "gate_bias" else jnp.bfloat16), name
        np.testing.assert_array_equal(value, {"gate": 0.5, "gate_bias": 0}.get(name, 0.25), name)


def test_a_key_instead_of_rngs() -> None:
    with pytest.raises(TypeError, match=r"rngs: expected flax\.nnx\.Rngs, got .*; pass nnx"):
        ep_flax.MoE(*SIZES, comm=COMM, rngs=jax.random.key(0), **CHOICES)


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnx_parameters_are_initialised_sharded(axis_types: AxisType) -> None:
    config = config_of(MESH, axis_types, **CHOICES)
    layer = ep_flax.MoE(*SIZES, comm=config.comm, rngs=nnx.Rngs(0), **CHOICES)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
    for name, value in nnx.to_pure_dict(nnx.state(layer)).items():
        assert value.sharding.is_equivalent_to(jax.NamedSharding(config.mesh, config.spec(name)), value.ndim)
        assert specs[name] == config.spec(name)


def test_linen_parameters_are_initialised_sharded() -> None:
    """By the rules, also in their boxes."""
    layer = linen.MoE(*SIZES, comm=COMM, **CHOICES)
    rules = [("exp", "expert"), ("embed", "fsdp"), ("mlp", "tensor")]
    with jax.set_mesh(COMM.mesh), nn.logical_axis_rules(rules):
        variables = jax.jit(layer.init)(jax.random.key(0), batch())
    config = config_of(MESH, **CHOICES)
    for name, boxed in {**variables["params"], **variables["router"]}.items():
        expected = jax.NamedSharding(COMM.mesh, config.spec(name))
        assert boxed.value.sharding.is_equivalent_to(expected, boxed.value.ndim), name


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnx_parameters_are_made_sharded(axis_types: AxisType) -> None:
    """Under jit, no device makes the matrices of other devices' experts."""
    config = config_of("expert", axis_types)
    experts, hidden, inner = 8, 64, 512
    comm = build_config(experts, 2, hidden, inner, mesh=config.mesh, max_tokens=4).comm

    def make():
        return nnx.to_pure_dict(
            nnx.state(ep_flax.MoE(experts, 2, hidden, inner, comm=comm, rngs=nnx.Rngs(0)))
        )

    with jax.set_mesh(config.mesh):
        temporary = jax.jit(make).lower().compile().memory_analysis().temp_size_in_bytes
    of_all = 3 * experts * hidden * inner * 4  # bytes of the matrices
    assert temporary < 2 * of_all / comm.size


def test_logical_axis_rules_of_the_program_take_precedence() -> None:
    with nnx.logical_axis_rules([("exp", "expert"), ("embed", None), ("mlp", "tensor")]):
        layer = nnx_layer(fsdp_axis=None)
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
        assert specs["wi_0"] == P("expert", None, "tensor")
        assert layer.wi_0[...].sharding.spec == P("expert", None, "tensor")


def test_a_training_step_updates_parameters_and_bias() -> None:
    """`nnx.grad` has gradients of parameters only; the load updates the bias."""
    layer, x = nnx_layer(), batch()

    @nnx.jit
    def step(layer, x):
        def loss(layer):
            out, aux = layer(x)
            return loss_of(out) + 0.01 * aux.balance_loss, aux

        gradients, aux = nnx.grad(loss, has_aux=True)(layer)
        layer.gate_bias[...] = update_bias(layer.gate_bias[...], aux.expert_load, 0.5)
        return gradients, aux

    gradients, aux = step(layer, x)
    assert "gate_bias" not in gradients
    assert all(np.any(value) for value in jax.tree.leaves(fetch(nnx.to_pure_dict(gradients))))
    load = fetch(aux.expert_load)
    np.testing.assert_array_equal(fetch(layer.gate_bias[...]), 0.5 * np.sign(load.mean() - load))


def test_orbax_saves_and_restores(tmp_path) -> None:
    """Parameters come back with the layer's sharding and the same bits."""
    if jax.process_count() > 1:
        tmp_path = Path(all_gather(bytes(tmp_path))[0].decode())  # that of the first process, for all
    layer, other = nnx_layer(), nnx_layer(seed=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.to_pure_dict(nnx.state(layer)))
    state = nnx.state(other)
    wanted = jax.tree.map(
        lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding),
        nnx.to_pure_dict(state),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "layer", wanted))
    nnx.update(other, state)

    parameters, restored = (nnx.to_pure_dict(nnx.state(module)) for module in (layer, other))
    jax.tree.map(np.testing.assert_array_equal, fetch(restored), fetch(parameters))
    placement, own = (jax.tree.map(lambda value: value.sharding, of) for of in (restored, parameters))
    assert placement == own


def test_a_linen_module_makes_its_communicator_once() -> None:
    """Linen copies modules while tracing."""
    config = config_of("data × expert")
    layer = linen.MoE(*SIZES, mesh=config.mesh, max_tokens=8)
    assert layer.clone().comm is layer.comm
    assert layer.comm.max_tokens == 8
    variables = jax.eval_shape(layer.init, jax.random.key(0), numbers(8, H))
    assert jax.eval_shape(layer.apply, nn.unbox(variables), numbers(8, H))[0].shape == (8, H)


def test_linen_without_a_rule_for_experts_warns() -> None:
    """All of them would be made on one device."""
    layer, x = linen.MoE(*SIZES, comm=config_of("expert").comm), numbers(8, H)
    with pytest.warns(
        UserWarning, match=r'no logical axis rule shards "exp".*Set rules around init and apply'
    ):
        jax.eval_shape(layer.init, jax.random.key(0), x)
    with warnings.catch_warnings(), nn.logical_axis_rules([("exp", "expert")]):
        warnings.simplefilter("error")
        jax.eval_shape(layer.init, jax.random.key(0), x)


def test_the_old_name_of_expert_map_warns() -> None:
    """Here with the error of a layer that has no replicas, so that nothing is compiled."""
    expert_map, layer = np.zeros(E, np.int32), linen.MoE(*SIZES, comm=COMM, **CHOICES)
    for call in (nnx_layer(), lambda x, **given: layer.init(jax.random.key(0), x, **given)):
        with (
            pytest.warns(DeprecationWarning, match="placement is now called expert_map"),
            pytest.raises(ValueError, match="expert_map: expected None for a layer without replicas"),
        ):
            jax.eval_shape(lambda x, call=call: call(x, placement=expert_map), batch())


def test_tabulate() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.moe = ep_flax.MoE(*SIZES, comm=COMM, rngs=rngs)

        def __call__(self, x):
            return x + self.moe(x)[0]

    assert "wi_0" in nnx.tabulate(Model(nnx.Rngs(0)), batch())


def test_the_modules_spell_out_the_same_arguments() -> None:
    """In the order of the configuration, with its defaults."""
    of_linen = {
        field.name: field.default
        for field in dataclasses.fields(linen.MoE)
        if field.name not in ("parent", "name")
    }
    arguments = inspect.signature(ep_flax.MoE.__init__).parameters
    of_nnx = {name: argument.default for name, argument in arguments.items() if name not in ("self", "rngs")}
    missing = (dataclasses.MISSING, inspect.Parameter.empty)
    clean = lambda of: {name: None if default in missing else default for name, default in of.items()}  # noqa: E731
    assert clean(of_nnx) == clean(of_linen)
    of_config = {field.name for field in dataclasses.fields(MoEConfig)}
    assert of_config <= set(of_nnx)
