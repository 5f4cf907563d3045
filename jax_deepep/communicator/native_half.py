"""What the native halves of communicators on all platforms have in common."""

import abc
import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.native_types import Export, NativeCommunicator
from jax_deepep.communicator.process_exchange import Exchange


class NativeHalf(abc.ABC):
    """The native half of a communicator on one platform, and the steps until it is started.

    Attributes:
        native: the object that ops use.
    """

    native: NativeCommunicator

    @abc.abstractmethod
    def __init__(self, config: CommunicatorConfig, id: int) -> None: ...

    @abc.abstractmethod
    def exports(self, open_here: contextlib.ExitStack) -> list[Export]:
        """Return what peers need of this process, open until `open_here` ends at least."""

    def publish(self, exports: list[Export], exchange: Exchange) -> None:  # noqa: B027
        """Publish what the other processes of the mesh need besides."""

    @abc.abstractmethod
    def start(self, exports: list[Export], everyones: Mapping[int, list[Export]], exchange: Exchange) -> None:
        """Map the memory of peers, and begin."""

    @abc.abstractmethod
    def transport(self) -> str:
        """Describe how rows reach peers, once it is started."""


def arguments_of(config: CommunicatorConfig, id: int) -> dict[str, Any]:
    """Return the arguments of a native communicator that all platforms have."""
    topology = config.topology
    here = jax.process_index()
    # A process needs only its own groups and those of its peers.
    locations = [
        (_name_to_custom_calls(device), group, rank, device.process_index)
        for group in topology.groups_with({here, *topology.peers_of(here)})
        for rank, device in enumerate(topology.groups[group])
    ]
    return {
        "id": id,
        "fingerprint": config.fingerprint,
        "locations": locations,
        "process": here,
        "num_ranks": topology.num_ranks,
        "num_groups": len(topology.groups),
        "num_experts": config.num_experts,
        "num_topk": config.num_experts_per_tok,
        "max_tokens": config.max_tokens,
        "hidden_size": config.hidden_size,
        "ranks_per_node": topology.ranks_per_node,
        "timeout_s": float(config.timeout_s),
    }


def _name_to_custom_calls(device: jax.Device) -> int:
    """Return the ordinal that XLA gives to a custom call on a device of this process."""
    if device.platform == "cpu":
        return int(device.id)
    return int(device.local_hardware_id) if device.process_index == jax.process_index() else -1
