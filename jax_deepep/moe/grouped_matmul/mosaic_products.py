"""The products of `mosaic`: rows in groups times matrices, and the gradients of matrices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep.moe.grouped_matmul.mosaic_kernel import (
    DEPTH,
    LARGEST_ROWS,
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
from jax_deepep.ops.pairs import Ended

TIMES, BESIDE_OPS = Tiles(), Tiles(phases=4)  # some SMs begin late beside an op: bench/RESULTS.md, "Overlap"
# Sums differ in length: in a model, 0.89 of full speed with groups of 1 / n, not 0.78.
OUTER = Tiles(phases=4)


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
    others: Sequence[jax.ShapeDtypeStruct] = (),
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
        others: types of further results.
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
    results = [jax.ShapeDtypeStruct((num_rows, width), operands[-1].dtype) for width in widths]
    # Behind barriers, as results of ops are: XLA would run a kernel twice whose result a loop saves and uses.
    products = multiply(product, (experts, ends, *operands), [*results, *others], tiles)
    return [lax.optimization_barrier(result) for result in products]


class Term(NamedTuple):
    """A term of the gradient of matrices: rowsᵀ gradient, summed over the rows of each group.

    Attributes:
        rows: [C, H], which the matrices multiplied.
        gradient: of these products, [C, F].
        group_sizes: int32 [L].
    """

    rows: jax.Array
    gradient: jax.Array
    group_sizes: jax.Array


def outer(terms: Sequence[Term], *, tiles: Tiles | None = None) -> Ended:
    """Return the sum of the terms [L, H, F], added in float32. `tiles` None = `OUTER`.

    Without a barrier: what a loop saves and does not use, XLA lets the kernel write to its place.
    """
    tiles = tiles or OUTER
    (num_experts,) = terms[0].group_sizes.shape
    height, width = terms[0].rows.shape[1], terms[0].gradient.shape[1]
    high, wide = largest_tile(height, LARGEST_ROWS), largest_tile(width, tiles.columns)
    down, across = height // high, width // wide
    per_expert = np.int32(down * across)
    steps = [term.group_sizes.astype(jnp.int32) // DEPTH for term in terms]
    firsts = [jnp.cumsum(of_term, dtype=jnp.int32) - of_term for of_term in steps]
    largest_first = jnp.argsort(-sum(steps[1:], steps[0])).astype(jnp.int32)

    def tile(refs: Any, index: Any) -> Tile:
        largest_first, *of_terms, out, _ = refs
        expert = largest_first[lax.div(index, per_expert)]
        below, beside = in_panels(lax.rem(index, per_expert), np.int32(down), across, tiles.panel)
        these_rows, these_columns = pl.ds(below * high, high), pl.ds(beside * wide, wide)

        def part(firsts: Any, steps: Any, rows: Any, gradient: Any) -> Part:
            def begin() -> Any:
                first = firsts[expert]

                def of_step(step: Any) -> Copies:
                    along = pl.ds((first + step) * DEPTH, DEPTH)
                    return rows.at[along, these_rows], gradient.at[along, these_columns]

                return of_step

            return Part(steps[expert], begin)

        parts = [part(*of_terms[number : number + 4]) for number in range(0, len(of_terms), 4)]
        return Tile(parts, whole(out.at[expert, these_rows, these_columns]))

    num_tiles = np.int32(num_experts) * per_expert
    product = Product("grouped_outer", high, wide, 1, (True, False), lambda refs: num_tiles, tile)
    operands = [largest_first]
    for first, of_term, term in zip(firsts, steps, terms, strict=True):
        operands += [first, of_term, term.rows, term.gradient]
    result = jax.ShapeDtypeStruct((num_experts, height, width), terms[0].gradient.dtype)
    return Ended(*multiply(product, operands, [result, jax.ShapeDtypeStruct((1,), jnp.float32)], tiles))
