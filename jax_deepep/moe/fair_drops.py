"""Which rows are dropped under a capacity: a fair part of every sender's, the lowest weights first.

Dispatch drops what does not fit last in its order, which is contract: always the last experts of a device,
and of an expert the rows of the last senders. So that no expert and no sender loses more than others, every
sender leaves out by itself what exceeds its part of the room, before it sends anything: nothing is exchanged
for it, what a token loses depends on the tokens of its own device alone, and it loses the same in every run.

A sender's part is used by no other, so that more rows are dropped than by dispatch, but of low weight. With
T = 1024, K = 8 of 64 experts on 8 devices, uniform routing and a capacity of the fair share: 1.2 % of the
rows and 0.0 % of the weight, in place of 0.5 % of both, of which the last experts bore 3.8 % and the last
sender 3.4 %. With T = 8: 12 % and 2.8 % in place of 4.4 % and 4.6 %, of which the last experts bore 30 %. (To
divide the room by experts, in the order of dispatch, drops more, and all of it from the last senders.)

Where a sender's part is of fewer than `LEAST_PART` rows, as in decoding, dispatch alone decides, and drops
the last experts and senders: parts of 4 rows would drop 17 % of the rows in place of 6 %, and of nearly even
weights 11 %; only an exchange of counts could tell a sender what its peers leave unused. Such calls do better
without a capacity.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.moe.config import MoEConfig

LEAST_PART = 8  # rows


def leave_out(
    config: MoEConfig, topk_idx: jax.Array, topk_weights: jax.Array, capacity: int | None, alignment: int
) -> jax.Array:
    """Return `topk_idx` with −1 for the entries that this device does not send.

    Args:
        config: of the layer.
        topk_idx: int32 [T, K], physical experts; whatever is outside of their range stays.
        topk_weights: float32 [T, K].
        capacity, alignment: of the dispatch; None = nothing is dropped for want of room.
    """
    comm = config.comm
    rank = jnp.int32(0) if comm.size == 1 else lax.axis_index(comm.axis_names)
    if config.expert_capacity is not None:
        topk_idx = _within(
            topk_idx, topk_idx, topk_weights, comm.num_experts, config.expert_capacity, rank, comm.size
        )
    if capacity is not None:
        padding = comm.num_local_experts * (alignment - 1)  # at most, of the rows of a device
        device = jnp.where(topk_idx < 0, -1, topk_idx // comm.num_local_experts)
        topk_idx = _within(topk_idx, device, topk_weights, comm.size, capacity - padding, rank, comm.size)
    return topk_idx


def _within(
    topk_idx: jax.Array,
    group: jax.Array,
    weights: jax.Array,
    num_groups: int,
    room: int,
    rank: jax.Array,
    num_ranks: int,
) -> jax.Array:
    """Leave out what exceeds this rank's part of the `room` of each group that entries [T, K] belong to."""
    part, rest = divmod(max(room, 0), num_ranks)
    if part < LEAST_PART:
        return topk_idx
    is_in = (group >= 0) & (group < num_groups)
    group = jnp.where(is_in, group, num_groups).reshape(-1)
    # Sorted by group, in a group by weight, the highest first, to 16 bits; of equals the first token first.
    bits = lax.bitcast_convert_type(jnp.abs(weights), jnp.uint32).reshape(-1) >> jnp.uint32(16)
    key = (group.astype(jnp.uint32) << jnp.uint32(16)) | (jnp.uint32(0xFFFF) - bits)
    entry = jnp.arange(key.size, dtype=jnp.int32)
    sorted_key, sorted_entry = lax.sort((key, entry), num_keys=1, is_stable=True)
    groups = jnp.arange(num_groups, dtype=jnp.int32)
    bounds = jnp.arange(num_groups + 1, dtype=jnp.int32)
    first = (group[None] < bounds[:, None]).sum(axis=1, dtype=jnp.int32)
    # The rest goes to other ranks for every group.
    own = part + ((groups + rank) % num_ranks < rest).astype(jnp.int32)
    # The last entry of each group that stays: a look at it tells of every other. No scatter, which on a GPU
    # makes entries wait for each other where many meet in few groups. What is in no group stays.
    last = jnp.minimum(first[:-1] + own, first[1:]) - 1
    last_key = jnp.append(sorted_key[last], jnp.uint32(0xFFFFFFFF))[group]
    last_entry = jnp.append(sorted_entry[last], jnp.int32(key.size))[group]
    stays = (key < last_key) | ((key == last_key) & (entry <= last_entry))
    return jnp.where(stays.reshape(topk_idx.shape), topk_idx, -1)
