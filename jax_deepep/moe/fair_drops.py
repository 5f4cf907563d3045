"""Which rows are dropped under a capacity: a fair share of every sender's, the lowest weights first.

Dispatch drops what comes last in its order, which is contract: always the last experts of a device, and of an
expert the rows of the last senders. To treat all experts and senders alike, every sender omits what exceeds
its share of the capacity before it sends: this needs no exchange, what a token loses depends only on the
tokens of its own device, and it is the same in every run.

No other sender can use what a sender leaves of its share, so that more rows are dropped than by dispatch, but
of low weight. With T = 1024, K = 8 of 64 experts on 8 devices, uniform routing and a capacity of K · T rows:
1.2 % of the rows and 0.0 % of the weight, instead of 0.5 % of both, where the last experts lost 3.8 % and the
last sender 3.4 %. With T = 8: 12 % and 2.8 % instead of 4.4 % and 4.6 %, where the last experts lost 30 %.
(Dividing the capacity by experts, in the order of dispatch, drops more, and all of it from the last senders.)

Where a sender's share is less than `LEAST_SHARE` rows, as in decoding, dispatch alone decides, and drops the
last experts and senders: shares of 4 rows would drop 17 % of the rows instead of 6 %, and 11 % of nearly even
weights; a sender could learn only by an exchange of counts what its peers leave unused. Such calls do better
without a capacity.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.moe.config import MoEConfig

LEAST_SHARE = 8  # rows


def omit_excess(
    config: MoEConfig, topk_idx: jax.Array, topk_weights: jax.Array, capacity: int | None, alignment: int
) -> jax.Array:
    """Return `topk_idx` with −1 for the entries that this device does not send.

    Args:
        config: of the layer.
        topk_idx: int32 [T, K], physical experts; entries out of range stay as they are.
        topk_weights: float32 [T, K].
        capacity, alignment: of the dispatch; None = the worst case, which drops nothing.
    """
    comm = config.comm
    rank = jnp.int32(0) if comm.size == 1 else lax.axis_index(comm.axis_names)
    if config.expert_capacity is not None:
        topk_idx = _within(
            topk_idx, topk_idx, topk_weights, comm.num_experts, config.expert_capacity, rank, comm.size
        )
    if capacity is not None:
        padding = comm.num_local_experts * (alignment - 1)  # the most padding rows of a device
        device = jnp.where(topk_idx < 0, -1, topk_idx // comm.num_local_experts)
        topk_idx = _within(topk_idx, device, topk_weights, comm.size, capacity - padding, rank, comm.size)
    return topk_idx


def _within(
    topk_idx: jax.Array,
    group: jax.Array,
    weights: jax.Array,
    num_groups: int,
    capacity: int,
    rank: jax.Array,
    num_ranks: int,
) -> jax.Array:
    """Omit entries [T, K] beyond this rank's share of the `capacity` of the `group` that they belong to."""
    share, rest = divmod(max(capacity, 0), num_ranks)
    if share < LEAST_SHARE:
        return topk_idx
    is_in = (group >= 0) & (group < num_groups)
    group = jnp.where(is_in, group, num_groups).reshape(-1)
    # Sorted by group, then by falling weight, of which 16 bits are compared, then by token.
    bits = lax.bitcast_convert_type(jnp.abs(weights), jnp.uint32).reshape(-1) >> jnp.uint32(16)
    key = (group.astype(jnp.uint32) << jnp.uint32(16)) | (jnp.uint32(0xFFFF) - bits)
    entry = jnp.arange(key.size, dtype=jnp.int32)
    sorted_key, sorted_entry = lax.sort((key, entry), num_keys=1, is_stable=True)
    groups = jnp.arange(num_groups, dtype=jnp.int32)
    bounds = jnp.arange(num_groups + 1, dtype=jnp.int32)
    first = (group[None] < bounds[:, None]).sum(axis=1, dtype=jnp.int32)
    # Which ranks get the remainder differs from group to group.
    own = share + ((groups + rank) % num_ranks < rest).astype(jnp.int32)
    # Every entry is compared with the last one of its group that stays. A scatter would serialise on a GPU,
    # where many entries fall into few groups. Entries without a group stay.
    last = jnp.minimum(first[:-1] + own, first[1:]) - 1
    last_key = jnp.append(sorted_key[last], jnp.uint32(0xFFFFFFFF))[group]
    last_entry = jnp.append(sorted_entry[last], jnp.int32(key.size))[group]
    stays = (key < last_key) | ((key == last_key) & (entry <= last_entry))
    return jnp.where(stays.reshape(topk_idx.shape), topk_idx, -1)
