"""The weights of replicas, fetched from the devices that own the experts."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_deepep.deprecation import renamed_arguments
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.layer import with_sharding


@renamed_arguments(placement="expert_map", own_first="keep_home")
def physical_parameters(
    config: MoEConfig, parameters: Mapping[str, jax.Array], expert_map: Any, *, keep_home: bool = True
) -> dict[str, jax.Array]:
    """Return `parameters` with the matrices of physical experts, [P, ...], in place of [E, ...].

    Differentiable: the gradient of an expert is the sum of those of its replicas. A training step calls it
    with the parameters of the step, as the Flax modules do; for serving, call it once per expert map.

    Every device fetches one physical expert at a time, for which it temporarily holds and sends R matrices.

    **Collective:** takes global arrays, outside of `shard_map`; every process of the mesh calls it.

    Args:
        config: static, with `num_physical_experts`.
        parameters: arrays of the names and shapes in `config.parameters`.
        expert_map: int32 [P], see `jax_deepep.balancing.plan_experts`; an array of NumPy, or of JAX, also
            traced. None without `num_physical_experts`: there is nothing to do.
        keep_home: the first E / R physical experts of every device are its own experts; only the others are
            fetched. With False, `expert_map` may have any expert anywhere, and all are fetched.

    Raises:
        ValueError, TypeError: an invalid expert map. The values of a JAX array are not checked.
    """
    config.check_expert_map(expert_map)
    if expert_map is None:
        return dict(parameters)
    if isinstance(expert_map, np.ndarray):
        _check_values(config, expert_map, keep_home)
    own = {name: parameters[name] for name, (_, axes) in config.parameters.items() if axes[0] == "exp"}
    return {**parameters, **_physical_experts(config, keep_home, own, jnp.asarray(expert_map))}


def _check_values(config: MoEConfig, expert_map: np.ndarray, keep_home: bool) -> None:
    if missing := sorted(set(range(config.num_experts)) - set(expert_map.tolist())):
        raise ValueError(
            f"expert_map: expected every expert at least once, got none of {missing}; use plan_experts."
        )
    if not ((expert_map >= 0) & (expert_map < config.num_experts)).all():
        raise ValueError(
            f"expert_map: expected experts in [0, {config.num_experts}), got others; use plan_experts."
        )
    own = np.arange(config.num_experts).reshape(config.comm.size, -1)
    if keep_home and (expert_map.reshape(config.comm.size, -1)[:, : own.shape[1]] != own).any():
        raise ValueError(
            "expert_map: expected every device's own experts first, got others; make it by plan_experts with "
            "keep_home=True, or pass keep_home=False here."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))  # see layer.py
def _physical_experts(
    config: MoEConfig, keep_home: bool, own: dict[str, jax.Array], expert_map: jax.Array
) -> dict[str, jax.Array]:
    """Return the matrices of all physical experts [P, ...], given those of the experts [E, ...]."""
    specs = {name: config.spec(name) for name in own}
    fetch = jax.shard_map(
        functools.partial(_fetch, config, keep_home), mesh=config.mesh, in_specs=(specs, P()), out_specs=specs
    )
    own = {name: with_sharding(config, own[name], spec) for name, spec in specs.items()}
    return fetch(own, with_sharding(config, expert_map, P()))


def _fetch(
    config: MoEConfig, keep_home: bool, own: dict[str, jax.Array], expert_map: jax.Array
) -> dict[str, jax.Array]:
    """Return the matrices of this device's physical experts [S, ...], given its experts' [E / R, ...]."""
    comm = config.comm
    num_own = config.num_experts // comm.size
    if comm.size == 1:
        return {name: value[expert_map] for name, value in own.items()}
    first_own = lax.axis_index(comm.axis_names) * num_own
    wanted = expert_map.reshape(comm.size, -1).T[num_own if keep_home else 0 :]  # [fetched per device, R]

    def fetch(value: jax.Array, experts: jax.Array) -> jax.Array:
        """Return the matrix of experts[this device]; `experts` [R] has the one that each device needs."""
        index = experts - first_own
        is_here = ((index >= 0) & (index < num_own)).reshape(-1, *(1 for _ in value.shape[1:]))
        sent = jnp.where(is_here, value[jnp.clip(index, 0, num_own - 1)], 0)
        # One device adds the matrix, the others zeros: the sum is exact.
        return lax.psum_scatter(sent, comm.axis_names, scatter_dimension=0)

    matrices = {}
    for name, value in own.items():
        fetched = lax.map(functools.partial(fetch, value), wanted)
        matrices[name] = jnp.concatenate([value, fetched]) if keep_home else fetched
    return matrices
