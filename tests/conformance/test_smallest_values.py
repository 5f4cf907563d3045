"""Values whose handling differs between machines: subnormal numbers, and the sign of zero."""

import ml_dtypes
import numpy as np
import oracle
import pytest
from implementations import assert_same_bits
from meshes import run_per_device
from problems import DTYPES, Problem, inputs_of

import jax_deepep as ep

pytestmark = pytest.mark.parametrize("implementation", ["native"])  # rounding hides them in the others


def assert_combined(problem: Problem, implementation: str, y: np.ndarray, bias: np.ndarray) -> None:
    """Combine rows y [D, C, H], added to bias [D, T, H], and compare with the oracle."""
    comm = problem.communicator(implementation)
    inputs = inputs_of(problem)

    def program(x, topk_idx, topk_weights, y, bias):
        _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return ep.combine(y, handle, comm=comm, bias=bias)

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights, y, bias)
    out = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    y, bias = inputs.by_group(y), inputs.by_group(bias)
    expected = inputs.from_oracle(
        lambda routes, group: oracle.combine(routes, y[group], weighted=True, bias=bias[group])
    )
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_subnormal_numbers_are_not_flushed(dtype: str, implementation: str) -> None:
    """XLA's threads on CPU flush them to zero; the contract does not."""
    problem = Problem(f"subnormal, {dtype}", dtype=dtype)
    inputs = inputs_of(problem)
    tiny = float(ml_dtypes.finfo(DTYPES[dtype]).smallest_normal) / 8
    y, bias = ((array.astype(np.float64) * tiny).astype(array.dtype) for array in (inputs.y, inputs.bias))
    assert_combined(problem, implementation, y, bias)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zeros_keep_their_signs(dtype: str, implementation: str) -> None:
    """-0 + -0 is -0, and every other sum of zeros is 0, wherever partial sums are stored."""
    problem = Problem(f"signs of zeros, {dtype}", dtype=dtype)
    inputs = inputs_of(problem)
    y, bias = (np.copysign(np.zeros_like(array), array) for array in (inputs.y, inputs.bias))
    y[..., ::2] = -0.0  # so that sums of several rows are -0, too
    assert_combined(problem, implementation, y, bias)
