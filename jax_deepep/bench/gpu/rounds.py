"""How programs become seconds: ranks that begin together, with nothing of the round before in the cache."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jax_deepep.bench.gpu.ops_under_test import TIMEOUT_S, Contender
from jax_deepep.bench.gpu.routed_inputs import DTYPE, per_device, put_on_ranks
from jax_deepep.bench.problems import AXIS
from jax_deepep.bench.timing import Spread, turns
from jax_deepep.communicator import Communicator
from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.ops import native
from jax_deepep.ops.handle import RouteShape

FLUSHED_FLOATS = 25_000_000  # 100 MB, twice the second-level cache of an H100
_START_HIDDEN = 8


def exchange_with_all(name: str, message: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Give `message` to all processes and return everyone's, without a program on any device."""
    processes = range(jax.process_count())
    with Exchange.between(processes, TIMEOUT_S, lambda process: f"process {process}") as exchange:
        if len(exchange.processes) == 1:
            return {exchange.process: dict(message)}
        exchange.come_to(name)
        exchange.publish(name, message)
        everyones = exchange.read(name, processes)
        exchange.report(Summary())
        exchange.verdict()  # everybody has read
    return everyones


class Rounds:
    """Times programs on all ranks.

    A round of device time is three programs in a row: one flushes the cache; the next is an op of a small
    communicator, which no rank leaves before all have come, and in the same program the contender.

    Args:
        mesh: one device per process.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
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
        # An operand and not a constant, which XLA would keep outside of the memory that peers map.
        self._token = put_on_ranks(
            mesh, (mesh.size, _START_HIDDEN), lambda part: np.zeros((1, _START_HIDDEN), DTYPE)
        )
        self._start = per_device(mesh, lambda token: self._all_have_come(token)[None])
        self._flush = per_device(mesh, lambda values: values + 1)
        self._values = per_device(mesh, lambda token: jnp.zeros(FLUSHED_FLOATS) + token[0, 0])(self._token)

    def close(self) -> None:
        """Let go of the device memory."""
        self._comm.close()

    def _all_have_come(self, token: jax.Array) -> jax.Array:
        """Return a zero that is there when all ranks have come here."""
        shape = RouteShape(self._comm, "token", 1, self.mesh.size, 1, None)
        to_itself = lax.axis_index(AXIS).astype(jnp.int32).reshape(1, 1)
        _, handle = native.dispatch(shape, token, to_itself, jnp.ones((1, 1), jnp.float32))
        return handle.num_invalid

    def started_together(self, contender: Contender) -> Callable[[], Any]:
        """Compile a contender behind a start of all ranks."""

        def run(token, *operands):
            return contender.run(self._all_have_come(token), *operands)

        program = per_device(self.mesh, run)
        return lambda: program(self._token, *contender.operands)

    def alone(self, contender: Contender) -> Callable[[], Any]:
        """Compile a contender as all that a program holds."""
        program = per_device(self.mesh, lambda *operands: contender.run(None, *operands))
        return lambda: program(*contender.operands)

    def device_seconds(
        self, contenders: Mapping[str, Contender], comm: Communicator, repeats: int
    ) -> tuple[dict[str, Spread], dict[str, int]]:
        """Return how long ops of `comm` take on the device, the slowest rank in each round; and their SMs."""
        programs = {name: self.started_together(contender) for name, contender in contenders.items()}

        def seconds_of(program: Callable[[], Any]) -> float:
            self._values = self._flush(self._values)
            jax.block_until_ready(program())
            [(seconds, _)] = comm._native.last_ops
            return seconds

        def num_sms_of(program: Callable[[], Any]) -> int:
            seconds_of(program)
            [(_, num_sms)] = comm._native.last_ops
            return num_sms

        seconds = self._take_turns(programs, seconds_of, repeats)
        return seconds, {name: num_sms_of(program) for name, program in programs.items()}

    def host_seconds(self, contenders: Mapping[str, Contender], repeats: int) -> dict[str, Spread]:
        """Return the time from launch to result on the host, that of the slowest rank in each round."""
        programs = {name: self.alone(contender) for name, contender in contenders.items()}
        return self._take_turns(programs, self._host_seconds_of, repeats)

    def _host_seconds_of(self, program: Callable[[], Any]) -> float:
        self._values = self._flush(self._values)
        jax.block_until_ready(self._start(self._token))
        start = time.perf_counter()
        result = jax.block_until_ready(program())
        seconds = time.perf_counter() - start
        del result  # freed outside of the measurement
        return seconds

    def _take_turns(
        self,
        programs: Mapping[str, Callable[[], Any]],
        seconds_of: Callable[[Callable[[], Any]], float],
        repeats: int,
    ) -> dict[str, Spread]:
        for _ in range(2):  # compiled, and then once more
            for program in programs.values():
                seconds_of(program)
        names = list(programs)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in turns(names, repeats):  # all ranks in the same order
            seconds[name].append(seconds_of(programs[name]))
        everyones = exchange_with_all("seconds", seconds).values()
        return {name: Spread.of(np.max([of_rank[name] for of_rank in everyones], axis=0)) for name in names}
