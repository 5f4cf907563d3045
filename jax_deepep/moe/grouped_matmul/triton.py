"""A grouped matmul for GPUs made of two Pallas kernels, which skip blocks of rows without an expert.

Groups begin at multiples of a block of rows (the `alignment` of the dispatch), so that every tile of the
result belongs to one expert, or, after the last group, to none and is not written.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat
from jax_deepep.ops.checks import vary_together

SMALLEST_TILE = 16  # of a matrix unit, in every dimension
COLUMNS = 128  # of a tile of the result, at most
DEPTH_BYTES = 128  # of the tiles that are multiplied: three pairs fit into an SM's shared memory


def unsupported_reason(**sizes: int) -> str | None:
    """Return why `hidden_size`, `intermediate_size` or `alignment` is unsupported, or None."""
    for name, size in sizes.items():
        if size % SMALLEST_TILE or (name == "alignment" and size & (size - 1)):
            kind = "power of two from" if name == "alignment" else "multiple of"
            return (
                f'{name}: expected a {kind} {SMALLEST_TILE} with grouped_matmul="triton", got {size}; use '
                'grouped_matmul="ragged_dot".'
            )
    return None


def triton_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int) -> jax.Array:
    """Multiply the rows of each group with its matrix: see `grouped_matmul`.

    Args:
        rows: [C, H], C a multiple of `block`.
        matrices: [L, H, F].
        group_sizes: int32 [L], multiples of `block`.
        block: rows per tile, a power of two of at least 16.

    Returns:
        [C, F], not written after the last group.

    Raises:
        ValueError: H or F is not a multiple of 16, or `block` is not such a power of two.
    """
    sizes = {"hidden_size": matrices.shape[1], "intermediate_size": matrices.shape[2], "alignment": block}
    if (reason := unsupported_reason(**sizes)) is not None:
        raise ValueError(reason)
    return _matmul(block, *vary_together(frozenset(), rows, matrices, group_sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(block: int, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _times(block, rows, matrices, group_sizes, transposed=False)


def _forward(block, rows, matrices, group_sizes):
    return _matmul(block, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = _times(block, gradient, matrices, group_sizes, transposed=True)
    return of_rows, _outer(block, rows, gradient, matrices, group_sizes), None


_matmul.defvjp(_forward, _backward)


def _tile(size: int, largest: int) -> int:
    """Return the largest power of two that divides `size`, up to `largest`."""
    return min(size & -size, largest)


def _depth(size: int, rows: jax.Array) -> int:
    """Return how many products of a sum over `size` are computed per step."""
    return _tile(size, DEPTH_BYTES // rows.dtype.itemsize)


def _call(kernel: Any, grid: tuple[int, ...], shape: tuple[int, ...], like: jax.Array, *operands: Any) -> Any:
    whole = pl.BlockSpec()
    compiler_params = jax_compat.pallas_triton().CompilerParams(num_warps=8, num_stages=3)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(operands),
        out_specs=whole,
        out_shape=jax_compat.shape_like(like, shape),
        compiler_params=compiler_params,
        interpret=jax_compat.platform_of(jax.devices()[0]) == "cpu",
    )(*operands)


def _times(block: int, rows: Any, matrices: Any, group_sizes: Any, *, transposed: bool) -> jax.Array:
    """Multiply the rows of each group with its matrix, or with its transpose."""
    inner, width = matrices.shape[1:][::-1] if transposed else matrices.shape[1:]
    columns, depth = _tile(width, COLUMNS), _depth(inner, rows)
    dot = jax_compat.pallas_triton().dot
    num_blocks = len(rows) // block
    ends = jnp.cumsum(group_sizes) // block
    expert_of_block = jnp.sum(
        jnp.arange(num_blocks, dtype=jnp.int32)[:, None] >= ends[None, :], axis=1, dtype=jnp.int32
    )

    def kernel(experts, rows, matrices, out):
        across, down = pl.program_id(0), pl.program_id(1)
        expert = experts[down]
        these_rows, these_columns = pl.ds(down * block, block), pl.ds(across * columns, columns)

        @pl.when(expert < len(matrices))
        def _():
            def step(number, total):
                along = pl.ds(number * depth, depth)
                tile = (
                    matrices[expert, these_columns, along]
                    if transposed
                    else matrices[expert, along, these_columns]
                )
                return total + dot(rows[these_rows, along], tile, trans_b=transposed)

            total = lax.fori_loop(0, inner // depth, step, jnp.zeros((block, columns), jnp.float32))
            out[these_rows, these_columns] = total.astype(out.dtype)

    grid = (width // columns, num_blocks)
    return _call(kernel, grid, (len(rows), width), rows, expert_of_block, rows, matrices)


def _outer(block: int, rows: Any, gradient: Any, matrices: Any, group_sizes: Any) -> jax.Array:
    """Sum rowsᵀ gradient over the rows of each group."""
    num_experts, height, width = matrices.shape
    down, across, depth = _tile(height, COLUMNS), _tile(width, COLUMNS), _depth(block, rows)
    dot = jax_compat.pallas_triton().dot
    ends = jnp.cumsum(group_sizes) // depth
    firsts = ends - group_sizes // depth

    def kernel(firsts, ends, rows, gradient, out):
        expert = pl.program_id(2)
        these_rows = pl.ds(pl.program_id(1) * down, down)
        these_columns = pl.ds(pl.program_id(0) * across, across)

        def step(number, total):
            along = pl.ds(number * depth, depth)
            return total + dot(rows[along, these_rows], gradient[along, these_columns], trans_a=True)

        zero = jnp.zeros((down, across), jnp.float32)
        total = lax.fori_loop(firsts[expert], ends[expert], step, zero)
        out[expert, these_rows, these_columns] = total.astype(out.dtype)

    grid = (width // across, height // down, num_experts)
    return _call(kernel, grid, matrices.shape, matrices, firsts, ends, rows, gradient)
