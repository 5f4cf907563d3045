"""implementation="xla": the verbs in plain JAX collectives, on every platform.

The reference of the tests, and what a platform without native ops runs. Every device gathers the
routing of its group, derives all routes from it, and gathers or exchanges the rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.capacity import num_groups, round_up
from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.quantization.block_scaled import quantize
from jax_deepep.quantization.formats import Format
from jax_deepep.quantization.packed_rows import unpack

NOT_A_ROW = -1


def _gather(shape: RouteShape, value: jax.Array) -> jax.Array:
    """Return the values of all devices of the group, [R, ...]."""
    comm = shape.comm
    if comm.size == 1:
        return value[None]
    gathered: jax.Array = lax.all_gather(value, comm.axis_names)
    return gathered


def _valid_entries(topk_idx: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Return (bool mask of entries that count, int32 [] count of entries that are wrong)."""
    inside = (topk_idx >= 0) & (topk_idx < num_experts)
    same = topk_idx[..., :, None] == topk_idx[..., None, :]
    repeated = jnp.any(jnp.tril(same, -1), axis=-1)
    valid = inside & ~repeated
    return valid, jnp.sum((topk_idx != -1) & ~valid, dtype=jnp.int32)


def _first_of_each_device(device: jax.Array, valid: jax.Array) -> jax.Array:
    """Mark for every (token, device) its first valid k."""
    same = (device[..., :, None] == device[..., None, :]) & valid[..., None, :]
    return valid & ~jnp.any(jnp.tril(same, -1), axis=-1)


def dispatch(
    shape: RouteShape,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    wire: Format | None = None,
    keep_quantized: bool = False,
) -> tuple[Any, Handle[Any]]:
    """Implement `implementations.dispatch`."""
    comm, capacity = shape.comm, shape.capacity
    num_ranks, num_local = comm.size, comm.num_local_experts
    groups_here = num_groups(shape.layout, num_local)
    rank = shape.rank()

    _, num_invalid = _valid_entries(topk_idx, comm.num_experts)
    everyones_idx = _gather(shape, topk_idx)  # [R, T, K]
    everyones_weights = _gather(shape, topk_weights)
    valid, _ = _valid_entries(everyones_idx, comm.num_experts)
    device = jnp.where(valid, everyones_idx // num_local, num_ranks)
    local_expert = jnp.where(valid, everyones_idx % num_local, -1)
    if shape.layout == "expert":
        makes_row = valid
        group = jnp.where(valid, everyones_idx, num_ranks * groups_here)
    else:
        makes_row = _first_of_each_device(device, valid)
        group = jnp.where(makes_row, device, num_ranks * groups_here)

    # The position of every entry inside its row group, in the order (source device, token, k). One more
    # group at the end holds the entries that make no row.
    flat_group = group.reshape(-1)
    received = jnp.zeros(num_ranks * groups_here + 1, jnp.int32).at[flat_group].add(1)
    first = jnp.cumsum(received) - received
    order = jnp.argsort(flat_group, stable=True)
    position = jnp.arange(flat_group.size, dtype=jnp.int32) - first[flat_group[order]]
    position = jnp.zeros_like(flat_group).at[order].set(position)

    received = received[:-1].reshape(num_ranks, groups_here)
    limit = received if shape.expert_capacity is None else shape.expert_capacity
    wanted = jnp.minimum(received, limit)
    padded = round_up(wanted, shape.alignment)
    offset = jnp.cumsum(padded, axis=1) - padded
    kept = jnp.clip(capacity - offset, 0, wanted)

    safe_offset = jnp.append(offset.reshape(-1), 0)[flat_group]
    safe_kept = jnp.append(kept.reshape(-1), 0)[flat_group]
    row = jnp.where(position < safe_kept, safe_offset + position, NOT_A_ROW).reshape(device.shape)
    if shape.layout == "token":
        # Every k of a token has the row that its first k on the same device made.
        shares = (device[..., :, None] == device[..., None, :]) & makes_row[..., None, :]
        row = jnp.max(jnp.where(shares, row[..., None, :], NOT_A_ROW), axis=-1)
        row = jnp.where(valid, row, NOT_A_ROW)
    destination = jnp.where(row >= 0, device * capacity + row, NOT_A_ROW)

    # Rows of this device: scatter by row; index `capacity` collects those of others and is cut off.
    mine = (row >= 0) & (device == rank)
    target = jnp.where(mine, row, capacity)
    code = jnp.arange(num_ranks)[:, None] * comm.max_tokens + jnp.arange(shape.num_tokens)[None, :]
    code = jnp.broadcast_to(code[..., None], row.shape).astype(jnp.int32)
    source = jnp.full(capacity + 1, NOT_A_ROW, jnp.int32).at[target].set(code)[:capacity]
    num_topk = comm.num_experts_per_tok
    if shape.layout == "expert":
        weights = jnp.zeros(capacity + 1, jnp.float32).at[target].set(everyones_weights)
        local_experts = None
    else:
        k = jnp.broadcast_to(jnp.arange(num_topk), row.shape)
        weights = jnp.zeros((capacity + 1, num_topk), jnp.float32)
        weights = weights.at[target, k].set(everyones_weights)
        local_experts = jnp.full((capacity + 1, num_topk), -1, jnp.int32)
        local_experts = local_experts.at[target, k].set(local_expert)[:capacity]

    num_received = jnp.sum(received[rank], dtype=jnp.int32)
    handle: Handle[Any] = Handle(
        source=source,
        destination=destination[rank],
        weights=weights[:capacity],
        local_experts=local_experts,
        pairs=None,
        group_sizes=round_up(kept[rank], shape.alignment),
        num_rows=kept[rank],
        num_received=num_received,
        num_dropped=num_received - jnp.sum(kept[rank], dtype=jnp.int32),
        num_invalid=num_invalid,
        route_shape=shape,
    )
    tokens, _ = cached_dispatch(shape, x, handle.routes, wire=wire, keep_quantized=keep_quantized)
    return tokens, handle


def _copy_rows(shape: RouteShape, everyones_x: jax.Array, routes: Routes) -> jax.Array:
    """Return the gathered x [R, T, ...] in the rows of its tokens, zeros in others."""
    device, token = jnp.divmod(routes.source, shape.comm.max_tokens)
    tokens = everyones_x.reshape(-1, *everyones_x.shape[2:])
    rows = jnp.take(tokens, device * shape.num_tokens + token, axis=0, mode="clip")
    live = (routes.source >= 0).reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(live, rows, jnp.zeros((), rows.dtype))


def cached_dispatch(
    shape: RouteShape,
    x: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    y: jax.Array | None = None,
    zero_rest: bool = False,
    wire: Format | None = None,
    keep_quantized: bool = False,
) -> tuple[Any, jax.Array | None]:
    """Implement `implementations.cached_dispatch`; here the rows after the groups are always zero."""
    del zero_rest
    if wire is None:
        everyones_x = _gather(shape, x)
    else:
        is_packed = jnp.issubdtype(x.dtype, jnp.integer)
        quantized = unpack(x, wire, shape.comm.hidden_size) if is_packed else quantize(x, wire)
        gathered = jax.tree.map(lambda leaf: _gather(shape, leaf), quantized)
        if keep_quantized:
            return jax.tree.map(lambda leaf: _copy_rows(shape, leaf, routes), gathered), None
        everyones_x = gathered.dequantize(x.dtype)
    rows = _copy_rows(shape, everyones_x, routes)
    products = None
    if y is not None:
        live_y = jnp.where((routes.source >= 0)[:, None], y, jnp.zeros((), y.dtype)).astype(jnp.float32)
        products = jnp.sum(rows.astype(jnp.float32) * live_y, axis=1)
    if weights is not None:
        rows = (rows.astype(jnp.float32) * weights[:, None]).astype(x.dtype)
    return rows, products


def combine(
    shape: RouteShape,
    y: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_gradients: jax.Array | None = None,
    wire: Format | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Implement `implementations.combine`."""
    comm, capacity = shape.comm, shape.capacity
    num_ranks = comm.size
    everyones = _gather(shape, routes.destination)  # [R, T, K]
    mine = (everyones >= 0) & (everyones // capacity == shape.rank())
    row = jnp.where(mine, everyones % capacity, capacity)

    gradients = None
    if row_gradients is not None:
        gradients = _returned_gradients(shape, row_gradients, row, mine)
    if shape.layout == "token":
        mine = _first_of_each_device(jnp.where(mine, 0, -1), mine)
        row = jnp.where(mine, row, capacity)

    # The entries on this device in ascending k: at most one per local expert.
    slots = min(comm.num_experts_per_tok, comm.num_local_experts)
    order = jnp.argsort(~mine, axis=-1, stable=True)[..., :slots]
    row = jnp.take_along_axis(row, order, axis=-1)

    partial_sum = jnp.zeros((*row.shape[:2], y.shape[1]), jnp.float32)
    for slot in range(row.shape[-1]):
        index = row[..., slot]
        live = (index < capacity)[..., None]
        term = jnp.take(y, index, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        if weights is not None:
            term = term * jnp.take(weights, index, mode="fill", fill_value=0)[..., None]
        partial_sum = jnp.where(live, partial_sum + term, partial_sum)
    parts = partial_sum.astype(y.dtype)  # [R, T, H], rounded once per (token, device)

    def exchange(value: jax.Array) -> jax.Array:
        exchanged: jax.Array = lax.all_to_all(value, comm.axis_names, 0, 0)
        return exchanged

    # In each node the rank with this one's index adds up its sums: the others cross a link.
    per_node = comm.topology.ranks_per_node
    if comm.size > 1 and (wire is None or comm.topology.num_nodes > 1):
        parts = exchange(parts)
    if comm.size > 1 and wire is not None:
        added_there = jnp.arange(num_ranks)[:, None, None] % per_node == shape.rank() % per_node
        received = jax.tree.map(exchange, quantize(partial_sum, wire)).dequantize(jnp.float32)
        parts = jnp.where(added_there, parts.astype(jnp.float32), received)
    if comm.topology.num_nodes > 1:
        sums = [
            functools.reduce(jnp.add, parts[first : first + per_node].astype(jnp.float32))
            for first in range(0, num_ranks, per_node)
        ]
        of_nodes = jnp.stack(sums)
        parts = of_nodes.astype(y.dtype)
        if wire is not None:
            own = jnp.arange(len(sums))[:, None, None] == shape.rank() // per_node
            received = quantize(of_nodes, wire).dequantize(jnp.float32)
            parts = jnp.where(own, parts.astype(jnp.float32), received)

    total = jnp.zeros(parts.shape[1:], jnp.float32) if bias is None else bias.astype(jnp.float32)
    for part in parts:
        total = total + part.astype(jnp.float32)
    return total.astype(y.dtype), gradients


def _returned_gradients(
    shape: RouteShape, row_gradients: jax.Array, row: jax.Array, mine: jax.Array
) -> jax.Array:
    """Return gradients of row weights ([C] or [C, K]) to the entries of their tokens."""
    if shape.layout == "expert":
        found = jnp.take(row_gradients, row, mode="fill", fill_value=0)
    else:
        k = jnp.broadcast_to(jnp.arange(row.shape[-1]), row.shape)
        found = row_gradients.at[row, k].get(mode="fill", fill_value=0)
    found = jnp.where(mine, found, 0.0)
    if shape.comm.size > 1:
        found = lax.all_to_all(found, shape.comm.axis_names, 0, 0)
    return jnp.sum(found, axis=0)
