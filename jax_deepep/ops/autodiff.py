"""The gradients: the transpose of dispatch is a combine, and the transpose of combine a dispatch.

Let S be the linear map that copies tokens to rows. Dispatch computes rows = S x, and combine
computes out = bias + Sᵀ (w · y), row by row. Hence

    dispatch:  x̄ = Sᵀ r̄ows (a combine with w = 1),  w̄_topk = w̄_rows copied back to [T, K];
               rows of integers, and those that stay quantised, have no r̄ows and no x̄, and their weights
               have gradients all the same
    combine:   ȳ = w · S ōut (a dispatch along the known routes, scaled),  w̄_rows = ⟨S ōut, y⟩,
               b̄ias = ōut

Every step reads only live rows, so the contents of others reach no gradient. The gradient of combine
for y is zero in rows without a token.
"""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.wire import Wire
from jax_deepep.quantization.block_scaled import BlockScaled

Results = TypeVar("Results")

DISPATCHED = "moe_dispatched"  # the name of received rows and routes in policies of jax.checkpoint


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch(
    shape: RouteShape, wire: Wire, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> tuple[Any, Handle[Any]]:
    """Compute the routes of `topk_idx` and copy `x` along them."""
    implementation = implementation_of(shape, known_routes=False)
    return implementation.dispatch(
        shape, x, topk_idx, topk_weights, wire=wire.format, keep_quantized=wire.keep_quantized
    )


def _dispatch_forward(
    shape: RouteShape, wire: Wire, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> tuple[tuple[Any, Handle[Any]], Routes]:
    # Named here, because a policy of jax.checkpoint saves residuals: it can keep the received rows, so that
    # the backward pass recomputes the rest without another exchange.
    tokens, handle = checkpoint_name(dispatch(shape, wire, x, topk_idx, topk_weights), DISPATCHED)
    return (tokens, handle), handle.routes


def _dispatch_backward(
    shape: RouteShape, wire: Wire, routes: Routes, gradients: tuple[Any, Handle[Any]]
) -> tuple[jax.Array | None, None, jax.Array | None]:
    tokens, handle = gradients
    rows = received_gradients(shape, tokens, handle.weights)
    x, topk_weights = implementation_of(shape).combine(
        shape, rows, routes, row_gradients=handle.weights, wire=wire.backward
    )
    return x if _has_gradient(tokens) else None, None, topk_weights


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def _has_gradient(tokens: Any) -> bool:
    return not isinstance(tokens, BlockScaled) and jnp.issubdtype(tokens.dtype, jnp.floating)


def received_gradients(shape: RouteShape, tokens: Any, weights: jax.Array) -> jax.Array:
    """Return the rows that the gradient of a dispatch sums, from the gradients of its results."""
    if _has_gradient(tokens):
        rows: jax.Array = tokens
        return rows
    # combine returns the weights' gradients beside sums of float rows: here of the narrowest, unused.
    return weights[:, None] if shape.layout == "expert" else weights[:, :1]


def without_integer_tangents(results: Results) -> Results:
    """Cut the integer arrays among the results of a dispatch out of differentiation.

    custom_vjp gives its integer results tangents of dtype float0. Under vmap(spmd_axis_name=...) with
    check_vma=True, JAX (0.10.2 and 0.11.2) gets their types wrong where a second custom_vjp takes them.
    An operation on bits has no tangent, and `| 0` costs nothing when compiled.
    """
    cut: Results = jax.tree.map(
        lambda leaf: leaf | 0 if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf, results
    )
    return cut


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cached_dispatch(shape: RouteShape, wire: Wire, x: jax.Array, routes: Routes) -> Any:
    """Copy other data along known routes."""
    tokens, _ = implementation_of(shape).cached_dispatch(
        shape, x, routes, wire=wire.format, keep_quantized=wire.keep_quantized
    )
    return tokens


def _cached_dispatch_forward(
    shape: RouteShape, wire: Wire, x: jax.Array, routes: Routes
) -> tuple[Any, Routes]:
    return cached_dispatch(shape, wire, x, routes), routes


def _cached_dispatch_backward(
    shape: RouteShape, wire: Wire, routes: Routes, tokens: Any
) -> tuple[jax.Array | None, None]:
    if not _has_gradient(tokens):
        return None, None
    x, _ = implementation_of(shape).combine(shape, tokens, routes, wire=wire.backward)
    return x, None


cached_dispatch.defvjp(_cached_dispatch_forward, _cached_dispatch_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def combine(
    shape: RouteShape,
    wire: Wire,
    y: jax.Array,
    weights: jax.Array | None,
    bias: jax.Array | None,
    routes: Routes,
) -> jax.Array:
    """Return `y` to the tokens, weighted and summed."""
    out, _ = implementation_of(shape).combine(shape, y, routes, weights=weights, bias=bias, wire=wire.format)
    return out


CombineResiduals = tuple[jax.Array | None, jax.Array | None, bool, Routes]  # y, weights, whether with bias


def _combine_forward(
    shape: RouteShape,
    wire: Wire,
    y: jax.Array,
    weights: jax.Array | None,
    bias: jax.Array | None,
    routes: Routes,
) -> tuple[jax.Array, CombineResiduals]:
    out = combine(shape, wire, y, weights, bias, routes)
    # Only the weights' gradient needs y again; without it y can be freed.
    residual_y = None if weights is None else y
    return out, (residual_y, weights, bias is not None, routes)


def _combine_backward(
    shape: RouteShape, wire: Wire, residuals: CombineResiduals, out: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, None]:
    y, weights, has_bias, routes = residuals
    y_gradient, weight_gradient = implementation_of(shape).cached_dispatch(
        shape, out, routes, weights=weights, y=y, zero_rest=True, wire=wire.backward
    )
    bias_gradient = out if has_bias else None
    return y_gradient, weight_gradient, bias_gradient, None


combine.defvjp(_combine_forward, _combine_backward)
