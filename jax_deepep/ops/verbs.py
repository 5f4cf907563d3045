"""The verbs as pairs, start and done: see `pairs`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepep.ops import native
from jax_deepep.ops.autodiff import DISPATCHED, received_gradients
from jax_deepep.ops.custom_call import Call
from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.ops.pairs import Verb
from jax_deepep.ops.wire import Wire
from jax_deepep.quantization.block_scaled import BlockScaled


def _transpose_dispatch(
    wire: Wire, shape: RouteShape, routes: Routes, outputs: tuple[Any, Handle[Any]], **where: Any
) -> Call:
    tokens, handle = outputs
    rows = received_gradients(shape, tokens, handle.weights)
    return native.combine_call(shape, rows, routes, row_gradients=handle.weights, wire=wire.backward, **where)


def _dispatch_gradients(wire: Wire, operands: Any, _: Any, results: Sequence[jax.Array]) -> Any:
    x, topk_weights, _sums = results
    has_gradient = jnp.issubdtype(operands[0].dtype, jnp.floating) and not wire.keep_quantized
    return x if has_gradient else None, None, topk_weights


@functools.cache
def dispatch(wire: Wire) -> Verb:
    """Return `autodiff.dispatch` as a pair."""
    format, keep_quantized = wire.format, wire.keep_quantized
    return Verb(
        call=functools.partial(native.dispatch_call, wire=format, keep_quantized=keep_quantized),
        outputs=lambda shape, operands, results: native.dispatched(
            shape, operands[0].shape[1], results, wire=format, keep_quantized=keep_quantized
        ),
        saved=lambda operands, outputs: outputs[1].routes,
        transpose=functools.partial(_transpose_dispatch, wire),
        gradients=functools.partial(_dispatch_gradients, wire),
        name=DISPATCHED,
    )


def _transpose_cached_dispatch(wire: Wire, shape: RouteShape, routes: Routes, tokens: Any) -> Call:
    # Of quantised rows, which have no gradient, only the types of the call matter.
    rows = tokens.data if isinstance(tokens, BlockScaled) else tokens
    return native.combine_call(shape, rows, routes, wire=wire.backward)


@functools.cache
def cached_dispatch(wire: Wire) -> Verb:
    """Return `autodiff.cached_dispatch` as a pair."""
    format, keep_quantized = wire.format, wire.keep_quantized
    return Verb(
        call=functools.partial(native.cached_dispatch_call, wire=format, keep_quantized=keep_quantized),
        outputs=lambda shape, operands, results: native.received_rows(
            results, operands[0].shape[1], wire=format, keep_quantized=keep_quantized
        ),
        saved=lambda operands, outputs: operands[1],
        transpose=functools.partial(_transpose_cached_dispatch, wire),
        gradients=lambda operands, of_call, results: (results[0], None),
    )


def _combine_call(
    wire: Wire,
    shape: RouteShape,
    y: jax.Array,
    weights: jax.Array | None,
    bias: jax.Array | None,
    routes: Routes,
    **where: Any,
) -> Call:
    return native.combine_call(shape, y, routes, weights=weights, bias=bias, wire=wire.format, **where)


def _save_combine(operands: Any, _: Any) -> Any:
    y, weights, _, routes = operands
    # Only the weights' gradient needs y again; without it y can be freed.
    return None if weights is None else y, weights, routes


def _transpose_combine(wire: Wire, shape: RouteShape, saved: Any, out: jax.Array, **where: Any) -> Call:
    y, weights, routes = saved
    return native.cached_dispatch_call(
        shape, out, routes, weights=weights, y=y, zero_rest=True, wire=wire.backward, **where
    )


def _combine_gradients(operands: Any, of_call: Sequence[jax.Array], results: Sequence[jax.Array]) -> Any:
    _, weights, bias, _ = operands
    y_gradient, _, _, weight_gradient, _encoded = results
    of_bias = None if bias is None else of_call[0]
    return y_gradient, None if weights is None else weight_gradient, of_bias, None


@functools.cache
def combine(wire: Wire) -> Verb:
    """Return `autodiff.combine` as a pair."""
    return Verb(
        call=functools.partial(_combine_call, wire),
        outputs=lambda shape, operands, results: results[0],
        saved=_save_combine,
        transpose=functools.partial(_transpose_combine, wire),
        gradients=_combine_gradients,
    )
