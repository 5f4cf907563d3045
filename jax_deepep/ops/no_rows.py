"""The verbs where no row can be sent: without tokens (T = 0), or with capacity 0.

T and C are the same on all devices, so that no device waits for another and nothing is exchanged. Operands
are used only where they have elements: one without, used in a `shard_map` over several devices, crashes XLA
of JAX 0.11.2, and no version accepts a `shard_map` that uses only such operands.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepep import jax_compat
from jax_deepep.capacity import num_groups
from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import Format
from jax_deepep.quantization.packed_rows import packed_size, unpack


def _full(value: int, shape: tuple[int, ...], dtype: Any, *, like: jax.Array) -> jax.Array:
    """Return an array full of `value` that varies over the mesh as `like` does."""
    array: jax.Array = jax_compat.as_varying(jnp.full(shape, value, dtype), jax_compat.varying_axes(like))
    return array


def _rows(
    shape: RouteShape, x: jax.Array, wire: Format | None, keep_quantized: bool
) -> jax.Array | BlockScaled:
    """Return received rows, all zero."""
    if not keep_quantized:
        return _full(0, (shape.capacity, x.shape[1]), x.dtype, like=x)
    assert wire is not None
    packed = _full(0, (shape.capacity, packed_size(wire, shape.comm.hidden_size)), jnp.uint8, like=x)
    return unpack(packed, wire, shape.comm.hidden_size)


def dispatch(
    shape: RouteShape,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    wire: Format | None = None,
    keep_quantized: bool = False,
) -> tuple[Any, Handle[Any]]:
    """Implement `implementations.dispatch` for T = 0; with tokens, dropped rows must be counted."""
    assert shape.num_tokens == 0
    num_topk, groups = shape.comm.num_experts_per_tok, num_groups(shape.layout, shape.comm.num_local_experts)
    of_rows = (shape.capacity,) if shape.layout == "expert" else (shape.capacity, num_topk)

    def ints(value: int, *sizes: int) -> jax.Array:
        return _full(value, sizes, jnp.int32, like=x)

    handle: Handle[Any] = Handle(
        source=ints(-1, shape.capacity),
        destination=ints(-1, 0, num_topk),
        weights=_full(0, of_rows, jnp.float32, like=x),
        local_experts=ints(-1, *of_rows) if shape.layout == "token" else None,
        pairs=None,
        group_sizes=ints(0, groups),
        num_rows=ints(0, groups),
        num_received=ints(0),
        num_dropped=ints(0),
        num_invalid=ints(0),
        route_shape=shape,
    )
    return _rows(shape, x, wire, keep_quantized), handle


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
    """Implement `implementations.cached_dispatch`; all rows are zero."""
    rows = _rows(shape, x, wire, keep_quantized)
    return rows, None if y is None else _full(0, (shape.capacity,), jnp.float32, like=x)


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
    """Implement `implementations.combine`; every token gets its bias alone."""
    if bias is None or shape.num_tokens == 0:
        bias = _full(0, (shape.num_tokens, y.shape[1]), y.dtype, like=y)
    entries = (shape.num_tokens, shape.comm.num_experts_per_tok)
    return bias, None if row_gradients is None else _full(0, entries, jnp.float32, like=y)
