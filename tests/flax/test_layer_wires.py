"""Layers whose rows cross links in formats: those of layers without, whose experts get rounded rows."""

import functools
import re
from typing import Any

import jax
import pytest
from dense_moe import E, F, H, K, config_of, loss_of, numbers, on_mesh, parameters_of
from flax import nnx
from implementations import assert_same_bits
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from moe_layer import assert_close

import jax_deepep as ep
from jax_deepep import flax as ep_flax
from jax_deepep.flax import linen
from jax_deepep.gating import group_limited_topk
from jax_deepep.moe import MoEConfig, build_config, moe
from jax_deepep.moe.experts import routed_experts, shared_experts
from jax_deepep.moe.routing import router_logits

BATCH = (8, 6, H)
WIRES: dict[str, Any] = {"wire": "fp8", "combine_wire": ep.Wire(None, backward="fp8")}


def results_of(layer: Any, config: MoEConfig) -> Any:
    """Return the output of `layer(parameters, x)`, and its gradients."""

    def program(parameters, x):
        def loss(parameters, x):
            out = layer(parameters, x)
            return loss_of(out), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)

    x = put_on_mesh(numbers(*BATCH), config.mesh, P(config.token_axes))
    return fetch(jax.jit(program)(on_mesh(config, parameters_of(config)), x))


@jax.custom_vjp
def rounded_backward(out):
    """Return `out`; its gradient is rounded to the format."""
    return out


rounded_backward.defvjp(lambda out: (out, None), lambda _, g: (ep.quantize_dequantize(g, "fp8"),))


def by_hand(config: MoEConfig) -> Any:
    """Return the layer in plain ops, without formats, on rows that are rounded before."""
    split = P(config.token_axes)
    specs = {name: config.spec(name) for name in config.parameters}

    def of_device(parameters, x):
        logits = router_logits(config.comm.platform, x, parameters["gate"])
        topk_idx, topk_weights = group_limited_topk(logits, num_experts_per_tok=K, score_function="softmax")
        if config.tensor_axes:  # along which tokens, and so the router, are the same
            x, topk_weights = (lax.pcast(v, config.tensor_axes, to="varying") for v in (x, topk_weights))
        matrices = {name: value for name, value in parameters.items() if name != "gate"}
        choice, alignment = config.experts_by(len(x), x.dtype)
        capacity = config.capacity(len(x), alignment)
        options = {"comm": config.comm, "capacity": capacity, "alignment": alignment}
        dispatched, handle = ep.dispatch(ep.quantize_dequantize(x, "fp8"), topk_idx, topk_weights, **options)
        y = routed_experts(
            dispatched.tokens, dispatched.weights, dispatched.group_sizes, matrices,
            activation=config.activation, choice=choice, alignment=alignment,
        )  # fmt: skip
        out = rounded_backward(ep.combine(y, handle, weighted=False))
        if config.shared_intermediate_size:
            out += shared_experts(x, matrices, activation=config.activation)
        return lax.psum(out, config.tensor_axes)

    per_device = jax.shard_map(of_device, mesh=config.mesh, in_specs=(specs, split), out_specs=split)
    return lambda parameters, x: per_device(parameters, x.reshape(-1, H)).reshape(x.shape)


def of_function(config: MoEConfig) -> Any:
    return lambda parameters, x: moe(config, parameters, x)[0]


def of_nnx(config: MoEConfig) -> Any:
    abstract = nnx.eval_shape(lambda: ep_flax.MoE(E, K, H, F, comm=config.comm, rngs=nnx.Rngs(0), **WIRES))
    graph, state = nnx.split(abstract)

    def layer(parameters, x):
        own = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(own, parameters)
        return nnx.merge(graph, own)(x)[0]

    return layer


def of_linen(config: MoEConfig) -> Any:
    layer = linen.MoE(E, K, H, F, comm=config.comm, **WIRES)
    return lambda parameters, x: layer.apply({"params": parameters}, x)[0]


# With the same sums in the same order, or not.
CASES = {
    "ragged_dot": ("data × expert", {"grouped_matmul": "ragged_dot"}, True),
    "blocks": ("expert", {}, True),
    "shared experts": (
        "data × expert",
        {"shared_intermediate_size": 8, "grouped_matmul": "ragged_dot"},
        False,
    ),
    "shared experts, blocks": ("expert", {"shared_intermediate_size": 8}, False),
    "tensor": ("fsdp × expert × tensor", {"shared_intermediate_size": 8, "fsdp_axis": None}, False),
    "chunks": ("data × expert", {"num_chunks": 2}, False),
}


NIGHTLY = {"blocks", "shared experts"}  # what they check one by one, another checks together


@pytest.mark.parametrize(
    ("mesh_name", "choices", "is_exact"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.nightly if name in NIGHTLY else ())
        for name, case in CASES.items()
    ],
)
def test_those_of_a_layer_on_rounded_rows(mesh_name: str, choices: dict[str, Any], is_exact: bool) -> None:
    config = config_of(mesh_name, **choices, **WIRES)
    got, expected = (results_of(layer(config), config) for layer in (of_function, by_hand))
    if is_exact:
        jax.tree.map(assert_same_bits, got, expected)
    assert_close(got, expected)


@pytest.mark.parametrize("module", [of_nnx, of_linen])
def test_modules(module: Any) -> None:
    config = config_of("expert", **WIRES)
    jax.tree.map(assert_same_bits, results_of(module(config), config), of_expert_mesh())


@functools.cache
def of_expert_mesh() -> Any:
    config = config_of("expert", **WIRES)
    return results_of(of_function(config), config)


@pytest.mark.parametrize("choices", [{}, {"shared_intermediate_size": 8}], ids=["", "shared experts"])
@pytest.mark.parametrize("grouped_matmul", ["blocks", "ragged_dot"])
def test_every_op_has_its_format(grouped_matmul: str, choices: dict[str, Any]) -> None:
    wires = {
        "wire": ep.Wire("nvfp4", backward="mxfp8"),
        "combine_wire": ep.Wire("fp8_ue8m0", backward="fp8"),
    }
    config = config_of("data × expert", grouped_matmul=grouped_matmul, **choices, **wires)
    step = jax.grad(lambda *operands: loss_of(moe(config, *operands)[0]), argnums=(0, 1))
    text = str(jax.make_jaxpr(step)(parameters_of(config), numbers(*BATCH)))
    ops = re.findall(r"jax_deepep_(\w+)\[\s[^\]]*?\bwire=(\w+)", text)
    assert set(ops) == {
        ("dispatch", "nvfp4"), ("combine", "mxfp8"), ("combine", "fp8_ue8m0"), ("cached_dispatch", "fp8")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "hidden_size", "words"),
    [
        ({"wire": "int4"}, H, '^wire: expected None or one of "fp8", .*"nvfp4" for dispatch, got \'int4\''),
        ({"wire": ep.Wire("fp8", keep_quantized=True)}, H, "^wire.keep_quantized: expected False in a layer"),
        (
            {"wire": ep.Wire("fp8", backward="nvfp4")},
            H,
            "^wire.backward: expected .* for the gradient of disp",
        ),
        ({"combine_wire": "nvfp4"}, H, '^combine_wire: expected None or one of .*"mxfp8" for combine, got'),
        (
            {"combine_wire": ep.Wire("fp8", keep_quantized=True)},
            H,
            "^combine_wire.keep_quantized: expected F",
        ),
        ({"combine_wire": ep.Wire(None, backward="int4")}, H, "^combine_wire.backward: expected None or one"),
        ({"wire": "nvfp4"}, H + 1, "expected rows of an even number of elements for nvfp4.*, got 17"),
    ],
    ids=str,
)
def test_wrong_formats(choices: dict[str, Any], hidden_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_config(E, K, hidden_size, F, mesh=mesh_named("expert"), max_tokens=8, **choices)
