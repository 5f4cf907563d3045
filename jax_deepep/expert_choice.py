"""The experts that rank highest, within groups of experts: a primitive, by a kernel on NVIDIA GPUs.

XLA sorts whole rows there for every `lax.top_k`: with groups, three times.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.communicator.native_types import CudaModule
from jax_deepep.router_primitive import router_primitive


def choose_experts(ranking: jax.Array, group_ranking: jax.Array, **integers: int) -> jax.Array:
    """Return the K experts that rank highest among those of the best groups; ties go to the lower index.

    Args:
        ranking: float32 [..., E], without NaN, −0 and −inf. It gets no gradient.
        group_ranking: likewise: a group is as good as the sum of its best values in it.
        integers: num_experts_per_tok, K; num_groups, of E / num_groups experts each; topk_groups, of which a
            token's experts come, with at least K; best_of_group, how many values are summed, 1 or 2.

    Returns:
        int32 [..., K], highest first: the same on every platform.
    """
    return _choose(ranking, group_ranking, **integers)


def _type(ranking: Any, group_ranking: Any, *, num_experts_per_tok: int, **_: int) -> Any:
    return jax_compat.with_last_axis(ranking, num_experts_per_tok, jnp.int32)


def _plain(
    ranking: jax.Array,
    group_ranking: jax.Array,
    *,
    num_experts_per_tok: int,
    num_groups: int,
    topk_groups: int,
    best_of_group: int,
) -> jax.Array:
    if topk_groups < num_groups:
        grouped = group_ranking.reshape(*ranking.shape[:-1], num_groups, -1)
        size = grouped.shape[-1]
        best = lax.top_k(grouped, min(best_of_group, size))[0].sum(axis=-1)
        chosen = lax.top_k(best, topk_groups)[1]  # [..., topk_groups]
        group = jnp.arange(ranking.shape[-1], dtype=jnp.int32) // size
        group = group.reshape((1,) * ranking.ndim + (-1,))  # [..., 1, E]
        allowed = (chosen[..., None] == group).any(axis=-2)
        ranking = jnp.where(allowed, ranking, -jnp.inf)
    return lax.top_k(ranking, num_experts_per_tok)[1]


def _kernel_takes(module: CudaModule, ranking: Any, *_: Any, num_groups: int, **__: int) -> bool:
    most_experts, most_groups, _most_entries = module.router_limits()
    return ranking.shape[-1] <= most_experts and num_groups <= most_groups


_choose = router_primitive("expert_choice", _plain, _type, kernel_takes=_kernel_takes, leading_axes=True)
