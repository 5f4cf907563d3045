"""Which experts the tokens of one device go to: by the layer's router, or by the caller's choice."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import gating
from jax_deepep.checks import check_array
from jax_deepep.moe.config import MoEConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What the caller gives for the tokens [...] or [T]; None where the layer decides.

    Attributes:
        mask: bool [...], False for what is not a token.
        logits: float [..., E], instead of the router's.
        topk_idx: int32 [..., K], chosen experts.
        topk_weights: float [..., K], their weights, instead of the router's.
    """

    mask: jax.Array | None = None
    logits: jax.Array | None = None
    topk_idx: jax.Array | None = None
    topk_weights: jax.Array | None = None


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        topk_idx: int32 [T, K], −1 = no expert; may have invalid entries if the caller chose it.
        counted: int32 [T, K], the same with −1 for entries that are invalid or repeated.
        topk_weights: float32 [T, K].
        logits: float32 [T, E], or None where the caller gave the weights.
    """

    topk_idx: jax.Array
    counted: jax.Array
    topk_weights: jax.Array
    logits: jax.Array | None


def check_given(config: MoEConfig, given: Given, leading: tuple[int, ...]) -> None:
    """Raise unless the given arrays fit x of shape [*leading, H]."""
    k, num_experts = config.num_experts_per_tok, config.num_experts
    for name, value, last, dtype in (
        ("mask", given.mask, (), jnp.bool_),
        ("router", given.logits, (num_experts,), None),
        ("topk_idx", given.topk_idx, (k,), jnp.int32),
        ("topk_weights", given.topk_weights, (k,), None),
    ):
        if value is None:
            continue
        names = {(): "x.shape[:-1]", (k,): "[*x.shape[:-1], num_experts_per_tok]"}
        check_array(
            name, value, (*leading, *last), names=names.get(last, "[*x.shape[:-1], num_experts]"), dtype=dtype
        )
        if dtype is None:
            gating.check_is_float(name, value)
    if given.topk_weights is not None and given.topk_idx is None:
        raise ValueError("topk_weights: expected None without topk_idx, got an array; pass both, or neither.")


def given_by(
    router: Any, x: jax.Array, mask: Any, topk_idx: jax.Array | None, topk_weights: jax.Array | None
) -> Given:
    """Call the caller's `router`, if there is one."""
    logits = None
    if router is not None:
        if not callable(router):
            raise TypeError(f"router: expected a function of x, got {router!r}; pass one, or None.")
        if topk_weights is not None:
            raise ValueError(
                "router: expected None with topk_weights, got a function; there is nothing to route."
            )
        routed = router(x)
        if isinstance(routed, tuple):
            if topk_idx is not None or len(routed) != 2:
                raise ValueError(
                    f"router: expected logits or (topk_idx, topk_weights), got {len(routed)} results"
                    f"{' beside topk_idx' * (topk_idx is not None)}; leave out topk_idx, or return logits."
                )
            topk_idx, topk_weights = routed
        else:
            logits = routed
    return Given(mask, logits, topk_idx, topk_weights)


def router_logits(platform: str, x: jax.Array, gate: jax.Array) -> jax.Array:
    """Return x · gate as float32 [T, E], exact to few units in the last place: an error may change a choice.

    NVIDIA GPUs multiply three bfloat16 parts of each operand on their matrix units: that is faster there than
    HIGHEST, and nearer to float64.
    """
    x, gate = x.astype(jnp.float32), gate.astype(jnp.float32)
    size, num_experts = gate.shape
    # XLA multiplies the parts of a single row or column in bfloat16, and rounds each product to it.
    if platform != "cuda" or size % 2 or 1 in (len(x), num_experts):
        return jnp.matmul(x, gate, precision=lax.Precision.HIGHEST)
    # H as two axes: for several devices XLA (0.10.2 to 0.12, Shardy) forgets the algorithm of a product of
    # matrices, and multiplies in TF32.
    halves = x.reshape(-1, 2, size // 2), gate.reshape(2, size // 2, num_experts)
    exact = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return lax.dot_general(*halves, (((1, 2), (0, 1)), ((), ())), precision=exact)


def route(config: MoEConfig, parameters: Any, x: jax.Array, is_token: jax.Array, given: Given) -> Routing:
    """Choose experts for x [T, H] of one device; rows that are not tokens get none."""
    is_token = is_token[:, None]
    if given.topk_weights is not None:
        assert given.topk_idx is not None
        topk_idx, logits = jnp.where(is_token, given.topk_idx, -1), None
        topk_weights = jnp.where(is_token, given.topk_weights.astype(jnp.float32), 0)
    else:
        if given.logits is None:
            logits = router_logits(config.comm.platform, x, parameters["gate"])
        else:
            logits = jnp.where(is_token, given.logits.astype(jnp.float32), 0)
        weighted: dict[str, Any] = {
            "score_function": config.score_function, "normalize": config.normalize, "scale": config.scale
        }  # fmt: skip
        topk_idx, topk_weights = gating.group_limited_topk(
            logits,
            num_experts_per_tok=config.num_experts_per_tok,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            bias=parameters.get("gate_bias"),
            **weighted,
        )
        if given.topk_idx is not None:
            is_chosen = (given.topk_idx >= 0).any(axis=-1, keepdims=True)
            topk_idx = jnp.where(is_chosen, given.topk_idx, topk_idx)
            topk_weights = gating.weights_of(logits, topk_idx, **weighted)
        topk_idx = jnp.where(is_token, topk_idx, -1)
    counted = topk_idx if given.topk_idx is None else _valid(topk_idx, config.num_experts)
    return Routing(topk_idx, counted, topk_weights, logits)


def _valid(topk_idx: jax.Array, num_experts: int) -> jax.Array:
    """Return −1 in place of entries that dispatch ignores."""
    same = topk_idx[:, :, None] == topk_idx[:, None, :]
    is_repeated = jnp.tril(same, -1).any(axis=-1)
    return jnp.where((topk_idx >= 0) & (topk_idx < num_experts) & ~is_repeated, topk_idx, -1)
