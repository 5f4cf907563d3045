"""How all processes make the native halves of a communicator together: one class per platform."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from jax_deepep.communicator import descriptors
from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.cpu_half import CpuHalf
from jax_deepep.communicator.cuda_half import CudaHalf
from jax_deepep.communicator.native_half import NativeHalf
from jax_deepep.communicator.native_types import Export
from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.communicator.topology import Topology

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
