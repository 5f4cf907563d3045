"""What the survivors observe when a rank dies, stalls, raises, or was started differently.

Every test ends by itself, long before its hard deadline, and leaves no process and no shared memory.
"""

import re
import signal
from collections.abc import Callable

import pytest
from fault_settings import TIMEOUT_S, is_over_network
from implementations import CAPTURE_ALL_OPS
from observed_fault import BETWEEN_NODES, Fault
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses, pretended_hosts

pytestmark = starts_its_own_processes

NUM_PROCESSES = 3
OPS_BEFORE = 3 * 4  # runs of `first_step` there, and ops of a run
DEADLINE_S = 15.0 * TIMEOUT_S  # of one fault, which takes about 12 s on two cores

KILLED = -signal.SIGKILL
THROUGHPUT = {"OPS_MODE": "throughput"}
LOW_LATENCY = {"OPS_MODE": "low_latency"}
IN_GRAPHS = {"XLA_FLAGS": CAPTURE_ALL_OPS}


def dies_before_the_op(fault: Fault) -> None:
    for process in fault.survivors:
        report = fault.report(process, "aborted")
        fault.assert_aborted(report)
        fault.assert_names_steps(report["error"], OPS_BEFORE)


def dies_after_the_op(fault: Fault) -> None:
    """No further op follows."""
    for process in fault.survivors:
        assert fault.report(process, "unharmed")["same"]


def dies_in_a_loop(fault: Fault) -> None:
    """The same op has been there before, in earlier iterations. On CPU, where ops have names."""
    for process in fault.survivors:
        report = fault.report(process, "aborted")
        fault.assert_aborted(report)
        fault.assert_names_steps(report["error"], OPS_BEFORE + 4 * 2)
        output = fault.run.ranks[process].text().splitlines()
        lines = [line for line in output if line.startswith("jax_deepep: ")]
        assert lines[0] == "jax_deepep: " + report["error"].partition(": ")[2]
        assert lines.count(lines[0]) == 1


def dies_during_ops(fault: Fault) -> None:
    """At any moment."""
    fault.assert_survivors_agree()


def raises_before_the_op(fault: Fault) -> None:
    for process in fault.survivors:
        report = fault.report(process, "aborted")
        assert report["results"]
        assert report["later_results"]
        if fault.run.platform == "cpu":
            error = (
                f"dispatch on rank .* at step {OPS_BEFORE + 1} waits for rank {fault.rank}, which has closed"
            )
        else:
            error = f"the program on rank {fault.rank} ended with an error"
        assert re.match(f"CommunicatorError: {error}", report["error"]), report["error"]
    assert "ValueError: the data loader of this rank failed" in fault.run.ranks[fault.victim].text()


def raises_during_an_op(fault: Fault) -> None:
    """Its program and a rank wait for each other, outside of ops: it leaves and notifies all. On CPU."""
    for process in fault.survivors:
        report = fault.report(process, "left")
        assert report["aborted"]
        assert report["error"].startswith(
            f"CommunicatorError: the program of rank {fault.rank} ended while its ops ran"
        )
        assert "ValueError: this rank failed" in report["error"]


def compiles_beside(fault: Fault) -> None:
    """A thread that compiles does no harm."""
    for process in fault.live:
        assert not fault.report(process, "unharmed")["aborted"]


def calls_share_a_number(fault: Fault) -> None:
    """What must not happen, forced: it is an error, and no op is left running. On CPU."""
    for process in fault.live:
        report = fault.report(process, "notified")
        # The same calls on every rank, or different ones, depending on which were renumbered.
        assert re.search(r"have the same index|met a different op|waited 4 s \(timeout_s\)", report["error"])
        assert report["aborted"]


def may_end_others(fault: Fault, code: int, check: Callable[[Fault], None]) -> None:
    """Over a network, NVSHMEM may end the process of a peer: see its README. None waits for ever."""
    codes = fault.run.finish()
    assert codes[fault.victim] == code
    if all(codes[process] == 0 for process in fault.survivors):
        check(fault)


def stalls_before_the_op(fault: Fault) -> None:
    """And comes back."""
    for process in fault.live:
        fault.report(process, "ready")
    fault.run.ranks[fault.victim].signal(signal.SIGSTOP)
    for process in fault.survivors:
        report = fault.report(process, "aborted")
        fault.assert_aborted(report)
        fault.assert_names_steps(report["error"], OPS_BEFORE)
    fault.run.ranks[fault.victim].signal(signal.SIGCONT)
    fault.assert_late_rank_does_no_harm()


def stalls_during_ops(fault: Fault) -> None:
    """At any moment, and comes back."""
    for process in fault.survivors:
        fault.report(process, "aborted")
    fault.assert_survivors_agree()
    fault.run.ranks[fault.victim].signal(signal.SIGCONT)
    fault.assert_late_rank_does_no_harm()


def process_0_dies(fault: Fault) -> None:
    """It hosts JAX's coordinator: JAX ends the others."""
    codes = fault.run.finish()
    assert codes[0] == KILLED
    assert all(code != 0 for code in codes)


# Those of a run follow each other in the same processes, on CPU; on GPUs, each has separate processes.
RUNS = {
    ("dies_in_a_loop:2", "dies_after_the_op:1"): (),
    ("dies_during_ops:2:1", "dies_before_the_op:1"): (),
    ("dies_during_ops:1:0", "dies_before_the_op:2"): pytest.mark.nightly,
    ("raises_before_the_op:3", "raises_during_an_op:1"): (),
    (
        "compiles_beside:1",
        "stalls_before_the_op:2",
        "stalls_during_ops:0:0",
        "calls_share_a_number:0",
        "process_0_dies:0",
    ): (),
    ("stalls_before_the_op:0", "stalls_during_ops:1:1"): pytest.mark.nightly,
}
RUNS_BETWEEN_NODES = {
    ("dies_during_ops:2:1", "dies_before_the_op:1"): (),
    ("stalls_before_the_op:2", "stalls_during_ops:1:1"): (),
    ("dies_in_a_loop:2", "dies_after_the_op:1"): pytest.mark.nightly,
    ("raises_before_the_op:3", "raises_during_an_op:1"): pytest.mark.nightly,
}
ON_CPU_ONLY = ("dies_in_a_loop", "raises_during_an_op", "calls_share_a_number")
CHECKS: dict[str, Callable[[Fault], None]] = {
    check.__name__: check
    for check in (
        dies_before_the_op, dies_after_the_op, dies_in_a_loop, dies_during_ops, raises_before_the_op,
        raises_during_an_op, compiles_beside, calls_share_a_number, stalls_before_the_op, stalls_during_ops,
        process_0_dies,
    )
}  # fmt: skip
ON_GPUS = dict.fromkeys(label for run in RUNS for label in run if not label.startswith(ON_CPU_ONLY))


@pytest.mark.parametrize(
    ("labels", "platform", "environment"),
    [
        *(
            pytest.param(run, "cpu", environment, id=f"{platform}-{run[0]}", marks=marks)
            for platform, environment, runs in (
                ("cpu", {}, RUNS),
                ("cpu, between nodes", BETWEEN_NODES, RUNS_BETWEEN_NODES),
            )
            for run, marks in runs.items()
        ),
        *(
            pytest.param((label,), "cuda", environment, id=f"{platform}-{label}", marks=pytest.mark.gpu)
            for label in ON_GPUS
            for platform, environment in (
                ("cuda", THROUGHPUT),
                ("cuda in graphs", IN_GRAPHS | THROUGHPUT),
                ("cuda, low latency", {}),
                ("cuda in graphs, low latency", IN_GRAPHS),
            )
        ),
        *(
            pytest.param(run[:1], "cuda", environment, id=f"{platform}-{run[0]}", marks=pytest.mark.gpu)
            for run in RUNS_BETWEEN_NODES
            if not run[0].startswith(ON_CPU_ONLY)
            for platform, environment in (
                ("cuda, between nodes", BETWEEN_NODES),
                ("cuda, between nodes, low latency", BETWEEN_NODES | LOW_LATENCY),
                ("cuda in graphs, between nodes", BETWEEN_NODES | IN_GRAPHS),
                ("cuda in graphs, between nodes, low latency", BETWEEN_NODES | LOW_LATENCY | IN_GRAPHS),
                ("cuda, between hosts", pretended_hosts(1)),
                ("cuda, between hosts, low latency", pretended_hosts(1) | LOW_LATENCY),
            )
        ),
    ],
)
def test_faults(labels: tuple[str, ...], platform: str, environment: dict[str, str]) -> None:
    faults = [(label, label.split(":")[0], int(label.split(":")[1])) for label in labels]
    live = list(range(max(NUM_PROCESSES, *(victim + 1 for _, _, victim in faults), 0)))
    codes: dict[int, int] = {}
    with RankProcesses(
        "faults", len(live), labels, platform=platform, environment=environment,
        deadline_s=DEADLINE_S * min(len(labels), 4),
    ) as run:  # fmt: skip
        for label, name, victim in faults:
            fault = Fault(run, label, victim, tuple(live))
            if name.startswith(("dies", "raises")):
                codes[victim] = KILLED if name.startswith("dies") else 1
                live.remove(victim)
            if is_over_network(environment) and victim in codes:
                may_end_others(fault, codes[victim], CHECKS[name])
                break
            CHECKS[name](fault)
        else:
            if faults[-1][1] != "process_0_dies":
                run.finish(codes)
        run.assert_nothing_is_left()


@pytest.mark.gpu
def test_an_op_cannot_be_launched_on_a_rank() -> None:
    """The others need not wait for it, and its next op does not match their present one.

    In low-latency mode peers do not read its operands.
    """
    environment = IN_GRAPHS | THROUGHPUT
    arguments = ("cannot_launch:1",)
    with RankProcesses(
        "faults", NUM_PROCESSES, arguments, platform="cuda", environment=environment, deadline_s=DEADLINE_S
    ) as run:
        run.finish({})
        for rank in range(NUM_PROCESSES):
            report = run.wait_for_report(rank, "cannot_launch:1: notified")
            assert "dispatch on rank 1 could not be launched" in report["error"]
            assert report["aborted"]
            assert ("constant of the program" in report["launch_error"]) == (rank == 1)


@pytest.mark.collectives
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rank_comes_late_to_a_layer(platform: str) -> None:
    """A layer has collectives of XLA with unbounded waits: the ops before them name the missing rank."""
    victim, ranks = 1, 2  # NCCL rejects two ranks on one GPU
    with RankProcesses("late_to_a_layer", ranks, (victim,), platform=platform, deadline_s=DEADLINE_S) as run:
        report = run.wait_for_report(0, "notified")
        assert re.search(rf"waited {TIMEOUT_S} s \(timeout_s\) for rank {victim} \(", report["error"])
        assert report["seconds"] < 3 * TIMEOUT_S
        line = f"jax_deepep: {report['error']}"
        run.wait_until(lambda: line in run.ranks[0].text(), "the error in the output of rank 0")
        run.finish({})
        for rank in range(ranks):
            assert not run.wait_for_report(rank, "first step")["aborted"]
            report = run.wait_for_report(rank, "ended")
            assert report["aborted"]
            assert report["error"].startswith("PeerTimeoutError: ")
        run.assert_nothing_is_left()
