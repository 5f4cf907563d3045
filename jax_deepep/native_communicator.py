"""The native half of a communicator: made by all processes together, one way per platform.

cpu    every process shares memory of its own, through which rows go to other processes
cuda   every process lets its peers map its control blocks, and XLA's memory pools for reading
"""

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jax_deepep import cpu_threads, native_module
from jax_deepep.bootstrap import Exchange
from jax_deepep.topology import Topology

# Memory of this process or a peer's: an open descriptor, the bytes behind it (0 where everyone knows
# them), and the PCI address of its GPU.
Export = tuple[int, int, str]


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


def make(comm: Any, exchange: Exchange | None) -> tuple[Any, str]:
    """Make the native half of `comm`; return it, or None and why some process could not.

    Args:
        comm: the communicator, complete but for this.
        exchange: of all processes of the mesh, or None where there is one process.
    """
    native, exports, why_not = None, [], ""
    with contextlib.ExitStack() as open_here:
        try:
            native = _make_cpu(comm) if comm.platform == "cpu" else _make_cuda(comm)
            exports = _exports_of(native, comm.platform)
        except Exception as error:  # whatever it is, the other processes must learn of it
            why_not = str(error)
        if comm.platform == "cuda":
            _close_at_end(open_here, exports)
        if exchange is not None:
            why_not = _first_error(exchange, "creation", why_not)
            if not why_not and exports:  # a group spans processes, or the devices are GPUs
                why_not = _attach(native, comm.platform, exports, exchange, open_here)
        elif not why_not and comm.platform == "cuda":
            why_not = _start(native, comm.platform, {jax.process_index(): exports})
    return (None if why_not else native), why_not


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
    places = [
        (_name_to_custom_calls(device), group, rank, device.process_index)
        for (group, rank), device in np.ndenumerate(topology.groups)
    ]
    return {
        "id": comm.id,
        "fingerprint": comm.fingerprint,
        "places": places,
        "process": jax.process_index(),
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


def _exports_of(native: Any, platform: str) -> list[Export]:
    """Return what peers need; the descriptors are the caller's on GPUs, and the communicator's on CPU."""
    if platform == "cuda":
        return native.exports()
    return [(native.segment_descriptor, 0, "")] if native.segment_descriptor >= 0 else []


def _close_at_end(stack: contextlib.ExitStack, exports: Iterable[Export]) -> None:
    for descriptor, *_ in exports:
        stack.callback(os.close, descriptor)


def _attach(
    native: Any, platform: str, exports: list[Export], exchange: Exchange, open_here: contextlib.ExitStack
) -> str:
    """Exchange memory between processes; return the first error of any process."""
    mine = {"bytes": [size for _, size, _ in exports], "places": [place for *_, place in exports]}
    facts = exchange.all_gather("sizes", mine)
    received = exchange.send_descriptors_to_all([descriptor for descriptor, *_ in exports])
    everyones = {
        process: list(zip(descriptors, facts[process]["bytes"], facts[process]["places"], strict=True))
        for process, descriptors in received.items()
    }
    for peers_exports in everyones.values():
        _close_at_end(open_here, peers_exports)
    if platform == "cuda":  # its own devices go the same way
        everyones[jax.process_index()] = exports
    return _first_error(exchange, "attachment", _start(native, platform, everyones))


def _start(native: Any, platform: str, exports: dict[int, list[Export]]) -> str:
    """Map the memory of processes; return an error, or nothing."""
    try:
        for process, memories in exports.items():
            if platform == "cuda":
                native.attach_peer(process, memories)
            else:
                [(descriptor, *_)] = memories
                native.attach_peer(process, os.dup(descriptor))  # it takes a descriptor over
        native.start()
    except Exception as error:  # whatever it is, the other processes must learn of it
        return str(error)
    return ""


def _first_error(exchange: Exchange, name: str, error: str) -> str:
    errors = exchange.all_gather(name, {"error": error})
    return next((facts["error"] for facts in errors.values() if facts["error"]), "")
