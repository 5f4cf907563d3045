"""Processes on several hosts, which are simulated: nodes are found, and on CPU native ops reach them all.

On GPUs groups inside of one host are native, whatever the mesh, and others by NVSHMEM if that is asked for.
"""

from collections.abc import Iterator

import numpy as np
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
    ("mesh_name", "ranks", "sides"),
    [
        ("expert", {1: 2, 2: 4}, {1: ("rank 0", "rank 2"), 2: ("ranks 0, 1", "ranks 4, 5")}),
        ("expert × data", {1: 1, 2: 2}, {1: ("rank 0", "rank 1"), 2: ("rank 0", "rank 2")}),
    ],
)
def test_a_group_that_spans_hosts(
    hosts: RankProcesses, mesh_name: str, ranks: dict[int, int], sides: dict[int, tuple[str, str]]
) -> None:
    num_devices = 1 if hosts.platform == "cuda" else 2
    ours, others = sides[num_devices]
    reason = f"group 0 spans hosts: {ours} (process 0) cannot share memory with {others} (process 2) ("
    for rank in range(NUM_PROCESSES):
        report = hosts.wait_for_report(rank, mesh_name)
        assert report["ranks_per_node"] == ranks[num_devices]
        if hosts.platform == "cpu":
            assert report["implementation"] == "native", report["description"]
            assert "TCP between nodes" in report["description"]
            assert report["right"]
            continue
        assert report["implementation"] == "xla"
        assert f"xla (auto: {reason}" in report["description"]
        refused = 'ValueError: implementation: expected "xla" or "auto" here, got "native"; '
        assert report["error"] == "no error" or report["error"].startswith(refused + reason)


def test_a_row_crosses_to_another_node_once(hosts: RankProcesses) -> None:
    """Eight ranks, four on each host: counted by the sender, the receiver, and the oracle."""
    if hosts.platform == "cuda":
        return
    for name in ("dispatch", "cached dispatch", "combine"):
        reports = [hosts.wait_for_report(rank, f"rows of {name}") for rank in range(NUM_PROCESSES)]
        sent = np.sum([report["sent"] for report in reports], axis=0)
        received = np.sum([report["received"] for report in reports], axis=0)
        expected = np.array(reports[0]["between_nodes"])  # [source rank, node]
        assert expected.any()
        np.testing.assert_array_equal(received, sent.T)
        for rank, peer in np.ndindex(sent.shape):
            if rank // 4 == peer // 4:
                continue
            source, other = (peer, rank) if name == "combine" else (rank, peer)
            count = expected[source, other // 4]
            assert sent[rank, peer] == (count if rank % 4 == peer % 4 else 0), (name, rank, peer)


def test_hosts_with_different_numbers_of_ranks(hosts: RankProcesses) -> None:
    if hosts.platform == "cpu":
        for rank in range(NUM_PROCESSES):
            report = hosts.wait_for_report(rank, "uneven hosts")
            assert report["implementation"] == "xla"
            assert (
                "the hosts have different numbers of consecutive ranks: the first one 2, and rank"
                in (report["description"])
            )


def test_hosts_that_cannot_connect(hosts: RankProcesses) -> None:
    """All processes learn of it in time, and of the address that was tried."""
    if hosts.platform == "cpu":
        for rank in range(NUM_PROCESSES):
            report = hosts.wait_for_report(rank, "no connection")
            assert report["implementation"] == "xla"
            assert "on another node, could not be reached at 127.0.0.1 port 9 (" in report["description"] or (
                "on another node, did not connect to 127.0.0.1 in time" in report["description"]
            )


def test_groups_that_share_some_processes(hosts: RankProcesses) -> None:
    if hosts.platform == "cpu":
        for rank in range(NUM_PROCESSES):
            report = hosts.wait_for_report(rank, "groups that share processes")
            assert report["implementation"] == "native"
            assert report["right"]


def test_no_key_is_left_in_the_store(hosts: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert hosts.wait_for_report(rank, "keys")["left"] == []
