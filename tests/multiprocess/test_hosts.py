"""Processes on several hosts: groups inside of one are native, whatever the mesh. The hosts are simulated."""

from collections.abc import Iterator

import pytest
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses

pytestmark = starts_its_own_processes

NUM_PROCESSES = 4  # on two hosts; of one device each on GPUs, of two on CPU
DEADLINE_S = 90.0


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
def hosts(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    with RankProcesses(
        "hosts", NUM_PROCESSES, num_devices=2, platform=request.param, deadline_s=DEADLINE_S
    ) as run:
        run.finish({})
        run.assert_nothing_is_left()
        yield run


def test_groups_inside_of_hosts_are_native_and_right(hosts: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        report = hosts.wait_for_report(rank, "data × expert")
        assert report["implementation"] == "native", report["description"]
        assert report["right"]


@pytest.mark.parametrize(
    ("mesh_name", "ranks"),
    [
        ("expert", {1: ("rank 0", "rank 2"), 2: ("ranks 0, 1", "ranks 4, 5")}),
        ("expert × data", {1: ("rank 0", "rank 1"), 2: ("rank 0", "rank 2")}),
    ],
)
def test_a_group_that_spans_hosts_makes_it_xla_and_is_named(
    hosts: RankProcesses, mesh_name: str, ranks: dict[int, tuple[str, str]]
) -> None:
    ours, others = ranks[1 if hosts.platform == "cuda" else 2]
    sides = f"group 0 spans hosts: {ours} (process 0) cannot share memory with {others} (process 2) ("
    for rank in range(NUM_PROCESSES):
        report = hosts.wait_for_report(rank, mesh_name)
        assert report["implementation"] == "xla"
        assert f"xla (auto: {sides}" in report["description"]
        refused = 'ValueError: implementation: expected "xla" or "auto" here, got "native"; '
        assert report["error"].startswith(refused + sides)


def test_groups_that_share_some_processes(hosts: RankProcesses) -> None:
    if hosts.platform == "cpu":
        for rank in range(NUM_PROCESSES):
            report = hosts.wait_for_report(rank, "groups that share processes")
            assert report["implementation"] == "native"
            assert report["right"]


def test_no_key_is_left_in_the_store(hosts: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert hosts.wait_for_report(rank, "keys")["left"] == []
