"""The experts' networks, on expert-major rows and on all tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepep.moe.blocks import apply_to_blocks
from jax_deepep.moe.halves import Activation, gated, halves_of, weighted

Weights = Mapping[str, jax.Array]


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
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    choice: Any,
    alignment: int,
    beside_ops: bool = False,
) -> jax.Array:
    """Apply to each group of rows the network of its expert.

    (row_weights ⊙ activation(rows · wi_0)) · wo, or with `wi_1` (row_weights ⊙ activation(rows · wi_0) ⊙
    (rows · wi_1)) · wo. Rows after the last group may hold NaN, as may their gradients: they affect nothing
    else.

    Args:
        rows: [C, H].
        row_weights: float32 [C].
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
        network = partial(_network, activation)
        return apply_to_blocks(network, alignment, rows, row_weights, weights, group_sizes)
    halves = halves_of(choice, alignment, activation, rows.dtype, beside_ops=beside_ops)
    matrices = tuple(input_matrices(weights).values())
    return halves.whole(rows, row_weights, matrices, weights["wo"], group_sizes)


def input_matrices(weights: Weights) -> dict[str, jax.Array]:
    """Return `wi_0` and, where there is one, `wi_1`."""
    return {name: weights[name] for name in ("wi_0", "wi_1") if name in weights}


def shared_experts(x: jax.Array, weights: Weights, *, activation: Activation) -> jax.Array:
    """Return the output of the shared experts, which apply to every token, [T, H]."""
    own = {
        name.removeprefix("shared_"): value for name, value in weights.items() if name.startswith("shared")
    }
    return _network(activation, x, None, own)


def _network(
    activation: Activation, x: jax.Array, row_weights: jax.Array | None, weights: Weights
) -> jax.Array:
    """Apply one expert to all rows of x."""
    products = [x @ matrix for matrix in input_matrices(weights).values()]
    hidden = gated(activation(products[0]), products[1:])
    if row_weights is not None:
        hidden = weighted(hidden, row_weights)
    return hidden.astype(x.dtype) @ weights["wo"]
