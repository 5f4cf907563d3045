"""The expert-parallel groups of a mesh, derived from its device grid."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_deepep import jax_compat


@dataclass(frozen=True)
class Topology:
    """The devices of a mesh as expert-parallel groups.

    Attributes:
        groups: devices, object array [num_groups, num_ranks]; every slice of the mesh along the
            expert-parallel axes is a group, and a device's rank is its column.
        axis_names: the expert-parallel axes, outermost first.
        num_nodes: nodes of a group, each of as many consecutive ranks.
        between_hosts: GPUs: whether nodes are on different hosts, where no memory can be mapped.
    """

    groups: np.ndarray
    axis_names: tuple[str, ...]
    num_nodes: int = 1
    between_hosts: bool = False

    @classmethod
    def of(cls, mesh: Mesh, axis_names: Sequence[str], ranks_per_node: int | None = None) -> "Topology":
        """Cut `mesh` into one group per coordinate along the axes that are not `axis_names`.

        Args:
            mesh: of devices.
            axis_names: the expert-parallel axes, outermost first.
            ranks_per_node: a divisor of the group's size, or None for one node.
        """
        positions = [mesh.axis_names.index(name) for name in axis_names]
        grid = np.moveaxis(mesh.devices, positions, range(-len(positions), 0))
        num_ranks = math.prod(mesh.shape[name] for name in axis_names)
        num_nodes = num_ranks // (ranks_per_node or num_ranks)
        return cls(grid.reshape(-1, num_ranks), tuple(axis_names), num_nodes)

    def has_groups_of(self, other: "Topology") -> bool:
        """Return whether the groups are those of `other`, with the same ranks, in any order."""
        return {tuple(group) for group in self.groups} == {tuple(group) for group in other.groups}

    @property
    def num_ranks(self) -> int:
        """Devices in one group."""
        return int(self.groups.shape[1])

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks of a group that are on one node."""
        return self.num_ranks // self.num_nodes

    def node_of(self, rank: int) -> int:
        """Return the node of a rank, from zero within its group."""
        return rank // self.ranks_per_node

    @property
    def platforms(self) -> set[str]:
        """Platforms of the devices, such as {"cpu"} or {"cuda"}."""
        return {jax_compat.platform_of(device) for device in self.groups.flat}

    @property
    def platform(self) -> str:
        """The platform of the devices; the first in the alphabet if there are several."""
        return min(self.platforms)

    @functools.cached_property
    def process_of(self) -> np.ndarray:
        """The process of each device, int array [num_groups, num_ranks]."""
        return np.array([device.process_index for device in self.groups.flat]).reshape(self.groups.shape)

    @property
    def processes(self) -> set[int]:
        """Process indices that own a device of the mesh."""
        return set(np.unique(self.process_of).tolist())

    def local_devices(self, process: int) -> list[Any]:
        """The devices of a process, in the order of (group, rank)."""
        return list(self.groups[self.process_of == process])

    def describe_process(self, process: int) -> str:
        """Return the name of a process in errors: the ranks that it has."""
        ranks = np.unique(np.nonzero(self.process_of == process)[1]).tolist()
        if len(ranks) == 1:
            return f"rank {ranks[0]} (process {process})"
        return f"ranks {', '.join(map(str, ranks))} (process {process})"

    def groups_with(self, processes: set[int]) -> list[int]:
        """Return which groups have a device of one of `processes`."""
        return np.nonzero(np.isin(self.process_of, list(processes)).any(axis=1))[0].tolist()

    def peers_of(self, process: int) -> set[int]:
        """Return the other processes in the groups of a process, with which it exchanges rows."""
        return set(np.unique(self.process_of[self.groups_with({process})]).tolist()) - {process}

    def uses_puts(self, group: int) -> bool:
        """Return whether rows go between the nodes of a group by puts: each process is on one node of it.

        Otherwise all of its processes share memory. Then nodes of CPUs only determine how sums are rounded,
        and those of GPUs put to memory that is mapped.
        """
        if self.num_nodes == 1 or not (self.platform == "cpu" or self.between_hosts):
            return False
        of_nodes = {(self.node_of(rank), p) for rank, p in enumerate(self.process_of[group].tolist())}
        processes = {process for _, process in of_nodes}
        return 1 < len(processes) == len(of_nodes)

    def uneven_nodes(self) -> str:
        """Return how the nodes of a group that uses puts differ in their processes, or an empty string."""
        for group in range(len(self.groups)):
            if not self.uses_puts(group):
                continue
            nodes = self.process_of[group].reshape(self.num_nodes, -1)
            # The first index of each process in its node: the same on all nodes.
            firsts = [[list(node).index(process) for process in node] for node in nodes.tolist()]
            for node, of_node in enumerate(firsts):
                if of_node != firsts[0]:
                    return (
                        f"the nodes of group {group} have different processes: expected each process of node "
                        f"{node} to have ranks of the same index as one of node 0; give all nodes the same "
                        "number of processes, and these the same devices"
                    )
        return ""

    def memory_peers_of(self, process: int) -> set[int]:
        """Return the other processes with which a process shares memory."""
        peers: set[int] = set()
        for group in self.groups_with({process}):
            nodes = self.process_of[group].reshape(self.num_nodes if self.uses_puts(group) else 1, -1)
            peers.update(*(set(node) for node in nodes.tolist() if process in node))
        return peers - {process}

    def remote_peers_of(self, process: int) -> list[tuple[int, int]]:
        """Return (group, process) for those with the ranks of a process on the other nodes of its groups."""
        found = []
        for group in self.groups_with({process}):
            if not self.uses_puts(group):
                continue
            nodes = self.process_of[group].reshape(self.num_nodes, -1)
            index = int(np.argwhere(nodes == process)[0][1])
            found += [(group, int(peer)) for peer in nodes[:, index] if peer != process]
        return found

    def leaders_of(self, process: int) -> dict[int, int]:
        """Return by group of a process the first process there with which it shares memory."""
        leaders = {}
        for group in np.nonzero((self.process_of == process).any(axis=1))[0].tolist():
            nodes = self.process_of[group].reshape(self.num_nodes if self.uses_puts(group) else 1, -1)
            leaders[group] = min(min(node) for node in nodes.tolist() if process in node)
        return leaders

    def neighbours_of(self, process: int) -> dict[tuple[int, int], int]:
        """Return by (group, rank) of a process the process of the rank before, if it is another one."""
        return {
            (group, rank): before
            for group, rank in np.argwhere(self.process_of == process).tolist()
            if rank > 0 and (before := int(self.process_of[group, rank - 1])) != process
        }

    def group_between_hosts(self, process: int, hosts: Mapping[int, str]) -> tuple[int, str] | None:
        """Return the first group in which a process cannot share memory with one with which it should.

        Args:
            process: the one to compare.
            hosts: of that process and of `leaders_of` it, by process.

        Returns:
            The group's index, and a text about both sides; or None.
        """
        for group, leader in self.leaders_of(process).items():
            if hosts[leader] != hosts[process]:
                first, other = self.describe_process(leader), self.describe_process(process)
                return group, (
                    f"group {group} spans hosts: {first} cannot share memory with {other} (on another host, "
                    "in another network namespace, or of another user)"
                )
        return None


def machine_identity() -> str:
    """Return a text that is equal for processes under the same kernel, in any container."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def host_identity() -> str:
    """Return a text that is equal for processes that can share memory and abstract Unix sockets.

    The variable JAX_DEEPEP_HOST_ID makes a process appear to be on another host, of that name: for tests. Its
    GPUs remain those of this machine.
    """
    pretended = os.environ.get("JAX_DEEPEP_HOST_ID", "")
    return f"{machine_identity()}/{pretended}/{os.readlink('/proc/self/ns/net')}/user {os.getuid()}"
