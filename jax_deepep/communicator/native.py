"""The native half of a communicator, made by all processes together: one class per platform."""

import abc
import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_deepep.communicator import descriptors, native_module
from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.key_value_store import digest_of
from jax_deepep.communicator.native_types import (
    AddressInPool,
    CpuCommunicator,
    CudaCommunicator,
    Export,
    NativeCommunicator,
)
from jax_deepep.communicator.node_sockets import NodeSockets
from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.communicator.topology import Topology, machine_identity


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


class CpuHalf(NativeHalf):
    """On CPU, every process shares a segment of memory with those of its node; TCP leads to other nodes."""

    native: CpuCommunicator

    def __init__(self, config: CommunicatorConfig, id: int) -> None:
        here = jax.process_index()
        self._remote_peers = config.topology.remote_peers_of(here)
        self._has_memory_peers = bool(config.topology.memory_peers_of(here))
        self._sockets: NodeSockets | None = None
        self.native = native_module.load("cpu").Communicator(**arguments_of(config, id))

    def exports(self, open_here: contextlib.ExitStack) -> list[Export]:
        if self._remote_peers:
            here = jax.process_index()
            self._sockets = open_here.enter_context(NodeSockets(here, self._remote_peers))
        descriptor = self.native.segment_descriptor  # owned by the communicator
        return [(descriptor, 0, "", 0)] if descriptor >= 0 else []

    def publish(self, exports: list[Export], exchange: Exchange) -> None:
        if self._sockets is not None:
            exchange.publish("node sockets", self._sockets.offer)

    def start(self, exports: list[Export], everyones: Mapping[int, list[Export]], exchange: Exchange) -> None:
        for process, [(descriptor, *_)] in everyones.items():
            self.native.attach_peer(process, os.dup(descriptor))  # it takes ownership
        if self._sockets is not None:
            lower = {process for _, process in self._remote_peers if process < exchange.process}
            offers = exchange.read("node sockets", sorted(lower))
            # The rest is for the other processes to learn of a failure.
            connected = self._sockets.connect(offers, min(exchange.seconds_left() / 2, MOST_CONNECTING_S))
            for (group, process), descriptor in connected.items():
                self.native.attach_remote(group, process, descriptor)  # likewise
        self.native.start()

    def transport(self) -> str:
        ways = []
        if self._has_memory_peers:
            ways.append("shared memory between the processes of a host")
        if self._remote_peers:
            ways.append("TCP between nodes, where a row goes once per node")
        # Otherwise every group is inside one process.
        return "; ".join(ways) or "process memory: peers' arrays are read in place"


# Seconds within which the processes of all nodes connect.
MOST_CONNECTING_S = 60.0

# A row in a wire format has up to three parts of 16 bytes, however few elements it has.
SHORTEST_ENCODED_ROW = 48


def window_of(config: CommunicatorConfig) -> tuple[int, int]:
    """Return the tokens of each source, and the bytes of a row, that ops in low-latency mode may push."""
    return config.most_low_latency_tokens, max(config.low_latency_row_bytes, SHORTEST_ENCODED_ROW)


class CudaHalf(NativeHalf):
    """On GPUs, every process lets its peers map its control blocks, and XLA's memory pools for reading."""

    native: CudaCommunicator

    def __init__(self, config: CommunicatorConfig, id: int) -> None:
        devices = config.topology.local_devices(jax.process_index())
        self._num_sms = config.num_sms
        self._config = config
        self.native = native_module.load("cuda").Communicator(
            **arguments_of(config, id),
            devices=[address_in_pool(device) for device in devices],
            num_sms=config.num_sms or 0,
            window=window_of(config),
        )

    def exports(self, open_here: contextlib.ExitStack) -> list[Export]:
        exports = self.native.exports()
        open_here.callback(descriptors.close_all, [descriptor for descriptor, *_ in exports])
        for descriptor, *_ in exports:
            os.set_inheritable(descriptor, False)
        return exports

    def publish(self, exports: list[Export], exchange: Exchange) -> None:
        for gpu, count in Counter(_gpus(exports)).items():
            exchange.publish(name_of_gpu(gpu), count)

    def start(self, exports: list[Export], everyones: Mapping[int, list[Export]], exchange: Exchange) -> None:
        # Its own memory is attached in the same way.
        for process, memories in {**everyones, exchange.process: exports}.items():
            self.native.attach_peer(process, memories)
        gpus = _gpus(exports)
        own = Counter(gpus)
        # Ranks of the whole mesh on the GPU of each device of this process.
        self.native.start([own[gpu] + sum(exchange.read_all_others(name_of_gpu(gpu))) for gpu in gpus])

    def transport(self) -> str:
        sms = f"{'up to ' if self._num_sms is None else ''}{self.native.most_blocks} SMs per op"
        ways = {
            "throughput": "peers' arrays are read in place",
            "low_latency": "rows are pushed to peers' windows",
            "auto": "peers' arrays are read in place, or rows are pushed to peers' windows",
        }
        between = self.native.between_nodes
        mode = "throughput" if between and self._config.mode == "auto" else self._config.mode
        way = f"{ways[mode]}, over NVLink or in one GPU"
        return f"{f'between nodes {between}; in a node ' if between else ''}{way}; {sms}"


HALVES: dict[str, type[NativeHalf]] = {"cpu": CpuHalf, "cuda": CudaHalf}


def make_native_half(config: CommunicatorConfig, exchange: Exchange) -> tuple[NativeHalf | None, str]:
    """Make the native half of a communicator; return it, or None and why a process could not.

    Args:
        config: of the communicator, the same in all processes.
        exchange: between all processes of the mesh. Memory is sent to those that share a group with this one.
    """
    topology = config.topology
    peers = topology.memory_peers_of(jax.process_index())
    half: NativeHalf | None = None
    exports: list[Export] = []
    error = ""
    with contextlib.ExitStack() as open_here:
        try:
            half = HALVES[topology.platform](config, exchange.id)
            exports = half.exports(open_here)
            _offer(exports, peers, exchange, open_here)
            half.publish(exports, exchange)
        except Exception as failure:  # of any kind: the other processes are notified
            error = _text_of(failure)
        error = _first_error(exchange, "creation", error)
        if half is not None and not error:
            offers = exchange.read("memory", sorted(peers))
            try:
                everyones = _receive(offers, topology, exchange.seconds_left(), open_here)
                half.start(exports, everyones, exchange)
            except Exception as failure:
                error = _text_of(failure)
            error = _first_error(exchange, "attachment", error)
    return (None if error else half), error


def _text_of(failure: Exception) -> str:
    return str(failure) or type(failure).__name__


def _first_error(exchange: Exchange, phase: str, error: str) -> str:
    summary = Summary()
    if error:
        summary.add("error", [exchange.process], error)
    return exchange.agree(phase, summary).get("error", "")


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


def address_in_pool(device: jax.Device) -> AddressInPool:
    """Return the ordinal of a GPU, and an address in XLA's memory pool on it."""
    array = jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    return device.local_hardware_id, array.unsafe_buffer_pointer()


def _offer(
    exports: list[Export], peers: set[int], exchange: Exchange, open_here: contextlib.ExitStack
) -> None:
    """Offer the memory of this process to peers until `open_here` ends."""
    if peers:
        server = descriptors.DescriptorServer([descriptor for descriptor, *_ in exports], len(peers))
        open_here.enter_context(server)
        exchange.publish("memory", {**server.offer, "facts": [facts for _, *facts in exports]})


def _receive(
    offers: Mapping[int, Any], topology: Topology, timeout_s: float, open_here: contextlib.ExitStack
) -> dict[int, list[Export]]:
    """Return the memory of peers, open until `open_here` ends."""
    everyones: dict[int, list[Export]] = {}
    for process, offer in offers.items():
        received = descriptors.receive(offer, topology.describe_process(process), timeout_s)
        open_here.callback(descriptors.close_all, received)
        everyones[process] = [
            (descriptor, *facts) for descriptor, facts in zip(received, offer["facts"], strict=True)
        ]
    return everyones


def _gpus(exports: list[Export]) -> list[str]:
    """Return the PCI address of each device of this process, which exports two memories."""
    return [gpu for _, _, gpu, _ in exports[::2]]


def name_of_gpu(gpu: str) -> str:
    """Return a name of a GPU that is unique among machines, whose PCI addresses are the same."""
    return f"gpus/{digest_of((machine_identity(), gpu))}"
