"""The experts' networks without blocks, in two halves, and their gradients."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.grouped_matmul import GroupedMatmul, fused, grouped_matmul
from jax_deepep.moe.grouped_matmul.mosaic import check_operands
from jax_deepep.moe.grouped_matmul.mosaic_kernel import Tiles
from jax_deepep.moe.grouped_matmul.mosaic_products import BESIDE_OPS, TIMES, Term, outer, times
from jax_deepep.ops.checks import vary_together
from jax_deepep.ops.pairs import Ended, values_of

Activation = Callable[[jax.Array], jax.Array]
Products = tuple[jax.Array, ...]

HIDDEN = "moe_hidden"  # in policies of jax.checkpoint


@dataclasses.dataclass(frozen=True)
class Halves:
    """The experts' networks in two halves, without blocks, and their gradients one by one.

    Group sizes are int32 [L], weights of rows float32 [C].

    Attributes:
        multiply: the grouped matmul.
        activation: elementwise.
    """

    multiply: GroupedMatmul
    activation: Activation

    def first(
        self, rows: jax.Array, row_weights: jax.Array, matrices: Products, group_sizes: jax.Array
    ) -> tuple[Products, jax.Array]:
        """Return rows · each of the matrices, and the operand of wo computed from them, [C, F] each."""
        products = (self.multiply(rows, matrix, group_sizes) for matrix in matrices)
        named = tuple(checkpoint_name(product, HIDDEN) for product in products)
        return named, self._hidden(named, row_weights)

    def _hidden(self, products: Products, row_weights: jax.Array) -> jax.Array:
        hidden = gated(self.activation(products[0]), products[1:])
        return weighted(hidden, row_weights).astype(products[0].dtype)

    def second(self, hidden: jax.Array, wo: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Return hidden · wo [C, H]."""
        return self.multiply(hidden, wo, group_sizes)

    def whole(
        self,
        rows: jax.Array,
        row_weights: jax.Array,
        matrices: Products,
        wo: jax.Array,
        group_sizes: jax.Array,
    ) -> jax.Array:
        """Return the result of both halves, which is differentiable."""
        _, hidden = self.first(rows, row_weights, matrices, group_sizes)
        return self.second(hidden, wo, group_sizes)

    def gradients_of_products(
        self,
        products: Products,
        row_weights: jax.Array,
        wo: jax.Array,
        group_sizes: jax.Array,
        of_y: jax.Array,
    ) -> tuple[Products, jax.Array, jax.Array]:
        """Return (the gradients of the products, of the rows' weights, the operand of wo again).

        `of_y` is the gradient of the result.
        """
        hidden, pull_back = jax.vjp(self._hidden, products, row_weights)
        of_hidden = _gradient(lambda hidden: self.multiply(hidden, wo, group_sizes), hidden, of_y)
        return *pull_back(of_hidden), hidden

    def gradient_of_rows(
        self, rows: jax.Array, matrices: Products, group_sizes: jax.Array, of_products: Products
    ) -> jax.Array:
        """Return the gradient of the rows [C, H], the sum over the matrices."""
        return _gradient(
            lambda rows: tuple(self.multiply(rows, matrix, group_sizes) for matrix in matrices),
            rows,
            of_products,
        )

    def gradient_of_matrices(self, matrices: jax.Array, terms: Sequence[Term]) -> jax.Array | Ended:
        """Return the gradient of `matrices`, [L, H, F] or [L, F, H], the sum of the terms."""

        def gradient(term: Term) -> jax.Array:
            return _gradient(
                lambda matrices: self.multiply(term.rows, matrices, term.group_sizes), matrices, term.gradient
            )

        return added([gradient(term) for term in terms])


def gated(hidden: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """Return the product with the factors, in the common dtype: activations may return another one."""
    with jax.numpy_dtype_promotion("standard"):
        return math.prod(factors, start=hidden)


def weighted(hidden: jax.Array, row_weights: jax.Array) -> jax.Array:
    """Return the product with the weights of the rows, in float32."""
    return hidden.astype(jnp.float32) * row_weights[:, None]


def _gradient(function: Callable[[jax.Array], Any], operand: jax.Array, cotangent: Any) -> Any:
    _, transposed = jax.vjp(function, operand)
    return transposed(cotangent)[0]


def added(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return the sum, added in float32, in their dtype."""
    if len(gradients) == 1:
        return gradients[0]
    wide = [gradient.astype(jnp.float32) for gradient in gradients]
    return sum(wide[1:], wide[0]).astype(gradients[0].dtype)


@dataclasses.dataclass(frozen=True)
class MosaicHalves(Halves):
    """With grouped_matmul="mosaic"."""

    def gradient_of_matrices(self, matrices, terms):
        """Return the sum of the terms, of which a tile is in registers until it has all of them."""
        return outer(terms)


@dataclasses.dataclass(frozen=True)
class FusedHalves(MosaicHalves):
    """The same in the kernels of `grouped_matmul.fused`, of which only `whole` is differentiable."""

    alignment: int
    tiles: Tiles = TIMES

    @property
    def _network(self) -> fused.Network:
        return fused.Network(self.activation, self.alignment, self.tiles)

    def first(self, rows, row_weights, matrices, group_sizes):
        """Return the products and the operand of wo."""
        check_operands(rows, matrices, self.alignment)
        products, hidden = fused.products_and_hidden(self._network, rows, row_weights, matrices, group_sizes)
        return checkpoint_name(products, HIDDEN), hidden

    def second(self, hidden, wo, group_sizes):
        """Return the product with wo."""
        return times(self.alignment, [(hidden, wo)], group_sizes, transposed=False, tiles=self.tiles)

    def whole(self, rows, row_weights, matrices, wo, group_sizes):
        """Return the result; without a gradient, the products are not written."""
        check_operands(rows, matrices, self.alignment)
        return _whole(self, *vary_together(frozenset(), rows, row_weights, matrices, wo, group_sizes))

    def hidden_alone(
        self, rows: jax.Array, row_weights: jax.Array, matrices: Products, group_sizes: jax.Array
    ) -> jax.Array:
        """Return the operand of wo."""
        operands = (rows, row_weights, matrices, group_sizes)
        return fused.products_and_hidden(self._network, *operands, keeps=False)[1]

    def gradients_of_products(self, products, row_weights, wo, group_sizes, of_y):
        """Return the gradients of the products, of the rows' weights, and the operand of wo again."""
        return fused.gradients_of_products(self._network, of_y, row_weights, wo, products, group_sizes)

    def gradient_of_rows(self, rows, matrices, group_sizes, of_products):
        """Return the gradient of the rows."""
        pairs = list(zip(of_products, matrices, strict=True))
        return times(self.alignment, pairs, group_sizes, transposed=True, tiles=self.tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(halves, rows, row_weights, matrices, wo, group_sizes):
    return halves.second(halves.hidden_alone(rows, row_weights, matrices, group_sizes), wo, group_sizes)


def _whole_forward(halves, rows, row_weights, matrices, wo, group_sizes):
    products, hidden = halves.first(rows, row_weights, matrices, group_sizes)
    residuals = (rows, row_weights, matrices, wo, group_sizes, products)
    return halves.second(hidden, wo, group_sizes), residuals


def _whole_backward(halves, residuals, of_y):
    rows, row_weights, matrices, wo, group_sizes, products = residuals
    of_products, of_row_weights, hidden = halves.gradients_of_products(
        products, row_weights, wo, group_sizes, of_y
    )
    of_rows = halves.gradient_of_rows(rows, matrices, group_sizes, of_products)
    of_matrices = tuple(
        halves.gradient_of_matrices(matrix, [Term(rows, of, group_sizes)])
        for matrix, of in zip(matrices, of_products, strict=True)
    )
    of_wo = halves.gradient_of_matrices(wo, [Term(hidden, of_y, group_sizes)])
    return of_rows, of_row_weights, *values_of((of_matrices, of_wo)), None


_whole.defvjp(_whole_forward, _whole_backward)


def halves_of(
    choice: Any, alignment: int, activation: Activation, dtype: Any, *, beside_ops: bool = False
) -> Halves:
    """Return the networks of experts whose rows are of `dtype`, for any choice but "blocks"."""
    tiles = BESIDE_OPS if beside_ops else None
    multiply = grouped_matmul(choice, alignment, tiles)
    if choice != "mosaic":
        return Halves(multiply, activation)
    if fused.can_fuse(activation, dtype):
        return FusedHalves(multiply, activation, alignment, tiles or TIMES)
    return MosaicHalves(multiply, activation)
