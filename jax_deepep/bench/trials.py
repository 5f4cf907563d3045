"""Timers, and interleaved trials on devices that start together."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jax_deepep.bench.baselines import clock, cuda_module
from jax_deepep.bench.problem import AXIS, per_device, put_on_devices
from jax_deepep.bench.processes import TIMEOUT_S, exchange_with_all
from jax_deepep.communicator import Communicator
from jax_deepep.ops import native
from jax_deepep.ops.handle import RouteShape

MIN_TRIALS = 5  # below this, percentiles are meaningless

# Before each run on CPU, to reduce the effect of the previous run: right after a large run of xla, native
# dispatch + combine took twice the CPU time. 0.3 s did not remove all of it either.
SETTLE_S = 0.03
FLUSHED_FLOATS = 25_000_000  # 100 MB, twice the second-level cache of an H100
_START_HIDDEN = 8

Timer = Callable[[], float]  # runs a case once and returns seconds


@dataclass(frozen=True)
class Case:
    """A case to be timed.

    Attributes:
        run: a function on one device, of (after, *operands). `after` is None, or an int32 zero that is
            computed when the case may start: whatever reads it starts later.
        operands: over all devices.
    """

    run: Callable[..., Any]
    operands: tuple[Any, ...]


def after_start(value: jax.Array, after: jax.Array | None) -> jax.Array:
    """Return `value` with a data dependency on `after`."""
    return value if after is None else value + after


def wall_clock(run: Callable[[], Any]) -> float:
    """Return seconds from the launch until all results are ready."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    del result  # freed outside of the measurement
    return seconds


def queued(run: Callable[[], Any], calls: int) -> Timer:
    """Return a timer of `calls` calls in flight at once, per call."""

    def seconds() -> float:
        return wall_clock(lambda: [run() for _ in range(calls)]) / calls

    return seconds


def interleaved(
    timers: Mapping[str, Timer], trials: int, limit_s: float = float("inf")
) -> dict[str, np.ndarray]:
    """Run every timer once per trial, so that slow moments of the machine affect all of them.

    Args:
        timers: by name, the same in all processes; each has two warm-up runs.
        trials: number of trials.
        limit_s: seconds; in a single process, trials are reduced to stay within it, to at least MIN_TRIALS.

    Returns:
        Seconds of each trial by name, of the slowest process; entries i of all names are from the same trial.
    """
    names = list(timers)
    for name in names:  # compiles
        timers[name]()
    start = time.perf_counter()
    for name in names:
        timers[name]()
    if jax.process_count() == 1:
        trials = int(min(trials, max(MIN_TRIALS, limit_s / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in turns(names, trials):
        seconds[name].append(timers[name]())
    everyones = exchange_with_all("seconds", seconds).values()
    return {name: np.max([of_process[name] for of_process in everyones], axis=0) for name in names}


def slopes(lengths: Sequence[int], seconds: Sequence[np.ndarray]) -> np.ndarray:
    """Return seconds per step in each trial: the slope between programs of two lengths."""
    return (np.asarray(seconds[1]) - np.asarray(seconds[0])) / (lengths[1] - lengths[0])


def turns(names: Sequence[str], trials: int) -> Iterator[str]:
    """Yield every name once per trial.

    Each trial starts with another one, so that the order, and what is in the cache, varies.
    """
    for trial in range(trials):
        for position in range(len(names)):
            yield names[(trial + position) % len(names)]


class Stopwatch:
    """Makes timers of cases. On GPUs, devices start together, with a flushed cache.

    There, a trial of device time is two programs in a row: one flushes the cache; the next has an op of a
    small communicator, which ends on no rank before all have arrived, and then the case.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.on_gpus = mesh.devices.flat[0].platform == "gpu"
        if not self.on_gpus:
            return
        self._comm = Communicator(
            mesh,
            AXIS,
            num_experts=mesh.size,
            num_experts_per_tok=1,
            max_tokens=1,
            hidden_size=_START_HIDDEN,
            implementation="native",
            num_sms=1,
            timeout_s=TIMEOUT_S,
        )
        # An operand, not a constant, which XLA would keep outside of the memory that peers map.
        self._token = put_on_devices(
            mesh, (mesh.size, _START_HIDDEN), lambda part: np.zeros((1, _START_HIDDEN), jnp.bfloat16)
        )
        self._start = per_device(mesh, lambda token: self._all_arrived(token)[None])
        self._flush = per_device(mesh, lambda values: values + 1)
        self._values = per_device(mesh, lambda token: jnp.zeros(FLUSHED_FLOATS) + token[0, 0])(self._token)

    def close(self) -> None:
        """Free the device memory."""
        if self.on_gpus:
            self._comm.close()

    def _all_arrived(self, token: jax.Array) -> jax.Array:
        """Return a zero that is computed when all ranks have arrived."""
        shape = RouteShape(self._comm, "token", 1, self.mesh.size, 1, None)
        to_itself = lax.axis_index(AXIS).astype(jnp.int32).reshape(1, 1)
        _, handle = native.dispatch(shape, token, to_itself, jnp.ones((1, 1), jnp.float32))
        return handle.num_invalid

    def program(self, case: Case) -> Callable[[], Any]:
        """Compile a case as a program."""
        compiled = per_device(self.mesh, lambda *operands: case.run(None, *operands))
        return lambda: compiled(*case.operands)

    def host(self, case: Case, *, flushed: bool = True) -> Timer:
        """Return a timer of a whole program, from its launch until its results are ready."""
        return self.host_of(self.program(case), flushed=flushed)

    def host_of(self, run: Callable[[], Any], *, flushed: bool = True) -> Timer:
        """Return the same for any function that launches programs; on GPUs, after a flush of the cache."""

        def seconds() -> float:
            if self.on_gpus:
                if flushed:
                    self._values = self._flush(self._values)
                jax.block_until_ready(self._start(self._token))
            else:
                time.sleep(SETTLE_S)
            return wall_clock(run)

        return seconds

    def on_device(self, case: Case) -> Timer:
        """Return a timer of a case by the clocks of GPUs: of the slowest device here."""
        module = cuda_module.load()
        module.load([device.local_hardware_id for device in self.mesh.local_devices])

        def timed(token: jax.Array, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
            begin = clock.now(self._all_arrived(token))
            # 0: nanoseconds take fewer than 63 bits. But XLA does not know.
            after = (begin[1] >> jnp.uint32(31)).astype(jnp.int32)
            return begin[None], clock.now(case.run(after, *operands))[None]

        compiled = per_device(self.mesh, timed)

        def seconds() -> float:
            begin, end = jax.block_until_ready(compiled(self._token, *case.operands))
            spans = [
                clock.nanoseconds(np.asarray(first.data)[0], np.asarray(last.data)[0])
                for first, last in zip(begin.addressable_shards, end.addressable_shards, strict=True)
            ]
            return 1e-9 * max(spans)

        return seconds

    def device(self, case: Case, comm: Communicator) -> Timer:
        """Return a timer of the last op of `comm` in a case, on GPUs: of the slowest device here."""
        compiled = per_device(
            self.mesh, lambda token, *operands: case.run(self._all_arrived(token), *operands)
        )

        def seconds() -> float:
            self._values = self._flush(self._values)
            jax.block_until_ready(compiled(self._token, *case.operands))
            return max(op.seconds for op in comm.last_ops())

        return seconds
