"""Who is where: the expert-parallel groups of a mesh, derived from its device grid."""

from collections.abc import Sequence
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
    """

    groups: np.ndarray
    axis_names: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh, axis_names: Sequence[str]) -> "Topology":
        """Cut `mesh` into one group per coordinate along the axes that are not `axis_names`."""
        positions = [mesh.axis_names.index(name) for name in axis_names]
        grid = np.moveaxis(mesh.devices, positions, range(-len(positions), 0))
        num_ranks = int(np.prod([mesh.shape[name] for name in axis_names]))
        return cls(grid.reshape(-1, num_ranks), tuple(axis_names))

    def has_groups_of(self, other: "Topology") -> bool:
        """Return whether the groups are those of `other`, with the same ranks, in whatever order."""
        return {tuple(group) for group in self.groups} == {tuple(group) for group in other.groups}

    @property
    def num_ranks(self) -> int:
        """Devices in one group."""
        return self.groups.shape[1]

    @property
    def platforms(self) -> set[str]:
        """Platforms of the devices, such as {"cpu"} or {"cuda"}."""
        return {jax_compat.platform_of(device) for device in self.groups.flat}

    @property
    def platform(self) -> str:
        """The platform of the devices; the first in the alphabet if there are several."""
        return min(self.platforms)

    def local_devices(self, process: int) -> list[Any]:
        """The devices of a process, in the order of (group, rank)."""
        return [device for device in self.groups.flat if device.process_index == process]

    def describe_process(self, process: int) -> str:
        """Return the name of a process in errors: the ranks that it has."""
        ranks = sorted({rank for (_, rank), d in np.ndenumerate(self.groups) if d.process_index == process})
        if len(ranks) == 1:
            return f"rank {ranks[0]} (process {process})"
        return f"ranks {', '.join(map(str, ranks))} (process {process})"

    @property
    def processes(self) -> set[int]:
        """Process indices that own a device of the mesh."""
        return {device.process_index for device in self.groups.flat}
