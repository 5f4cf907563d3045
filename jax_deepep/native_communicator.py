"""The native half of a communicator: made by all processes together, one way per platform.

cpu    every process shares memory of its own, through which rows go to other processes
cuda   every process lets its peers map its control blocks, and XLA's memory pools for reading
"""

import contextlib
import os
from collections import Counter
from typing import Any

import jax
import numpy as np

from jax_deepep import bootstrap, cpu_threads, descriptors, native_module
from jax_deepep.bootstrap import Exchange, Summary
from jax_deepep.topology import Topology, machine_identity

# Memory of this process or a peer's: an open descriptor, the bytes behind it (0 where everyone knows
# them), the PCI address of its GPU, and a number that no other allocation of any process has.
Export = tuple[int, int, str, int]


def obstacle(comm: Any) -> str:
    """Return why native ops cannot serve `comm` as far as this process can tell, or an empty string.

    Never raises: the other processes wait for what this one finds.
    """
    if comm.implementation == "xla":  # nothing is native then, and no GPU is touched
        return ""
    topology: Topology = comm.topology
    if len(topology.platforms) > 1:
        return f"native ops need devices of one platform, not of {', '.join(sorted(topology.platforms))}"
    try:
        if text := native_module.obstacle(topology.platform):
            return text
        return _obstacle_of_gpus(comm) if topology.platform == "cuda" else ""
    except Exception as error:
        return f"looking for native ops failed: {type(error).__name__}: {error}"


def _obstacle_of_gpus(comm: Any) -> str:
    module = native_module.load("cuda")
    for device in comm.topology.local_devices(jax.process_index()):
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:
            return (
                f"JAX does not tell how far XLA's memory pool on GPU {device.local_hardware_id} may grow "
                "(memory_stats() has no bytes_limit): leave XLA_PYTHON_CLIENT_ALLOCATOR and "
                "XLA_PYTHON_CLIENT_PREALLOCATE at their defaults"
            )
        if text := module.obstacle(
            comm.topology.num_ranks, comm.num_experts, comm.num_experts_per_tok, _in_pool(device), limit
        ):
            return text
    return ""


def _in_pool(device: jax.Device) -> tuple[int, int]:
    """Return the ordinal of a GPU, and an address in XLA's memory pool on it."""
    array = jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    return device.local_hardware_id, array.unsafe_buffer_pointer()


def make(comm: Any, exchange: Exchange) -> tuple[Any, str]:
    """Make the native half of `comm`; return it, or None and why some process could not.

    Args:
        comm: the communicator, complete but for this.
        exchange: between all processes of the mesh. Memory goes to those that share a group with this one.
    """
    peers: set[int] = comm.topology.peers_of(jax.process_index())
    native, exports, error = None, [], ""
    with contextlib.ExitStack() as open_here:
        try:
            native = _make_cpu(comm) if comm.platform == "cpu" else _make_cuda(comm)
            exports = _exports_of(native, comm.platform, open_here)
            _offer(exports, peers, exchange, open_here)
            if comm.platform == "cuda":
                _publish_ranks_per_gpu(exports, exchange)
        except Exception as failure:  # whatever it is, the other processes must learn of it
            error = _text_of(failure)
        error = _first_error(exchange, "creation", error)
        if not error:
            offers = exchange.read("memory", sorted(peers))
            try:
                everyones = _receive(offers, comm.topology, exchange.seconds_left(), open_here)
                _start(native, comm.platform, exports, everyones, exchange)
            except Exception as failure:
                error = _text_of(failure)
            error = _first_error(exchange, "attachment", error)
    return (None if error else native), error


def _text_of(failure: Exception) -> str:
    return str(failure) or type(failure).__name__


def _first_error(exchange: Exchange, phase: str, error: str) -> str:
    summary = Summary()
    if error:
        summary.add("error", [exchange.process], error)
    return exchange.agree(phase, summary).get("error", "")


def _make_cpu(comm: Any) -> Any:
    topology: Topology = comm.topology
    cpu_threads.warn_of_too_few_threads(len(topology.local_devices(jax.process_index())))
    return native_module.load("cpu").Communicator(**_arguments(comm))


def _make_cuda(comm: Any) -> Any:
    devices = [_in_pool(device) for device in comm.topology.local_devices(jax.process_index())]
    return native_module.load("cuda").Communicator(
        **_arguments(comm), devices=devices, num_sms=comm.num_sms or 0
    )


def _arguments(comm: Any) -> dict[str, Any]:
    topology: Topology = comm.topology
    here = jax.process_index()
    # Other groups than those of its peers do not concern a process, however many there are.
    places = [
        (_name_to_custom_calls(device), group, rank, device.process_index)
        for group in topology.groups_with({here, *topology.peers_of(here)})
        for rank, device in enumerate(topology.groups[group])
    ]
    return {
        "id": comm.id,
        "fingerprint": comm.fingerprint,
        "places": places,
        "process": here,
        "num_ranks": comm.size,
        "num_groups": len(topology.groups),
        "num_experts": comm.num_experts,
        "num_topk": comm.num_experts_per_tok,
        "max_tokens": comm.max_tokens,
        "hidden_size": comm.hidden_size,
        "timeout_s": float(comm.timeout_s),
    }


def _name_to_custom_calls(device: jax.Device) -> int:
    """Return the ordinal that XLA gives to a custom call on a device of this process."""
    if device.platform == "cpu":
        return device.id
    return device.local_hardware_id if device.process_index == jax.process_index() else -1


def _exports_of(native: Any, platform: str, open_here: contextlib.ExitStack) -> list[Export]:
    """Return what peers need; the descriptors are the communicator's on CPU."""
    if platform == "cpu":
        return [(native.segment_descriptor, 0, "", 0)] if native.segment_descriptor >= 0 else []
    exports: list[Export] = native.exports()
    open_here.callback(descriptors.close_all, [descriptor for descriptor, *_ in exports])
    for descriptor, *_ in exports:
        os.set_inheritable(descriptor, False)
    return exports


def _offer(
    exports: list[Export], peers: set[int], exchange: Exchange, open_here: contextlib.ExitStack
) -> None:
    """Let peers have the memory of this process until `open_here` ends."""
    if peers:
        server = descriptors.DescriptorServer([descriptor for descriptor, *_ in exports], len(peers))
        open_here.enter_context(server)
        exchange.publish("memory", {**server.offer, "facts": [facts for _, *facts in exports]})


def _receive(
    offers: dict[int, Any], topology: Topology, timeout_s: float, open_here: contextlib.ExitStack
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


def _start(
    native: Any, platform: str, exports: list[Export], everyones: dict[int, list[Export]], exchange: Exchange
) -> None:
    """Map the memory of peers, and on GPUs, where its own goes the same way, of this process."""
    if platform == "cpu":
        for process, [(descriptor, *_)] in everyones.items():
            native.attach_peer(process, os.dup(descriptor))  # it takes a descriptor over
        native.start()
        return
    for process, memories in {**everyones, exchange.process: exports}.items():
        native.attach_peer(process, memories)
    native.start(_ranks_per_gpu(exports, exchange))


def _gpus(exports: list[Export]) -> list[str]:
    """Return the PCI address of each device of this process, which exports two memories."""
    return [gpu for _, _, gpu, _ in exports[::2]]


def _name_of_gpu(gpu: str) -> str:
    """Return the name of a GPU among those of all machines, which have the same addresses."""
    return f"gpus/{bootstrap.digest_of((machine_identity(), gpu))}"


def _publish_ranks_per_gpu(exports: list[Export], exchange: Exchange) -> None:
    for gpu, count in Counter(_gpus(exports)).items():
        exchange.publish(_name_of_gpu(gpu), count)


def _ranks_per_gpu(exports: list[Export], exchange: Exchange) -> list[int]:
    """Return how many ranks of the whole mesh are on the GPU of each device of this process."""
    gpus = _gpus(exports)
    own = Counter(gpus)
    return [own[gpu] + sum(exchange.read_all_others(_name_of_gpu(gpu))) for gpu in gpus]
