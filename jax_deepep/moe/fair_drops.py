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

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.communicator.native_types import CudaModule
from jax_deepep.moe.config import MoEConfig
from jax_deepep.ops.checks import vary_together
from jax_deepep.router_primitive import router_primitive

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
    local, bounds = comm.num_local_experts, []
    if config.expert_capacity is not None:
        bounds.append((1, config.expert_capacity))
    if capacity is not None:
        bounds.append((local, capacity - local * (alignment - 1)))  # without the most padding rows
    for experts_per_group, rows in bounds:
        share, rest = divmod(max(rows, 0), comm.size)
        if share < LEAST_SHARE:
            continue
        topk_idx = keep_shares(
            topk_idx, topk_weights, rank, num_groups=comm.num_experts // experts_per_group,
            experts_per_group=experts_per_group, share=share, rest=rest, num_ranks=comm.size,
        )  # fmt: skip
    return topk_idx


def keep_shares(topk_idx: jax.Array, topk_weights: jax.Array, rank: jax.Array, **integers: int) -> jax.Array:
    """Return `topk_idx` with −1 for what exceeds the share of a rank in each group of experts.

    Of a group, the entries with the highest weights stay, of which 16 bits are compared, the first of equals.

    Args:
        topk_idx: int32 [T, K]; entries that name no expert of a group stay.
        topk_weights: float32 [T, K].
        rank: int32 [].
        integers: num_groups, of experts_per_group experts each; share of a group, at least 1, and one more if
            (group + rank) % num_ranks < rest.
    """
    if topk_idx.size == 0:
        return topk_idx
    return _keep(*vary_together(frozenset(), topk_idx, topk_weights, rank), **integers)


def _plain(
    topk_idx: jax.Array,
    weights: jax.Array,
    rank: jax.Array,
    *,
    num_groups: int,
    experts_per_group: int,
    share: int,
    rest: int,
    num_ranks: int,
) -> jax.Array:
    group = jnp.where(topk_idx < 0, -1, topk_idx // experts_per_group)
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


def _type(topk_idx: Any, *_: Any, **__: int) -> Any:
    return jax_compat.array_like(topk_idx, topk_idx.shape, topk_idx.dtype)


def _kernel_takes(module: CudaModule, topk_idx: Any, *_: Any, **__: int) -> bool:
    return topk_idx.size <= module.router_limits()[2]


_keep = router_primitive("fair_share", _plain, _type, kernel_takes=_kernel_takes, in_place=True)
