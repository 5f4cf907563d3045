"""One problem with one number of SMs, from programs to results."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jax_deepep.bench.gpu import floors, ops_under_test
from jax_deepep.bench.gpu.rounds import Rounds
from jax_deepep.bench.gpu.routed_inputs import RoutedInputs
from jax_deepep.bench.problems import Problem
from jax_deepep.bench.timing import Spread


@dataclass(frozen=True)
class Result:
    """One op.

    Attributes:
        problem: the shape.
        num_sms: that the op and its floors have on each rank.
        op: its name.
        bytes_moved: the rows that all ranks receive, each counted once.
        device: seconds in the kernel, of the slowest rank.
        host: seconds of a program that holds the op alone, of the slowest rank.
        floors: seconds on the device, by name.
    """

    problem: Problem
    num_sms: int
    op: str
    bytes_moved: int
    device: Spread
    host: Spread
    floors: dict[str, Spread]

    @property
    def best_floor(self) -> str:
        """The fastest floor."""
        return min(self.floors, key=lambda name: self.floors[name].median)

    @property
    def over_floor(self) -> float:
        """How many times the best floor's time the op takes."""
        return self.device.median / self.floors[self.best_floor].median

    @property
    def rate(self) -> float:
        """GB/s (10⁹ bytes per second) of all ranks together."""
        return self.bytes_moved / self.device.median / 1e9


def measure(rounds: Rounds, inputs: RoutedInputs, num_sms: int | None, repeats: int) -> Iterator[Result]:
    """Measure every op on `inputs`, all of them and their floors in turns.

    Raises:
        RuntimeError: a floor moves other rows than the ops do, or the communicator broke.
    """
    problem = inputs.problem
    options = {"num_sms": num_sms, "timeout_s": ops_under_test.TIMEOUT_S}
    with problem.communicator(rounds.mesh, "native", **options) as comm:
        shape = ops_under_test.route_shape(comm, inputs)
        dispatched = ops_under_test.run_dispatch(rounds.mesh, ops_under_test.dispatch_of(shape, inputs))
        ops = ops_under_test.ops_of(shape, inputs, dispatched)
        plain = floors.floors_of(rounds.mesh, shape, inputs, dispatched)
        gradient, _ = jax.block_until_ready(rounds.alone(ops["dispatch backward"])())
        floors.check_floors(rounds.mesh, plain, dispatched, gradient)
        del gradient
        device, sms = rounds.device_seconds({**ops, **plain}, comm, repeats)
        host = rounds.host_seconds(ops, repeats)
        comm.check()
        for op in ops:
            kind = floors.kind_of_floor(op, problem.layout)
            of_op = {name: device[name] for name in plain if name.split(":")[0] == kind}
            yield Result(problem, sms[op], op, inputs.bytes_moved, device[op], host[op], of_op)
