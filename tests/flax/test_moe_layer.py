"""The layer as a function of global arrays, against the dense one, on every kind of mesh."""

import copy
import dataclasses
import functools
import pickle
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from dense_moe import MAX_TOKENS, E, F, H, K, config_of, dense_moe, loss_of, numbers, on_mesh, parameters_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from moe_layer import assert_close

import jax_deepep as ep
from jax_deepep import jax_compat
from jax_deepep.moe import MoEConfig, build_config, moe
from jax_deepep.moe.grouped_matmul.triton import triton_matmul

BATCH = (8, 6, H)
BALANCE = 0.5  # weight of the balance loss
DEEPSEEK = {
    "num_groups": 4,
    "topk_groups": 2,
    "score_function": "sigmoid",
    "scale": 2.5,
    "use_bias_correction": True,
    "shared_intermediate_size": 8,
}


def results_of(config: MoEConfig, parameters: dict[str, np.ndarray], x: np.ndarray) -> Any:
    """Return ((output, aux), gradients of the parameters and x) of the layer, unsharded."""

    def loss(parameters, x):
        out, aux = moe(config, parameters, x)
        return loss_of(out.astype(jnp.float32)) + BALANCE * aux.balance_loss, (out, aux)

    is_even = x.ndim > 1 and x.shape[0] % config.num_token_shards == 0
    operands = (
        on_mesh(config, parameters),
        put_on_mesh(x, config.mesh, P(config.token_axes if is_even else None)),
    )
    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*operands)
    return fetch(results), fetch(gradients)


def expected_of(config: MoEConfig, x: np.ndarray) -> Any:
    """Return ((output, balance loss, load), gradients) of the dense layer with `parameters_of` and `x`."""
    # Choices that do not affect the results are left out, so that configurations share a program.
    choices = tuple((name, getattr(config, name)) for name in (*DEEPSEEK, "normalize", "gated", "activation"))
    (out, *rest), (of_parameters, of_x) = _dense(choices, x.shape[:-1] or (1,))
    return (out.reshape(x.shape), *rest), (of_parameters, of_x.reshape(x.shape))


@functools.cache
def _dense(choices: tuple[tuple[str, Any], ...], shape: tuple[int, ...]) -> Any:
    config = config_of("one device", **dict(choices))

    def loss(parameters, x):
        out, balance_loss, load = dense_moe(config, parameters, x)
        return loss_of(out) + BALANCE * balance_loss, (out, balance_loss, load)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        parameters_of(config), numbers(*shape, H)
    )
    return jax.tree.map(np.asarray, (results, gradients))


@pytest.mark.parametrize(
    ("mesh_name", "choices"),
    [
        ("one device", {}),
        ("expert", {"grouped_matmul": "ragged_dot"}),
        ("data × expert", {"gated": False, "activation": jax.nn.gelu, "normalize": False}),
        ("node × expert", {"axis_types": AxisType.Explicit, **DEEPSEEK}),
        ("fsdp × expert × tensor", {"num_chunks": 2, "shared_intermediate_size": 8}),
        ("fsdp × expert × tensor", {"axis_types": AxisType.Explicit, "grouped_matmul": "ragged_dot"}),
        ("data × fsdp", DEEPSEEK),
        ("stage × expert", {"num_chunks": 3, "alignment": 4}),
        ("data × expert", {"axis_types": (AxisType.Explicit, AxisType.Auto)}),
        ("data × expert", {"axis_types": (AxisType.Auto, AxisType.Explicit), "normalize": False}),
    ],
    ids=["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
)
def test_output_and_gradients(mesh_name: str, choices: dict[str, Any]) -> None:
    config = config_of(mesh_name, **choices)
    parameters, x = parameters_of(config), numbers(*BATCH)
    (out, aux), gradients = results_of(config, parameters, x)

    assert_close(((out, aux.balance_loss, aux.expert_load), gradients), expected_of(config, x))
    assert aux.expert_load.sum() == 8 * 6 * K
    assert aux.num_dropped == 0


@pytest.mark.parametrize(
    ("shape", "axis_types", "num_chunks"),
    [
        ((3, 5, H), AxisType.Auto, 2),
        pytest.param((3, 5, H), AxisType.Explicit, 1, marks=pytest.mark.nightly),
        ((1, H), AxisType.Explicit, 2),
    ],
    ids=str,
)
def test_token_counts_that_do_not_divide(
    shape: tuple[int, ...], axis_types: AxisType, num_chunks: int
) -> None:
    """Padding is not counted, neither in the loads nor in the balance loss."""
    config = config_of("data × expert", axis_types, num_chunks=num_chunks)
    parameters, x = parameters_of(config), numbers(*shape)
    (out, aux), gradients = results_of(config, parameters, x)

    assert_close(((out, aux.balance_loss, aux.expert_load), gradients), expected_of(config, x))


@pytest.mark.parametrize("num_tokens", [1, 11])
def test_tokens_without_a_batch(num_tokens: int) -> None:
    """The first ones of those above, [H] or [T, H]."""
    config = config_of("data × expert")
    x = numbers(3, 5, H).reshape(-1, H)[:num_tokens].reshape((num_tokens, H)[num_tokens == 1 :])
    out, aux = fetch(jax.jit(partial(moe, config))(on_mesh(config, parameters_of(config)), x))
    (expected, *_), _ = expected_of(config, numbers(3, 5, H))
    assert_close(out, expected.reshape(-1, H)[:num_tokens].reshape(x.shape))
    np.testing.assert_array_equal(aux.expert_load, np.bincount(aux.topk_idx.ravel(), minlength=E))
    assert aux.topk_idx.shape == (*x.shape[:-1], K)
    assert aux.expert_load.sum() == num_tokens * K


def test_no_tokens() -> None:
    """As in the last, empty batch of a data set: everything is 0, also the balance loss."""
    config = config_of("data × expert", num_chunks=2)
    (out, aux), gradients = results_of(config, parameters_of(config), np.zeros((0, H), np.float32))
    assert out.shape == (0, H)
    assert float(aux.balance_loss) == 0
    assert not any(np.any(value) for value in jax.tree.leaves((aux, gradients)))


def test_bfloat16() -> None:
    """Parameters stay float32, as do their gradients; the router computes in float32."""
    config = config_of("data × expert", dtype=jnp.bfloat16)
    parameters, x = parameters_of(config), numbers(*BATCH)
    (out, aux), gradients = results_of(config, parameters, x)
    (expected, _, load), expected_gradients = expected_of(config, x)

    assert out.dtype == jnp.bfloat16
    assert {value.dtype for value in jax.tree.leaves(gradients)} == {np.dtype("float32")}
    assert_close(out.astype(np.float32), expected, tolerance=2e-2)
    assert_close(gradients, expected_gradients, tolerance=5e-2)
    np.testing.assert_array_equal(aux.expert_load, load)


def test_bias_correction_affects_only_the_choice() -> None:
    """A bias sends tokens to other experts; the weights are the scores without it."""
    config = config_of("expert", use_bias_correction=True, score_function="sigmoid", normalize=False)
    parameters, x = parameters_of(config), numbers(*BATCH)
    parameters["gate_bias"] = np.where(np.arange(E) < K, np.float32(9), np.float32(0))
    out, aux = fetch(jax.jit(partial(moe, config))(on_mesh(config, parameters), x))

    np.testing.assert_array_equal(aux.expert_load, np.where(np.arange(E) < K, 8 * 6, 0))
    assert_close(out, np.asarray(jax.jit(partial(dense_moe, config))(parameters, x)[0]))


def test_checkpoint_policies() -> None:
    """A policy that keeps the received rows avoids the second dispatch; none changes the gradients."""
    config = config_of("expert", grouped_matmul="ragged_dot")
    parameters, x = (
        on_mesh(config, parameters_of(config)),
        put_on_mesh(numbers(*BATCH), config.mesh, P("expert")),
    )
    keep = jax.checkpoint_policies.save_only_these_names

    def layer(parameters, x):
        out, aux = moe(config, parameters, x)
        return out, aux.balance_loss

    layers = {
        "plain": layer,
        "nothing kept": jax.checkpoint(layer),
        "rows kept": jax.checkpoint(layer, policy=keep("moe_dispatched")),
        "products kept": jax.checkpoint(layer, policy=keep("moe_dispatched", "moe_hidden")),
    }
    dispatches, products, gradients = {}, {}, {}
    for name, layer in layers.items():

        def loss(*operands, layer=layer):
            out, balance_loss = layer(*operands)
            return loss_of(out) + BALANCE * balance_loss

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(parameters, x)
        compiled = traced.lower().compile()
        calls = re.findall(r"custom_call_target=\"jax_deepep_(\w+)\"", compiled.as_text())
        dispatches[name] = calls.count("dispatch")
        # The collective of the balance loss depends on the output, which is not recomputed for it. On GPUs
        # one of the two is in two parts.
        assert calls.count("combine") == (2 if config.comm.platform == "cpu" else 3)
        products[name] = str(traced.jaxpr).count("ragged_dot_general[")
        gradients[name] = fetch(compiled(parameters, x))

    assert dispatches == {"plain": 1, "nothing kept": 2, "rows kept": 1, "products kept": 1}
    assert products["products kept"] < products["rows kept"] == products["nothing kept"]
    for name in layers:
        assert_close(gradients[name], gradients["plain"])


@pytest.mark.parametrize(("num_chunks", "products"), [(1, 3 + 6), (2, 3 + 2 + 6)])
def test_triton_kernels_in_the_layer(num_chunks: int, products: int, monkeypatch) -> None:
    """Traced as for a GPU: forward, both gradients, and with chunks the first two products again."""
    mesh = mesh_named("fsdp × expert × tensor")
    sizes = {"num_experts": E, "num_experts_per_tok": K, "max_tokens": MAX_TOKENS, "hidden_size": H}
    config = build_config(
        E, K, H, 32, comm=ep.Communicator(mesh, implementation="xla", **sizes), num_chunks=num_chunks,
        grouped_matmul=partial(triton_matmul, block=16), alignment=16, dtype=jnp.bfloat16,
    )  # fmt: skip
    parameters = on_mesh(config, parameters_of(config))
    x = put_on_mesh(numbers(*BATCH), mesh, P(config.token_axes))
    monkeypatch.setattr(jax_compat, "platform_of", lambda device: "cuda")
    step = jax.grad(lambda *operands: loss_of(moe(config, *operands)[0].astype(jnp.float32)), argnums=(0, 1))
    assert str(jax.make_jaxpr(step)(parameters, x)).count("= pallas_call[") == products


def test_the_mesh_of_the_program_is_the_default() -> None:
    with jax.set_mesh(mesh_named("data × expert")):
        config = build_config(E, K, H, 32, max_tokens=8, num_chunks=3)
    assert config.mesh == mesh_named("data × expert")
    assert config.comm.max_tokens == 3


@pytest.mark.parametrize(
    ("choices", "error", "words"),
    [
        ({"num_experts": 12}, ValueError, "num_experts: expected num_experts=8 of the communicator, got 12"),
        ({"mesh": mesh_named("one device")}, ValueError, "mesh: expected None or the comm.* mesh, .*, got"),
        ({"comm": 3}, TypeError, r"comm: expected a jax_deepep\.Communicator, got int"),
        ({"num_chunks": 0}, ValueError, "num_chunks: expected an integer of at least 1, got 0"),
        (
            {"num_chunks": 0, "comm": None, "max_tokens": 8},
            ValueError,
            "num_chunks: expected an int.*, got 0",
        ),
        ({"max_tokens": "8", "comm": None}, TypeError, "max_tokens: expected a Python integer.*, got '8'"),
        ({"intermediate_size": 2.5}, TypeError, r"intermediate_size: expected a Python integer.*, got 2\.5"),
        ({"capacity_factor": 0}, ValueError, "capacity_factor: expected a positive, .*, got 0"),
        ({"capacity_factor": "2"}, TypeError, "capacity_factor: expected a number .*, got '2'"),
        ({"scale": jnp.float32(2)}, TypeError, "scale: expected a number of Python or NumPy .*, got .*2"),
        ({"scale": None}, TypeError, "scale: expected a number .*, got None"),
        ({"activation": "silu"}, TypeError, "activation: expected a function, got 'silu'"),
        (
            {"activation": lambda gate, up: gate * up},
            TypeError,
            "activation: expected an elementwise function of one array, got one that raises TypeError .*; ",
        ),
        ({"activation": jnp.sum}, TypeError, "activation: expected an elementwise .*, got a function to Sha"),
        ({"score_function": "sofmax"}, ValueError, "score_function: expected .*, got 'sofmax'"),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of the 8 experts, got 3"),
        ({"num_groups": 2.0}, TypeError, r"num_groups: expected a Python integer.*, got 2\.0"),
        ({"num_groups": 8}, ValueError, "num_experts_per_tok: expected at most 1, the experts in .*, got 3"),
        ({"normalize": "no"}, TypeError, "normalize: expected True or False, got 'no'; pass a bool"),
        ({"gated": 1}, TypeError, "gated: expected True or False, got 1; pass a bool"),
        ({"dtype": "bf16"}, TypeError, "dtype: expected None, bfloat16, float16, float32, got 'bf16'"),
        ({"dtype": jnp.int32}, TypeError, "dtype: expected None, bfloat16.*, got .*int32"),
        ({"num_experts": 8.0}, TypeError, r"num_experts: expected a Python integer.*, got 8\.0"),
        ({"fsdp_axis": ("data",)}, TypeError, r"fsdp_axis: expected the name of one .*, got \('data',\)"),
        ({"capacity_factor": float("inf")}, ValueError, "capacity_factor: expected a .*, finite .*, got inf"),
        ({"grouped_matmul": "fast"}, ValueError, "grouped_matmul: expected 'auto', 'blocks'.*, got 'fast'"),
        ({"tensor_axis": "expert"}, ValueError, "tensor_axis: expected two axes other than"),
        ({"fsdp_axis": "dta"}, ValueError, r"fsdp_axis: expected an axis of the mesh, \(.*\), .*, got 'dta'"),
        (
            {"tensor_axis": "data", "fsdp_axis": "data"},
            ValueError,
            "fsdp_axis, tensor_axis: expected .*, got 'data', 'data'",
        ),
        ({"fsdp_axis": "data", "hidden_size": 3}, ValueError, "hidden_size: expected hidden_size=16 of the"),
        ({"comm": None}, ValueError, "max_tokens: expected an integer without comm, got None"),
        ({"comm": None, "max_tokens": 8}, ValueError, "mesh: expected .* are [248] devices, got None"),
        (
            {"comm": None, "max_tokens": 8, "mesh": mesh_named("one device"), "axis_name": "exprt"},
            ValueError,
            "axis_name: expected axes of the mesh.*, got 'exprt'; .* for example axis_name='expert'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",  # the same on every rank
)
def test_wrong_arguments(choices: dict[str, Any], error: type[Exception], words: str) -> None:
    sizes = {"num_experts": E, "num_experts_per_tok": K, "hidden_size": H, "intermediate_size": 32}
    arguments = {"comm": config_of("data × expert").comm, **sizes, **choices}
    with pytest.raises(error, match=words):
        build_config(**arguments)


def test_wrong_operands() -> None:
    config = config_of("data × expert")
    parameters, x = parameters_of(config), numbers(*BATCH)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., hidden_size=16\], got \[8, 6, 15\]"):
        moe(config, parameters, x[..., 1:])
    with pytest.raises(TypeError, match="x: expected an array, got list"):
        moe(config, parameters, [1.0] * H)
    with pytest.raises(TypeError, match=r"x: expected dtype bfloat16, float16, float32.*, got int32"):
        moe(config, parameters, x.astype(np.int32))
    with pytest.raises(TypeError, match=r"config: expected a MoEConfig, got .*Tracer; it is static"):
        jax.jit(moe)(config, parameters, x)
    with pytest.raises(ValueError, match=r"parameters: expected \['gate', 'wi_0',.*, got \['gate'\]"):
        moe(config, {"gate": parameters["gate"]}, x)
    with pytest.raises(ValueError, match=r"wo: expected shape \[exp, mlp, embed\] =.*, got \[8, 31, 16\]"):
        moe(config, {**parameters, "wo": parameters["wo"][:, 1:]}, x)
    num_tokens = 96 * config.num_token_shards
    words = (
        "x: expected at most max_tokens=64 tokens on each device, got 96 on each of "
        f"{config.num_token_shards} devices; .* max_tokens=96, or split the tokens into num_chunks=2 chunks"
    )
    with pytest.raises(ValueError, match=words):
        moe(config, parameters, numbers(num_tokens, H))
    with (
        jax.enable_x64(True),
        pytest.raises(TypeError, match=r"x: expected dtype .*, got float64; .*astype\(jnp.float32\)"),
    ):
        moe(config, parameters, x.astype(np.float64))
    with (
        jax.set_mesh(mesh_named("data × expert", AxisType.Explicit)),
        pytest.raises(ValueError, match=r"comm: expected a communicator of the mesh .*data=\d \(Explicit\)"),
    ):
        moe(config, parameters, x)


def test_a_call_in_a_shard_map() -> None:
    config = config_of("data × expert")
    parameters, x = parameters_of(config), numbers(*BATCH)
    inside = jax.shard_map(
        lambda x: moe(config, parameters, x)[0], mesh=config.mesh, in_specs=P("data"), out_specs=P("data")
    )
    with pytest.raises(
        ValueError, match=r"x: expected a global array, .* in a shard_map over \('data', 'expert'\)"
    ):
        jax.jit(inside)(x)


def test_without_a_jit_it_is_compiled_once() -> None:
    config = config_of("data × expert")
    parameters, x = on_mesh(config, parameters_of(config)), numbers(*BATCH)
    for call in (moe, jax.grad(lambda config, parameters, x: moe(config, parameters, x)[0].sum(), argnums=1)):
        once = fetch(call(config, parameters, x))
        with compilations() as compiled:
            again = fetch(call(config, parameters, x))
        assert not compiled
        jax.tree.map(np.testing.assert_array_equal, again, once)


def test_a_copy_of_a_configuration_is_the_same() -> None:
    """Otherwise a copied module would be compiled again: a copy of `jax.nn.silu` is another function."""
    config = config_of("data × expert", capacity_factor=np.float32(1.5), alignment=np.int32(8))
    assert copy.deepcopy(config) is copy.copy(config) is config
    assert hash(config) == hash(dataclasses.replace(config, alignment=8))
    with pytest.raises(TypeError, match=r"comm: Communicator #.* cannot be pickled.*; make a new one"):
        pickle.dumps(config)


def test_a_communicator_is_not_made_while_tracing() -> None:
    def traced(x):
        config_of("data × expert")
        return x

    with pytest.raises(ValueError, match=r"comm: expected .* inside a jitted or otherwise .*, got None"):
        jax.jit(traced)(numbers(*BATCH))


def test_without_an_axis_of_experts_every_device_has_all() -> None:
    config = build_config(E, K, H, F, mesh=mesh_named("data × fsdp"), max_tokens=4)
    assert (config.comm.size, config.comm.num_local_experts) == (1, E)
