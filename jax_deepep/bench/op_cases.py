"""The ops and their gradients as functions of one device's values, and chains of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_deepep.bench.problem import Inputs
from jax_deepep.bench.trials import Case, Stopwatch, after_start
from jax_deepep.communicator import Communicator
from jax_deepep.ops.combine import combine as public_combine
from jax_deepep.ops.dispatch import dispatch as public_dispatch
from jax_deepep.ops.handle import Routes, RouteShape
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.wire import OF_COMBINE
from jax_deepep.quantization.formats import Format

PAIR = "dispatch + combine"
KEPT = "dispatch, kept quantised"
# How many times each op moves the received rows.
PASSES = {"dispatch": 1, KEPT: 1, "combine": 1, PAIR: 2, "dispatch backward": 1, "combine backward": 1}


@dataclass(frozen=True)
class Dispatched:
    """The results of a dispatch on all devices, joined along the first axis."""

    tokens: jax.Array
    routes: Routes
    weights: jax.Array


@dataclass(frozen=True)
class OpCases:
    """The ops of one communicator on one problem.

    Attributes:
        shape: the static part.
        dispatched: the operands of combine and the gradients; their speed does not depend on the values.
        cases: by the names in PASSES; KEPT only if it is asked for.
        programs: the same, compiled separately.
        round_trip: [R·T, H], the result of dispatch + combine.
    """

    shape: RouteShape
    dispatched: Dispatched
    cases: dict[str, Case]
    programs: dict[str, Callable[[], Any]]
    round_trip: jax.Array

    @classmethod
    def of(
        cls,
        comm: Communicator,
        stopwatch: Stopwatch,
        inputs: Inputs,
        wire: Format | None = None,
        *,
        keep_quantized: bool = False,
    ) -> "OpCases":
        """Compile and run a dispatch, and make the cases that depend on it.

        Rows cross links in the format `wire`, and sums as mxfp8 where combine does not take it. With
        `keep_quantized` there is also a dispatch whose rows stay in the format.
        """
        problem = inputs.problem
        mode = comm.mode_of(problem.tokens)
        shape = RouteShape(comm, problem.layout, problem.tokens, problem.capacity_rows, 1, None, mode)
        ops = implementation_of(shape)
        weighted, of_sums = shape.layout == "expert", _format_of_sums(wire)

        def dispatch(after, x, topk_idx, topk_weights):
            tokens, handle = ops.dispatch(shape, x, after_start(topk_idx, after), topk_weights, wire=wire)
            return tokens, handle.routes, handle.weights

        def kept(after, x, topk_idx, topk_weights):
            topk_idx = after_start(topk_idx, after)
            return ops.dispatch(shape, x, topk_idx, topk_weights, wire=wire, keep_quantized=True)[0]

        def combine(after, y, routes, weights):
            routes = routes._replace(destination=after_start(routes.destination, after))
            return ops.combine(shape, y, routes, weights=weights if weighted else None, wire=of_sums)[0]

        def dispatch_backward(after, tokens, routes, weights):
            routes = routes._replace(destination=after_start(routes.destination, after))
            return ops.combine(shape, tokens, routes, row_gradients=weights, wire=of_sums)

        def combine_backward(after, out, y, routes, weights):
            routes = routes._replace(group_sizes=after_start(routes.group_sizes, after))
            scaled = {"weights": weights, "y": y} if weighted else {}
            return ops.cached_dispatch(shape, out, routes, zero_rest=True, wire=wire, **scaled)

        tokens = (inputs.x, inputs.topk_idx, inputs.topk_weights)
        sent = Case(dispatch, tokens)
        programs = {"dispatch": stopwatch.program(sent)}
        dispatched = Dispatched(*programs["dispatch"]())
        received = (dispatched.tokens, dispatched.routes, dispatched.weights)
        cases = {"dispatch": sent}
        if keep_quantized and wire is not None:
            cases[KEPT] = Case(kept, tokens)
        cases |= {
            "combine": Case(combine, received),
            PAIR: chain(shape, inputs, 1, wire),
            "dispatch backward": Case(dispatch_backward, received),
            "combine backward": Case(combine_backward, (inputs.x, *received)),
        }
        programs |= {name: stopwatch.program(case) for name, case in cases.items() if case is not sent}
        return cls(shape, dispatched, cases, programs, programs[PAIR]())


def _format_of_sums(wire: Format | None) -> Format | None:
    return wire if wire is None or wire in OF_COMBINE else "mxfp8"


def chain(shape: RouteShape, inputs: Inputs, length: int, wire: Format | None) -> Case:
    """Return `length` pairs of dispatch and combine, each on the result of the previous one."""

    def run(after, x, topk_idx, topk_weights):
        topk_idx = after_start(topk_idx, after)
        for _ in range(length):
            received, handle = public_dispatch(
                x, topk_idx, topk_weights, comm=shape.comm, layout=shape.layout, capacity=shape.capacity,
                wire=wire,
            )  # fmt: skip
            x = public_combine(received.tokens, handle, comm=shape.comm, wire=_format_of_sums(wire))
        return x

    return Case(run, (inputs.x, inputs.topk_idx, inputs.topk_weights))


def check_agreement(one: OpCases, other: OpCases) -> None:
    """Raise unless both computed the same.

    Raises:
        RuntimeError: they differ.
    """
    # 2⁻⁶ is two roundings of bfloat16, whose results the implementations may round differently.
    for a, b in zip(one.round_trip.addressable_shards, other.round_trip.addressable_shards, strict=True):
        got, wanted = (np.asarray(shard.data).astype(np.float32) for shard in (a, b))
        if not np.allclose(got, wanted, rtol=2**-6, atol=2**-6):
            raise RuntimeError(
                f"{PAIR}: expected the same of both implementations, got a difference of up to "
                f"{np.abs(got - wanted).max():g}; run the tests before measuring."
            )
