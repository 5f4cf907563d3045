"""The experts' networks, one block of rows after the other, live blocks only: what a CPU runs.

The cost depends on the rows in row groups, not on the capacity: other rows are not touched, and intermediate
values exist for one block at a time. The number of blocks is known on the device only, so that a GPU would
have to synchronise with its host after each block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.ops.checks import vary_together

Weights = Any  # a pytree of arrays [L, ...]; of one expert, without the first axis
# (rows [B, H], their weights [B], weights of an expert) → [B, H]
Network = Callable[[jax.Array, jax.Array, Weights], jax.Array]


def apply_to_blocks(
    network: Network,
    block: int,
    rows: jax.Array,
    row_weights: jax.Array,
    weights: Weights,
    group_sizes: jax.Array,
) -> jax.Array:
    """Apply to each group of rows the network of its expert. Differentiable, but for `group_sizes`.

    The backward pass recomputes the intermediate values.

    Args:
        network: applies one expert to a block of its rows, each row independently.
        block: rows per block.
        rows: [C, H], C a multiple of `block`.
        row_weights: [C].
        weights: of all experts.
        group_sizes: int32 [L], multiples of `block`.

    Returns:
        [C, H]; arbitrary after the last group.
    """
    if rows.shape[0] % block:
        raise ValueError(
            f"rows: expected a multiple of block={block}, got {rows.shape[0]}; pass alignment={block} to "
            "dispatch."
        )
    return _apply(network, block, *vary_together(frozenset(), rows, row_weights, weights, group_sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(
    network: Network, block: int, rows: Any, row_weights: Any, weights: Any, group_sizes: Any
) -> jax.Array:
    def of_expert(expert, out):
        own = _of(weights, expert)

        def of_block(number, out):
            of_rows = network(_read(out, number, block), _read(row_weights, number, block), own)
            return _written(out, of_rows, number, block)

        return lax.fori_loop(*_blocks_of(expert, group_sizes, block), of_block, out)

    return lax.fori_loop(0, len(group_sizes), of_expert, rows)  # each block of results overwrites its rows


def _forward(network, block, *operands):
    return _apply(network, block, *operands), operands


def _backward(network, block, residuals, gradient):
    rows, row_weights, weights, group_sizes = residuals

    def of_expert(expert, gradients):
        own = _of(weights, expert)

        def of_block(number, state):
            (of_rows, of_row_weights), totals = state
            own_rows = (_read(rows, number, block), _read(row_weights, number, block))
            _, pull_back = jax.vjp(network, *own_rows, own)
            *of_both, of_own = pull_back(_read(of_rows, number, block))
            totals = jax.tree.map(lambda total, value: total + value.astype(total.dtype), totals, of_own)
            both = zip((of_rows, of_row_weights), of_both, strict=True)
            return tuple(_written(whole, part, number, block) for whole, part in both), totals

        of_both, of_weights = gradients
        zeros = jax.tree.map(lambda value: _zeros(value.shape, jnp.float32, rows), own)
        of_both, totals = lax.fori_loop(*_blocks_of(expert, group_sizes, block), of_block, (of_both, zeros))
        return of_both, jax.tree.map(
            lambda value, total: lax.dynamic_update_index_in_dim(value, total.astype(value.dtype), expert, 0),
            of_weights,
            totals,
        )

    of_weights = jax.tree.map(lambda value: _zeros(value.shape, value.dtype, rows), weights)
    of_both = (gradient, _zeros(row_weights.shape, row_weights.dtype, rows))
    of_both, of_weights = lax.fori_loop(0, len(group_sizes), of_expert, (of_both, of_weights))
    return *of_both, of_weights, None


_apply.defvjp(_forward, _backward)


def _of(weights: Any, expert: jax.Array) -> Any:
    return jax.tree.map(lambda value: value[expert], weights)  # copied once for all blocks of the expert


def _blocks_of(expert: jax.Array, group_sizes: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the first block of an expert, and the first block after it."""
    end = jnp.cumsum(group_sizes)[expert]
    return (end - group_sizes[expert]) // block, end // block


def _read(rows: jax.Array, number: jax.Array, block: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(rows, number * block, block)


def _written(rows: jax.Array, values: jax.Array, number: jax.Array, block: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(rows, values, number * block, 0)


def _zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    """Return zeros that vary over the mesh axes over which `like` does, as the carry of a loop has to."""
    return jax_compat.as_varying(jnp.zeros(shape, dtype), jax_compat.varying_axes(like))
