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
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep import jax_compat
from jax_deepep.ops.autodiff import without_integer_tangents
from jax_deepep.ops.custom_call import Call, without_debugging_nans
from jax_deepep.ops.handle import RouteShape


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
        call: (shape, *operands) → the custom call. Of dispatch and combine, it and `transpose` also take the
            keywords of the call in `native` that say which rows of a larger array the op's tokens are.
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
    transpose: Callable[..., Call]
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


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _float_type(of: Any) -> Any:
    return of.dtype if _is_float(of) else jnp.float32


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


def _beside(values: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the others, which vmap maps, and which vary over devices, as soon as one of the values does.

    A cotangent of something that vmap does not map would be summed over the mapped axis; under
    vmap(spmd_axis_name=...) with check_vma=True, JAX would get its type wrong.
    """
    first = [value.ravel()[0] for value in values if value.size]
    # XLA drops it, and reads none of them.
    never = functools.reduce(operator.or_, [(one != one) & False for one in first])
    return [jnp.where(never, jnp.zeros((), other.dtype), other) for other in others]


def start(verb: Verb, shape: RouteShape, channel: int, operands: Any) -> Flight:
    """Begin an op."""
    # Only `_link` is differentiated: gradients pass through none of these.
    call = verb.call(shape, *lax.stop_gradient(without_integer_tangents(operands)))
    call, results, token = call.start(channel)
    operands, transposed, token = _link(verb, shape, channel, operands, token)
    return Flight(call, results, without_integer_tangents(operands), transposed, token)


Link = tuple[Any, list[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _link(verb: Verb, shape: RouteShape, channel: int, operands: Any, token: jax.Array) -> Link:
    """Return what of a flight has cotangents: operands, `transposed` and token."""
    types = _Transposed.of(verb, shape, operands).types()
    transposed = [jnp.zeros(of.shape, _float_type(of)) for of in types]
    return operands, _beside([token], transposed), token


def _link_forward(
    verb: Verb, shape: RouteShape, channel: int, operands: Any, token: jax.Array
) -> tuple[Link, _Transposed]:
    return _link(verb, shape, channel, operands, token), _Transposed.of(verb, shape, operands)


def _link_backward(
    verb: Verb, shape: RouteShape, channel: int, transposed: _Transposed, cotangents: Link
) -> tuple[Any, None]:
    operands, values, token = cotangents
    arrays = [_as_type(value, of.dtype) for value, of in zip(values, transposed.types(), strict=True)]
    num_operands = len(transposed.call.operands)
    call = dataclasses.replace(transposed.call, operands=tuple(arrays[:num_operands]))
    results = call.done(channel, arrays[num_operands:], token)
    return verb.gradients(operands, call.operands, results), None


_link.defvjp(_link_forward, _link_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def done(verb: Verb, shape: RouteShape, channel: int, flight: Flight) -> Any:
    """End an op and return its outputs."""
    results = flight.call.done(channel, flight.results, flight.token)
    return verb.outputs(shape, flight.operands, results)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Types:
    """Types of a tree of arrays."""

    tree: Any

    @classmethod
    def of(cls, tree: Any) -> "_Types":
        return cls(jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), tree))

    def zeros(self, token: jax.Array) -> Any:
        """Return zeros, and None for integers."""
        zeros = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype) if _is_float(of) else None, self.tree)
        leaves, structure = jax.tree.flatten(zeros)
        return jax.tree.unflatten(structure, _beside([token], leaves))


Saved = tuple[Any, _Types]  # what `Verb.saved` returned, and the types of the op's operands


def _done_forward(verb: Verb, shape: RouteShape, channel: int, flight: Flight) -> tuple[Any, Saved]:
    outputs = done(verb, shape, channel, flight)
    if verb.name is not None:
        outputs = checkpoint_name(outputs, verb.name)
    return outputs, (verb.saved(flight.operands, outputs), _Types.of(flight.operands))


def _done_backward(
    verb: Verb, shape: RouteShape, channel: int, saved: Saved, cotangents: Any
) -> tuple[Flight]:
    of_verb, types = saved
    call = verb.transpose(shape, of_verb, cotangents)
    # Before start, so that it has the operands of done.
    call = dataclasses.replace(call, operands=tuple(_beside(call.operands, call.operands)))
    call, results, token = call.start(channel)
    arrays = [_as_type(value, _float_type(value)) for value in (*call.operands, *results)]
    zero: Any = None
    # `_link` does not use the cotangents of operands; None would get a wrong type, see `_beside`.
    return (Flight(zero, zero, types.zeros(token), arrays, token),)


done.defvjp(_done_forward, _done_backward)


class Ended(NamedTuple):
    """A value that a kernel has computed where `end` can be read.

    An op in flight waits for `end`, so that nothing is between the value and what uses it: XLA lets the
    kernel write it where a loop saves it.

    Attributes:
        value: an array.
        end: float32 [1], another result of the kernel, which it does not write: only the dependence counts.
    """

    value: jax.Array
    end: jax.Array


def values_of(tree: Any) -> Any:
    """Return the tree with values in place of each `Ended`."""
    return jax.tree.map(lambda leaf: leaf.value if _is_ended(leaf) else leaf, tree, is_leaf=_is_ended)


def _is_ended(leaf: Any) -> bool:
    return isinstance(leaf, Ended)


def _order_after(token: jax.Array, computed: Any) -> tuple[jax.Array, Any]:
    """Do as `order` with results, of which each `Ended` is known to be computed by its end."""
    leaves, structure = jax.tree.flatten(computed, is_leaf=_is_ended)
    others = [None if _is_ended(leaf) else leaf for leaf in leaves]
    token, others = order(token, others)
    # Not by a barrier, of which XLA drops what nothing uses.
    with without_debugging_nans():
        ends = [leaf.end.reshape(()) for leaf in leaves if _is_ended(leaf)]
        token = functools.reduce(operator.add, ends, token)
    values = [leaf.value if _is_ended(leaf) else other for leaf, other in zip(leaves, others, strict=True)]
    return token, jax.tree.unflatten(structure, values)


Beside = Callable[..., tuple[Any, Any]]


def run_beside(
    call: Call, channel: int, function: Beside | None, *operands: Any
) -> tuple[list[jax.Array], tuple[Any, Any]]:
    """Run an op, and a function while it is in flight; for rules of differentiation: it has no gradient.

    Args:
        call: the op.
        channel: on which it is in flight.
        function: (operands) → (results that are computed before the op ends, each an array or `Ended`,
            further results); None for a whole op, on channel 0.
        operands: pytrees of arrays, not used before the op has started.

    Returns:
        (the results of the op, those of the function, as `values_of`; None for both of them without one).
    """
    if function is None:
        return call.run(), (None, None)
    call, results, token = call.start(channel)
    token, operands = order(token, operands)
    computed, others = function(*operands)
    token, computed = _order_after(token, computed)
    return call.done(channel, results, token), (computed, others)
