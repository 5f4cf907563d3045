"""Rows in wire formats, and block-scaled ones, under what JAX does with functions.

What the tests compute beside ops is exact: XLA may fuse operations, and then round, differently.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import LOW_LATENCY, assert_same_bits
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh
from moe_layer import assert_close, communicator
from problems import DTYPES, Problem, inputs_of

import jax_deepep as ep

# Two blocks in most formats, of which the last is shorter.
EXPERT = Problem("wire, expert-major", "stage × expert", num_tokens=5, hidden_size=136, routing="some_none")
TOKEN = Problem(
    "wire, token-major", "stage × expert", num_tokens=5, hidden_size=136, layout="token", capacity=9
)
MESH, AXIS = EXPERT.mesh, EXPERT.axis_name

DISPATCH = ep.Wire("fp8", backward="mxfp8")
AGAIN = ep.Wire("nvfp4", backward="fp8")
COMBINE = ep.Wire("fp8_ue8m0", backward="nvfp4")

Layer = Callable[..., Any]


def doubled(rows):
    return 2 * jnp.maximum(rows, 0)


def experts(dispatched):
    """Return rows for combine; token-major ones are not weighted by it."""
    rows = jnp.where(dispatched.mask[:, None], doubled(dispatched.tokens), 0)
    return rows if isinstance(dispatched, ep.ExpertMajor) else rows * dispatched.topk_weights[:, :1]


def options_of(problem: Problem, comm: ep.Communicator) -> dict[str, Any]:
    return {"comm": comm, **problem.dispatch_options}


def whole(problem: Problem, comm: ep.Communicator, x, topk_weights, topk_idx):
    """Apply a layer with a shared expert, whose results go along the routes as well."""
    shared = doubled(x)
    dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, wire=DISPATCH, **options_of(problem, comm))
    again, _ = ep.dispatch(shared, handle=handle, wire=AGAIN)
    rows = experts(dispatched) + jnp.where(dispatched.mask[:, None], again.tokens, 0)
    return ep.combine(rows, handle, bias=jnp.abs(shared), wire=COMBINE)


def in_parts(problem: Problem, comm: ep.Communicator, x, topk_weights, topk_idx):
    """Do the same, and compute while ops are in flight."""
    options = options_of(problem, comm)
    sent = ep.dispatch_start(x, topk_idx, topk_weights, wire=DISPATCH, **options)
    shared = sent.meanwhile(doubled, x)
    dispatched, handle = ep.dispatch_done(sent)
    sent = ep.dispatch_start(shared, handle=handle, wire=AGAIN)
    rows = sent.meanwhile(experts, dispatched)
    again, _ = ep.dispatch_done(sent)
    rows = rows + jnp.where(dispatched.mask[:, None], again.tokens, 0)
    returned = ep.combine_start(rows, handle, bias=jnp.abs(shared), wire=COMBINE)
    returned.meanwhile(jnp.abs, shared)
    return ep.combine_done(returned)


@jax.custom_vjp
def quantized_backward(out):
    """Return `out`; its gradient is rounded to the format."""
    return out


quantized_backward.defvjp(lambda out: (out, None), lambda _, g: (ep.quantize_dequantize(g, "fp8"),))


def plain(problem: Problem, comm: ep.Communicator, x, topk_weights, topk_idx):
    """Apply a layer without formats to rounded rows."""
    x = ep.quantize_dequantize(x, "fp8")
    dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, **options_of(problem, comm))
    return quantized_backward(ep.combine(experts(dispatched), handle))


def with_formats(problem: Problem, comm: ep.Communicator, x, topk_weights, topk_idx):
    """Do the same with formats."""
    dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, wire="fp8", **options_of(problem, comm))
    return ep.combine(experts(dispatched), handle, wire=ep.Wire(None, backward="fp8"))


def kept(options, x, topk_weights, topk_idx):
    wire = ep.Wire("fp8", keep_quantized=True)
    return ep.dispatch(x, topk_idx, topk_weights, wire=wire, **options)


def kept_in_parts(options, x, topk_weights, topk_idx):
    wire = ep.Wire("fp8", keep_quantized=True)
    return ep.dispatch_done(ep.dispatch_start(x, topk_idx, topk_weights, wire=wire, **options))


def kept_along_in_parts(options, x, topk_weights, topk_idx):
    _, handle = ep.dispatch(topk_idx, topk_idx, topk_weights, **options)
    wire = ep.Wire("fp8", keep_quantized=True)
    return ep.dispatch_done(ep.dispatch_start(x, handle=handle, wire=wire))


def copied(options, x, topk_weights, topk_idx):
    return ep.dispatch(x, topk_idx, topk_weights, **options)


def copied_along(options, x, topk_weights, topk_idx):
    _, handle = ep.dispatch(topk_idx, topk_idx, topk_weights, **options)
    return ep.dispatch(x, handle=handle)


OF_BLOCK_SCALED = (copied, copied_along)


def received_from(
    send: Layer, problem: Problem, comm: ep.Communicator, x, topk_weights, topk_idx, wrap=jax.jit
):
    """Do the same as `plain`; block-scaled rows leave a function that is wrapped."""
    sent = wrap(functools.partial(send, options_of(problem, comm)))
    dispatched, handle = sent(lax.stop_gradient(x), topk_weights, topk_idx)
    assert isinstance(dispatched.tokens, ep.BlockScaled)
    dispatched = dataclasses.replace(dispatched, tokens=dispatched.tokens.dequantize(jnp.float32))
    return ep.combine(experts(dispatched), handle, wire=ep.Wire(None, backward="fp8"))


def quantized(x):
    """Return [2, T, H] block-scaled, without a gradient."""
    rows = ep.quantize(lax.stop_gradient(x).reshape(-1, x.shape[-1]), "fp8")
    return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:2], -1), rows)


def in_turn(layer: Layer, *operands):
    """Apply a layer to both elements of a batch."""
    batch = [jax.tree.map(operator.itemgetter(i), operands) for i in range(2)]
    return jnp.stack([layer(*of_one) for of_one in batch])


WAYS: dict[str, Layer] = {
    "whole": in_turn,
    "remat": lambda layer, *operands: in_turn(jax.checkpoint(layer), *operands),
    "scan": lambda layer, *operands: lax.scan(
        lambda carry, of_one: (carry, jax.checkpoint(layer)(*of_one)), None, operands
    )[1],
    "vmap": lambda layer, *operands: jax.vmap(layer)(*operands),
    "stages": in_turn,
}


def results_of(layer: Layer, way: str, implementation: str, problem: Problem, check_vma: bool) -> Any:
    """Return results and gradients [devices, 2, ...] of both applications of a layer."""
    comm, inputs = communicator(implementation, problem), inputs_of(problem)
    arrays = [inputs.x, inputs.topk_weights, inputs.topk_idx, inputs.x2]
    arrays = [np.stack([array, array[:, ::-1]], axis=1) for array in arrays]
    if implementation == LOW_LATENCY:
        arrays[0], arrays[3] = (arrays[i].astype(DTYPES["bfloat16"]) for i in (0, 3))
    apply = functools.partial(WAYS[way], functools.partial(layer, problem, comm))

    def of_device(x, *others):
        is_scaled = isinstance(layer, functools.partial) and layer.args[0] in OF_BLOCK_SCALED
        return apply(quantized(x) if is_scaled else x, *others)

    if way == "stages":  # every stage is a group of its own

        def body(*operands):
            return of_device(*(operand[0] for operand in operands))[None]

        spec = P("expert")
        stage = jax.shard_map(body, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=check_vma)
        of_all, spec = jax.vmap(stage, spmd_axis_name="stage"), P("stage", "expert")
        split = MESH.devices.shape
    else:
        of_all = per_device(of_device, MESH, AXIS, check_vma=check_vma)
        spec, split = device_axis(MESH, AXIS), (MESH.size,)

    def program(x, topk_weights, topk_idx, g):
        out, backward = jax.vjp(lambda *operands: of_all(*operands, topk_idx), x, topk_weights)
        return out, backward(g)

    arrays = [array.reshape(*split, *array.shape[1:]) for array in arrays]
    results = fetch(compiled(program)(*put_on_mesh(arrays, MESH, spec)))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[len(split) :]), results)


@functools.cache
def expected_of(layer: Layer, implementation: str, problem: Problem = EXPERT) -> Any:
    return results_of(layer, "whole", implementation, problem, check_vma=True)


def ways(check_vma: bool, *names: str) -> list[Any]:
    marks = () if check_vma else pytest.mark.nightly
    return [
        pytest.param(name, check_vma, id=f"{name}-check_vma" if check_vma else name, marks=marks)
        for name in names
    ]


ALL_WAYS = pytest.mark.parametrize(
    ("way", "check_vma"), [*ways(True, *WAYS), *ways(False, "whole", "stages")]
)


@ALL_WAYS
@pytest.mark.parametrize("layer", [whole, in_parts])
def test_the_bits_of_whole_ops(layer: Layer, way: str, check_vma: bool) -> None:
    got = results_of(layer, way, "native", EXPERT, check_vma)
    jax.tree.map(assert_same_bits, got, expected_of(whole, "native"))


def test_the_bits_of_whole_ops_in_low_latency_mode() -> None:
    got = results_of(in_parts, "whole", LOW_LATENCY, EXPERT, check_vma=True)
    jax.tree.map(assert_same_bits, got, expected_of(whole, LOW_LATENCY))


RECEIVED = {
    send.__name__: functools.partial(received_from, send)
    for send in (kept, kept_in_parts, kept_along_in_parts, copied)
}


def check_rounded(layer: Layer, got: Any, expected: Any) -> None:
    """Compare bits; block-scaled rows have no gradient."""
    out, (of_x, of_weights) = got
    assert_same_bits(out, expected[0])
    # Token-major, JAX sums the products, in an order that differs between programs on GPUs.
    assert_close(of_weights, expected[1][1], 1e-6)
    assert_same_bits(of_x, expected[1][0] if layer is with_formats else np.zeros_like(of_x))


@ALL_WAYS
@pytest.mark.parametrize("layer", [with_formats, *RECEIVED.values()], ids=["with_formats", *RECEIVED])
def test_rounded_rows(layer: Layer, way: str, check_vma: bool) -> None:
    """A format in dispatch and in the gradient of combine has the effect of rounding before plain ops."""
    got = results_of(layer, way, "native", EXPERT, check_vma)
    check_rounded(layer, got, expected_of(plain, "native"))


RECOMPUTED = [functools.partial(received_from, send, wrap=jax.checkpoint) for send in (kept, copied_along)]


@pytest.mark.parametrize(
    ("problem", "implementation"),
    [(TOKEN, "native"), pytest.param(EXPERT, "xla", marks=[pytest.mark.collectives, pytest.mark.nightly])],
)
@pytest.mark.parametrize("layer", [with_formats, *RECOMPUTED])
def test_rounded_rows_of_others(layer: Layer, problem: Problem, implementation: str) -> None:
    got = results_of(layer, "whole", implementation, problem, check_vma=True)
    check_rounded(layer, got, expected_of(plain, implementation, problem))


def operands_on_mesh(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
    return put_on_mesh(arrays, MESH, device_axis(MESH, AXIS))


def test_the_gradient_of_a_router() -> None:
    comm, inputs = communicator("native", EXPERT), inputs_of(EXPERT)
    shape = (MESH.size, EXPERT.hidden_size, EXPERT.num_experts)
    # Logits of about 1, whose sigmoids are not constant; and weights whose sum is not.
    gate = np.random.default_rng(0).normal(scale=EXPERT.hidden_size**-0.5, size=shape).astype(np.float32)

    def routed(layer: Layer, x, gate, g):
        def apply(x, gate):
            topk_idx, topk_weights = ep.group_limited_topk(
                x @ gate, num_experts_per_tok=EXPERT.num_topk, normalize=False
            )
            return layer(EXPERT, comm, x, topk_weights, topk_idx)

        out, backward = jax.vjp(apply, x, gate)
        return out, backward(g)

    arrays = operands_on_mesh(inputs.x, gate, inputs.x2)
    results = [
        fetch(compiled(per_device(functools.partial(routed, layer), MESH, AXIS))(*arrays))
        for layer in (with_formats, plain)
    ]
    jax.tree.map(assert_same_bits, *results)
    assert np.all(np.max(np.abs(results[0][1][1]), axis=(1, 2)) > 0.1)


def test_export_and_donation() -> None:
    """Programs have the bits of the same ones, after a round trip, and when they may write over operands."""
    comm, inputs = communicator("native", EXPERT), inputs_of(EXPERT)
    program = jax.jit(per_device(functools.partial(whole, EXPERT, comm), MESH, AXIS), donate_argnums=0)
    names = [f"jax_deepep_{verb}" for verb in ("dispatch", "cached_dispatch", "combine")]
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    arrays = (inputs.x, inputs.topk_weights, inputs.topk_idx)
    exported = jax.export.export(program, disabled_checks=checks)(*operands_on_mesh(*arrays))
    again = jax.jit(jax.export.deserialize(exported.serialize()).call)
    expected = expected_of(whole, "native")[0][:, 0]
    for run in (program, program, again):
        x, *others = operands_on_mesh(*arrays)
        assert_same_bits(fetch(run(x, *others)), expected)
        assert x.is_deleted() or run is again


@pytest.mark.parametrize("send", [kept, kept_in_parts])
def test_kept_rows_have_no_gradient(send: Layer) -> None:
    comm, inputs = communicator("native", EXPERT), inputs_of(EXPERT)

    def loss(x, topk_weights, topk_idx):
        dispatched, _ = send({"comm": comm}, x, topk_weights, topk_idx)
        return jnp.sum(dispatched.weights)

    with pytest.raises(TypeError, match=r"quantize: expected not to be differentiated.*quantize_dequantize"):
        jax.eval_shape(per_device(jax.grad(loss), MESH, AXIS), inputs.x, inputs.topk_weights, inputs.topk_idx)
