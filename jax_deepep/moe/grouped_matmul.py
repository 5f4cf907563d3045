"""Grouped matmuls: rows of expert-major order, each times the matrix of its expert.

A grouped matmul is a function (rows [C, H], matrices [L, H, F], group_sizes int32 [L]) → [C, F]. Group e is
the next group_sizes[e] rows. Rows after the last group may hold NaN: what comes out there is arbitrary, and
nothing of them reaches another row, or the gradient of the matrices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.ops.checks import vary_together

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Choice = Literal["auto", "ragged_dot", "blocks"] | GroupedMatmul

NAMES = ("auto", "ragged_dot", "blocks")
LARGEST_BLOCK = 128  # rows
SMALLEST_BLOCK = 8


def chosen(choice: Any, platform: str) -> Any:
    """Return the name or function that `choice` stands for on a platform.

    Raises:
        ValueError: there is none of this name.
    """
    if not callable(choice) and choice not in NAMES:
        raise ValueError(
            f"grouped_matmul: got {choice!r}; takes {', '.join(map(repr, NAMES))}, or a function of "
            "(rows, matrices, group_sizes)."
        )
    if choice == "auto":
        return "blocks" if platform == "cpu" else "ragged_dot"
    return choice


def alignment_for(choice: Any, mean_rows: float) -> int:
    """Return what the sizes of groups of `mean_rows` rows on average should be multiples of.

    For blocks a power of two: a group is padded to whole blocks, by half a block on average, but small
    blocks use the units of the processor less well.
    """
    if choice != "blocks":
        return 1
    block = SMALLEST_BLOCK
    while block < LARGEST_BLOCK and 2 * block <= mean_rows:
        block *= 2
    return block


def grouped_matmul(choice: Any, alignment: int) -> GroupedMatmul:
    """Return the grouped matmul of this name for groups of multiples of `alignment`."""
    if choice == "ragged_dot":
        return jax.lax.ragged_dot
    return partial(block_matmul, block=alignment) if choice == "blocks" else choice


def block_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int) -> jax.Array:
    """Multiply block after block, the live ones alone: a grouped matmul for CPUs.

    Costs what the rows in groups cost, however many more rows the capacity has. The number of blocks is
    known on the device only, so that GPUs would ask the host after each one whether another follows.

    Args:
        rows: [C, H], C a multiple of `block`.
        matrices: [L, H, F].
        group_sizes: int32 [L], multiples of `block`.
        block: rows that are multiplied at once.

    Returns:
        [C, F], zero after the last group.
    """
    if rows.shape[0] % block:
        raise ValueError(f"rows: got {rows.shape[0]}; takes a multiple of block={block}.")
    return _blocks(block, *vary_together(frozenset(), rows, matrices, group_sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(block: int, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _times(block, rows, matrices, group_sizes, transposed=False)


def _forward(block, rows, matrices, group_sizes):
    return _blocks(block, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = _times(block, gradient, matrices, group_sizes, transposed=True)
    return of_rows, _outer(block, rows, gradient, matrices, group_sizes), None


_blocks.defvjp(_forward, _backward)


def _block_range(block: int, group_sizes: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first block of an expert, and the first after it."""
    end = jnp.cumsum(group_sizes)[expert]
    return (end - group_sizes[expert]) // block, end // block


def _zeros_like_result(shape: tuple[int, ...], operand: jax.Array) -> jax.Array:
    return jax_compat.as_varying(jnp.zeros(shape, operand.dtype), jax_compat.varying_axes(operand))


def _rows_of(block: int, rows: jax.Array, number: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(rows, number * block, block)


def _times(block: int, rows: Any, matrices: Any, group_sizes: Any, *, transposed: bool) -> jax.Array:
    """Multiply the rows of each group with its matrix, or with its transpose."""
    contracted = ((1,), (1 if transposed else 0,)), ((), ())
    width = matrices.shape[1 if transposed else 2]

    def of_expert(expert, out):
        matrix = matrices[expert]  # copied out once for all its blocks

        def of_block(number, out):
            product = lax.dot_general(_rows_of(block, rows, number), matrix, contracted)
            return lax.dynamic_update_slice_in_dim(out, product, number * block, 0)

        return lax.fori_loop(*_block_range(block, group_sizes, expert), of_block, out)

    return lax.fori_loop(0, len(matrices), of_expert, _zeros_like_result((len(rows), width), rows))


def _outer(block: int, rows: Any, gradient: Any, matrices: Any, group_sizes: Any) -> jax.Array:
    """Sum rowsᵀ gradient over the rows of each group, in float32."""
    shape = matrices.shape[1:]

    def of_expert(expert, out):
        def of_block(number, total):
            pair = _rows_of(block, rows, number), _rows_of(block, gradient, number)
            return total + lax.dot_general(
                *pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        zero = jax_compat.as_varying(jnp.zeros(shape, jnp.float32), jax_compat.varying_axes(rows))
        total = lax.fori_loop(*_block_range(block, group_sizes, expert), of_block, zero)
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, 0)

    return lax.fori_loop(0, len(matrices), of_expert, _zeros_like_result(matrices.shape, matrices))
