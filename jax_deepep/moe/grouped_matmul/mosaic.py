"""A grouped matmul for Hopper GPUs (H100, H200)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic_tiles import LARGEST_ROWS, Product, Tile, Tiles, in_panels, largest_tile, product
from jax_deepep.ops.checks import vary_together

TILES = Tiles()


def mosaic_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int) -> jax.Array:
    return _matmul(block, *vary_together(frozenset(), rows, matrices, group_sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(block: int, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return times(block, rows, matrices, group_sizes, transposed=False)


def _forward(block, rows, matrices, group_sizes):
    return _matmul(block, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = times(block, gradient, matrices, group_sizes, transposed=True)
    return of_rows, outer(block, rows, gradient, group_sizes, matrices.dtype), None


_matmul.defvjp(_forward, _backward)


def times(
    block: int, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, transposed: bool, tiles: Tiles = TILES
) -> jax.Array:
    """Multiply the rows of each group with its matrix, or with its transpose."""
    inner, width = matrices.shape[1:][::-1] if transposed else matrices.shape[1:]
    high, wide, depth = largest_tile(block, LARGEST_ROWS), largest_tile(width, tiles.columns), largest_tile(inner, tiles.depth)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32) // high
    starts = jnp.arange(len(rows) // high, dtype=jnp.int32)
    experts = jnp.sum(starts[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    across = width // wide

    def num_tiles(experts, ends, *_):
        return ends[len(matrices) - 1] * across

    def tile(refs, index):
        experts, ends, rows, matrices, out = refs
        down, over = in_panels(index, ends[matrices.shape[0] - 1], across, tiles.panel)
        these_rows, these_columns = pl.ds(down * high, high), pl.ds(over * wide, wide)

        def right(step):
            along = pl.ds(step * depth, depth)
            expert = experts[down]
            return matrices.at[expert, these_columns, along] if transposed else matrices.at[expert, along, these_columns]

        return Tile(
            num_steps=lambda: inner // depth,
            left=lambda step: rows.at[these_rows, pl.ds(step * depth, depth)],
            right=right,
            result=out.at[these_rows, these_columns],
        )

    what = Product(high, wide, depth, False, transposed, num_tiles, tile)
    return product(what, (experts, ends, rows, matrices), (len(rows), width), rows.dtype, tiles)


def outer(block: int, rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array, dtype: Any, tiles: Tiles = TILES) -> jax.Array:
    """Sum rowsᵀ gradient over the rows of each group."""
    (num_experts,), height, width = group_sizes.shape, rows.shape[1], gradient.shape[1]
    high, wide, depth = largest_tile(height, LARGEST_ROWS), largest_tile(width, tiles.columns), largest_tile(block, tiles.depth)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32) // depth
    steps = group_sizes // depth
    down, across = height // high, width // wide

    def num_tiles(*_):
        return jnp.int32(num_experts * down * across)

    def tile(refs, index):
        ends, steps, rows, gradient, out = refs
        expert = lax.div(index, jnp.int32(down * across))
        below, over = in_panels(lax.rem(index, jnp.int32(down * across)), jnp.int32(down), across, tiles.panel)
        these_rows, these_columns = pl.ds(below * high, high), pl.ds(over * wide, wide)

        def along(step):
            return pl.ds((ends[expert] - steps[expert] + step) * depth, depth)

        return Tile(
            num_steps=lambda: steps[expert],
            left=lambda step: rows.at[along(step), these_rows],
            right=lambda step: gradient.at[along(step), these_columns],
            result=out.at[expert, these_rows, these_columns],
        )

    what = Product(high, wide, depth, True, False, num_tiles, tile)
    return product(what, (ends, steps, rows, gradient), (num_experts, height, width), dtype, tiles)
