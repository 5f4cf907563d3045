"""The gradients of dispatch and of combine against the oracle: native bit for bit, xla up to rounding.

Gradients of whole layers, and how transformations treat them, are in ../transforms.
"""

import numpy as np
import oracle
from implementations import EXACT, assert_same_bits, assert_same_sums, cases
from moe_layer import assert_close
from outcomes import outcome
from problems import PROBLEMS, Inputs, Problem, is_nightly, is_run_in_low_latency, is_run_in_xla

pytestmark = cases(
    "problem", PROBLEMS, in_xla=is_run_in_xla, in_low_latency=is_run_in_low_latency, nightly=is_nightly
)


def test_gradients_of_dispatch(problem: Problem, implementation: str) -> None:
    """Cotangents of rows without a token reach no gradient."""
    inputs, cotangents, _, gradients = outcome(problem, implementation)
    tokens, weights = inputs.by_group(cotangents["tokens"]), inputs.by_group(cotangents["weights"])
    expected = [
        oracle.dispatch_gradients(routes, tokens[group], weights[group])
        for group, routes in enumerate(inputs.routes)
    ]
    x, topk_weights = gradients["dispatch"]
    assert_same_sums(x, np.concatenate([each.x for each in expected]), implementation)
    assert_same_bits(topk_weights, np.concatenate([each.topk_weights for each in expected]))


def expected_of_combine(problem: Problem, inputs: Inputs, g: np.ndarray, *, weighted: bool) -> dict:
    y, g = inputs.by_group(inputs.y), inputs.by_group(g)
    by_group = [
        oracle.combine_gradients(routes, y[group], g[group], weighted=weighted)
        for group, routes in enumerate(inputs.routes)
    ]
    return {
        name: np.concatenate([getattr(each, name) for each in by_group])
        for name in oracle.CombineGradients._fields
    }


def test_gradients_of_combine(problem: Problem, implementation: str) -> None:
    inputs, cotangents, _, gradients = outcome(problem, implementation)
    y, _, bias = gradients["combine"]
    weighted = problem.layout == "expert"
    expected = expected_of_combine(problem, inputs, cotangents["out"], weighted=weighted)
    assert_same_sums(y, expected["y"], implementation)
    assert_same_bits(bias, expected["bias"])
    (y,) = gradients["unweighted"]
    assert_same_bits(y, expected_of_combine(problem, inputs, cotangents["out"], weighted=False)["y"])


def test_gradient_of_combine_for_the_router_weights(problem: Problem, implementation: str) -> None:
    """A dot product per row, whose order of sums is part of the contract."""
    inputs, cotangents, _, gradients = outcome(problem, implementation)
    _, topk_weights, _ = gradients["combine"]
    weighted = problem.layout == "expert"
    expected = expected_of_combine(problem, inputs, cotangents["out"], weighted=weighted)["topk_weights"]
    if implementation in EXACT:
        assert_same_bits(topk_weights, expected)
    else:
        assert_close(topk_weights, expected)
