"""Dispatch with what a layer computes while it, or its gradient, is in flight.

    forward     start(dispatch) → shared experts → done → products with wi_0 and wi_1
    backward    gradient of the rows → start(combine) → gradients of wi_0, wi_1, shared experts → done

Without shared experts nothing runs beside dispatch, which is a plain op then.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.experts import HIDDEN, after_products, input_matrices, routed_experts, shared_experts
from jax_deepep.moe.grouped_matmul import GroupedMatmul, grouped_matmul
from jax_deepep.ops import native, pairs, verbs
from jax_deepep.ops.autodiff import without_integer_tangents
from jax_deepep.ops.dispatch import Request, checked_request, dispatch
from jax_deepep.ops.handle import Handle, RouteShape
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.overlap import dispatch_done, dispatch_start

CHANNEL = 1  # of the pairs; other ops are on channel 0

Products = tuple[tuple[jax.Array, ...], Handle[Any]]


def dispatch_to_experts(
    config: MoEConfig,
    weights: dict[str, jax.Array],
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, Handle[Any], jax.Array | None]:
    """Send the tokens of a device to the experts' networks.

    Args:
        config: static.
        weights: of the experts.
        x: [T, H].
        topk_idx, topk_weights: [T, K].
        options: layout="expert", capacity, expert_capacity and alignment.

    Returns:
        (the operand of combine, the handle, the output of the shared experts [T, H] or None).
    """
    choice, alignment = config.experts_by, options["alignment"]
    shared = None
    if config.shared_intermediate_size:
        shared = partial(shared_experts, weights=weights, activation=config.activation)
    request = checked_request("dispatch", x, topk_idx, topk_weights, config.comm, options, config.wire, None)
    if choice != "blocks" and implementation_of(request.shape, known_routes=False) is native:
        multiply = grouped_matmul(choice, alignment)
        products, handle, bias = _dispatch_to_products(
            request, input_matrices(weights),
            multiply=multiply, name=HIDDEN, meanwhile=shared,
        )  # fmt: skip
        rest = partial(after_products, activation=config.activation, multiply=multiply)
        return rest(products, handle.group_sizes, weights["wo"]), handle, bias
    bias = None
    if shared is None:
        dispatched, handle = dispatch(
            x, topk_idx, topk_weights, comm=config.comm, wire=config.wire, **options
        )
    else:
        sent = dispatch_start(x, topk_idx, topk_weights, comm=config.comm, wire=config.wire, **options)
        bias = sent.meanwhile(shared, x)
        dispatched, handle = dispatch_done(sent)
    y = routed_experts(
        dispatched.tokens,
        dispatched.group_sizes,
        weights,
        activation=config.activation,
        choice=choice,
        alignment=alignment,
    )
    return y, handle, bias


def _dispatch_to_products(
    request: Request,
    matrices: Sequence[jax.Array],
    *,
    multiply: GroupedMatmul,
    name: str,
    meanwhile: Callable[[jax.Array], jax.Array] | None,
) -> tuple[tuple[jax.Array, ...], Handle[Any], jax.Array | None]:
    """Dispatch expert-major rows and multiply them with several matrices.

    Args:
        request: the dispatch, with x, topk_idx and topk_weights as operands.
        matrices: [L, H, F] each.
        multiply: the grouped matmul.
        name: of the products in policies of jax.checkpoint.
        meanwhile: a function of x that is computed while the dispatch is in flight, or None.

    Returns:
        (the products [C, F], the handle, the result of `meanwhile`).
    """
    verb, way = verbs.dispatch(request.wire), pairs.Way(CHANNEL, forward=meanwhile is not None)
    flight = pairs.start(verb, request.shape, way, request.operands)
    beside = None
    if meanwhile is not None:
        flight, beside = pairs.compute_beside(flight, meanwhile, request.operands[0])
    products, handle = _done(verb, request.shape, way, multiply, name, flight, tuple(matrices))
    return products, without_integer_tangents(handle), beside


def _gradient(
    function: Callable[[jax.Array], jax.Array], operand: jax.Array, cotangent: jax.Array
) -> jax.Array:
    _, transposed = jax.vjp(function, operand)
    gradient: jax.Array = transposed(cotangent)[0]
    return gradient


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _done(
    verb: pairs.Verb,
    shape: RouteShape,
    way: pairs.Way,
    multiply: GroupedMatmul,
    name: str,
    flight: pairs.Flight,
    matrices: tuple[jax.Array, ...],
) -> Products:
    tokens, handle = pairs.done(verb, shape, way, flight)
    return tuple(multiply(tokens, matrix, handle.group_sizes) for matrix in matrices), handle


def _done_forward(
    verb: pairs.Verb,
    shape: RouteShape,
    way: pairs.Way,
    multiply: GroupedMatmul,
    name: str,
    flight: pairs.Flight,
    matrices: tuple[jax.Array, ...],
) -> tuple[Products, Any]:
    (tokens, handle), saved = pairs.done_forward(verb, shape, way, flight)
    products = tuple(
        checkpoint_name(multiply(tokens, matrix, handle.group_sizes), name) for matrix in matrices
    )
    return (products, handle), (tokens, saved, matrices)


def _done_backward(
    verb: pairs.Verb,
    shape: RouteShape,
    way: pairs.Way,
    multiply: GroupedMatmul,
    name: str,
    residuals: Any,
    cotangents: Products,
) -> tuple[pairs.Flight, tuple[jax.Array, ...]]:
    tokens, saved, matrices = residuals
    group_sizes = saved.of_verb.group_sizes
    of_products, of_handle = cotangents

    # Of one operand each: the two are on either side of the start.
    def of_rows(matrix: jax.Array, gradient: jax.Array) -> jax.Array:
        return _gradient(lambda rows: multiply(rows, matrix, group_sizes), tokens, gradient)

    def of_matrix(matrix: jax.Array, gradient: jax.Array) -> jax.Array:
        return _gradient(lambda matrix: multiply(tokens, matrix, group_sizes), matrix, gradient)

    first, *others = map(of_rows, matrices, of_products)
    flight = pairs.start_transposed(verb, shape, way, saved, (sum(others, first), of_handle))
    return pairs.compute_beside(
        flight, lambda gradients: tuple(map(of_matrix, matrices, gradients)), of_products
    )


_done.defvjp(_done_forward, _done_backward)
