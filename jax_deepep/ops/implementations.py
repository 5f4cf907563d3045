"""The native and the XLA implementation of the verbs, and one for ops without rows, behind one interface.

An implementation is a module with three functions on per-device values. `RouteShape` gives the
static sizes; optional operands that are None stay out of the computation. Rows are W ≤ H floats; dispatch,
and cached_dispatch without weights and y, also copy rows of integers of at most 4 · H bytes.

    dispatch(shape, x, topk_idx, topk_weights, *, wire=None, keep_quantized=False)
        -> (tokens [C, W], Handle)
    cached_dispatch(
        shape, x, routes, *, weights=None, y=None, zero_rest=False, wire=None, keep_quantized=False
    )
        -> (rows [C, W], products float32 [C] or None)
        rows = weights · x[routes.source]; products = ⟨x[routes.source], y⟩ per row; rows without a token are
        zero inside the groups and, with `zero_rest`, after them too.
    combine(shape, y, routes, *, weights=None, bias=None, row_gradients=None, wire=None)
        -> (out [T, W], gradients float32 [T, K] or None)
        out as in `jax_deepep.combine`; gradients[t, k] is `row_gradients` of that entry's row.

With `wire`, a block-scaled format, dispatch and cached_dispatch move quantize_dequantize(x) in place of x;
with `keep_quantized` quantize(x), as `BlockScaled` [C, H], and x may be what `pack` makes of such rows.
combine quantises the sum of a device for another one.
"""

from typing import Any, Protocol

import jax

from jax_deepep.ops import native, no_rows, reference
from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.quantization.formats import Format


class Implementation(Protocol):
    """The functions of an implementation: see above."""

    def dispatch(
        self,
        shape: RouteShape,
        x: jax.Array,
        topk_idx: jax.Array,
        topk_weights: jax.Array,
        *,
        wire: Format | None = None,
        keep_quantized: bool = False,
    ) -> tuple[Any, Handle[Any]]: ...

    def cached_dispatch(
        self,
        shape: RouteShape,
        x: jax.Array,
        routes: Routes,
        *,
        weights: jax.Array | None = None,
        y: jax.Array | None = None,
        zero_rest: bool = False,
        wire: Format | None = None,
        keep_quantized: bool = False,
    ) -> tuple[Any, jax.Array | None]: ...

    def combine(
        self,
        shape: RouteShape,
        y: jax.Array,
        routes: Routes,
        *,
        weights: jax.Array | None = None,
        bias: jax.Array | None = None,
        row_gradients: jax.Array | None = None,
        wire: Format | None = None,
    ) -> tuple[jax.Array, jax.Array | None]: ...


def implementation_of(shape: RouteShape, *, known_routes: bool = True) -> Implementation:
    """Return the module for the ops of one dispatch: along `known_routes`, or the dispatch itself.

    A dispatch with capacity 0 copies no row either, but it counts tokens.
    """
    if shape.num_tokens == 0 or (known_routes and shape.capacity == 0):
        return no_rows
    return native if shape.comm.implementation == "native" else reference
