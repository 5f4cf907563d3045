"""Ranks that run different programs are notified at once; those that only seem to are not.

`timeout_s` is 300 there, so that a test that waits for it fails.
"""

import re

import pytest
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses

pytestmark = starts_its_own_processes

NUM_PROCESSES, VICTIM = 3, 1
DEADLINE_S = 100.0

# What the error says: the values of the other ranks, and of rank 1. On GPUs, ops are matched in order,
# whatever program they belong to.
ALIGNED = [("capacity", "48", "56"), ("alignment", "1", "4")]
DIFFERENCES = {
    "num_tokens": [("num_tokens", "8", "16"), ("capacity", "48", "96")],
    "capacity": [("capacity", "48", "32")],
    "dtype": [("dtype", "float32", "bfloat16")],
    "alignment": ALIGNED,
    "layout": [("layout", "expert", "token")],
    "another order": ALIGNED,
}
DIFFERENCES_OF_PROGRAMS = {
    "skipped layer": [("the number of ops in the program", "4", "2")],
    "around the ops": "the ops are equal, but the programs around them differ",
}
OTHER_CASES = ("two threads", "cleared listeners", "close")


@pytest.fixture(scope="module")
def run_on_cpu():
    names = ",".join([*OTHER_CASES, *DIFFERENCES, *DIFFERENCES_OF_PROGRAMS])
    with RankProcesses("different_programs", NUM_PROCESSES, (VICTIM, names), deadline_s=DEADLINE_S) as run:
        run.finish({})
        yield run


def assert_reported(run: RankProcesses, case: str, difference: str | list[tuple[str, str, str]]) -> None:
    """Check that every rank has an error, from any rank, on where another one's op differs."""
    for rank in range(NUM_PROCESSES):
        report = run.wait_for_report(rank, case)
        assert report["aborted"], "nothing of it may be trained on"
        begin = r"CommunicatorError: dispatch on rank (\d) at step \d+ met a different op of rank (\d): "
        found = re.match(begin, report["error"])
        assert found, report["error"]
        here, there = map(int, found.groups())
        assert (here == VICTIM) != (there == VICTIM)
        assert report["error"].removeprefix(found[0]).startswith(in_words(difference, here, there))
        assert "Run the same program on all ranks" in report["error"]


def in_words(difference: str | list[tuple[str, str, str]], here: int, there: int) -> str:
    if isinstance(difference, str):
        return difference
    values = [
        (name, *((usual, other) if there == VICTIM else (other, usual))) for name, usual, other in difference
    ]
    return "; ".join(
        f"{name} is {mine} on rank {here} and {theirs} on rank {there}" for name, mine, theirs in values
    )


@pytest.mark.parametrize("case", [*DIFFERENCES, *DIFFERENCES_OF_PROGRAMS])
def test_different_programs(run_on_cpu: RankProcesses, case: str) -> None:
    assert_reported(run_on_cpu, case, (DIFFERENCES | DIFFERENCES_OF_PROGRAMS)[case])


@pytest.mark.gpu
def test_different_programs_on_gpus() -> None:
    """Two of them: ranks may share a GPU, by time slices, and then programs take long to compile."""
    cases = ("num_tokens", "another order")
    arguments = (VICTIM, ",".join(cases))
    with RankProcesses(
        "different_programs", NUM_PROCESSES, arguments, platform="cuda", deadline_s=2 * DEADLINE_S
    ) as run:
        run.finish({})
        for case in cases:
            assert_reported(run, case, DIFFERENCES[case])


def test_programs_of_two_threads_may_cross(run_on_cpu: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert run_on_cpu.wait_for_report(rank, "two threads")["results"] == [1.0, 2.0]


def test_calls_are_numbered_after_listeners_were_cleared(run_on_cpu: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert run_on_cpu.wait_for_report(rank, "cleared listeners")["means"] == [1.0, 2.0]


def test_close_frees_everything_and_notifies_the_others(run_on_cpu: RankProcesses) -> None:
    """Although a compiled program holds the native communicator; and the last op of others may still read."""
    closed = run_on_cpu.wait_for_report(VICTIM, "close")
    assert closed["held"] > 0
    assert closed["holds"] == 0
    assert closed["segments"] == []
    assert "is closed, but the program was compiled with it" in closed["error"]
    assert "shared memory between the processes" in closed["text"]
    for rank in (0, 2):
        report = run_on_cpu.wait_for_report(rank, "close")
        assert "waits for rank 1, which has closed the communicator or ended" in report["error"]
        assert report["aborted"]
        assert report["rows"] > 0
    for rank in range(NUM_PROCESSES):
        assert run_on_cpu.wait_for_report(rank, "nothing is mapped")["maps"] == 0


def test_nothing_is_left(run_on_cpu: RankProcesses) -> None:
    run_on_cpu.assert_nothing_is_left()
