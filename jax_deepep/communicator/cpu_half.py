"""The native half of a communicator on CPU devices."""

import contextlib
import os
from collections.abc import Mapping

import jax

from jax_deepep.communicator import native_module
from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.native_half import NativeHalf, arguments_of
from jax_deepep.communicator.native_types import CpuCommunicator, Export
from jax_deepep.communicator.node_sockets import NodeSockets
from jax_deepep.communicator.process_exchange import Exchange

# Seconds within which the processes of all nodes connect.
MOST_CONNECTING_S = 60.0


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
