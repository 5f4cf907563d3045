"""Nodes of groups, and which processes share memory or send puts; devices are mocks."""

from types import SimpleNamespace

import numpy as np
import pytest

from jax_deepep.communicator.topology import Topology


def topology_of(process_of: list[list[int]], ranks_per_node: int) -> Topology:
    devices = np.empty((len(process_of), len(process_of[0])), dtype=object)
    for index, process in np.ndenumerate(np.array(process_of)):
        devices[index] = SimpleNamespace(process_index=process, platform="cpu")
    return Topology(devices, ("expert",), devices.shape[1] // ranks_per_node)


# Processes of devices in the order (group, rank), ranks per node, and who has memory of whom, who sends puts.
LAYOUTS = {
    "a node per process": ([[0, 0, 1, 1]], 2, {0: set(), 1: set()}, {0: [(0, 1)], 1: [(0, 0)]}),
    "two processes per node": (
        [[0, 1, 2, 3]], 2, {0: {1}, 2: {3}}, {0: [(0, 2)], 1: [(0, 3)], 3: [(0, 1)]}
    ),
    "two groups": ([[0, 1], [2, 3]], 1, {0: set(), 3: set()}, {0: [(0, 1)], 3: [(1, 2)]}),
    "nodes of one process": ([[0, 0, 0, 0]], 2, {0: set()}, {0: []}),
    "processes with ranks of two nodes": ([[0, 1, 0, 1]], 2, {0: {1}, 1: {0}}, {0: [], 1: []}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_processes_reach_each_other(name: str) -> None:
    process_of, ranks_per_node, memory, remote = LAYOUTS[name]
    topology = topology_of(process_of, ranks_per_node)
    assert {process: topology.memory_peers_of(process) for process in memory} == memory
    assert {process: topology.remote_peers_of(process) for process in remote} == remote
    assert topology.uneven_nodes() == ""


def test_nodes_have_processes_alike() -> None:
    text = topology_of([[0, 1, 2, 2]], 2).uneven_nodes()
    assert text.startswith(
        "the nodes of group 0 have different processes: expected each process of node 1 to"
    )
