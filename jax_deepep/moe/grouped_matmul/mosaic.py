"""A grouped matmul for Hopper GPUs (H100, H200), made of Pallas Mosaic GPU kernels with wgmma and TMA.

Groups begin at multiples of a block of rows (the `alignment` of the dispatch), so that every tile of the
result belongs to one expert, or, after the last group, to none and is not computed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic_kernel import (
    DEPTH,
    LARGEST_ROWS,
    SMALLEST_TILE,
    STORED,
    Copies,
    Part,
    Product,
    Stores,
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
TIMES, BESIDE_OPS = Tiles(), Tiles(phases=4)  # some SMs begin late beside an op: bench/RESULTS.md, "Overlap"
# Sums differ in length: in a model, 0.89 of full speed with groups of 1 / n, not 0.78.
OUTER = Tiles(phases=4)


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
    rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int, tiles: Tiles | None = None
) -> jax.Array:
    """Multiply the rows of each group with its matrix: see `grouped_matmul`.

    Args:
        rows: [C, H], bfloat16 or float16, C a multiple of `block`.
        matrices: [L, H, F], of the same dtype.
        group_sizes: int32 [L], multiples of `block`.
        block: a multiple of 64, better of 128.
        tiles: how the three products are divided; None = as suits each.

    Returns:
        [C, F], summed in float32; not written after the last group. The gradient of the matrices is zero for
        empty groups.

    Raises:
        ValueError: another dtype, or `block`, H or F is not a multiple of 64.
        TypeError: matrices of another dtype than rows.
    """
    check_operands(rows, [matrices], block)
    return _matmul(block, tiles, *vary_together(frozenset(), rows, matrices, group_sizes))


def check_operands(rows: jax.Array, matrices: Sequence[jax.Array], block: int) -> None:
    """Raise unless rows in blocks can be multiplied with [L, H, F] matrices: see `mosaic_matmul`."""
    hidden_size, intermediate_size = matrices[0].shape[1:]
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "alignment": block}
    if (reason := unsupported_reason(rows.dtype, **sizes)) is not None:
        raise ValueError(reason)
    for matrix in matrices:
        if matrix.dtype != rows.dtype:
            raise TypeError(
                f"matrices: expected the dtype of rows, {rows.dtype}, got {matrix.dtype}; cast one of them."
            )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    block: int, tiles: Tiles | None, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return times(block, [(rows, matrices)], group_sizes, transposed=False, tiles=tiles)


def _forward(block, tiles, rows, matrices, group_sizes):
    return _matmul(block, tiles, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, tiles, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = times(block, [(gradient, matrices)], group_sizes, transposed=True, tiles=tiles)
    return of_rows, outer(block, rows, gradient, group_sizes, tiles=tiles), None


_matmul.defvjp(_forward, _backward)


def times(
    block: int,
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    group_sizes: jax.Array,
    *,
    transposed: bool,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Multiply the rows of each group with its matrix, or with its transpose; add the products of all pairs.

    Args:
        block: of the rows.
        pairs: rows [C, H] and matrices [L, H, F] each; transposed, rows [C, F] and the same matrices.
        group_sizes: int32 [L].
        transposed: see above.
        tiles: None = `TIMES`.
    """
    tiles = tiles or TIMES
    matrices = pairs[0][1]
    inner, width = matrices.shape[:0:-1] if transposed else matrices.shape[1:]
    wide = largest_tile(width, tiles.columns)

    def tile(place: Place, refs: Sequence[Any]) -> Tile:
        *operands, out = refs
        these_columns = pl.ds(place.beside * wide, wide)

        def part(rows: Any, matrices: Any) -> Part:
            def begin() -> Any:
                matrix = matrices.at[place.expert()]

                def of_step(step: Any) -> Copies:
                    along = pl.ds(step * DEPTH, DEPTH)
                    of_matrix = (these_columns, along) if transposed else (along, these_columns)
                    return rows.at[place.rows, along], matrix.at[of_matrix]

                return of_step

            return Part(inner // DEPTH, begin)

        parts = [part(*pair) for pair in zip(operands[::2], operands[1::2], strict=True)]
        return Tile(parts, whole(out.at[place.rows, these_columns]))

    name = "grouped_matmul_transposed" if transposed else "grouped_matmul"
    operands = [operand for pair in pairs for operand in pair]
    (out,) = by_row_blocks(
        name, block, group_sizes, operands, [width], tile,
        columns=wide, across=width // wide, transposed=transposed, tiles=tiles,
    )  # fmt: skip
    return out


def whole(result: Any) -> Callable[..., Stores]:
    """Return `Tile.stores` of tiles that store their sum in `result`."""

    def stores(sums: Sequence[jax.Array], own_rows: Any, further: Any) -> Stores:
        (total,) = sums
        for column in range(0, total.shape[1], STORED):
            values = total[:, column : column + STORED].astype(result.dtype)
            yield values, result.at[own_rows, pl.ds(column, STORED)]

    return stores


class Place(NamedTuple):
    """Where a tile is in a product by blocks of rows.

    Attributes:
        rows: its rows.
        beside: its index among those with the same rows.
        expert: reads which expert has these rows.
    """

    rows: Any
    beside: Any
    expert: Callable[[], Any]


def by_row_blocks(
    name: str,
    block: int,
    group_sizes: jax.Array,
    operands: Sequence[jax.Array],
    widths: Sequence[int],
    tile: Callable[[Place, Sequence[Any]], Tile],
    *,
    columns: int,
    across: int,
    transposed: bool,
    tiles: Tiles,
    sums: int = 1,
    plain: bool = True,
) -> list[jax.Array]:
    """Compute results whose rows are those of the groups; they are not written after the last group.

    Args:
        name: of the kernel.
        block: of the rows.
        group_sizes: int32 [L].
        operands: of the product; the first has as many rows as the results.
        widths: of the results.
        tile: (its place, references to operands and results) → a tile.
        columns: of its sum.
        across: tiles with the same rows.
        transposed: whether the right operand of a step is.
        tiles: the panel, and what `multiply` needs.
        sums, plain: see `Product`.
    """
    num_experts, num_rows = len(group_sizes), len(operands[0])
    high = largest_tile(block, LARGEST_ROWS)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32) // high
    blocks = jnp.arange(num_rows // high, dtype=jnp.int32)
    experts = jnp.sum(blocks[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)

    def down(refs: Any) -> Any:
        return refs[1][num_experts - 1]

    def of_index(refs: Any, index: Any) -> Tile:
        below, beside = in_panels(index, down(refs), across, tiles.panel)
        return tile(Place(pl.ds(below * high, high), beside, lambda: refs[0][below]), refs[2:])

    product = Product(
        name, high, columns, sums, (False, transposed), lambda refs: down(refs) * np.int32(across), of_index,
        plain,
    )  # fmt: skip
    return multiply(product, (experts, ends, *operands), [(num_rows, width) for width in widths], tiles)


def outer(
    block: int,
    rows: jax.Array,
    gradient: jax.Array,
    group_sizes: jax.Array,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Sum rowsᵀ gradient over the rows of each group. `tiles` None = `OUTER`."""
    tiles = tiles or OUTER
    (num_experts,), height, width = group_sizes.shape, rows.shape[1], gradient.shape[1]
    high, wide = largest_tile(height, LARGEST_ROWS), largest_tile(width, tiles.columns)
    down, across = height // high, width // wide
    per_expert = np.int32(down * across)
    num_steps = group_sizes.astype(jnp.int32) // DEPTH
    firsts = jnp.cumsum(num_steps, dtype=jnp.int32) - num_steps
    largest_first = jnp.argsort(-num_steps).astype(jnp.int32)

    def tile(refs: Any, index: Any) -> Tile:
        largest_first, firsts, num_steps, rows, gradient, out = refs
        expert = largest_first[lax.div(index, per_expert)]
        below, beside = in_panels(lax.rem(index, per_expert), np.int32(down), across, tiles.panel)
        these_rows, these_columns = pl.ds(below * high, high), pl.ds(beside * wide, wide)

        def begin() -> Any:
            first = firsts[expert]

            def of_step(step: Any) -> Copies:
                along = pl.ds((first + step) * DEPTH, DEPTH)
                return rows.at[along, these_rows], gradient.at[along, these_columns]

            return of_step

        return Tile([Part(num_steps[expert], begin)], whole(out.at[expert, these_rows, these_columns]))

    num_tiles = np.int32(num_experts) * per_expert
    product = Product("grouped_outer", high, wide, 1, (True, False), lambda refs: num_tiles, tile)
    operands = (largest_first, firsts, num_steps, rows, gradient)
    (out,) = multiply(product, operands, [(num_experts, height, width)], tiles)
    return out
