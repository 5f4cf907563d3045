"""How processes agree: thousands of them, one after the other in one thread, over a store in memory.

In every phase all reports go from the last process to the first, then all verdicts from the first to the
last: in this order no process waits.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from key_value_store import Store

import jax_deepep as ep
from jax_deepep.communicator.backend import compare_hosts
from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.communicator.topology import Topology

ARGUMENTS = {"mesh": "{'data': 1250, 'expert': 8} of devices [0, 1, 2, 3, 4]", "num_experts": "256"}
GROUP_SIZE = 5


class Job:
    """Processes of one device each, of which every GROUP_SIZE are a group."""

    def __init__(self, num_processes: int) -> None:
        devices = np.empty(num_processes, dtype=object)
        devices[:] = [SimpleNamespace(process_index=process) for process in range(num_processes)]
        self.topology = Topology(devices.reshape(-1, GROUP_SIZE), ("expert",))
        self.store = Store()
        self.processes = tuple(range(num_processes))
        self.exchanges = {process: self.exchange_of(process) for process in self.processes}
        self.verdicts: dict[int, dict[str, str]] = {}
        self.errors: dict[int, str] = {}

    def exchange_of(self, process: int) -> Exchange:
        return Exchange(self.processes, process, 0, self.store.client(process), 7.0, "process {}".format)

    def do(self, process: int, step: Callable[[Exchange], None]) -> None:
        """Run a step of a process that has not failed; keep its error."""
        if process in self.errors:
            return
        try:
            step(self.exchanges[process])
        except ep.CommunicatorError as error:
            self.errors[process] = f"{type(error).__name__}: {error}"
            self.exchanges[process].__exit__()

    def report(self, process: int, arguments: dict[str, str], host: str) -> None:
        def step(exchange: Exchange) -> None:
            summary = Summary(dict(arguments))
            compare_hosts(exchange, self.topology, host, summary, finds_nodes=True)
            exchange.report(summary)

        self.do(process, step)

    def take_verdict(self, process: int) -> None:
        def step(exchange: Exchange) -> None:
            self.verdicts[process] = exchange.verdict()

        self.do(process, step)

    def agree_on_arguments(
        self,
        arguments_of: Callable[[int], dict[str, str]] = lambda process: ARGUMENTS,
        host_of: Callable[[int], str] = lambda process: f"host {process // GROUP_SIZE}",
        absent: tuple[int, ...] = (),
        silent: tuple[int, ...] = (),
    ) -> None:
        """Have all processes agree except for absent ones, and silent ones, which read no verdict."""
        present = [process for process in self.processes if process not in absent]
        for process in present:
            self.exchanges[process].begin_phase("arguments")
            self.exchanges[process].publish("host", host_of(process))
        for process in reversed(present):
            self.report(process, arguments_of(process), host_of(process))
        for process in present:
            if process not in silent:
                self.take_verdict(process)

    def agree(self, phase: str) -> None:
        for process in self.processes:
            self.exchanges[process].begin_phase(phase)
        for process in reversed(self.processes):
            self.exchanges[process].report(Summary())
        for process in self.processes:
            self.take_verdict(process)

    def end(self) -> None:
        for exchange in self.exchanges.values():
            exchange.__exit__()


def most_of_any_process(num_processes: int) -> tuple[int, int]:
    """Make a communicator without a fault; return the most messages and bytes that a process has moved."""
    job = Job(num_processes)
    job.agree_on_arguments()
    job.agree("creation")
    job.agree("attachment")
    job.end()
    assert job.errors == {}
    assert set(job.verdicts) == set(job.processes)
    assert not any(job.verdicts.values())
    assert job.store.values == {}
    return max(job.store.num_messages.values()), max(job.store.num_bytes.values())


@pytest.mark.parametrize("num_processes", [1000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_many_processes_cost_each_one_no_more_than_ten_do(num_processes: int) -> None:
    """Except for the parent that a process with eight children has, hosts, and longer numbers."""
    messages, size = most_of_any_process(num_processes)
    messages_of_ten, size_of_ten = most_of_any_process(10)
    assert messages <= messages_of_ten + 3 * 3 + 2
    assert size <= 1.25 * size_of_ten
    assert messages < 100
    assert size < 20_000


@pytest.mark.parametrize("different", [0, 1, 7, 8, 9, 72, 99])
def test_a_difference_is_reported_to_all_wherever_it_is(different: int) -> None:
    job = Job(100)
    job.agree_on_arguments(
        lambda process: {**ARGUMENTS, "num_experts": "64"} if process == different else ARGUMENTS
    )
    job.end()
    above, below = (0, 1) if different == 0 else ((different - 1) // 8, different)
    value_above, value_below = ("64", "256") if different == 0 else ("256", "64")
    expected = (
        f"CommunicatorError: num_experts: expected the same in all processes, got {value_above} on process "
        f"{above} and {value_below} on process {below};"
    )
    assert set(job.errors) == set(job.processes)
    assert {error[: len(expected)] for error in job.errors.values()} == {expected}
    assert job.store.values == {}


def test_of_many_differences_the_first_argument_is_reported() -> None:
    job = Job(100)
    job.agree_on_arguments(
        lambda process: {"mesh": "one" if process < 80 else "other", "num_experts": str(process)}
    )
    assert set(job.errors) == set(job.processes)
    assert {error.partition(";")[0] for error in job.errors.values()} == {
        "CommunicatorError: mesh: expected the same in all processes, got one on process 9 and other on "
        "process 80"
    }


def test_texts_that_some_processes_lack_are_compared_between_the_others() -> None:
    job = Job(10)
    job.agree_on_arguments(lambda process: {} if process == 4 else {"build of native ops": "one"})
    assert job.errors == {}


def test_a_group_that_spans_hosts_is_named() -> None:
    """Groups, not the mesh: the hosts of 60 processes each are cut between two groups, and then in one."""
    job = Job(240)
    job.agree_on_arguments(host_of=lambda process: f"host {process // 60}")
    assert not any(job.verdicts.values())

    job = Job(240)
    job.agree_on_arguments(host_of=lambda process: f"host {process // 64}")
    [text] = {verdict["group between hosts"] for verdict in job.verdicts.values()}
    assert text.startswith(
        "group 12 spans hosts: rank 0 (process 60) cannot share memory with rank 4 (process 64) ("
    )
    assert len(job.verdicts) == 240


@pytest.mark.parametrize("absent", [(0,), (1,), (8,), (9,), (73,), (99,), (3, 30, 31)], ids=str)
def test_all_processes_are_notified_of_absent_ones(absent: tuple[int, ...]) -> None:
    job = Job(100)
    job.agree_on_arguments(absent=absent)
    assert set(job.errors) == set(job.processes) - set(absent)
    names = ", ".join(f"process {process}" for process in absent)
    for error in job.errors.values():
        assert error.startswith("PeerTimeoutError: making a communicator on process ")
        assert f" waited 7 s (timeout_s) in the exchange of arguments for {names}. Every process" in error


def test_of_many_absent_processes_some_are_named_at_little_cost() -> None:
    job = Job(1000)
    job.agree_on_arguments(absent=tuple(range(20, 1000)))
    assert set(job.errors) == set(range(20))
    assert "for process 20, process 21, process 22, process 23, process 24, process 137, " in job.errors[0]
    assert "process 139 and others. Every" in job.errors[0]
    assert max(job.store.num_messages.values()) < 150


def test_a_late_process_is_notified_at_once() -> None:
    job = Job(100)
    job.agree_on_arguments(absent=(1,))
    job.exchanges[1].begin_phase("arguments")
    job.exchanges[1].publish("host", "host 0")
    job.report(1, ARGUMENTS, "host 0")
    job.take_verdict(1)
    assert "in the exchange of arguments for process 1. Every" in job.errors[1]


def test_a_process_that_does_not_forward_a_verdict_is_named() -> None:
    """Its ancestors have finished and are gone, and were not absent."""
    job = Job(100)
    job.agree_on_arguments(silent=(1, *range(9, 17), *range(73, 100)))
    assert job.errors == {}
    for process in range(9):
        if process != 1:
            job.exchanges[process].__exit__()
    for process in (9, 73, 80):
        job.take_verdict(process)
        assert "in the exchange of arguments for process 1. Every" in job.errors[process]


def test_a_process_that_aborts_too_early_fails_the_next_phase() -> None:
    """It just missed the verdict: the others have it, and must not wait for this process again."""
    job = Job(10)
    job.agree_on_arguments(silent=(9,))
    for key in [key for key in job.store.values if "/down/" in key]:
        del job.store.values[key]
    job.take_verdict(9)
    assert "process 9 waited 7 s" in job.errors[9]
    for process in range(9):
        job.exchanges[process].begin_phase("creation")
    for process in reversed(range(9)):
        job.do(process, lambda exchange: exchange.report(Summary()))
    for process in range(9):
        job.take_verdict(process)
    assert set(job.errors.values()) == {job.errors[9]}


def test_texts_of_any_length_are_cut() -> None:
    summary = Summary()
    summary.add("error", [3], "x" * 10_000)
    assert len(summary.encode()) < 2_200
