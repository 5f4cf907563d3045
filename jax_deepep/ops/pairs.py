"""Native ops in two parts, start and done, and their gradients, which are pairs as well.

Everything that done needs passes through a `Flight`. In the backward pass its cotangent is the flight of the
transposed op, which starts where done is differentiated, and ends where start is:

    forward     operands → start → Flight → done → outputs
    backward    gradients ← done of the transposed op ← cotangent of Flight ← its start ← cotangents

A cotangent has the shapes of its primal value. So a flight has leaves with the shapes of everything that the
transposed op has in flight; forward they are zeros, which XLA never computes, because nothing reads them.
Integers travel in them as the bits of float32.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep import jax_compat
from jax_deepep.ops import native
from jax_deepep.ops.autodiff import DISPATCHED, received_gradients
from jax_deepep.ops.custom_call import Call
from jax_deepep.ops.handle import Handle, Routes, RouteShape


class Flight(NamedTuple):
    """What passes from start to done.

    Attributes:
        call: the op, with its operands, which are in use until done.
        results: of the call, not valid before done.
        operands: those of the op's function in `autodiff`.
        transposed: zeros, for operands and results of the transposed op.
        token: float32 []; what depends on it runs after start, and done after what it depends on.
    """

    call: Call
    results: list[jax.Array]
    operands: Any
    transposed: list[jax.Array]
    token: jax.Array


@dataclasses.dataclass(frozen=True)
class Verb:
    """An op as a pair. Its operands and outputs are those of its function in `autodiff`, without `shape`.

    Attributes:
        call: (shape, *operands) → the custom call.
        outputs: (shape, operands, results of the call) → outputs.
        saved: (operands, outputs) → what the gradient needs.
        transpose: (shape, saved, cotangents of the outputs) → the call of the transposed op.
        gradients: (cotangents of the operands, of which the structure counts, operands and results of the
            transposed call) → the gradients of the operands.
        name: of the outputs in policies of jax.checkpoint, or None.
    """

    call: Callable[..., Call]
    outputs: Callable[[RouteShape, Any, Sequence[jax.Array]], Any]
    saved: Callable[[Any, Any], Any]
    transpose: Callable[[RouteShape, Any, Any], Call]
    gradients: Callable[[Any, Sequence[jax.Array], Sequence[jax.Array]], Any]
    name: str | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Transposed:
    """The types of a transposed op."""

    call: Call
    results: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, verb: Verb, shape: RouteShape, operands: Any) -> "_Transposed":
        def transpose(operands: Any) -> tuple[Call, list[jax.Array]]:
            outputs = verb.outputs(shape, operands, verb.call(shape, *operands).run())
            call = verb.transpose(shape, verb.saved(operands, outputs), outputs)
            return call, call.run()

        types = jax.tree.map(
            lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), jax.eval_shape(transpose, operands)
        )
        return cls(types[0], tuple(types[1]))

    def types(self) -> list[Any]:
        return [*self.call.operands, *self.results]


def _float_type(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _as_type(value: jax.Array, dtype: Any) -> jax.Array:
    return value if value.dtype == dtype else lax.bitcast_convert_type(value, dtype)


def order(token: jax.Array, values: Any) -> tuple[jax.Array, Any]:
    """Return the values, which depend on the token, and a token that depends on them; cotangents likewise.

    Only floats that vary over the devices as the token does have this dependence.
    """
    leaves, structure = jax.tree.flatten(values)
    axes = jax_compat.varying_axes(token)
    ordered = [
        i
        for i, leaf in enumerate(leaves)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jax_compat.varying_axes(leaf) == axes
    ]
    token, *together = lax.optimization_barrier((token, *(leaves[i] for i in ordered)))
    for i, leaf in zip(ordered, together, strict=True):
        leaves[i] = leaf
    return token, jax.tree.unflatten(structure, leaves)


def compute_beside(flight: Flight, function: Callable[..., Any], *operands: Any) -> tuple[Flight, Any]:
    """Return the flight, and `function(*operands)`, computed between its start and its done."""
    token, operands = order(flight.token, operands)
    token, results = order(token, function(*operands))
    return flight._replace(token=token), results


class Way(NamedTuple):
    """Static: on which channel a pair runs, and whether forward too; otherwise, start does all of the op."""

    channel: int
    forward: bool = True


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def start(verb: Verb, shape: RouteShape, way: Way, operands: Any) -> Flight:
    """Begin an op."""
    call = verb.call(shape, *operands)
    if way.forward:
        results, token = call.start(way.channel)
        axes = jax_compat.varying_axes(token)
    else:
        results = call.run()
        axes = jax_compat.varying_axes(results[0])
        token = jax_compat.as_varying(jnp.zeros((), jnp.float32), axes)
    transposed = [
        jax_compat.as_varying(jnp.zeros(of.shape, _float_type(of.dtype)), axes)
        for of in _Transposed.of(verb, shape, operands).types()
    ]
    return Flight(call, results, operands, transposed, token)


def _start_forward(verb: Verb, shape: RouteShape, way: Way, operands: Any) -> tuple[Flight, _Transposed]:
    return start(verb, shape, way, operands), _Transposed.of(verb, shape, operands)


def _start_backward(
    verb: Verb, shape: RouteShape, way: Way, transposed: _Transposed, flight: Flight
) -> tuple[Any]:
    arrays = [
        _as_type(value, of.dtype) for value, of in zip(flight.transposed, transposed.types(), strict=True)
    ]
    num_operands = len(transposed.call.operands)
    call = dataclasses.replace(transposed.call, operands=tuple(arrays[:num_operands]))
    results = call.done(way.channel, arrays[num_operands:], flight.token)
    return (verb.gradients(flight.operands, call.operands, results),)


start.defvjp(_start_forward, _start_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def done(verb: Verb, shape: RouteShape, way: Way, flight: Flight) -> Any:
    """End an op and return its outputs."""
    results = flight.results
    if way.forward:
        results = flight.call.done(way.channel, results, flight.token)
    return verb.outputs(shape, flight.operands, results)


def done_forward(verb: Verb, shape: RouteShape, way: Way, flight: Flight) -> tuple[Any, Any]:
    """Return the outputs, and what `start_transposed` needs."""
    outputs = done(verb, shape, way, flight)
    if verb.name is not None:
        outputs = checkpoint_name(outputs, verb.name)
    return outputs, verb.saved(flight.operands, outputs)


def _done_backward(verb: Verb, shape: RouteShape, way: Way, saved: Any, cotangents: Any) -> tuple[Flight]:
    return (start_transposed(verb, shape, way, saved, cotangents),)


def start_transposed(verb: Verb, shape: RouteShape, way: Way, saved: Any, cotangents: Any) -> Flight:
    """Begin the transposed op; return the cotangent of the flight."""
    call = verb.transpose(shape, saved, cotangents)
    results, token = call.start(way.channel)
    axes = jax_compat.varying_axes(token)
    arrays = [
        jax_compat.as_varying(_as_type(value, _float_type(value.dtype)), axes)
        for value in (*call.operands, *results)
    ]
    zero: Any = None
    return Flight(zero, zero, zero, arrays, token)


done.defvjp(done_forward, _done_backward)


def _transpose_dispatch(shape: RouteShape, routes: Routes, outputs: tuple[Any, Handle[Any]]) -> Call:
    tokens, handle = outputs
    rows = received_gradients(shape, tokens, handle.weights)
    return native.combine_call(shape, rows, routes, row_gradients=handle.weights)


def _dispatch_gradients(operands: Any, _: Any, results: Sequence[jax.Array]) -> Any:
    x, topk_weights, _sums = results
    return x if jnp.issubdtype(operands[0].dtype, jnp.floating) else None, None, topk_weights


DISPATCH = Verb(
    call=native.dispatch_call,
    outputs=lambda shape, operands, results: native.dispatched(shape, operands[0].shape[1], results),
    saved=lambda operands, outputs: outputs[1].routes,
    transpose=_transpose_dispatch,
    gradients=_dispatch_gradients,
    name=DISPATCHED,
)

CACHED_DISPATCH = Verb(
    call=native.cached_dispatch_call,
    outputs=lambda shape, operands, results: results[0][:, : operands[0].shape[1]],
    saved=lambda operands, outputs: operands[1],
    transpose=lambda shape, routes, tokens: native.combine_call(shape, tokens, routes),
    gradients=lambda operands, of_call, results: (results[0], None),
)


def _combine_call(
    shape: RouteShape, y: jax.Array, weights: jax.Array | None, bias: jax.Array | None, routes: Routes
) -> Call:
    return native.combine_call(shape, y, routes, weights=weights, bias=bias)


def _save_combine(operands: Any, _: Any) -> Any:
    y, weights, _, routes = operands
    # Only the weights' gradient needs y again; without it y can be freed.
    return None if weights is None else y, weights, routes


def _transpose_combine(shape: RouteShape, saved: Any, out: jax.Array) -> Call:
    y, weights, routes = saved
    return native.cached_dispatch_call(shape, out, routes, weights=weights, y=y, zero_rest=True)


def _combine_gradients(operands: Any, of_call: Sequence[jax.Array], results: Sequence[jax.Array]) -> Any:
    _, weights, bias, _ = operands
    y_gradient, weight_gradient = results
    of_bias = None if bias is None else of_call[0]
    return y_gradient, None if weights is None else weight_gradient, of_bias, None


COMBINE = Verb(
    call=_combine_call,
    outputs=lambda shape, operands, results: results[0],
    saved=_save_combine,
    transpose=_transpose_combine,
    gradients=_combine_gradients,
)
