"""The router: which experts a token goes to, with which weights, and how the experts' loads are balanced.

Everything here is plain JAX on [..., E] arrays, inside `shard_map` or outside. Ties always go to the lower
index, among experts and among expert groups, on every platform.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep.checks import check_array, check_bool, check_is_array, checked_integer
from jax_deepep.expert_choice import choose_experts

__all__ = [
    "ScoreFunction", "balance_loss", "expert_load", "group_limited_topk", "router_probabilities",
    "update_bias", "weights_of",
]  # fmt: skip

ScoreFunction = Literal["sigmoid", "softmax"]

# Scores are clamped to at least this. The sum of two is still finite, and −inf is left for the experts of
# excluded groups, which are never chosen, whatever the logits are.
LOWEST = float(jnp.finfo(jnp.float32).min) / 2


def group_limited_topk(
    logits: jax.Array,
    *,
    num_experts_per_tok: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    bias: jax.Array | None = None,
    score_function: ScoreFunction = "sigmoid",
    normalize: bool = True,
    scale: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of every token, and their weights.

    An expert's score is the sigmoid of its logit, or the softmax of the logits over all experts. The
    experts form `num_groups` groups of consecutive experts. Those outside of the `topk_groups` best groups
    are excluded, and the K with the highest biased scores (score + `bias`) among the others are chosen. The
    score of a group is the sum of its two best biased scores with "sigmoid", its best one with "softmax".
    The bias affects this choice only; weights are the scores without it.

        DeepSeek-V3     sigmoid, bias, num_groups=8, topk_groups=4, scale=2.5
        DeepSeek-V2     softmax, num_groups=8, topk_groups=3, normalize=False, scale=16.0
        Mixtral, Qwen3  softmax
        GPT-OSS         softmax: a softmax over the logits of the chosen experts alone is the same as one
                        over all experts, normalised over the chosen, and it is computed in that form

    Without a bias, logits are compared instead of scores, which have the same order but may round to the
    same value: the choice then does not depend on how a platform rounds exp.

    Args:
        logits: [..., E] of any float dtype; everything is computed in float32. −inf and NaN rank equally,
            below all numbers. Differentiable: the gradient of the weights flows through the scores.
        num_experts_per_tok: K.
        num_groups: groups of E / num_groups experts each.
        topk_groups: groups that a token's experts may come from.
        bias: [E] float, added to the scores for the choice, or None. It gets no gradient: `update_bias`
            updates it.
        score_function: "sigmoid" or "softmax".
        normalize: divide the weights of a token by their sum. With K = 1 every weight is then 1, and the
            router gets no gradient from it.
        scale: factor of the weights, applied last.

    Returns:
        (`topk_idx` int32 [..., K], highest biased score first; `topk_weights` float32 [..., K]).

    Raises:
        ValueError, TypeError: a wrong argument; the message names it and says what was expected.
    """
    _check(logits, bias)
    num_experts_per_tok, num_groups, topk_groups = check_choices(
        logits.shape[-1], num_experts_per_tok=num_experts_per_tok, num_groups=num_groups,
        topk_groups=topk_groups, score_function=score_function, normalize=normalize,
    )  # fmt: skip
    logits = logits.astype(jnp.float32)
    scores = _scores(logits, score_function)
    biased, ranking = scores, logits
    if bias is not None:
        biased = ranking = scores + _as_last_axis(bias, scores)
    ranking = group_ranking = _comparable(ranking)
    by_scores = score_function == "sigmoid"
    if by_scores and topk_groups < num_groups:
        group_ranking = _comparable(biased)
    topk_idx = choose_experts(
        ranking,
        group_ranking,
        num_experts_per_tok=num_experts_per_tok,
        num_groups=num_groups,
        topk_groups=topk_groups,
        best_of_group=2 if by_scores else 1,
    )
    return topk_idx, _weights(logits, scores, topk_idx, score_function, normalize, scale)


def weights_of(
    logits: jax.Array,
    topk_idx: jax.Array,
    *,
    score_function: ScoreFunction = "sigmoid",
    normalize: bool = True,
    scale: float | jax.Array = 1.0,
) -> jax.Array:
    """Return the weights of given experts, bitwise those of `group_limited_topk` for experts that it chose.

    Args:
        logits: [..., E] of any float dtype. Differentiable.
        topk_idx: int32 [..., K]; entries outside of [0, E) name no expert and have weight 0.
        score_function, normalize, scale: as in `group_limited_topk`.

    Returns:
        float32 [..., K].
    """
    _check_score_function(score_function)
    logits = logits.astype(jnp.float32)
    scores = _scores(logits, score_function)
    is_expert = (topk_idx >= 0) & (topk_idx < logits.shape[-1])
    return _weights(
        logits, scores, jnp.where(is_expert, topk_idx, 0), score_function, normalize, scale, is_expert
    )


def _scores(logits: jax.Array, score_function: ScoreFunction) -> jax.Array:
    return jax.nn.softmax(logits) if score_function == "softmax" else jax.nn.sigmoid(logits)


def _weights(
    logits: jax.Array,
    scores: jax.Array,
    topk_idx: jax.Array,
    score_function: ScoreFunction,
    normalize: bool,
    scale: float | jax.Array,
    is_expert: jax.Array | None = None,
) -> jax.Array:
    """Return the weights of experts in [0, E); 0 where `is_expert`, if it is given, is False."""
    if normalize and score_function == "softmax":  # never 0 / 0, unlike a quotient of scores
        chosen = jnp.take_along_axis(logits, topk_idx, axis=-1)
        if is_expert is not None:
            # If all of a token's entries were −inf, the softmax and its gradient would be NaN.
            is_any = is_expert.any(axis=-1, keepdims=True)
            chosen = jnp.where(is_expert | ~is_any, chosen, -jnp.inf)
        weights = jax.nn.softmax(chosen)
    else:
        weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
        if is_expert is not None:
            weights = jnp.where(is_expert, weights, 0)
        if normalize:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    if is_expert is not None:
        weights = jnp.where(is_expert, weights, 0)
    return weights * jnp.asarray(scale, jnp.float32)


def router_probabilities(logits: jax.Array, score_function: ScoreFunction = "sigmoid") -> jax.Array:
    """Return the scores of the experts divided by their sum, float32 [..., E], for `balance_loss`."""
    _check_score_function(score_function)
    logits = logits.astype(jnp.float32)
    if score_function == "softmax":
        return jax.nn.softmax(logits)
    scores = jax.nn.sigmoid(logits)
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)


def expert_load(topk_idx: jax.Array, num_experts: int) -> jax.Array:
    """Return how many entries of `topk_idx` (any shape) name each expert, int32 [E].

    Entries outside of [0, E), such as the −1 of padding, are not counted. On several devices, sum the
    results with `lax.psum`.
    """
    in_range = (topk_idx >= 0) & (topk_idx < num_experts)
    # A histogram as a scatter of ones; bin E takes what is not counted.
    counts = jnp.zeros(num_experts + 1, jnp.int32)
    return counts.at[jnp.where(in_range, topk_idx, num_experts).reshape(-1)].add(1)[:num_experts]


def balance_loss(load: jax.Array, mean_probability: jax.Array) -> jax.Array:
    """Return E · Σ_e load_e / Σ load · mean_probability_e, float32 [...]: 1 when all loads are equal.

    Equations 4 to 6 of "Switch Transformers" (Fedus et al., 2021) without their factor α; equations 17 to 20
    of the DeepSeek-V3 report for several experts per token. Only `mean_probability` has a gradient.

    Args:
        load: [..., E], entries per expert over the tokens of a batch, or of a sequence.
        mean_probability: float32 [..., E], the mean of `router_probabilities` over the same tokens.
    """
    load = lax.stop_gradient(load.astype(jnp.float32))
    part = load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1)
    return load.shape[-1] * jnp.sum(part * mean_probability, axis=-1)


def update_bias(bias: jax.Array, load: jax.Array, rate: float | jax.Array = 1e-3) -> jax.Array:
    """Return the `bias` of `group_limited_topk` for the next step, in its dtype.

    Raises the bias of every expert with less than the mean load by `rate`, and lowers that of experts with
    more: balance without a loss (Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts"; in DeepSeek-V3 with a rate of 1e-3).

    Args:
        bias: [..., E] float32, one row per layer if there are several.
        load: [..., E], entries per expert in this step, over all devices.
        rate: the step size.

    Raises:
        ValueError: a bias of 16 bits in which a step is lost to rounding, or, while tracing, may be.
    """
    load = load.astype(jnp.float32)
    step = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    moved = (bias.astype(jnp.float32) + jnp.asarray(rate, jnp.float32) * step).astype(bias.dtype)
    if jnp.dtype(bias.dtype).itemsize < 4:
        _check_moves(bias, moved, step, rate)
    return moved


def _as_last_axis(bias: jax.Array, scores: jax.Array) -> jax.Array:
    """Return `bias` [E] as float32 [1, ..., 1, E], a constant to autodiff."""
    bias = lax.stop_gradient(bias.astype(jnp.float32))
    return bias.reshape((1,) * (scores.ndim - 1) + bias.shape)


def _comparable(scores: jax.Array) -> jax.Array:
    """Return `scores` without NaN, which top_k orders by sign, and without −0, which it orders below 0."""
    scores = lax.stop_gradient(scores)
    scores = jnp.where(scores >= LOWEST, scores, LOWEST)  # NaN compares false
    return jnp.where(scores == 0, 0.0, scores)


def _check_score_function(score_function: Any) -> None:
    if score_function not in ("sigmoid", "softmax"):
        raise ValueError(
            f'score_function: expected "sigmoid" or "softmax", got {score_function!r}; pass one of them.'
        )


def check_choices(
    num_experts: int,
    *,
    num_experts_per_tok: Any,
    num_groups: Any,
    topk_groups: Any,
    score_function: Any,
    normalize: Any,
) -> tuple[int, int, int]:
    """Return the integers; raise unless `group_limited_topk` takes all of this for `num_experts` experts."""
    _check_score_function(score_function)
    check_bool("normalize", normalize)
    num_experts_per_tok = checked_integer("num_experts_per_tok", num_experts_per_tok, minimum=1)
    num_groups = checked_integer("num_groups", num_groups, minimum=1)
    topk_groups = checked_integer("topk_groups", topk_groups, minimum=1)
    if num_experts % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {num_experts} experts, got {num_groups}; pass one."
        )
    if topk_groups > num_groups:
        raise ValueError(
            f"topk_groups: expected at most num_groups={num_groups}, got {topk_groups}; pass fewer groups."
        )
    available = num_experts // num_groups * topk_groups
    if num_experts_per_tok > available:
        raise ValueError(
            f"num_experts_per_tok: expected at most {available}, the experts in topk_groups={topk_groups} of "
            f"{num_groups} groups ({num_experts} experts in all), got {num_experts_per_tok}; pass fewer, or "
            "more groups."
        )
    return num_experts_per_tok, num_groups, topk_groups


def _check(logits: Any, bias: Any) -> None:
    """Raise unless `group_limited_topk` takes these arrays."""
    check_is_array("logits", logits)
    check_is_float("logits", logits)
    if not logits.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected shape [..., num_experts], got {list(logits.shape)}; pass a row per token."
        )
    if bias is not None:
        check_array("bias", bias, (logits.shape[-1],), names="[num_experts]")
        check_is_float("bias", bias)


def check_is_float(name: str, value: Any) -> None:
    """Raise unless the array `value` has a float dtype."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected floats, got dtype {value.dtype.name}; cast it: {name}.astype(jnp.float32)."
        )


def _check_moves(bias: jax.Array, moved: jax.Array, step: jax.Array, rate: Any) -> None:
    """Raise if a step of `rate` is lost in a bias of 16 bits, or may be."""
    is_known = not isinstance(moved, jax.core.Tracer) and getattr(moved, "is_fully_addressable", True)
    if is_known and not (np.asarray(step) * (np.asarray(moved) == np.asarray(bias))).any():
        return
    lost = "in which this step is lost" if is_known else "in which steps are lost unless it is small"
    raise ValueError(
        f"bias: expected float32, got {bias.dtype.name} with rate={rate}, {lost}; keep the bias in float32, "
        "as the layers do with gate_bias whatever their param_dtype."
    )
