"""Meshes over all devices of all processes, and the way of arrays onto them and back.

Arrays of the tests are NumPy arrays [devices, ...] in the order (group, rank). Nothing here asks how many
processes hold the devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Name, shape, axes, and which of them are expert-parallel.
_SHAPES = {
    "expert 8": ((8,), ("expert",), "expert"),
    "data 2 × expert 4": ((2, 4), ("data", "expert"), "expert"),
    "data 4 × expert 2": ((4, 2), ("data", "expert"), "expert"),
    "expert 4 × data 2": ((4, 2), ("expert", "data"), "expert"),
    "node 2 × expert 4": ((2, 4), ("node", "expert"), ("node", "expert")),
    "stage 2 × expert 4": ((2, 4), ("stage", "expert"), "expert"),
    "one device": ((1,), ("expert",), "expert"),
}


@functools.cache
def mesh_named(name: str, axis_types: AxisType = AxisType.Auto) -> Mesh:
    """Return a mesh over all eight devices, or over one of this process."""
    shape, axes, _ = _SHAPES[name]
    devices = jax.local_devices()[:1] if name == "one device" else jax.devices()
    if len(devices) != np.prod(shape):
        raise RuntimeError(f"the tests take 8 devices over all processes, got {len(devices)}")
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=(axis_types,) * len(axes))


def expert_axes(name: str) -> str | tuple[str, ...]:
    """Return the `axis_name` of a communicator on the mesh `name`."""
    return _SHAPES[name][2]


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
    # Every process fills in what it holds, zeros elsewhere; the largest byte of all processes is the value.
    # All arrays go at once, in a buffer of few different sizes, so that little is compiled for it.
    values = [np.zeros(array.shape, array.dtype) for array in arrays]
    for array, value in zip(arrays, values, strict=True):
        for shard in array.addressable_shards:
            value[shard.index] = shard.data
    mine = b"".join(value.tobytes() for value in values)
    buffer = np.zeros(1 << max(12, (len(mine) - 1).bit_length()), np.uint8)
    buffer[: len(mine)] = np.frombuffer(mine, np.uint8)
    everyones = np.max(multihost_utils.process_allgather(buffer), axis=0)
    ends = np.cumsum([value.nbytes for value in values])
    parts = np.split(everyones[: ends[-1]], ends[:-1])
    fetched = [
        np.frombuffer(part.tobytes(), value.dtype).reshape(value.shape)
        for part, value in zip(parts, values, strict=True)
    ]
    return jax.tree.unflatten(structure, fetched)


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


def run_per_device(
    function: Callable[..., Any], mesh: Mesh, axis_name: str | tuple[str, ...], *args: Any, **options: Any
) -> Any:
    """Compile and run a function of per-device values on NumPy arrays [devices, ...]; return NumPy."""
    program = jax.jit(per_device(function, mesh, axis_name, **options))
    return fetch(program(*put_on_mesh(args, mesh, device_axis(mesh, axis_name))))
