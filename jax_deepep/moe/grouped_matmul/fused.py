"""Networks of experts for Hopper GPUs in few kernels, whose work is that of the rows in groups.

What lies between the matmuls is computed from tiles of their sums, before these are stored:

    forward     hidden = w ⊙ activation(rows · wi_0) ⊙ (rows · wi_1)    one kernel, which stores both products
                y = hidden · wo                                         too where gradients need them
    backward    the gradients of the products and of w, hidden again    one kernel: of y's gradient · woᵀ
                the gradient of rows, the sum over both matrices    one kernel
                the gradient of each matrix                         one kernel each

Products, the gradient of hidden, and what is stored are rounded to the dtype of the rows; everything between
them is in float32: the activation, its derivative, and their products.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic_kernel import (
    DEPTH,
    SMALLEST_TILE,
    STORED,
    Copies,
    Part,
    Stores,
    Tile,
    Tiles,
    largest_tile,
)
from jax_deepep.moe.grouped_matmul.mosaic_products import TIMES, Place, by_row_blocks

Activation = Callable[[jax.Array], jax.Array]
Arrays = tuple[jax.Array, ...]


class Network(NamedTuple):
    """What the networks of all experts have in common.

    Attributes:
        activation: elementwise.
        block: rows of a group are a multiple of it.
        tiles: of all products but the gradients of matrices.
    """

    activation: Activation
    block: int
    tiles: Tiles = TIMES


def _hidden(activation: Activation, *products: jax.Array) -> jax.Array:
    """Return activation(products[0]) ⊙ products[1], or without the latter, in float32."""
    first, *others = (product.astype(jnp.float32) for product in products)
    hidden = activation(first).astype(jnp.float32)
    return hidden * others[0] if others else hidden


def _hidden_and_gradients(
    activation: Activation, of_hidden: jax.Array, *products: jax.Array
) -> tuple[Arrays, jax.Array]:
    """Return (the gradients of the products, `_hidden`), in float32.

    By forward differentiation, as the activation is elementwise: Pallas does not lower all of the reverse.
    """
    first, *others = (product.astype(jnp.float32) for product in products)
    of_hidden = of_hidden.astype(jnp.float32)
    of_value = of_hidden * others[0] if others else of_hidden
    value, of_first = jax.jvp(lambda x: activation(x).astype(jnp.float32), (first,), (of_value,))
    if not others:
        return (of_first,), value
    return (of_first, of_hidden * value), value * others[0]


def _weights(row_weights: Any, place: Place, own_rows: Any) -> jax.Array:
    """Return the weights of 64 rows of a tile, for each of STORED columns."""
    own_weights = jax_compat.load_in_rows(row_weights.at[place.rows].at[own_rows])
    return lax.broadcast_in_dim(own_weights, (SMALLEST_TILE, STORED), (0,))


def products_and_hidden(
    network: Network,
    rows: jax.Array,
    row_weights: jax.Array,
    matrices: Arrays,
    group_sizes: jax.Array,
    *,
    keeps: bool = True,
) -> tuple[Arrays, jax.Array]:
    """Multiply the rows of each group with its matrices, and apply the activation and the rows' weights.

    Args:
        network: static.
        rows: [C, H].
        row_weights: float32 [C].
        matrices: `wi_0` and optionally `wi_1`, [L, H, F] each.
        group_sizes: int32 [L].
        keeps: whether the products are returned.

    Returns:
        (the products, hidden), [C, F] each.
    """
    inner, width = matrices[0].shape[1:]
    wide = largest_tile(width, network.tiles.columns // len(matrices))

    def tile(place: Place, refs: Sequence[Any]) -> Tile:
        row_weights, rows, matrices, outs = refs[0], refs[1], refs[2 : 2 + number], refs[2 + number :]
        these_columns = pl.ds(place.beside * wide, wide)

        def begin() -> Any:
            expert = place.expert()

            def of_step(step: Any) -> Copies:
                along = pl.ds(step * DEPTH, DEPTH)
                return (
                    rows.at[place.rows, along],
                    *(matrix.at[expert, along, these_columns] for matrix in matrices),
                )

            return of_step

        def stores(sums: Sequence[jax.Array], own_rows: Any, further: Any) -> Stores:
            own_weights = _weights(row_weights, place, own_rows)
            for column in range(0, wide, STORED):
                products = [total[:, column : column + STORED].astype(dtype) for total in sums]
                kept = products if keeps else []
                hidden = _hidden(network.activation, *products) * own_weights
                for values, out in zip((*kept, hidden), outs, strict=True):
                    own_columns = pl.ds(column, STORED)
                    yield values.astype(dtype), out.at[place.rows, these_columns].at[own_rows, own_columns]

        return Tile([Part(inner // DEPTH, begin)], stores)

    number, dtype = len(matrices), rows.dtype
    *products, hidden = by_row_blocks(
        "grouped_hidden", network.block, group_sizes, [row_weights, rows, *matrices],
        [width] * (1 + number * keeps), tile,
        columns=wide, across=width // wide, transposed=False, tiles=network.tiles, sums=number, plain=False,
    )  # fmt: skip
    return tuple(products), hidden


def gradients_of_products(
    network: Network,
    of_y: jax.Array,
    row_weights: jax.Array,
    wo: jax.Array,
    products: Arrays,
    group_sizes: jax.Array,
) -> tuple[Arrays, jax.Array, jax.Array]:
    """Return (the gradients of the products, of the weights, hidden), from the gradient of hidden · wo."""
    jax_compat.let_mosaic_add_tangents()
    width, inner = wo.shape[1:]
    wide = largest_tile(width, network.tiles.columns)

    def tile(place: Place, refs: Sequence[Any]) -> Tile:
        row_weights, of_y, wo, products = refs[0], refs[1], refs[2], refs[3 : 3 + number]
        *outs, of_weights = refs[3 + number :]
        these_columns = pl.ds(place.beside * wide, wide)

        def begin() -> Any:
            matrix = wo.at[place.expert()]

            def of_step(step: Any) -> Copies:
                along = pl.ds(step * DEPTH, DEPTH)
                return of_y.at[place.rows, along], matrix.at[these_columns, along]

            return of_step

        chunks = [pl.ds(place.beside * wide + column, STORED) for column in range(0, wide, STORED)]

        def stores(sums: Sequence[jax.Array], own_rows: Any, further: Any) -> Stores:
            (total,) = sums
            own_weights = _weights(row_weights, place, own_rows)
            of_own_weights = []  # of each chunk
            for index, chunk in enumerate(chunks):
                columns = total[:, index * STORED : (index + 1) * STORED]
                of_hidden = columns.astype(dtype).astype(jnp.float32)
                gradients, hidden = _hidden_and_gradients(
                    network.activation, of_hidden * own_weights, *further(number)
                )
                of_own_weights.append(jnp.sum(of_hidden * hidden, axis=1))
                for values, out in zip((*gradients, hidden * own_weights), outs, strict=True):
                    yield values.astype(dtype), out.at[place.rows, chunk].at[own_rows]
            own = of_weights.at[place.beside, place.rows].at[own_rows]
            own[...] = sum(of_own_weights[1:], of_own_weights[0])

        needed = [product.at[place.rows, chunk] for chunk in chunks for product in products]
        return Tile([Part(inner // DEPTH, begin)], stores, needed)

    number, dtype = len(products), of_y.dtype
    # Of each tile, the sum over its columns.
    of_weights_type = jax.ShapeDtypeStruct((width // wide, len(of_y)), jnp.float32)
    *gradients, hidden, of_weights = by_row_blocks(
        "grouped_hidden_gradient", network.block, group_sizes, [row_weights, of_y, wo, *products],
        [width] * (1 + number), tile, others=[of_weights_type],
        columns=wide, across=width // wide, transposed=True, tiles=network.tiles, plain=False,
    )  # fmt: skip
    return tuple(gradients), of_weights.sum(axis=0), hidden


def can_fuse(activation: Activation, dtype: Any) -> bool:
    """Return whether Pallas can lower an activation and its derivative inside of the kernels."""
    return _lowers(activation, jnp.dtype(dtype), jax_compat.platform_of(jax.devices()[0]))


@functools.lru_cache(maxsize=64)
def _lowers(activation: Activation, dtype: Any, platform: str) -> bool:
    try:
        _lower(activation, dtype, platform)
    except Exception:  # whatever Pallas raises for what it cannot lower
        _lower(lambda x: x, dtype, platform)  # raises if the activation is not the reason
        return False
    return True


def _lower(activation: Activation, dtype: Any, platform: str) -> None:
    size = SMALLEST_TILE

    def kernels(rows: jax.Array, row_weights: jax.Array, matrices: Arrays, group_sizes: jax.Array) -> Any:
        network = Network(activation, size)
        products, hidden = products_and_hidden(network, rows, row_weights, matrices, group_sizes)
        return gradients_of_products(network, hidden, row_weights, matrices[0], products, group_sizes)

    rows, matrix = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((size, size), (1, size, size)))
    row_weights = jax.ShapeDtypeStruct((size,), jnp.float32)
    sizes = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.jit(kernels).trace(rows, row_weights, (matrix, matrix), sizes).lower(lowering_platforms=(platform,))
