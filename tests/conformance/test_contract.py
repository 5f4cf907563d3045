"""dispatch, cached_dispatch and combine against the oracle: every problem, every implementation."""

import numpy as np
import oracle
from implementations import assert_same_bits, assert_same_sums, cases
from outcomes import outcome
from problems import PROBLEMS, Inputs, Problem, is_nightly, is_run_in_low_latency, is_run_in_xla

pytestmark = cases(
    "problem", PROBLEMS, in_xla=is_run_in_xla, in_low_latency=is_run_in_low_latency, nightly=is_nightly
)


def joined(inputs: Inputs, attribute: str) -> np.ndarray:
    return np.concatenate([getattr(routes, attribute) for routes in inputs.routes])


def test_rows_arrive_in_their_order(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    written = joined(inputs, "mask") if problem.layout == "token" else joined(inputs, "written")
    for name, x in (("dispatched", inputs.x), ("again", inputs.x2)):
        by_group = inputs.by_group(x)
        expected = inputs.from_oracle(
            lambda routes, group, by_group=by_group: oracle.copy_rows(routes, by_group[group])
        )
        assert results[name].tokens.shape == expected.shape
        assert_same_bits(results[name].tokens[written], expected[written])


def test_counts_and_sources(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    for dispatched in (results["dispatched"], results["again"]):
        np.testing.assert_array_equal(dispatched.mask, joined(inputs, "mask"))
        if problem.layout == "expert":
            np.testing.assert_array_equal(dispatched.group_sizes, joined(inputs, "group_sizes"))
            np.testing.assert_array_equal(dispatched.num_rows, joined(inputs, "num_rows"))
        else:
            np.testing.assert_array_equal(dispatched.num_tokens, joined(inputs, "num_rows")[:, 0])
    handle = results["handle"]
    np.testing.assert_array_equal(handle.source, joined(inputs, "source"))
    np.testing.assert_array_equal(handle.num_received, joined(inputs, "num_received"))
    np.testing.assert_array_equal(handle.num_dropped, joined(inputs, "num_dropped"))
    np.testing.assert_array_equal(handle.num_invalid, joined(inputs, "num_invalid"))


def test_router_weights_arrive_with_their_rows(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    for dispatched in (results["dispatched"], results["again"]):
        if problem.layout == "expert":
            assert_same_bits(dispatched.weights, joined(inputs, "row_weights"))
        else:
            expected = inputs.from_oracle(lambda routes, _: routes.row_topk[0])
            np.testing.assert_array_equal(dispatched.topk_idx, expected)
            expected = inputs.from_oracle(lambda routes, _: routes.row_topk[1])
            assert_same_bits(dispatched.topk_weights, expected)


def test_dtypes_of_the_results(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    dispatched, handle = results["dispatched"], results["handle"]
    for leaf in (handle.source, handle.num_received, handle.num_dropped, handle.num_invalid):
        assert leaf.dtype == np.int32
    assert dispatched.tokens.dtype == results["default"].dtype == inputs.x.dtype
    assert dispatched.mask.dtype == bool


def test_combine_sums_in_exactly_this_order(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    y, bias = inputs.by_group(inputs.y), inputs.by_group(inputs.bias)
    weighted = problem.layout == "expert"
    expected = inputs.from_oracle(
        lambda routes, group: oracle.combine(routes, y[group], weighted=weighted, bias=bias[group])
    )
    assert_same_sums(results["default"], expected, implementation)
    expected = inputs.from_oracle(lambda routes, group: oracle.combine(routes, y[group], weighted=False))
    assert_same_sums(results["unweighted"], expected, implementation)


def test_a_token_with_no_expert_yields_its_bias_or_zero(problem: Problem, implementation: str) -> None:
    inputs, _, results, _ = outcome(problem, implementation)
    nowhere = np.concatenate([(routes.row_of < 0).all(axis=-1) for routes in inputs.routes])
    assert_same_bits(results["default"][nowhere], inputs.bias[nowhere])
    np.testing.assert_array_equal(results["unweighted"][nowhere], 0)
