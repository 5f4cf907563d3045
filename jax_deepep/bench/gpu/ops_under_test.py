"""Our ops, each as a function of one device's values, with what it is called on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jax_deepep.bench.gpu.routed_inputs import RoutedInputs, per_device
from jax_deepep.communicator import Communicator
from jax_deepep.ops import native
from jax_deepep.ops.handle import Routes, RouteShape

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        run: a function of one device, of (after, *operands). `after` is an int32 zero that is known only when
            the function may begin, or None: what reads it cannot begin before.
        operands: over all devices.
    """

    run: Callable[..., Any]
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Dispatched:
    """What a dispatch left on all devices, joined along the first axis."""

    tokens: jax.Array
    routes: Routes
    weights: jax.Array


def after_start(value: jax.Array, after: jax.Array | None) -> jax.Array:
    """Return `value` as something that is not known before `after` is."""
    return value if after is None else value + after


def route_shape(comm: Communicator, inputs: RoutedInputs) -> RouteShape:
    """Return the static part of the ops on `inputs`."""
    problem = inputs.problem
    assert problem.capacity_rows is not None
    return RouteShape(comm, problem.layout, problem.tokens, problem.capacity_rows, 1, None)


def dispatch_of(shape: RouteShape, inputs: RoutedInputs) -> Contender:
    """Return the dispatch of `inputs`; its results are the fields of `Dispatched`."""

    def dispatch(after, x, topk_idx, topk_weights):
        tokens, handle = native.dispatch(shape, x, after_start(topk_idx, after), topk_weights)
        return tokens, handle.routes, handle.weights

    return Contender(dispatch, (inputs.x, inputs.topk_idx, inputs.topk_weights))


def run_dispatch(mesh: Mesh, contender: Contender) -> Dispatched:
    """Run a dispatch once, for the routes that all others take."""
    program = per_device(mesh, lambda *operands: contender.run(None, *operands))
    return Dispatched(*program(*contender.operands))


def ops_of(shape: RouteShape, inputs: RoutedInputs, dispatched: Dispatched) -> dict[str, Contender]:
    """Return our ops and gradients by name.

    Gradients run on rows that are there anyway: what the numbers are does not matter to their speed.
    """
    weighted = shape.layout == "expert"

    def combine(after, y, routes, weights):
        routes = routes._replace(destination=after_start(routes.destination, after))
        return native.combine(shape, y, routes, weights=weights if weighted else None)[0]

    def dispatch_backward(after, tokens, routes, weights):
        routes = routes._replace(destination=after_start(routes.destination, after))
        return native.combine(shape, tokens, routes, row_gradients=weights)

    def combine_backward(after, out, y, routes, weights):
        routes = routes._replace(group_sizes=after_start(routes.group_sizes, after))
        scaled = {"weights": weights, "y": y} if weighted else {}
        return native.redispatch(shape, out, routes, zero_rest=True, **scaled)

    received = (dispatched.tokens, dispatched.routes, dispatched.weights)
    return {
        "dispatch": dispatch_of(shape, inputs),
        "combine": Contender(combine, received),
        "dispatch backward": Contender(dispatch_backward, received),
        "combine backward": Contender(combine_backward, (inputs.x, *received)),
    }
