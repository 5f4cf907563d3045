"""What a device does with a chunk of its tokens: choose experts, apply them, count.

With `two_batch_overlap` it applies them to each half of the chunk, of which one communicates while the other
computes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_deepep import gating, jax_compat
from jax_deepep.balancing import to_physical_experts
from jax_deepep.moe.aux import Call, Counts, Sequences, Sums
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.fair_drops import omit_excess
from jax_deepep.moe.overlapped import apply_experts, parted
from jax_deepep.moe.routing import Given, Routing, route
from jax_deepep.moe.steps import Batch

ROUTER = ("gate", "gate_bias")

PerToken = tuple[jax.Array, jax.Array | None]  # the two fields of `MoEAux` with a value per token


class Tokens(NamedTuple):
    """Tokens of one device.

    Attributes:
        position: int32 [T], their indices among those of all devices.
        x: [T, H].
        given: what the caller gave for them.
    """

    position: jax.Array
    x: jax.Array
    given: Given


def apply_to_chunk(
    config: MoEConfig,
    call: Call,
    sequences: Sequences,
    device: jax.Array,
    parameters: dict[str, jax.Array],
    expert_map: jax.Array | None,
    tokens: Tokens,
) -> tuple[jax.Array, PerToken, Counts]:
    """Return (output [T, H], the fields of `MoEAux` with a value per token, `Counts`)."""
    num_batches = config.batches_per_chunk
    num_tokens = len(tokens.x) // num_batches  # of a batch
    choice, alignment = config.experts_by(num_tokens, call.dtype)
    capacity = config.capacity(num_tokens, alignment)
    options = {
        "layout": "expert",
        "capacity": capacity,
        "expert_capacity": config.expert_capacity,
        "alignment": alignment,
    }
    is_token = tokens.position < call.num_tokens
    if (mask := tokens.given.mask) is not None:
        is_token &= mask
    routing = route(config, parameters, tokens.x, is_token, tokens.given)
    topk_idx = routing.topk_idx
    if expert_map is not None:
        # An invalid expert must not become a valid physical expert.
        topk_idx = jnp.where(topk_idx < config.num_experts, topk_idx, config.comm.num_experts)
        topk_idx = to_physical_experts(topk_idx, tokens.position, expert_map, num_experts=config.num_experts)

    def varying(value: jax.Array) -> jax.Array:
        # Marked before dispatch as varying along the tensor axis too, so that the gradients of the tokens are
        # summed along it, and not those of all received rows.
        return jax_compat.as_varying(value, frozenset(config.mesh.axis_names))

    def to_experts(topk_idx: jax.Array, topk_weights: jax.Array) -> Batch:
        topk_idx = omit_excess(config, topk_idx, topk_weights, capacity, alignment)
        return Batch(topk_idx, varying(topk_weights))

    shared = {name: value for name, value in parameters.items() if name.startswith("shared")}
    routed = {name: value for name, value in parameters.items() if name not in ROUTER and name not in shared}
    entries = (parted(value, num_batches) for value in (topk_idx, routing.topk_weights))
    batches = [to_experts(*of_batch) for of_batch in zip(*entries, strict=True)]
    x = varying(tokens.x).astype(call.dtype)
    out, destination, num_received = apply_experts(config, choice, x, batches, routed, shared, options)
    if mask is not None:  # a shared expert may not be 0 for x = 0
        out = jnp.where(mask[:, None], out, jnp.zeros((), out.dtype))
    drops = None
    if config.may_drop:
        drops = gating.expert_load(jnp.where(destination < 0, routing.counted, -1), config.num_experts)
    of_sequences = None
    if call.sequence_loss:
        of_sequences = functools.partial(
            sequences.sums, tokens.position // sequences.length - sequences.first(device)
        )
    counts = _counts(config, is_token, routing, drops, num_received, of_sequences)
    return out, (routing.topk_idx, routing.logits if call.router_logits else None), counts


def _counts(
    config: MoEConfig,
    is_token: jax.Array,
    routing: Routing,
    drops: jax.Array | None,
    num_received: jax.Array,
    of_sequences: Callable[[jax.Array], jax.Array] | None,
) -> Counts:
    """Count what the tokens of one device chose."""
    num_tokens, num_experts = len(is_token), config.num_experts
    if routing.logits is None:
        probability, z = jnp.zeros((num_tokens, num_experts), jnp.float32), jnp.zeros((), jnp.float32)
    else:
        probability = gating.router_probabilities(routing.logits, config.score_function)
        probability = jnp.where(is_token[:, None], probability, 0)
        z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
        z = jnp.where(is_token, z, 0).sum()
    every = Sums(
        gating.expert_load(routing.counted, num_experts),
        probability.sum(axis=0),
        is_token.sum(dtype=jnp.int32),
    )
    sequences = None
    if of_sequences is not None:
        is_chosen = jax.vmap(functools.partial(gating.expert_load, num_experts=num_experts))(routing.counted)
        sequences = Sums(*map(of_sequences, (is_chosen, probability, is_token.astype(jnp.int32))))
    return Counts(every, sequences, z, drops, num_received)
