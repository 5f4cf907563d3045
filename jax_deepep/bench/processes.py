"""The processes of a run: one, or the ranks of the launcher."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.cpu_threads import reserve_cpu_threads
from jax_deepep.launch import launched_rank

TIMEOUT_S = 120.0


def start_jax(num_devices: int) -> None:
    """Join the job of the launcher, or split the CPU of this process into devices.

    Call it before JAX is first used, which initialises XLA's backends. Settings of CPU devices in the
    environment take precedence.
    """
    if launched_rank() is not None:
        jax.distributed.initialize()
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={num_devices}")
    reserve_cpu_threads()


def end_jax() -> None:
    """Leave the job of the launcher once all processes have finished: they need the coordinator."""
    if launched_rank() is not None:
        exchange_with_all("end", {})
        jax.distributed.shutdown()


def exchange_with_all(name: str, message: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Exchange messages between all processes, without a program on any device."""
    processes = range(jax.process_count())
    with Exchange.between(processes, TIMEOUT_S, lambda process: f"process {process}") as exchange:
        if len(exchange.processes) == 1:
            return {exchange.process: dict(message)}
        exchange.begin_phase(name)
        exchange.publish(name, message)
        everyones = exchange.read(name, processes)
        exchange.report(Summary())
        exchange.verdict()  # all have read
    return everyones
