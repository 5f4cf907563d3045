"""Rows that cross links in a wire format: dispatch, a dispatch along a handle and combine, with gradients.

What arrives is what the formats' oracle gives for the rows of the sender, bit for bit.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import oracle
import quantization_oracle
from implementations import EXACT, assert_same_bits, assert_same_sums, cases
from meshes import run_per_device
from moe_layer import assert_close
from problems import Inputs, Problem, inputs_of, is_run_in_low_latency

import jax_deepep as ep


@dataclass(frozen=True)
class Case:
    """A problem, and the formats of dispatch, of its gradient, of combine, and of combine's gradient."""

    problem: Problem
    dispatch: str | None = None
    of_dispatch: str | None = None
    combine: str | None = None
    of_combine: str | None = None

    @property
    def name(self) -> str:
        formats = (self.dispatch, self.of_dispatch, self.combine, self.of_combine)
        return f"{self.problem.name}, {' '.join(map(str, formats))}"


# 136 elements: in every format the last block is shorter.
_EXPERT = Problem("expert-major", hidden_size=136, dtype="bfloat16", routing="some_none")
_TOKEN = replace(_EXPERT, name="token-major", layout="token")
_DROPS = Problem("drops, alignment 4", hidden_size=200, capacity=12, expert_capacity=5, alignment=4,
                 routing="skewed", dtype="float16")  # fmt: skip
_OF_TOKENS = Problem("token-major drops", hidden_size=136, layout="token", capacity=16, alignment=8,
                     routing="skewed")  # fmt: skip
# No whole groups of elements.
_ODD = Problem("hidden 38", hidden_size=38, num_topk=6, dtype="float16")
_TINY = Problem("hidden 2", hidden_size=2, dtype="bfloat16")
_NODES = replace(_EXPERT, name="nodes", mesh_name="expert", num_experts=16, num_topk=6, num_nodes=2)
_WIDE = replace(_EXPERT, name="float32", dtype="float32", hidden_size=256)

CASES = [
    Case(_EXPERT, "fp8", "fp8", "fp8", "fp8"),
    Case(_EXPERT, "nvfp4", "mxfp8", "mxfp8", "nvfp4"),
    Case(_EXPERT, "mxfp8", "fp8_ue8m0", "fp8_ue8m0", "mxfp8"),
    Case(_EXPERT, "fp8", None, None, "fp8"),  # as in DeepSeek-V3
    Case(_TOKEN, "fp8_ue8m0", "fp8", "fp8", "fp8_ue8m0"),
    Case(_TOKEN, "nvfp4", "mxfp8", "mxfp8", "nvfp4"),
    Case(_DROPS, "fp8", "mxfp8", "fp8_ue8m0", "fp8_ue8m0"),
    Case(_DROPS, "nvfp4", "fp8", "mxfp8", "nvfp4"),
    Case(_OF_TOKENS, "mxfp8", "fp8_ue8m0", "fp8", "fp8"),
    Case(_ODD, "fp8", "mxfp8", "fp8_ue8m0", "mxfp8"),
    Case(_ODD, "nvfp4", "fp8", "fp8", "nvfp4"),
    Case(_TINY, "nvfp4", "fp8", "mxfp8", "fp8"),
    Case(replace(_EXPERT, name="no tokens", num_tokens=0, routing="random"), "fp8", "fp8", "fp8", "fp8"),
    Case(replace(_EXPERT, name="one device", mesh_name="one device"), "fp8", "fp8", "fp8", "fp8"),
    Case(_WIDE, "fp8_ue8m0", "fp8", "fp8", "fp8"),
    Case(_NODES, "fp8", "fp8", "fp8", "fp8"),
    Case(_NODES, "nvfp4", "mxfp8", "fp8_ue8m0", "mxfp8"),
    Case(
        replace(_NODES, name="nodes, token-major", layout="token", dtype="float16"),
        "mxfp8",
        "fp8",
        "fp8",
        "fp8",
    ),
]
_IN_XLA = {"expert-major", "token-major", "no tokens", "one device", "nodes, token-major"}


def _in_low_latency(case: Case) -> bool:
    if case.problem.num_nodes > 1:
        return False
    return is_run_in_low_latency(case.problem) or case.problem.name in {"expert-major", "token-major"}


# Every format of theirs is in another case as well.
_NIGHTLY_IN_XLA = {
    "expert-major, fp8 fp8 fp8 fp8", "expert-major, mxfp8 fp8_ue8m0 fp8_ue8m0 mxfp8",
    "token-major, nvfp4 mxfp8 mxfp8 nvfp4",
}  # fmt: skip

pytestmark = cases(
    "case",
    CASES,
    in_xla=lambda case: case.problem.name in _IN_XLA,
    in_low_latency=_in_low_latency,
    nightly=lambda implementation, case: implementation == "xla" and case.name in _NIGHTLY_IN_XLA,
)


def quantized(x: np.ndarray, format: str | None, dtype: Any = None) -> np.ndarray:
    """Return x after quantising and dequantising, in its own or another dtype."""
    if format is None:
        return x
    dtype = x.dtype if dtype is None else dtype
    return quantization_oracle.dequantize(quantization_oracle.quantize(x, format), format, dtype)


def _special(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return x with outliers, and rows of tiny, zero and huge elements, NaN and infinity among them."""
    x = x.copy()
    x[rng.random(x.shape) < 0.02] *= 300
    tokens = x.reshape(-1, x.shape[-1])
    for row, value in ((0, 0.0), (3, -0.0), (4, 1e-6), (5, 6e4)):
        if row < len(tokens):
            tokens[row] = np.asarray(value, x.dtype)
    for row, value in ((1, np.nan), (2, -np.inf)):
        if row < len(tokens):
            tokens[row, -1] = value
    return x


def inputs_for(case: Case) -> Inputs:
    inputs = inputs_of(case.problem)
    rng = np.random.default_rng(5)
    return replace(inputs, x=_special(inputs.x, rng), x2=_special(inputs.x2, rng))


@functools.cache
def outcome(case: Case, implementation: str) -> tuple[Inputs, dict[str, Any]]:
    case = replace(case, problem=case.problem.as_run_by(implementation))
    problem, inputs = case.problem, inputs_for(case)
    comm = problem.communicator(implementation)
    of_dispatch = ep.Wire(case.dispatch, backward=case.of_dispatch)
    of_combine = ep.Wire(case.combine, backward=case.of_combine)
    weights_name = "weights" if problem.layout == "expert" else "topk_weights"

    def program(x, x2, topk_idx, topk_weights, y, bias, g):
        def dispatch(x, topk_weights, wire=of_dispatch):
            return ep.dispatch(x, topk_idx, topk_weights, comm=comm, wire=wire, **problem.dispatch_options)

        def sent(x, topk_weights):
            dispatched, _ = dispatch(x, topk_weights)
            return dispatched.tokens, getattr(dispatched, weights_name)

        def combined(y, topk_weights, bias):
            return ep.combine(y, dispatch(x, topk_weights, None)[1], bias=bias, wire=of_combine)

        def again(x2):
            return ep.dispatch(x2, handle=handle, wire=of_dispatch)[0].tokens

        (tokens, weights), backward = jax.vjp(sent, x, topk_weights)
        _, handle = dispatch(x, topk_weights)
        out, of_out = jax.vjp(combined, y, topk_weights, bias)
        keep_quantized = ep.Wire(case.dispatch, keep_quantized=True)
        kept, _ = dispatch(x, topk_weights, keep_quantized)
        kept_along, _ = ep.dispatch(x2, handle=handle, wire=keep_quantized)
        as_it_is, _ = dispatch(ep.quantize(x, case.dispatch), topk_weights, None)
        along, _ = ep.dispatch(ep.quantize(x2, case.dispatch), handle=handle)
        repeated, of_repeated = jax.vjp(again, x2)
        return {
            "tokens": tokens,
            "gradients": backward((y, jax.numpy.ones_like(weights))),
            "again": repeated,
            "of_again": of_repeated(y),
            "kept": kept.tokens,
            "kept_along": kept_along.tokens,
            "as_it_is": as_it_is.tokens,
            "along": along.tokens,
            "out": out,
            "of_out": of_out(g),
        }

    arrays = (inputs.x, inputs.x2, inputs.topk_idx, inputs.topk_weights, inputs.y, inputs.bias, inputs.x2)
    return inputs, run_per_device(program, problem.mesh, problem.axis_name, *arrays)


def assert_same_rows(got: np.ndarray, expected: np.ndarray) -> None:
    """Compare bits, but those of NaN, of which platforms have different ones."""
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert_same_bits(*(np.where(np.isnan(rows), np.zeros((), rows.dtype), rows) for rows in (got, expected)))


def received(case: Case, inputs: Inputs, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that arrive for x, and which of them are specified."""
    by_group = inputs.by_group(x)
    rows = inputs.from_oracle(lambda routes, group: oracle.copy_rows(routes, by_group[group]))
    written = "mask" if case.problem.layout == "token" else "written"
    return rows, np.concatenate([getattr(routes, written) for routes in inputs.routes])


def test_rows_are_those_of_quantize(case: Case, implementation: str) -> None:
    inputs, results = outcome(case, implementation)
    for name, x in (("tokens", inputs.x), ("again", inputs.x2)):
        expected, written = received(case, inputs, quantized(x, case.dispatch))
        assert_same_rows(results[name][written], expected[written])


def test_quantized_rows_arrive_byte_for_byte(case: Case, implementation: str) -> None:
    inputs, results = outcome(case, implementation)
    sent = {"kept": inputs.x, "as_it_is": inputs.x, "kept_along": inputs.x2, "along": inputs.x2}
    for name, x in sent.items():
        rows = quantization_oracle.quantize(x, case.dispatch)
        got = results[name]
        for leaf in ("data", "scales", "row_scale"):
            sent = getattr(rows, leaf)
            if sent is None:
                assert getattr(got, leaf) is None
                continue
            as_rows = sent if sent.ndim == 3 else sent[..., None]
            expected, written = received(case, inputs, as_rows)
            assert_same_bits(getattr(got, leaf)[written].reshape(expected[written].shape), expected[written])


def combined(
    case: Case, inputs: Inputs, y: np.ndarray, format: str | None, *, weighted: bool, bias: Any = None
) -> np.ndarray:
    """Return the sums in which a device's part for another device is quantised."""
    rows, biases = inputs.by_group(y), None if bias is None else inputs.by_group(bias)

    def quantize(part: np.ndarray) -> np.ndarray:
        return quantized(part, format, np.float32)

    return inputs.from_oracle(
        lambda routes, group: oracle.combine(
            routes, rows[group], weighted=weighted, bias=None if biases is None else biases[group],
            quantize=None if format is None else quantize,
        )
    )  # fmt: skip


def test_sums_of_other_devices_are_quantized_once(case: Case, implementation: str) -> None:
    inputs, results = outcome(case, implementation)
    weighted = case.problem.layout == "expert"
    expected = combined(case, inputs, inputs.y, case.combine, weighted=weighted, bias=inputs.bias)
    _assert_same_sums(results["out"], expected, implementation, case.combine)


def test_the_gradient_of_dispatch_has_its_own_format(case: Case, implementation: str) -> None:
    inputs, results = outcome(case, implementation)
    expected = combined(case, inputs, inputs.y, case.of_dispatch, weighted=False)
    _assert_same_sums(results["gradients"][0], expected, implementation, case.of_dispatch)
    _assert_same_sums(results["of_again"][0], expected, implementation, case.of_dispatch)
    there = inputs.from_oracle(lambda routes, _: routes.row_of >= 0)
    np.testing.assert_array_equal(results["gradients"][1], there)


def test_the_gradient_of_combine_has_its_own_format(case: Case, implementation: str) -> None:
    inputs, results = outcome(case, implementation)
    of_y, of_weights, of_bias = results["of_out"]
    g, y = inputs.by_group(quantized(inputs.x2, case.of_combine)), inputs.by_group(inputs.y)
    weighted = case.problem.layout == "expert"
    with np.errstate(invalid="ignore"):
        expected = [
            oracle.combine_gradients(routes, y[group], g[group], weighted=weighted)
            for group, routes in enumerate(inputs.routes)
        ]
    assert_same_bits(of_bias, inputs.x2)
    rows = np.concatenate([each.y for each in expected])
    # A NaN has no specified bits once it has been multiplied.
    assert np.array_equal(np.isnan(of_y), np.isnan(rows))
    assert_same_sums(np.where(np.isnan(rows), 0, of_y), np.where(np.isnan(rows), 0, rows), implementation)
    products = np.concatenate([each.topk_weights for each in expected])
    finite = np.isfinite(products)
    assert np.array_equal(np.isnan(of_weights), np.isnan(products))
    if implementation in EXACT:
        assert_same_bits(of_weights[finite], products[finite])
    else:
        assert_close(of_weights[finite], products[finite])


def _assert_same_sums(got: np.ndarray, expected: np.ndarray, implementation: str, format: str | None) -> None:
    if implementation in EXACT or format is None:
        assert_same_sums(got, expected, implementation)
        return
    # A sum that differs in the last bit may round to the next code, of 3 bits and more of mantissa.
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=2.0**-3, atol=2.0**-3
    )
