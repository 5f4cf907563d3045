"""A grouped matmul for Hopper GPUs (H100, H200), made of Pallas Mosaic GPU kernels with wgmma and TMA.

Groups begin at multiples of a block of rows (the `alignment` of the dispatch), so that every tile of the
result belongs to one expert, or, after the last group, to none and is not computed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic_kernel import (
    LARGEST_ROWS,
    SMALLEST_TILE,
    Product,
    Tile,
    Tiles,
    in_panels,
    largest_tile,
    multiply,
)
from jax_deepep.ops.checks import vary_together

HOPPER = "9.0"
DTYPES = ("bfloat16", "float16")
INSTEAD = 'use grouped_matmul="triton"'
DEFAULT = Tiles()


def missing_reason(device: jax.Device) -> str | None:
    """Return why this JAX or a device cannot run `mosaic_matmul`, or None."""
    if jax_compat.pallas_mosaic_gpu() is None:
        return (
            'grouped_matmul: expected a JAX with the Mosaic GPU backend of Pallas for "mosaic", got JAX '
            f"{jax.__version__} without it; {INSTEAD}."
        )
    capability = getattr(device, "compute_capability", HOPPER)
    if capability != HOPPER:
        return (
            f'grouped_matmul: expected "mosaic" on GPUs of compute capability {HOPPER} only (H100, H200), '
            f"got it on {device.device_kind} of {capability}; {INSTEAD}."
        )
    return None


def unsupported_reason(dtype: Any, **sizes: int) -> str | None:
    """Return why `dtype`, `hidden_size`, `intermediate_size` or `alignment` is unsupported, or None."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        return (
            f'rows: expected {" or ".join(DTYPES)} with grouped_matmul="mosaic", got {dtype}; {INSTEAD}, or '
            "give the layer one of these as dtype."
        )
    for name, size in sizes.items():
        if size % SMALLEST_TILE or size == 0:
            return (
                f'{name}: expected a multiple of {SMALLEST_TILE} with grouped_matmul="mosaic", got {size}; '
                f"{INSTEAD}."
            )
    return None


def mosaic_matmul(
    rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int, tiles: Tiles = DEFAULT
) -> jax.Array:
    """Multiply the rows of each group with its matrix: see `grouped_matmul`.

    Args:
        rows: [C, H], bfloat16 or float16, C a multiple of `block`.
        matrices: [L, H, F], of the same dtype.
        group_sizes: int32 [L], multiples of `block`.
        block: a multiple of 64, better of 128.
        tiles: how the three products are divided.

    Returns:
        [C, F], summed in float32; not written after the last group. The gradient of the matrices is zero for
        empty groups.

    Raises:
        ValueError: another dtype, or `block`, H or F is not a multiple of 64.
        TypeError: matrices of another dtype than rows.
    """
    sizes = {"hidden_size": matrices.shape[1], "intermediate_size": matrices.shape[2], "alignment": block}
    if (reason := unsupported_reason(rows.dtype, **sizes)) is not None:
        raise ValueError(reason)
    if matrices.dtype != rows.dtype:
        raise TypeError(
            f"matrices: expected the dtype of rows, {rows.dtype}, got {matrices.dtype}; cast one of them."
        )
    return _matmul(block, tiles, *vary_together(frozenset(), rows, matrices, group_sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    block: int, tiles: Tiles, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return times(block, rows, matrices, group_sizes, transposed=False, tiles=tiles)


def _forward(block, tiles, rows, matrices, group_sizes):
    return _matmul(block, tiles, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, tiles, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = times(block, gradient, matrices, group_sizes, transposed=True, tiles=tiles)
    return of_rows, outer(block, rows, gradient, group_sizes, dtype=matrices.dtype, tiles=tiles), None


_matmul.defvjp(_forward, _backward)


def times(
    block: int,
    rows: jax.Array,
    matrices: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool,
    tiles: Tiles = DEFAULT,
) -> jax.Array:
    """Multiply the rows of each group with its matrix, or with its transpose."""
    num_experts, *shape = matrices.shape
    inner, width = shape[::-1] if transposed else shape
    high, wide = largest_tile(block, LARGEST_ROWS), largest_tile(width, tiles.columns)
    depth, across = largest_tile(inner, tiles.depth), width // wide
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32) // high
    blocks = jnp.arange(len(rows) // high, dtype=jnp.int32)
    experts = jnp.sum(blocks[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)

    def down(refs: Any) -> Any:
        _, ends, *_ = refs
        return ends[num_experts - 1]

    def tile(refs: Any, index: Any) -> Tile:
        experts, _, rows, matrices, out = refs
        below, beside = in_panels(index, down(refs), across, tiles.panel)
        these_rows, these_columns = pl.ds(below * high, high), pl.ds(beside * wide, wide)

        def operands() -> Any:
            matrix = matrices.at[experts[below]]

            def of_step(step: Any) -> tuple[Any, Any]:
                along = pl.ds(step * depth, depth)
                of_matrix = (these_columns, along) if transposed else (along, these_columns)
                return rows.at[these_rows, along], matrix.at[of_matrix]

            return of_step

        return Tile(inner // depth, operands, out.at[these_rows, these_columns])

    name = "grouped_matmul_transposed" if transposed else "grouped_matmul"
    product = Product(
        name, high, wide, depth, (False, transposed), lambda refs: down(refs) * np.int32(across), tile
    )
    return multiply(product, (experts, ends, rows, matrices), (len(rows), width), rows.dtype, tiles)


def outer(
    block: int,
    rows: jax.Array,
    gradient: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any,
    tiles: Tiles = DEFAULT,
) -> jax.Array:
    """Sum rowsᵀ gradient over the rows of each group, as `dtype`: of the operands, or float32."""
    (num_experts,), height, width = group_sizes.shape, rows.shape[1], gradient.shape[1]
    high, wide = largest_tile(height, LARGEST_ROWS), largest_tile(width, tiles.columns)
    depth, down, across = largest_tile(block, tiles.depth), height // high, width // wide
    per_expert = np.int32(down * across)
    num_steps = group_sizes.astype(jnp.int32) // depth
    firsts = jnp.cumsum(num_steps, dtype=jnp.int32) - num_steps
    largest_first = jnp.argsort(-num_steps).astype(jnp.int32)

    def tile(refs: Any, index: Any) -> Tile:
        largest_first, firsts, num_steps, rows, gradient, out = refs
        expert = largest_first[lax.div(index, per_expert)]
        below, beside = in_panels(lax.rem(index, per_expert), np.int32(down), across, tiles.panel)
        these_rows, these_columns = pl.ds(below * high, high), pl.ds(beside * wide, wide)

        def operands() -> Any:
            first = firsts[expert]

            def of_step(step: Any) -> tuple[Any, Any]:
                along = pl.ds((first + step) * depth, depth)
                return rows.at[along, these_rows], gradient.at[along, these_columns]

            return of_step

        return Tile(num_steps[expert], operands, out.at[expert, these_rows, these_columns])

    num_tiles = np.int32(num_experts) * per_expert
    product = Product("grouped_outer", high, wide, depth, (True, False), lambda refs: num_tiles, tile)
    operands = (largest_first, firsts, num_steps, rows, gradient)
    return multiply(product, operands, (num_experts, height, width), dtype, tiles)
