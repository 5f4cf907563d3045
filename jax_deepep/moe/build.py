"""Builds a layer's configuration, communicator included, from the arguments of a module."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep import jax_compat
from jax_deepep.capacity import round_up
from jax_deepep.checks import checked_integer
from jax_deepep.communicator import Communicator
from jax_deepep.moe.config import MoEConfig


def build_config(
    num_experts: int,
    num_experts_per_tok: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    comm: Communicator | None = None,
    mesh: Mesh | None = None,
    axis_name: str | tuple[str, ...] = "expert",
    max_tokens: int | None = None,
    num_chunks: int | None = None,
    two_batch_overlap: bool = MoEConfig.two_batch_overlap,
    num_physical_experts: int | None = None,
    **choices: Any,
) -> MoEConfig:
    """Return the configuration of a MoE layer; make its communicator unless one is passed.

    **Collective** without `comm`: see `jax_deepep.Communicator`.

    Args:
        num_experts, num_experts_per_tok, hidden_size, intermediate_size, num_chunks, two_batch_overlap,
            num_physical_experts: as in `MoEConfig`.
        comm: the communicator, for any number of layers of the same sizes. The arguments below are for a
            communicator that is made here.
        mesh: None = the one that `jax.set_mesh` set, or a mesh of the only device.
        axis_name: the expert-parallel axis, or a tuple of axes, outermost first. On a mesh without an axis
            "expert", the default, every device has all experts.
        max_tokens: the most tokens per device in one call of the layer.
        choices: further fields of `MoEConfig`.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it and says what was expected.
    """
    sizes = {
        "num_experts": num_experts if num_physical_experts is None else num_physical_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "hidden_size": hidden_size,
    }
    if comm is None:
        comm = _communicator(
            mesh, axis_name, max_tokens, num_chunks, two_batch_overlap, num_physical_experts, sizes
        )
    elif mesh is not None and mesh != comm.mesh:
        raise ValueError(
            f"mesh: expected None or the communicator's mesh, {comm.mesh.shape}, got {mesh.shape}; leave "
            "it out."
        )
    return MoEConfig(
        comm, num_experts, num_experts_per_tok, hidden_size, intermediate_size, num_chunks=num_chunks,
        two_batch_overlap=two_batch_overlap, num_physical_experts=num_physical_experts, **choices,
    )  # fmt: skip


def _communicator(
    mesh: Mesh | None,
    axis_name: str | tuple[str, ...],
    max_tokens: int | None,
    num_chunks: int | None,
    two_batch_overlap: bool,
    num_physical_experts: int | None,
    sizes: dict[str, Any],
) -> Communicator:
    if jax_compat.is_tracing():
        raise ValueError(
            "comm: expected a jax_deepep.Communicator inside a jitted or otherwise transformed function, got "
            "None; processes exchange messages to make one, so make it where the mesh is made, and pass "
            "comm=comm, also to modules inside others."
        )
    if max_tokens is None:
        raise ValueError(
            "max_tokens: expected an integer without comm, got None; pass the most tokens of a device in "
            "one call, and mesh= unless jax.set_mesh has set it, or pass comm."
        )
    max_tokens = checked_integer("max_tokens", max_tokens, minimum=1)
    num_batches = 1 if num_chunks is None else checked_integer("num_chunks", num_chunks, minimum=1)
    num_batches *= 2 if two_batch_overlap else 1
    if mesh is None:
        mesh = _mesh_here()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    here = tuple(name for name in names if name in mesh.axis_names)
    if here != tuple(names) and axis_name != "expert":
        raise ValueError(
            f"axis_name: expected axes of the mesh, {mesh.axis_names}, got {axis_name!r}; name the axis that "
            f"shards the experts, for example axis_name={mesh.axis_names[-1]!r}, or leave it out: on a mesh "
            "without an axis 'expert', every device has all experts."
        )
    if num_physical_experts is not None:  # the communicator's error would name num_experts
        checked_integer("num_physical_experts", num_physical_experts, minimum=1)
        num_devices = math.prod(mesh.shape[name] for name in here)
        if num_physical_experts % num_devices:
            raise ValueError(
                f"num_physical_experts: expected a multiple of the {num_devices} devices along {here}, got "
                f"{num_physical_experts}; pass the same number for each device, for example "
                f"{round_up(num_physical_experts, num_devices)}."
            )
    return Communicator(mesh, here, max_tokens=round_up(max_tokens, num_batches) // num_batches, **sizes)


def _mesh_here() -> Mesh:
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        return mesh
    if jax.device_count() > 1:
        raise ValueError(
            f"mesh: expected the mesh of the program where there are {jax.device_count()} devices, got None; "
            "pass mesh= or comm=, or call jax.set_mesh(mesh)."
        )
    return Mesh(np.array(jax.devices()), ("expert",))
