"""Ops in two parts, between which the program computes: dispatch_start and _done, combine_start and _done."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import jax
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.capacity import Layout
from jax_deepep.communicator import Communicator
from jax_deepep.ops import autodiff, native, pairs, verbs
from jax_deepep.ops.combine import checked_operands
from jax_deepep.ops.dispatch import checked_request, received
from jax_deepep.ops.handle import Handle, RouteShape
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.wire import Wire
from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import Format

Result = TypeVar("Result")

# Plain ops are on channel 0, so that of two ops in flight the first leaves it to them.
_CHANNELS = (1, 0)


class InFlight(Generic[Result]):
    """An op that has been started; `dispatch_done` or `combine_done` takes it, once.

    Not a pytree: it cannot cross the boundary of jit, scan, cond, checkpoint or shard_map, and is used in the
    function that made it.
    """

    _pending: ClassVar["weakref.WeakSet[InFlight[Any]]"] = weakref.WeakSet()

    def __init__(
        self,
        op: str,
        shape: RouteShape,
        verb: pairs.Verb,
        operands: Any,
        finish: Callable[[Any], Result],
        run: Callable[..., Any],
        known_routes: bool,
    ) -> None:
        self._op, self._verb, self._shape, self._finish = op, verb, shape, finish
        self._trace, self._is_done = jax_compat.current_trace(), False
        self._flight: pairs.Flight | None = None
        self._outputs: Any = None  # of an op that start has done
        self._channel = self._take_channel()
        if implementation_of(shape, known_routes=known_routes) is native:
            self._flight = pairs.start(verb, shape, self._channel, operands)
        else:  # the others cannot be parted
            self._outputs = run(shape, *operands)
        self._pending.add(self)

    def _take_channel(self) -> int:
        taken = {
            other._channel
            for other in self._pending
            if other._shape.comm is self._shape.comm and other._trace == self._trace
        }
        free = [channel for channel in _CHANNELS if channel not in taken]
        if not free:
            raise ValueError(
                f"{self._op}_start: expected at most {len(_CHANNELS)} ops of a communicator in flight, got "
                "another one; call done of the first before."
            )
        return free[0]

    def meanwhile(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Return `function(*operands)`, computed while the op is in flight, and its gradient likewise.

        Without it the program is as right, but XLA may compute before start or after done.

        Args:
            function: of pytrees of arrays, to pytrees of arrays.
            operands: at least one array of floats that varies over the devices, or everything that
                `function` closes over may be computed earlier.

        Raises:
            ValueError: the op has ended.
        """
        self._check_usable("meanwhile")
        if self._flight is None:
            return function(*operands)
        self._flight, results = pairs.compute_beside(self._flight, function, *operands)
        return results

    def done(self, op: str) -> Result:
        """Implement `dispatch_done` and `combine_done`."""
        if self._op != op:
            raise TypeError(f"in_flight: expected one of {op}_start, got one of {self._op}_start.")
        self._check_usable(f"{op}_done")
        self._is_done = True
        self._pending.discard(self)
        if self._flight is not None:
            self._outputs = pairs.done(self._verb, self._shape, self._channel, self._flight)
            self._flight = None
        outputs, self._outputs = self._outputs, None
        return self._finish(outputs)

    def _check_usable(self, op: str) -> None:
        if self._is_done:
            raise ValueError(f"{op}: expected an op in flight, got one that has ended; done takes it once.")
        if self._trace != jax_compat.current_trace():
            raise ValueError(
                f"{op}: expected an op that was started in this function, got one from outside of a jit, "
                "scan, cond, checkpoint, grad or shard_map; call start and done in one function."
            )

    def __repr__(self) -> str:
        return f"InFlight({self._op}, {'ended' if self._is_done else 'in flight'})"


def _run(op: Callable[..., Any], wire: Wire, shape: RouteShape, *operands: Any) -> Any:
    return op(shape, wire, *operands)


def _after(x: jax.Array, after: Any) -> jax.Array:
    """Return x, which depends on the arrays of `after`."""
    if not jax.tree.leaves(after):
        return x
    # Not on a path of gradients: they are no results of `after`.
    x, _ = lax.optimization_barrier((x, jax.tree.map(lax.stop_gradient, after)))
    return x


def dispatch_start(
    x: jax.Array | BlockScaled,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    comm: Communicator | None = None,
    layout: Layout = "expert",
    capacity: int | None = None,
    expert_capacity: int | None = None,
    alignment: int = 1,
    wire: Wire | Format | None = None,
    handle: Handle[Any] | None = None,
    after: Any = None,
) -> InFlight[tuple[Any, Handle[Any]]]:
    """Begin a dispatch, and return at once; the program computes until `dispatch_done`.

        in_flight = dispatch_start(x, topk_idx, topk_weights, comm=comm)
        shared = in_flight.meanwhile(shared_experts, x)
        dispatched, handle = dispatch_done(in_flight)

    The backward pass of a pair is a pair, with the gradient of what ran in between in between. Native ops of
    GPUs overlap: in throughput mode, the transfer takes at most `num_sms` SMs (24 if None) beside the
    computation, and cannot be captured in a CUDA graph; in low-latency mode no SM works between the parts,
    which can be captured. On CPUs ops run on threads of their own; with implementation="xla", and under vmap,
    start does all of the op.

    A communicator has two channels: at most two of its ops are in flight at once, of which one may be a plain
    op. All ops of a channel run in the order of the program.

    Args:
        x, topk_idx, topk_weights, comm, layout, capacity, expert_capacity, alignment, wire, handle: as
            `dispatch`.
        after: a pytree of arrays; the op begins after they have been computed.

    Returns:
        `InFlight`, for `dispatch_done`.

    Raises:
        ValueError, TypeError, CommunicatorError: as `dispatch`; ValueError: two ops are in flight.
    """
    options = {
        "layout": layout,
        "capacity": capacity,
        "expert_capacity": expert_capacity,
        "alignment": alignment,
    }
    request = checked_request("dispatch_start", x, topk_idx, topk_weights, comm, options, wire, handle)
    first, *others = request.operands
    operands = (_after(first, after), *others)
    if handle is not None:
        along = handle
        return InFlight(
            "dispatch", request.shape, verbs.cached_dispatch(request.wire), operands,
            lambda tokens: (received(tokens, along), along),
            partial(_run, autodiff.cached_dispatch, request.wire), True,
        )  # fmt: skip

    def finish(outputs: Any) -> tuple[Any, Handle[Any]]:
        tokens, handle = autodiff.without_integer_tangents(outputs)
        return received(tokens, handle), handle

    return InFlight(
        "dispatch", request.shape, verbs.dispatch(request.wire), operands, finish,
        partial(_run, autodiff.dispatch, request.wire), False,
    )  # fmt: skip


def dispatch_done(in_flight: InFlight[tuple[Any, Handle[Any]]]) -> tuple[Any, Handle[Any]]:
    """End a dispatch that `dispatch_start` began.

    Args:
        in_flight: from `dispatch_start`, in the same function; done takes it once.

    Returns:
        As `dispatch`, the same bits.

    Raises:
        ValueError, TypeError: it has ended, is from another function, or not from `dispatch_start`.
    """
    dispatched: tuple[Any, Handle[Any]] = _checked(in_flight, "dispatch").done("dispatch")
    return dispatched


def combine_start(
    y: jax.Array,
    handle: Handle[Any],
    *,
    comm: Communicator | None = None,
    weighted: bool | None = None,
    bias: jax.Array | None = None,
    wire: Wire | Format | None = None,
    after: Any = None,
) -> InFlight[jax.Array]:
    """Begin a combine, and return at once; the program computes until `combine_done`.

    See `dispatch_start` for what overlaps.

    Args:
        y, handle, comm, weighted, bias, wire: as `combine`.
        after: a pytree of arrays; the op begins after they have been computed.

    Returns:
        `InFlight`, for `combine_done`.

    Raises:
        ValueError, TypeError, CommunicatorError: as `combine`; ValueError: two ops are in flight.
    """
    formats, (first, *others) = checked_operands("combine_start", y, handle, comm, weighted, bias, wire)
    operands = (_after(first, after), *others)
    return InFlight(
        "combine", handle.route_shape, verbs.combine(formats), operands, lambda out: out,
        partial(_run, autodiff.combine, formats), True,
    )  # fmt: skip


def combine_done(in_flight: InFlight[jax.Array]) -> jax.Array:
    """End a combine that `combine_start` began.

    Args:
        in_flight: from `combine_start`, in the same function; done takes it once.

    Returns:
        As `combine`, the same bits.

    Raises:
        ValueError, TypeError: it has ended, is from another function, or not from `combine_start`.
    """
    out: jax.Array = _checked(in_flight, "combine").done("combine")
    return out


def _checked(in_flight: Any, op: str) -> InFlight[Any]:
    if not isinstance(in_flight, InFlight):
        raise TypeError(f"in_flight: expected what {op}_start returned, got {type(in_flight).__name__}.")
    return in_flight
