"""Gating against an oracle in plain NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_deepep as ep
from jax_deepep import gating

MODELS = {
    "deepseek v3": {"num_experts_per_tok": 6, "num_groups": 8, "topk_groups": 4, "scale": 2.5},
    "deepseek v2": {"num_experts_per_tok": 6, "num_groups": 8, "topk_groups": 3, "score_function": "softmax",
                    "normalize": False, "scale": 16.0},
    "softmax": {"num_experts_per_tok": 4, "score_function": "softmax"},
    "sigmoid": {"num_experts_per_tok": 4},
    "sigmoid, not normalised": {"num_experts_per_tok": 4, "normalize": False},
    "groups of one": {"num_experts_per_tok": 4, "num_groups": 32, "topk_groups": 5},
    "whole groups": {"num_experts_per_tok": 8, "num_groups": 8, "topk_groups": 2},
}  # fmt: skip
EXPERTS = 32


def best_of(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the highest scores, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def oracle(logits, *, num_experts_per_tok, num_groups=1, topk_groups=1, bias=None, score_function="sigmoid",
           normalize=True, scale=1.0):  # fmt: skip
    """Return (topk_idx, topk_weights) of logits [T, E], one token at a time in float64."""
    chosen, weights = [], []
    for row in np.asarray(logits, np.float64):
        if score_function == "softmax":
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        else:
            scores = 1 / (1 + np.exp(-row))
        biased = scores + (0 if bias is None else np.asarray(bias, np.float64))
        groups = biased.reshape(num_groups, -1)
        best = 1 if score_function == "softmax" else 2
        group_scores = np.array([np.sort(group)[::-1][:best].sum() for group in groups])
        allowed = np.zeros_like(groups, bool)
        allowed[best_of(group_scores, topk_groups)] = True
        experts = best_of(np.where(allowed.ravel(), biased, -np.inf), num_experts_per_tok)
        w = scores[experts]
        chosen.append(experts)
        weights.append(scale * (w / w.sum() if normalize else w))
    return np.array(chosen, np.int32), np.array(weights)


def random_logits(dtype=np.float32, tokens: int = 50) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(tokens, EXPERTS)).astype(dtype)


def check(logits, **options) -> None:
    idx, weights = jax.jit(functools.partial(ep.group_limited_topk, **options))(logits)
    expected_idx, expected_weights = oracle(np.asarray(logits).astype(np.float64), **options)
    assert (idx.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(idx, expected_idx)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_choice_and_weights(name: str, biased: bool) -> None:
    bias = np.random.default_rng(1).normal(scale=0.2, size=EXPERTS).astype(np.float32) if biased else None
    check(random_logits(), bias=bias, **MODELS[name])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["deepseek v3", "deepseek v2", "softmax"])
def test_half_precision_is_computed_in_float32(name: str, dtype) -> None:
    check(random_logits(dtype), **MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_ties_go_to_the_lower_index(name: str) -> None:
    """Logits have three values, so that experts and groups often tie; zero has two signs."""
    logits = np.random.default_rng(2).choice([-0.0, 0.0, 1.0], (200, EXPERTS)).astype(np.float32)
    logits[0] = 0
    check(logits, **MODELS[name])
    check(logits, bias=np.tile(np.float32([0.0, 0.5]), EXPERTS // 2), **MODELS[name])


@pytest.mark.parametrize("garbage", [-np.inf, np.nan, -np.nan, -3e38])
@pytest.mark.parametrize("name", ["deepseek v3", "deepseek v2", "softmax"])
def test_an_excluded_group_gives_no_expert(name: str, garbage: float) -> None:
    """Even where no score in the chosen groups is a number."""
    options = MODELS[name]
    groups = options.get("num_groups", 1)
    logits = random_logits()
    logits[:25] = np.where(np.arange(EXPERTS) % (EXPERTS // groups) > 0, np.float32(garbage), logits[:25])
    logits[0] = garbage
    idx, _ = ep.group_limited_topk(logits, **options)
    group = np.asarray(idx) // (EXPERTS // groups)
    assert max(len(set(row)) for row in group) <= options.get("topk_groups", 1)
    assert all(len(set(row)) == options["num_experts_per_tok"] for row in np.asarray(idx))
    np.testing.assert_array_equal(idx[25:], oracle(logits[25:], **options)[0])


def test_minus_infinity_and_nan_come_last_in_order() -> None:
    logits = np.float32([[np.nan, 1, -np.inf, 3, -np.nan]])
    idx, _ = ep.group_limited_topk(logits, num_experts_per_tok=5)
    np.testing.assert_array_equal(idx, [[3, 1, 0, 2, 4]])


def test_without_a_bias_rounding_of_scores_does_not_matter() -> None:
    """The sigmoid of 20 and of 30 is 1 in float32, and a probability of exp(-200) is 0."""
    saturated = np.float32([[0, 20, 30, 25]])
    np.testing.assert_array_equal(ep.group_limited_topk(saturated, num_experts_per_tok=2)[0], [[2, 3]])
    idx, weights = ep.group_limited_topk(
        np.float32([[-300, 0, -200, -250]]), num_experts_per_tok=3, score_function="softmax"
    )
    np.testing.assert_array_equal(idx, [[1, 2, 3]])
    np.testing.assert_array_equal(weights, [[1, 0, 0]])


def test_normalised_softmax_is_the_softmax_of_the_chosen() -> None:
    """As in GPT-OSS; a bias may choose experts whose probabilities are all zero in float32."""
    logits = np.float32([[0, 200, 1, 2]])
    bias = np.float32([2, 0, 2, 0])
    idx, weights = ep.group_limited_topk(logits, num_experts_per_tok=2, score_function="softmax", bias=bias)
    np.testing.assert_array_equal(idx, [[0, 2]])
    np.testing.assert_allclose(weights, [[1 / (1 + np.e), np.e / (1 + np.e)]], rtol=1e-6)


def test_weights_are_float32_whatever_the_scale() -> None:
    logits = random_logits()
    expected = ep.group_limited_topk(logits, num_experts_per_tok=2, scale=2.5)[1]
    with jax.enable_x64(True):
        weights = ep.group_limited_topk(logits, num_experts_per_tok=2, scale=np.float64(2.5))[1]
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_and_leading_axes(name: str) -> None:
    logits = random_logits().reshape(2, 5, 5, EXPERTS)
    gate = functools.partial(ep.group_limited_topk, **MODELS[name])
    one_by_one = [gate(logits[i, j]) for i in range(2) for j in range(5)]
    for batched in (gate(logits), jax.vmap(jax.vmap(gate))(logits)):
        for k, result in enumerate(batched):
            np.testing.assert_array_equal(result.reshape(10, 5, -1), np.stack([one[k] for one in one_by_one]))


@pytest.mark.parametrize("name", MODELS)
def test_gradient(name: str) -> None:
    """Against differences in float64; none for the bias."""
    bias = np.random.default_rng(1).normal(scale=0.2, size=EXPERTS)
    logits = random_logits(np.float64, tokens=3)
    factors = np.random.default_rng(3).normal(size=(3, MODELS[name]["num_experts_per_tok"]))

    def loss(logits, bias):
        return (ep.group_limited_topk(logits, bias=bias, **MODELS[name])[1] * factors).sum()

    gradient, of_bias = jax.grad(loss, argnums=(0, 1))(jnp.float32(logits), jnp.float32(bias))
    expected = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-6
        above, below = (oracle(at, bias=bias, **MODELS[name])[1] for at in (logits + step, logits - step))
        expected[index] = ((above - below) * factors).sum() / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)
    assert not np.asarray(of_bias).any()


def test_integers_of_numpy_and_jax() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    wanted = gating.group_limited_topk(logits, num_experts_per_tok=2, num_groups=4, topk_groups=2)
    integers = {"num_experts_per_tok": jnp.int32(2), "num_groups": np.int8(4), "topk_groups": np.int64(2)}
    for got, expected in zip(gating.group_limited_topk(logits, **integers), wanted, strict=True):
        np.testing.assert_array_equal(got, expected)


ERRORS = [
    ({"logits": [1.0, 2.0]}, TypeError, "logits: expected an array, got list"),
    ({"logits": np.zeros((2, 8), np.int32)}, TypeError, "logits: expected floats, got dtype int32"),
    ({"logits": np.zeros((2, 0), np.float32)}, ValueError, r"logits: expected shape .*, got \[2, 0\]"),
    ({"bias": np.zeros(4, np.float32)}, ValueError, r"bias: expected shape \[num_experts\] = \[8\], got"),
    ({"bias": np.zeros(8, np.int32)}, TypeError, "bias: expected floats, got dtype int32"),
    ({"score_function": "relu"}, ValueError, "score_function: expected \"sigmoid\" or .*, got 'relu'"),
    ({"num_experts_per_tok": 0}, ValueError, "num_experts_per_tok: expected an integer of at least 1, got 0"),
    ({"num_experts_per_tok": 2.0}, TypeError, r"num_experts_per_tok: expected a Python integer .*, got 2\.0"),
    ({"num_experts_per_tok": 9}, ValueError, "num_experts_per_tok: expected at most 8, .*, got 9"),
    ({"normalize": "no"}, TypeError, "normalize: expected True or False, got 'no'; pass a bool"),
    ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of the 8 experts, got 3"),
    ({"num_groups": 2, "topk_groups": 3}, ValueError, "topk_groups: expected at most num_groups=2, got 3"),
    ({"num_groups": 4, "topk_groups": 1, "num_experts_per_tok": 3}, ValueError,
     "num_experts_per_tok: expected at most 2, the experts in topk_groups=1 of 4 groups .*, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "words"), ERRORS, ids=[case[2][:40] for case in ERRORS])
def test_a_wrong_argument(wrong: dict, error: type[Exception], words: str) -> None:
    arguments = {"logits": np.zeros((2, 8), np.float32), "num_experts_per_tok": 2, **wrong}
    with pytest.raises(error, match=words):
        ep.group_limited_topk(arguments.pop("logits"), **arguments)


def test_load_counts_entries_in_range() -> None:
    topk_idx = np.int32([[[0, 2], [2, -1]], [[5, 2], [-7, 6]]])
    load = jax.jit(functools.partial(gating.expert_load, num_experts=6))(topk_idx)
    assert load.dtype == jnp.int32
    np.testing.assert_array_equal(load, [1, 0, 3, 0, 0, 1])


def test_probabilities_of_the_balance_loss() -> None:
    logits = random_logits(ml_dtypes.bfloat16)
    exact = logits.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-exact))
    softmax = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    np.testing.assert_allclose(gating.router_probabilities(logits, "softmax"), softmax, rtol=1e-5)
    np.testing.assert_allclose(
        gating.router_probabilities(logits), sigmoid / sigmoid.sum(-1, keepdims=True), rtol=1e-5
    )


def test_balance_loss() -> None:
    load, probability = np.int32([6, 2, 0, 0]), np.float32([0.5, 0.25, 0.125, 0.125])
    loss, gradient = jax.value_and_grad(gating.balance_loss, argnums=1)(load, probability)
    assert float(loss) == 4 * (0.75 * 0.5 + 0.25 * 0.25)
    np.testing.assert_array_equal(gradient, [3, 1, 0, 0])
    assert float(gating.balance_loss(np.int32([5] * 4), probability)) == 1
    assert float(gating.balance_loss(np.int32([0] * 4), probability)) == 0  # no tokens, and no NaN
    per_layer = gating.balance_loss(np.stack([load, load[::-1]]), np.stack([probability, probability]))
    np.testing.assert_array_equal(per_layer, [1.75, 4 * (0.75 * 0.125 + 0.25 * 0.125)])


def test_bias_moves_towards_an_even_load() -> None:
    bias = np.float32([[0.5, 0, 0], [0, 0, 0]])
    load = np.int32([[3, 1, 2], [0, 0, 9]])
    moved = gating.update_bias(bias, load, rate=0.25)
    np.testing.assert_array_equal(moved, [[0.25, 0.25, 0], [0.25, 0.25, -0.25]])
    assert gating.update_bias(jnp.zeros(3, jnp.bfloat16), load[0]).dtype == jnp.bfloat16


def test_a_bias_that_would_not_move_is_an_error() -> None:
    """A step of 1e-3 from 7 is lost in bfloat16; the value of a traced bias is not known."""
    load = np.int32([3, 1, 2])
    for update in (gating.update_bias, jax.jit(gating.update_bias)):
        with pytest.raises(ValueError, match=r"bias: expected float32, got bfloat16 with rate=.*; keep the"):
            update(jnp.full(3, 7, jnp.bfloat16), load)
    np.testing.assert_allclose(gating.update_bias(jnp.full(3, 7.0), load), [6.999, 7.001, 7])
    gating.update_bias(jnp.full(3, 7, jnp.bfloat16), np.int32([2, 2, 2]))  # no step to lose


def test_the_bias_evens_out_a_skewed_router() -> None:
    """After some steps, hot experts lose their advantage."""
    logits = random_logits(tokens=512) + np.linspace(0, 2, EXPERTS, dtype=np.float32)

    @jax.jit
    def step(bias):
        idx, _ = ep.group_limited_topk(logits, num_experts_per_tok=4, bias=bias)
        load = gating.expert_load(idx, EXPERTS)
        return gating.update_bias(bias, load, rate=0.01), load.max() / load.mean()

    bias, before = step(jnp.zeros(EXPERTS))
    for _ in range(100):
        bias, after = step(bias)
    assert before > 2
    assert after < 1.2
