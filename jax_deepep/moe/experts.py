"""The experts' networks, on expert-major rows and on all tokens."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.blocks import apply_to_blocks
from jax_deepep.moe.grouped_matmul import GroupedMatmul, fused, grouped_matmul
from jax_deepep.moe.grouped_matmul.mosaic import BESIDE_OPS, TIMES, Tiles

Activation = Callable[[jax.Array], jax.Array]
Weights = Mapping[str, jax.Array]
Products = tuple[jax.Array, ...]

HIDDEN, EXPERT_OUT = "moe_hidden", "moe_expert_out"  # in policies of jax.checkpoint


def check_activation(activation: Any) -> None:
    """Raise unless `activation` is an elementwise function of one array."""
    if not callable(activation):
        raise TypeError(f"activation: expected a function, got {activation!r}; pass jax.nn.silu or the like.")
    rows = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    try:
        result = jax.eval_shape(activation, rows)
        what = "" if getattr(result, "shape", None) == rows.shape else f"a function to {result}"
    except Exception as error:  # whatever a function of other arguments raises
        what = f"one that raises {type(error).__name__} on an array: {str(error).splitlines()[:1]}"
    if what:
        raise TypeError(
            f"activation: expected an elementwise function of one array, got {what}; pass jax.nn.silu "
            "or the like. With gated=True the layer multiplies its result with x · wi_1."
        )


def routed_experts(
    rows: jax.Array,
    group_sizes: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    choice: Any,
    alignment: int,
    beside_ops: bool = False,
) -> jax.Array:
    """Apply to each group of rows the network of its expert.

    activation(rows · wi_0) · wo, or with `wi_1` (activation(rows · wi_0) ⊙ (rows · wi_1)) · wo. Rows after
    the last group may hold NaN, as may their gradients: they affect nothing else.

    Args:
        rows: [C, H].
        group_sizes: int32 [L], multiples of `alignment`.
        weights: `wi_0` and optionally `wi_1` [L, H, F], `wo` [L, F, H], of the dtype of rows.
        activation: elementwise; it may return another float dtype.
        choice: the result of `grouped_matmul.chosen`.
        alignment: rows per block.
        beside_ops: whether an op may be in flight meanwhile.

    Returns:
        [C, H]; arbitrary after the last group.
    """
    if choice == "blocks":
        weights = {name: weights[name] for name in ("wi_0", "wi_1", "wo") if name in weights}
        return apply_to_blocks(partial(_network, activation), alignment, rows, weights, group_sizes)
    halves = halves_of(choice, alignment, activation, rows.dtype, beside_ops=beside_ops)
    return halves.whole(rows, tuple(input_matrices(weights).values()), weights["wo"], group_sizes)


def input_matrices(weights: Weights) -> dict[str, jax.Array]:
    """Return `wi_0` and, where there is one, `wi_1`."""
    return {name: weights[name] for name in ("wi_0", "wi_1") if name in weights}


@dataclasses.dataclass(frozen=True)
class Halves:
    """The experts' networks in two halves, without blocks. Group sizes are int32 [L].

    Attributes:
        multiply: the grouped matmul.
        activation: elementwise.
    """

    multiply: GroupedMatmul
    activation: Activation

    def first(
        self, rows: jax.Array, matrices: Products, group_sizes: jax.Array
    ) -> tuple[Products, jax.Array | None]:
        """Return rows · each of the matrices, [C, F] each, and what else `second` may need."""
        products = (self.multiply(rows, matrix, group_sizes) for matrix in matrices)
        return tuple(checkpoint_name(product, HIDDEN) for product in products), None

    def second(
        self, products: Products, hidden: jax.Array | None, wo: jax.Array, group_sizes: jax.Array
    ) -> jax.Array:
        """Return the rest of the network of `products` [C, H]. Differentiable but for `hidden`."""
        del hidden
        value = self.activation(products[0])
        for product in products[1:]:
            value *= product
        value = value.astype(products[0].dtype)
        return checkpoint_name(self.multiply(value, wo, group_sizes), EXPERT_OUT)

    def whole(self, rows: jax.Array, matrices: Products, wo: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Return the result of both halves."""
        return self.second(*self.first(rows, matrices, group_sizes), wo, group_sizes)


@dataclasses.dataclass(frozen=True)
class FusedHalves(Halves):
    """The same in the kernels of `grouped_matmul.fused`."""

    alignment: int
    tiles: Tiles = TIMES

    @property
    def _network(self) -> fused.Network:
        return fused.Network(self.activation, self.alignment, self.tiles)

    def first(self, rows, matrices, group_sizes):
        """Return the products and the operand of wo."""
        return checkpoint_name(fused.first(self._network, rows, matrices, group_sizes), HIDDEN)

    def second(self, products, hidden, wo, group_sizes):
        """Return the product with wo."""
        return checkpoint_name(fused.second(self._network, products, hidden, wo, group_sizes), EXPERT_OUT)

    def whole(self, rows, matrices, wo, group_sizes):
        """Return the result; without a gradient, the products are not written."""
        return fused.whole(self._network, super().whole, rows, matrices, wo, group_sizes)


def halves_of(
    choice: Any, alignment: int, activation: Activation, dtype: Any, *, beside_ops: bool = False
) -> Halves:
    """Return the networks of experts whose rows are of `dtype`, for any choice but "blocks"."""
    tiles = BESIDE_OPS if beside_ops else None
    multiply = grouped_matmul(choice, alignment, tiles)
    if choice == "mosaic" and fused.can_fuse(activation, dtype):
        return FusedHalves(multiply, activation, alignment, tiles or TIMES)
    return Halves(multiply, activation)


def shared_experts(x: jax.Array, weights: Weights, *, activation: Activation) -> jax.Array:
    """Return the output of the shared experts, which apply to every token, [T, H]."""
    own = {
        name.removeprefix("shared_"): value for name, value in weights.items() if name.startswith("shared")
    }
    return _network(activation, x, own)


def _network(activation: Activation, x: jax.Array, weights: Weights) -> jax.Array:
    """Apply one expert to all rows of x."""
    hidden = activation(x @ weights["wi_0"])
    if "wi_1" in weights:
        hidden *= x @ weights["wi_1"]
    return hidden.astype(x.dtype) @ weights["wo"]
