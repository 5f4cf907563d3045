"""Meshes over all devices of all processes; moves arrays onto them and back.

Arrays of the tests are NumPy arrays [devices, ...] in the order (group, rank). Nothing here asks how many
processes hold the devices.
"""

import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from implementations import OPS_ARE_CAPTURED
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from process_exchange import all_gather

DEVICE_COUNTS = (2, 4, 8)


@functools.cache
def _meshes() -> dict[str, tuple[tuple[int, ...], tuple[str, ...], str | tuple[str, ...]]]:
    """Return shape, axes, and the expert-parallel ones among them, by name."""
    devices = jax.device_count()
    if devices not in DEVICE_COUNTS:
        raise RuntimeError(f"the tests take 2, 4 or 8 devices over all processes, got {devices}")
    data = min(2, devices // 2)  # "data × expert" and "expert × data" have groups of two devices at least
    return {
        "expert": ((devices,), ("expert",), "expert"),
        "data × expert": ((data, devices // data), ("data", "expert"), "expert"),
        "data × expert 2": ((devices // 2, 2), ("data", "expert"), "expert"),
        "expert × data": ((devices // data, data), ("expert", "data"), "expert"),
        "node × expert": ((2, devices // 2), ("node", "expert"), ("node", "expert")),
        "stage × expert": ((2, devices // 2), ("stage", "expert"), "expert"),
        "fsdp × expert × tensor": (
            (devices // 4 or 1, min(2, devices // 2), 2),
            ("fsdp", "expert", "tensor"),
            "expert",
        ),
        "data × fsdp": ((devices // 2, 2), ("data", "fsdp"), ()),  # every device is its own group
        "one device": ((1,), ("expert",), "expert"),
    }


@functools.cache
def mesh_named(name: str, axis_types: AxisType | tuple[AxisType, ...] = AxisType.Auto) -> Mesh:
    """Return a mesh over all devices, or over one of this process; its sizes follow from their number.

    `axis_types` are those of all axes, or of each.
    """
    shape, axes, _ = _meshes()[name]
    devices = jax.local_devices()[:1] if name == "one device" else jax.devices()
    types = axis_types if isinstance(axis_types, tuple) else (axis_types,) * len(axes)
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=types)


def expert_axes(name: str) -> str | tuple[str, ...]:
    """Return the `axis_name` of a communicator on the mesh `name`."""
    return _meshes()[name][2]


def groups_of(mesh: Mesh, axis_name: str | tuple[str, ...]) -> tuple[int, int]:
    """Return (number of groups, devices in one group)."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    size = int(np.prod([mesh.shape[axis] for axis in axes]))
    return mesh.size // size, size


def device_axis(mesh: Mesh, axis_name: str | tuple[str, ...]) -> P:
    """Return the sharding of an axis [devices] in the order (group, rank)."""
    inner = (axis_name,) if isinstance(axis_name, str) else axis_name
    outer = tuple(axis for axis in mesh.axis_names if axis not in inner)
    return P(outer + inner)


def put_on_mesh(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Put NumPy arrays, which every process has in full, on the devices of `mesh`."""
    sharding = NamedSharding(mesh, spec)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Return arrays on the mesh as NumPy arrays, in full in every process."""
    arrays, structure = jax.tree.flatten(tree)
    if all(array.is_fully_addressable for array in arrays):
        return jax.tree.unflatten(structure, map(np.asarray, arrays))
    values = [np.empty(array.shape, array.dtype) for array in arrays]
    # Every part of every array once, in the same order in every process.
    parts = [
        (value, shard)
        for value, array in zip(values, arrays, strict=True)
        for shard in sorted(array.global_shards, key=lambda shard: shard.device.id)
        if shard.replica_id == 0
    ]
    mine = [np.asarray(shard.data) for _, shard in parts if shard.device.process_index == jax.process_index()]
    everyones = [io.BytesIO(data) for data in all_gather(b"".join(part.tobytes() for part in mine))]
    for value, shard in parts:
        part = value[shard.index]
        data = everyones[shard.device.process_index].read(part.nbytes)
        value[shard.index] = np.frombuffer(data, part.dtype).reshape(part.shape)
    return jax.tree.unflatten(structure, values)


def per_device(
    function: Callable[..., Any], mesh: Mesh, axis_name: str | tuple[str, ...], *, check_vma: bool = True
) -> Callable[..., Any]:
    """Map a function of per-device values to one of arrays [devices, ...], by shard_map."""

    def body(*args: Any) -> Any:
        results = function(*jax.tree.map(lambda array: array[0], args))
        return jax.tree.map(lambda array: array[None], results)

    if mesh.size == 1:
        return body
    spec = device_axis(mesh, axis_name)
    return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `jax.jit` of a function, whose calls are `captured`."""
    return captured(jax.jit(function))


def captured(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return a program whose calls run three times where XLA captures all ops in CUDA graphs.

    XLA may run ops one by one at first; then it captures them, and replays the graph.
    """

    def run(*args: Any) -> Any:
        for _ in range(2 if OPS_ARE_CAPTURED else 0):
            jax.block_until_ready(program(*args))
        return program(*args)

    return run


def run_per_device(
    function: Callable[..., Any], mesh: Mesh, axis_name: str | tuple[str, ...], *args: Any, **options: Any
) -> Any:
    """Compile and run a function of per-device values on NumPy arrays [devices, ...]; return NumPy."""
    program = compiled(per_device(function, mesh, axis_name, **options))
    return fetch(program(*put_on_mesh(args, mesh, device_axis(mesh, axis_name))))
