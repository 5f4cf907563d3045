"""The weights of redundant experts: fetched from the devices that own them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.layer import placed


def physical_parameters(
    config: MoEConfig, parameters: Mapping[str, jax.Array], expert_map: Any, *, keep_home: bool = True
) -> dict[str, jax.Array]:
    """Return `parameters` with the experts' matrices as the slots hold them: [P, ...] in place of [E, ...].

    Differentiable: the gradient of an expert is the sum of those of its copies. A training step calls it with
    the parameters of the step (the Flax modules do); to serve, call it once for each expert_map.

    Per slot that is fetched, R matrices pass through every device, and are in its memory meanwhile.

    **Collective:** takes global arrays, outside of `shard_map`; every process of the mesh calls it.

    Args:
        config: static, with `num_physical_experts`.
        parameters: arrays of the names and shapes in `config.parameters`.
        expert_map: int32 [P], see `jax_deepep.balancing.plan_experts`; an array of NumPy, or of JAX, which may
            be traced. None without `num_physical_experts`: there is nothing to do.
        keep_home: the first E / R slots of every device hold its own experts; only the others are fetched.
            With False `expert_map` may have any expert anywhere, and all are.

    Raises:
        ValueError, TypeError: a expert_map that is none. The values of a JAX array are not looked at.
    """
    config.check_expert_map(expert_map)
    if expert_map is None:
        return dict(parameters)
    if isinstance(expert_map, np.ndarray):
        _check_values(config, expert_map, keep_home)
    own = {name: parameters[name] for name, (_, axes) in config.parameters.items() if axes[0] == "exp"}
    return {**parameters, **_slots(config, keep_home, own, jnp.asarray(expert_map))}


def _check_values(config: MoEConfig, expert_map: np.ndarray, keep_home: bool) -> None:
    if missing := sorted(set(range(config.num_experts)) - set(expert_map.tolist())):
        raise ValueError(f"expert_map: has no slot for experts {missing}; takes every expert at least once.")
    if not ((expert_map >= 0) & (expert_map < config.num_experts)).all():
        raise ValueError(f"expert_map: got entries outside of [0, {config.num_experts}); takes experts.")
    own = np.arange(config.num_experts).reshape(config.comm.size, -1)
    if keep_home and (expert_map.reshape(config.comm.size, -1)[:, : own.shape[1]] != own).any():
        raise ValueError(
            "expert_map: does not begin with the own experts of every device; takes keep_home=True of "
            "plan_experts, or pass keep_home=False."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))  # see layer.py
def _slots(
    config: MoEConfig, keep_home: bool, own: dict[str, jax.Array], expert_map: jax.Array
) -> dict[str, jax.Array]:
    """Return the matrices of all slots [P, ...], given those of the experts [E, ...]."""
    specs = {name: config.spec(name) for name in own}
    fetch = jax.shard_map(
        functools.partial(_fetch, config, keep_home), mesh=config.mesh, in_specs=(specs, P()), out_specs=specs
    )
    own = {name: placed(config, own[name], spec) for name, spec in specs.items()}
    return fetch(own, placed(config, expert_map, P()))


def _fetch(
    config: MoEConfig, keep_home: bool, own: dict[str, jax.Array], expert_map: jax.Array
) -> dict[str, jax.Array]:
    """Return the matrices of this device's slots [S, ...], given those of its own experts [L, ...]."""
    comm = config.comm
    num_own = config.num_experts // comm.size
    if comm.size == 1:
        return {name: value[expert_map] for name, value in own.items()}
    first_own = lax.axis_index(comm.axis_names) * num_own
    wanted = expert_map.reshape(comm.size, -1).T[num_own if keep_home else 0 :]  # [fetched slots, R]

    def fetch(value: jax.Array, experts: jax.Array) -> jax.Array:
        """Return the matrix of experts[this device], one that each device asks for."""
        index = experts - first_own
        is_here = ((index >= 0) & (index < num_own)).reshape(-1, *(1 for _ in value.shape[1:]))
        sent = jnp.where(is_here, value[jnp.clip(index, 0, num_own - 1)], 0)
        # One device adds the matrix, the others zeros: the sum is exact.
        return lax.psum_scatter(sent, comm.axis_names, scatter_dimension=0)

    slots = {}
    for name, value in own.items():
        fetched = lax.map(functools.partial(fetch, value), wanted)
        slots[name] = jnp.concatenate([value, fetched]) if keep_home else fetched
    return slots
