"""The router: which experts a token goes to, with which weights, and what keeps the experts' loads even.

Everything here is plain JAX on [..., E] arrays, inside `shard_map` or outside. Ties always go to the lower
index, among experts and among groups, on every platform.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep.checks import check_array, checked_integer

__all__ = [
    "ScoreFunction", "balance_loss", "expert_load", "group_limited_topk", "router_probabilities",
    "update_bias", "weights_of",
]  # fmt: skip

ScoreFunction = Literal["sigmoid", "softmax"]

# What a score counts as at least. The sum of two is still a number, and −inf is left for the experts of
# groups that are out: they are never chosen, whatever the logits hold.
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
    experts form `num_groups` groups of neighbours; those outside of the `topk_groups` best groups are out,
    and of the rest the K with the highest biased scores (score + `bias`) are chosen. A group's own score is
    the sum of its two best biased scores with "sigmoid", its best one with "softmax". The bias takes part
    in this choice only; weights are the scores without it.

        DeepSeek-V3     sigmoid, bias, num_groups=8, topk_groups=4, scale=2.5
        DeepSeek-V2     softmax, num_groups=8, topk_groups=3, normalize=False, scale=16.0
        Mixtral, Qwen3  softmax
        GPT-OSS         softmax: a softmax over the logits of the chosen experts alone is the same as one
                        over all experts, normalised over the chosen, and it is computed in that form

    Without a bias, logits are compared in place of scores, which have the same order but may round to the
    same value: the choice is then the same on every platform, whatever its exp does in the last bit.

    Args:
        logits: [..., E] of any float dtype; everything is computed in float32. −inf and NaN rank equal,
            below the numbers. Differentiable: the gradient of the weights flows through the scores.
        num_experts_per_tok: K.
        num_groups: groups of E / num_groups experts each.
        topk_groups: groups that a token's experts may come from.
        bias: [E] float, added to the scores in the choice, or None. It gets no gradient: `update_bias`
            moves it.
        score_function: "sigmoid" or "softmax".
        normalize: divide the weights of a token by their sum. With K = 1 a weight is 1 then, and the router
            gets no gradient from it.
        scale: factor of the weights, applied last.

    Returns:
        (`topk_idx` int32 [..., K], highest biased score first; `topk_weights` float32 [..., K]).

    Raises:
        ValueError, TypeError: a bad argument, named with what it got and what it takes.
    """
    _check(logits, bias)
    check_choices(
        logits.shape[-1], num_experts_per_tok=num_experts_per_tok, num_groups=num_groups,
        topk_groups=topk_groups, score_function=score_function, normalize=normalize,
    )  # fmt: skip
    logits = logits.astype(jnp.float32)
    scores = _scores(logits, score_function)
    biased, ranking = scores, logits
    if bias is not None:
        biased = ranking = scores + _as_last_axis(bias, scores)
    ranking = _comparable(ranking)
    if topk_groups < num_groups:
        if score_function == "sigmoid":
            allowed = _in_best_groups(_comparable(biased), num_groups, topk_groups, best=2)
        else:
            allowed = _in_best_groups(ranking, num_groups, topk_groups, best=1)
        ranking = jnp.where(allowed, ranking, -jnp.inf)
    topk_idx = lax.top_k(ranking, num_experts_per_tok)[1]

    return topk_idx, _weights(logits, scores, topk_idx, score_function, normalize, scale)


def weights_of(
    logits: jax.Array,
    topk_idx: jax.Array,
    *,
    score_function: ScoreFunction = "sigmoid",
    normalize: bool = True,
    scale: float | jax.Array = 1.0,
) -> jax.Array:
    """Return the weights of given experts: those of `group_limited_topk` if it chose them, to the bit.

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
    if normalize and score_function == "softmax":  # never 0 / 0, unlike the quotient of scores
        chosen = jnp.take_along_axis(logits, topk_idx, axis=-1)
        if is_expert is not None:
            # Not −inf in all places of a token, of which the softmax and its gradient would be NaN.
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

    Entries outside of [0, E), such as the −1 of padding, count nowhere. On several devices, `lax.psum`
    adds up what each one counted.
    """
    in_range = (topk_idx >= 0) & (topk_idx < num_experts)
    # A histogram as a scatter of ones; entry E takes what counts nowhere.
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

    Raises the bias of every expert with less than the mean load by `rate`, and lowers it where there is
    more: balance without a loss (Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts"; in DeepSeek-V3 with a rate of 1e-3).

    Args:
        bias: [..., E] float32, one row per layer if there are several.
        load: [..., E], entries per expert in this step, over all devices.
        rate: how far the bias moves.

    Raises:
        ValueError: a bias of 16 bits in which a step is lost, or, while tracing, may be.
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
    """Return `scores` without what top_k orders by bits: NaN by its sign, and −0 below 0."""
    scores = lax.stop_gradient(scores)
    scores = jnp.where(scores >= LOWEST, scores, LOWEST)  # NaN compares false
    return jnp.where(scores == 0, 0.0, scores)


def _in_best_groups(scores: jax.Array, num_groups: int, topk_groups: int, best: int) -> jax.Array:
    """Return bool [..., E]: the experts of the groups whose `best` highest scores have the highest sums."""
    grouped = scores.reshape(*scores.shape[:-1], num_groups, -1)
    best_scores = lax.top_k(grouped, min(best, grouped.shape[-1]))[0]
    chosen = lax.top_k(best_scores.sum(axis=-1), topk_groups)[1]  # [..., topk_groups]
    group = jnp.arange(scores.shape[-1], dtype=jnp.int32) // grouped.shape[-1]
    group = group.reshape((1,) * (scores.ndim) + (-1,))  # [..., 1, E]
    return (chosen[..., None] == group).any(axis=-2)


def _check_score_function(score_function: Any) -> None:
    if score_function not in ("sigmoid", "softmax"):
        raise ValueError(f'score_function: got {score_function!r}; takes "sigmoid" or "softmax".')


def check_choices(
    num_experts: int,
    *,
    num_experts_per_tok: Any,
    num_groups: Any,
    topk_groups: Any,
    score_function: Any,
    normalize: Any,
) -> None:
    """Raise unless `group_limited_topk` can choose so among `num_experts` experts."""
    _check_score_function(score_function)
    if not isinstance(normalize, bool | np.bool_):
        raise TypeError(f"normalize: expected True or False, got {normalize!r}; pass a bool.")
    for name, value in (
        ("num_experts_per_tok", num_experts_per_tok), ("num_groups", num_groups), ("topk_groups", topk_groups)
    ):  # fmt: skip
        checked_integer(name, value, minimum=1)
    if num_experts % num_groups:
        raise ValueError(f"num_groups: got {num_groups}; takes a divisor of the {num_experts} experts.")
    if topk_groups > num_groups:
        raise ValueError(f"topk_groups: got {topk_groups}; takes at most num_groups={num_groups}.")
    available = num_experts // num_groups * topk_groups
    if num_experts_per_tok > available:
        raise ValueError(
            f"num_experts_per_tok: got {num_experts_per_tok}; takes at most {available}, the experts of "
            f"topk_groups={topk_groups} of {num_groups} groups ({num_experts} experts in all)."
        )


def _check(logits: Any, bias: Any) -> None:
    """Raise unless `group_limited_topk` can work with these arrays."""
    if not hasattr(logits, "dtype") or not hasattr(logits, "shape"):
        raise TypeError(f"logits: got {type(logits).__name__}; takes an array.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits: got dtype {logits.dtype.name}; takes floats.")
    if not logits.shape or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}; takes [..., num_experts].")
    if bias is not None:
        check_array("bias", bias, (logits.shape[-1],), names="[num_experts]")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias: got dtype {bias.dtype.name}; takes floats.")


def _check_moves(bias: jax.Array, moved: jax.Array, step: jax.Array, rate: Any) -> None:
    """Raise if a bias of 16 bits does not move by `rate`, or may not for all that is known."""
    is_known = not isinstance(moved, jax.core.Tracer) and getattr(moved, "is_fully_addressable", True)
    if is_known and not (np.asarray(step) * (np.asarray(moved) == np.asarray(bias))).any():
        return
    lost = "in which this step is lost" if is_known else "in which steps are lost as soon as it is not small"
    raise ValueError(
        f"bias: expected float32, got {bias.dtype.name} with rate={rate}, {lost}; keep the bias in float32, "
        "as the layers do with gate_bias whatever their param_dtype."
    )
