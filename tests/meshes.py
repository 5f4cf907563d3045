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

    def fetch_array(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        values, held = np.zeros(array.shape, array.dtype), np.zeros(array.shape, bool)
        for shard in array.addressable_shards:
            values[shard.index], held[shard.index] = shard.data, True
        all_values, all_held = multihost_utils.process_allgather((values, held))  # [processes, ...]
        holder = np.argmax(all_held, axis=0)
        return np.take_along_axis(np.asarray(all_values), holder[None], axis=0)[0]

    return jax.tree.map(fetch_array, tree)


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
