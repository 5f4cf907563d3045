"""One problem, from programs to results."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_deepep.bench import ops_under_test
from jax_deepep.bench.memcpy_rate import Memcpy
from jax_deepep.bench.problems import AXIS, Problem, draw_inputs
from jax_deepep.bench.timing import Spread, take_turns
from jax_deepep.communicator import Implementation

MEMCPY = "memcpy"


@dataclass(frozen=True)
class Result:
    """One op on one problem.

    Attributes:
        problem: the shape.
        op: a name of `ops_under_test.PASSES`.
        bytes_moved: as `report.BYTES_MOVED` defines it.
        seconds: by contender: implementations and "memcpy" of as many bytes.
        xla_over_native: median over the rounds of seconds of xla / seconds of native; None where
            one was not measured.
        launch: an empty program on the same devices.
    """

    problem: Problem
    op: str
    bytes_moved: int
    seconds: dict[str, Spread]
    xla_over_native: float | None
    launch: Spread

    def rate(self, contender: str) -> float:
        """Return GB/s (10⁹ bytes per second) at the median."""
        return self.bytes_moved / self.seconds[contender].median / 1e9

    def share_of_memcpy(self, contender: str) -> float:
        """Return the rate of `contender` as a fraction of memcpy's."""
        return self.seconds[MEMCPY].median / self.seconds[contender].median


def measure(
    problem: Problem, implementations: Sequence[Implementation], *, repeats: int, limit_s: float
) -> Iterator[Result]:
    """Measure every op of `problem`; yield each result as soon as it is there.

    Args:
        problem: the shape.
        implementations: "native", "xla" or both.
        repeats: rounds per op.
        limit_s: seconds for the rounds of one op; see `timing.take_turns`.

    Raises:
        ValueError: there are fewer devices than the problem needs.
        RuntimeError: the implementations disagree.
    """
    available = jax.devices()
    if problem.devices > len(available):
        raise ValueError(
            f"devices: got {problem.devices}; this process has {len(available)}. On a CPU unset XLA_FLAGS, "
            f"or set XLA_FLAGS=--xla_force_host_platform_device_count={problem.devices}."
        )
    mesh = jax.make_mesh((problem.devices,), (AXIS,), devices=available[: problem.devices])
    inputs = draw_inputs(problem, mesh)
    empty = ops_under_test.empty_program(mesh)
    launch = Spread.of(take_turns({"empty": empty}, repeats=50, limit_s=1.0)["empty"])

    with contextlib.ExitStack() as stack:
        tested = {}
        for implementation in implementations:
            comm, tested[implementation] = ops_under_test.build(problem, mesh, inputs, implementation)
            stack.enter_context(comm)
        contestants = list(tested.values())
        for other in contestants[1:]:
            ops_under_test.check_agreement(contestants[0], other)
        passed_bytes = contestants[0].rows * problem.row_bytes
        memcpy = Memcpy(passed_bytes * max(ops_under_test.PASSES.values()))
        stack.callback(memcpy.close)

        for op, passes in ops_under_test.PASSES.items():
            bytes_moved = passes * passed_bytes
            contenders: dict[str, Callable[[], Any]] = {
                name: ops.programs[op] for name, ops in tested.items()
            }
            contenders[MEMCPY] = partial(memcpy.copy, bytes_moved)
            seconds = take_turns(contenders, repeats=repeats, limit_s=limit_s)
            ratio = None
            if {"native", "xla"} <= seconds.keys():
                ratio = float(np.median(np.divide(seconds["xla"], seconds["native"])))
            spreads = {name: Spread.of(values) for name, values in seconds.items()}
            yield Result(problem, op, bytes_moved, spreads, ratio, launch)
