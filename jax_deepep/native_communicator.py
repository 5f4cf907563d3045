"""The native half of a communicator: made by all processes together, one way per platform.

cpu    every process shares memory of its own, through which rows go to other processes
cuda   every process lets its peers map its control blocks, and XLA's memory pools for reading
"""

import contextlib
import os
from typing import Any

import jax
import numpy as np

from jax_deepep import cpu_threads, native_module
from jax_deepep.bootstrap import Exchange
from jax_deepep.topology import Topology


def obstacle(comm: Any) -> str:
    """Return why native ops cannot serve `comm` as far as this process can tell, or an empty string."""
    topology: Topology = comm.topology
    if len(topology.platforms) > 1:
        return f"native ops need devices of one platform, not of {', '.join(sorted(topology.platforms))}"
    if text := native_module.obstacle(topology.platform):
        return text
    if topology.platform == "cuda":
        return _obstacle_of_gpus(comm, native_module.load("cuda"))
    return ""


def _obstacle_of_gpus(comm: Any, module: Any) -> str:
    if comm.topology.num_ranks > module.max_ranks:
        return (
            f"groups have {comm.topology.num_ranks} devices, and native ops take at most {module.max_ranks}"
        )
    num_topk = comm.num_experts_per_tok
    if isinstance(num_topk, int) and num_topk > module.max_experts_per_tok:
        return f"num_experts_per_tok is {num_topk}, and native ops take at most {module.max_experts_per_tok}"
    for device in comm.topology.local_devices(jax.process_index()):
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        if text := module.obstacle_of_pool(_in_pool(device), limit):
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
    native, why_not = None, ""
    try:
        native = _make_cpu(comm) if comm.platform == "cpu" else _make_cuda(comm)
        descriptors = _descriptors_of(native, comm.platform)
    except RuntimeError as error:  # the native side, which has said what failed
        native, descriptors, why_not = None, [], str(error)
    if exchange is not None:
        why_not = _first_error(exchange, "creation", why_not)
        if not why_not:
            why_not = _attach(comm, native, descriptors, exchange)
    elif not why_not and comm.platform == "cuda":
        why_not = _start(native, {jax.process_index(): descriptors})
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


def _descriptors_of(native: Any, platform: str) -> list[tuple[int, int]]:
    """Return what peers need: descriptors, and the bytes behind each (0 where peers know them)."""
    if platform == "cuda":
        return native.exports()
    return [(native.segment_descriptor, 0)] if native.segment_descriptor >= 0 else []


def _attach(comm: Any, native: Any, exports: list[tuple[int, int]], exchange: Exchange) -> str:
    """Exchange memory between processes; return the first error of any process."""
    if not exports:  # no group spans processes
        return ""
    sizes = exchange.all_gather("sizes", {"bytes": [size for _, size in exports]})
    received = exchange.send_descriptors_to_all([descriptor for descriptor, _ in exports])
    everyones = {
        process: list(zip(descriptors, sizes[process]["bytes"], strict=True))
        for process, descriptors in received.items()
    }
    if comm.platform == "cuda":
        error = _start(native, {jax.process_index(): exports, **everyones})
    else:
        error = ""
        try:
            for process, [(descriptor, _)] in everyones.items():
                native.attach_peer(process, descriptor)
            native.start()
        except RuntimeError as failure:
            error = str(failure)
    return _first_error(exchange, "attachment", error)


def _start(native: Any, exports: dict[int, list[tuple[int, int]]]) -> str:
    """Map the GPU memory of all processes; return an error, or nothing."""
    try:
        for process, memories in exports.items():
            native.attach_peer(process, memories)
        native.start()
    except RuntimeError as error:
        return str(error)
    finally:
        for memories in exports.values():
            for descriptor, _ in memories:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
    return ""


def _first_error(exchange: Exchange, name: str, error: str) -> str:
    errors = exchange.all_gather(name, {"error": error})
    return next((facts["error"] for facts in errors.values() if facts["error"]), "")
