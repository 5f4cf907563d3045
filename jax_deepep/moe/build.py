"""From the arguments of a module to its configuration, communicator included."""

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
    num_physical_experts: int | None = None,
    **choices: Any,
) -> MoEConfig:
    """Return the configuration of a MoE layer; make its communicator unless there is one.

    **Collective** without `comm`: see `jax_deepep.Communicator`.

    Args:
        num_experts, num_experts_per_tok, hidden_size, intermediate_size, num_chunks,
            num_physical_experts: as in `MoEConfig`.
        comm: the communicator, for any number of layers of the same sizes. The arguments below are those of
            one that is made here.
        mesh: None = the one that `jax.set_mesh` set, or the device, if there is only one.
        axis_name: the expert-parallel axis, or a tuple of axes, outermost first. On a mesh without an axis
            "expert", the default, every device has all experts.
        max_tokens: most tokens per device in one call of the layer.
        choices: further fields of `MoEConfig`.

    Raises:
        ValueError, TypeError: a bad argument, named with what it got and what it takes.
    """
    sizes = {
        "num_experts": num_experts if num_physical_experts is None else num_physical_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "hidden_size": hidden_size,
    }
    if comm is None:
        comm = _communicator(mesh, axis_name, max_tokens, num_chunks, num_physical_experts, sizes)
    elif mesh is not None and mesh != comm.mesh:
        raise ValueError(
            f"mesh: got {mesh.shape} together with a communicator of {comm.mesh.shape}; takes None, "
            "or the communicator's own."
        )
    return MoEConfig(
        comm, num_experts, num_experts_per_tok, hidden_size, intermediate_size, num_chunks=num_chunks,
        num_physical_experts=num_physical_experts, **choices,
    )  # fmt: skip


def _communicator(
    mesh: Mesh | None,
    axis_name: str | tuple[str, ...],
    max_tokens: int | None,
    num_chunks: int | None,
    num_physical_experts: int | None,
    sizes: dict[str, Any],
) -> Communicator:
    if jax_compat.is_tracing():
        raise ValueError(
            "comm: got None inside of a jitted or otherwise transformed function; takes a "
            "jax_deepep.Communicator made outside of it, because to make one is an agreement of processes. "
            "Make it where the mesh is made and pass it on, comm=comm, to modules inside of others, too."
        )
    if max_tokens is None:
        raise ValueError(
            "max_tokens: got None without comm; takes the most tokens that a device has in one call, or "
            "pass comm."
        )
    max_tokens = checked_integer("max_tokens", max_tokens, minimum=1)
    num_chunks = 1 if num_chunks is None else checked_integer("num_chunks", num_chunks, minimum=1)
    if mesh is None:
        mesh = _mesh_here()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    here = tuple(name for name in names if name in mesh.axis_names)
    if here != tuple(names) and axis_name != "expert":
        raise ValueError(
            f"axis_name: got {axis_name!r}; takes axes of the mesh, {mesh.axis_names}, or 'expert', without "
            "which every device has all experts. Name the axis that splits the experts, for example "
            f"axis_name={mesh.axis_names[-1]!r}."
        )
    if num_physical_experts is not None:  # the communicator would say num_experts
        checked_integer("num_physical_experts", num_physical_experts, minimum=1)
        num_devices = math.prod(mesh.shape[name] for name in here)
        if num_physical_experts % num_devices:
            raise ValueError(
                f"num_physical_experts: got {num_physical_experts} for {num_devices} devices along {here}; "
                f"takes a multiple of {num_devices}, the same number of slots on each, for example "
                f"{round_up(num_physical_experts, num_devices)}."
            )
    return Communicator(mesh, here, max_tokens=round_up(max_tokens, num_chunks) // num_chunks, **sizes)


def _mesh_here() -> Mesh:
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        return mesh
    if jax.device_count() > 1:
        raise ValueError(
            f"mesh: got None, and there are {jax.device_count()} devices; takes the mesh of the program, as "
            "mesh=, in comm, or by jax.set_mesh(mesh)."
        )
    return Mesh(np.array(jax.devices()), ("expert",))
