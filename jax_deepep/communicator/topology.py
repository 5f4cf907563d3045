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
    """

    groups: np.ndarray
    axis_names: tuple[str, ...]
    num_nodes: int = 1

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

    def leaders_of(self, process: int) -> dict[int, int]:
        """Return the first process of each group of a process, by group."""
        groups = np.nonzero((self.process_of == process).any(axis=1))[0].tolist()
        return dict(zip(groups, self.process_of[groups].min(axis=1).tolist(), strict=True))

    def group_between_hosts(self, process: int, hosts: Mapping[int, str]) -> tuple[int, str] | None:
        """Return the first group in which a process is on another host than the group's first process.

        Args:
            process: the one to compare.
            hosts: of that process and of the first processes of its groups, by process.

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
    """Return a text that is equal for processes under the same kernel, in any container.

    The variable JAX_DEEPEP_HOST_ID makes a process appear to be on another machine, of that name: for tests.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.environ.get('JAX_DEEPEP_HOST_ID', '')}"


def host_identity() -> str:
    """Return a text that is equal for processes that can share memory and abstract Unix sockets."""
    return f"{machine_identity()}/{os.readlink('/proc/self/ns/net')}/user {os.getuid()}"
