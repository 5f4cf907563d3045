"""Processes that make their communicators with different arguments or builds, and one that makes none."""

import re

import pytest
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses

pytestmark = starts_its_own_processes

NUM_PROCESSES = 3
TIMEOUT_S = 4  # as in ranks/mismatches.py
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def mismatches():
    with RankProcesses("mismatches", NUM_PROCESSES, (1,), deadline_s=DEADLINE_S) as run:
        run.finish({})
        yield run


@pytest.mark.parametrize(
    ("argument", "usual", "other"),
    [
        ("num_experts", "3", "6"),
        ("num_experts_per_tok", "2", "1"),
        ("max_tokens", "4", "5"),
        ("hidden_size", "16", "24"),
        ("timeout_s", "4.0", "9.0"),
        ("implementation", "'native'", "'xla'"),
        ("mode", "'auto'", "'throughput'"),
        ("ranks_per_node", "None", "3"),
        ("wrong max_tokens", "4", "0"),
        ("wrong num_experts", "3", "2.5"),
        ("wrong hidden_size", "16", "2147483648"),
        ("wrong axis_name", "'expert'", "'exprt'"),
        ("wrong ranks_per_node", "None", "2"),
    ],
)
def test_arguments_differ_between_processes(
    mismatches: RankProcesses, argument: str, usual: str, other: str
) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, argument)["error"]
        assert error.startswith(
            f"CommunicatorError: {argument.removeprefix('wrong ')}: expected the same in all processes, got "
            f"{usual} on rank 0 (process 0) and {other} on rank 1 (process 1);"
        )


@pytest.mark.parametrize(
    ("function", "what", "sources"),
    [
        ("_python_sources", "build", "Python sources"),
        ("_native_sources", "build of native ops", "native sources"),
    ],
)
def test_builds_differ_between_processes(
    mismatches: RankProcesses, function: str, what: str, sources: str
) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, function)["error"]
        assert re.match(
            rf"CommunicatorError: {what}: expected .*, got version \S+, {sources} [0-9a-f]{{12}} on rank 0 "
            rf"\(process 0\) and version \S+, {sources} f00d on rank 1 \(process 1\); .*the same build of",
            error,
        ), error


def test_arguments_are_wrong_on_all_processes(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        tokens, experts, hidden, axis, nodes = mismatches.wait_for_report(rank, "all wrong")["errors"]
        assert tokens.startswith("ValueError: max_tokens: expected an integer of at least 1, got 0")
        assert experts.startswith("TypeError: num_experts: expected a Python integer")
        assert hidden.startswith("ValueError: hidden_size: expected at most 2147483647")
        assert axis.startswith(
            "ValueError: axis_name: expected an axis of mesh, ('expert',), got 'exprt'; pass"
        )
        assert nodes.startswith("ValueError: ranks_per_node: expected a divisor of the 3 ranks")


def test_a_mesh_without_a_device_of_the_process(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, "mesh of others")["error"]
        assert error.startswith(f"ValueError: mesh: expected one with a device of this process ({rank}),")


def test_equal_arguments_work_after_different_ones(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert mismatches.wait_for_report(rank, "equal arguments")["mean"] == 1.0


def test_a_rank_makes_no_communicator(mismatches: RankProcesses) -> None:
    for rank in (0, 2):
        report = mismatches.wait_for_report(rank, "absence")
        assert re.match(
            rf"PeerTimeoutError: making a communicator on rank [02] \(process [02]\) waited {TIMEOUT_S} s "
            r"\(timeout_s\) in the exchange of arguments for rank 1 \(process 1\)\. ",
            report["error"],
        )
        assert report["seconds"] < 3 * TIMEOUT_S
    longest = max(mismatches.wait_for_report(rank, "absence")["seconds"] for rank in (0, 2))
    assert longest > TIMEOUT_S - 0.5  # the first to time out notifies the other


def test_mismatches_leave_nothing_behind(mismatches: RankProcesses) -> None:
    mismatches.assert_nothing_is_left()
