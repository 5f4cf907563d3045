"""Checks of an op at trace time: communicator, handle, call site and operands."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_deepep import jax_compat
from jax_deepep.checks import ROW_DTYPES, check_array, check_is_array, nearest_row_dtype
from jax_deepep.communicator import Communicator
from jax_deepep.communicator.topology import Topology
from jax_deepep.ops.handle import Handle

OPAQUE_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")  # copied bit for bit


def check_comm(comm: Any, op: str) -> None:
    """Raise unless `comm` is a communicator that can still be used."""
    if not isinstance(comm, Communicator):
        raise TypeError(
            f"comm: expected a jax_deepep.Communicator, got {type(comm).__name__}; make one outside of jit "
            f"and pass it to {op}."
        )
    comm.raise_if_unusable()


def check_sent_rows(name: str, value: Any, hidden_size: int) -> None:
    """Raise unless `value` has rows that dispatch can send: `hidden_size` floats, or integers that fit."""
    check_is_array(name, value)
    if value.dtype.name in ROW_DTYPES:
        check_array(name, value, (None, hidden_size), names="[T, hidden_size]")
        return
    if value.dtype.name not in OPAQUE_DTYPES:
        raise TypeError(
            f"{name}: expected dtype {', '.join(ROW_DTYPES + OPAQUE_DTYPES)}, got {value.dtype.name}; "
            f"cast it: {name}.astype(jnp.{nearest_row_dtype(value.dtype)}), or send its bits as integers: "
            f"jax.lax.bitcast_convert_type({name}, jnp.uint8)."
        )
    check_array(name, value, (None, None), names="[T, W]")
    widest = widest_integers(hidden_size, value.dtype.itemsize)
    if not 1 <= value.shape[1] <= widest:
        raise ValueError(
            f"{name}: expected rows of 1 to {widest} {value.dtype.name}, the bytes of hidden_size="
            f"{hidden_size} float32, got {value.shape[1]}; send the rest along the same routes with handle=, "
            "or make the communicator with a larger hidden_size."
        )


def check_fits_mode(name: str, rows: Any, comm: Communicator) -> None:
    """Raise unless the mode of `comm` sends rows as wide as these."""
    widest, width = comm.config.low_latency_row_bytes, rows.shape[1] * rows.dtype.itemsize
    if comm.mode == "low_latency" and width > widest:
        is_float = jnp.issubdtype(rows.dtype, jnp.floating)
        remedy = "cast them to bfloat16" if is_float else "send them in parts along the handle"
        raise ValueError(
            f'{name}: expected rows of at most {widest} bytes with mode="low_latency" and hidden_size='
            f"{comm.hidden_size}, whatever crosses the link, got {rows.shape[1]} {rows.dtype.name}, {width} "
            f'bytes; {remedy}, or make the communicator with mode="throughput".'
        )


def widest_integers(hidden_size: int, itemsize: int) -> int:
    """Return the most integers of `itemsize` bytes in a row: as many bytes as `hidden_size` float32."""
    return 4 * hidden_size // itemsize


def communicator_of(handle: Any, comm: Any, op: str) -> Communicator:
    """Return the communicator of `handle`.

    Raises:
        ValueError, TypeError: it is not a handle, does not have the shapes of one device, or belongs to
            another communicator than `comm`.
        CommunicatorError: the communicator cannot be used any more.
    """
    if not isinstance(handle, Handle):
        raise TypeError(
            f"handle: expected a jax_deepep.Handle, got {type(handle).__name__}; pass the second result of "
            "jax_deepep.dispatch."
        )
    own, capacity = handle.comm, handle.capacity
    if comm is not None:
        check_comm(comm, op)
        if comm is not own:
            raise ValueError(f"comm: expected {own!r}, which made the handle, got {comm!r}; leave comm out.")
    own.raise_if_unusable()
    if handle.source.shape != (capacity,):
        raise ValueError(
            f"handle: expected the leaves of one device, source of shape [capacity] = [{capacity}], got "
            f"{list(handle.source.shape)}; remove the leading axis with which a handle leaves shard_map: "
            "jax.tree.map(lambda leaf: leaf[0], handle)."
        )
    return own


def check_call_site(comm: Communicator, op: str) -> frozenset[str]:
    """Raise unless `op` is called per device; return the mesh axes that its results vary along."""
    if comm.mesh.size == 1:
        return frozenset()
    here, own = (
        {axis: size for axis, size in sizes.items() if size > 1}
        for sizes in (jax_compat.axis_sizes_here(), comm.mesh.shape)
    )
    if here and here != own:
        raise ValueError(
            f"comm: expected a communicator of the mesh in use here, {here}, got one of {own}; call {op} in "
            "jax.shard_map(..., mesh=comm.mesh), or make the communicator with the mesh of the program."
        )
    manual = jax_compat.manual_axes()
    for axis, size in own.items():
        if axis not in manual:
            raise ValueError(
                f"{op}: expected values of one device, got a call where the mesh axis {axis!r} of size "
                f"{size} is not manual (manual: {manual or 'none'}); call it in jax.shard_map(..., "
                "mesh=comm.mesh) over all mesh axes. Under a vmap, do not split the mapped dimension over an "
                "Explicit axis."
            )
    return frozenset(comm.axis_names) & frozenset(manual)


def check_groups(comm: Communicator, mesh: Mesh) -> None:
    """Raise if a program over `mesh` would have other groups than `comm`, or other ranks in them.

    The native side detects only a device that runs as another rank of its group.
    """
    if comm.size == 1:  # whatever axes the program has, a device is its own group
        return
    of_program = Topology.of(mesh, comm.axis_names)
    if not of_program.has_groups_of(comm.topology):
        groups = [[[d.id for d in group] for group in t.groups] for t in (of_program, comm.topology)]
        raise ValueError(
            f"comm: expected the groups of devices that the program's mesh has along {comm.axis_name!r}, "
            f"{groups[0]}, got {groups[1]}; use shard_map with comm.mesh, or make the communicator with the "
            "mesh of the program."
        )


def check_platform(comm: Communicator, platforms: Sequence[str]) -> None:
    """Raise unless a program for `platforms` can run native ops of `comm`."""
    if set(platforms) != {comm.platform}:
        raise ValueError(
            f"comm: expected a communicator of {' and '.join(platforms)} devices, for which the program is "
            f'lowered, got native ops on {comm.platform}; make it with implementation="xla", which runs on '
            "every platform, or on a mesh of those devices."
        )


def vary_together(axes: frozenset[str], *values: Any) -> tuple[Any, ...]:
    """Mark all arrays in `values` as varying along `axes` and along every axis that one of them varies along.

    Results of an op differ between the devices of a group whatever its operands do, and operands of
    one primitive must agree in how they vary.
    """
    for value in jax.tree.leaves(values):
        axes = axes | jax_compat.varying_axes(value)
    marked: tuple[Any, ...] = jax.tree.map(
        lambda value: jax_compat.as_varying(jnp.asarray(value), axes), values
    )
    return marked
