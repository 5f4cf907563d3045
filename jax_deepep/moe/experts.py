"""The experts' networks, on expert-major rows and on all tokens."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.blocks import apply_to_blocks
from jax_deepep.moe.grouped_matmul import GroupedMatmul, grouped_matmul

Activation = Callable[[jax.Array], jax.Array]
Weights = Mapping[str, jax.Array]

HIDDEN = "moe_hidden"  # the name of products with wi_0 and wi_1 in policies of jax.checkpoint


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

    Returns:
        [C, H]; arbitrary after the last group.
    """
    if choice == "blocks":
        weights = {name: weights[name] for name in ("wi_0", "wi_1", "wo") if name in weights}
        return apply_to_blocks(partial(_network, activation), alignment, rows, weights, group_sizes)
    multiply = grouped_matmul(choice, alignment)
    products = [
        checkpoint_name(multiply(rows, matrix, group_sizes), HIDDEN)
        for matrix in input_matrices(weights).values()
    ]
    return after_products(products, group_sizes, weights["wo"], activation=activation, multiply=multiply)


def input_matrices(weights: Weights) -> dict[str, jax.Array]:
    """Return `wi_0` and, where there is one, `wi_1`."""
    return {name: weights[name] for name in ("wi_0", "wi_1") if name in weights}


def after_products(
    products: Sequence[jax.Array],
    group_sizes: jax.Array,
    wo: jax.Array,
    *,
    activation: Activation,
    multiply: GroupedMatmul,
) -> jax.Array:
    """Do the rest of `routed_experts`, without blocks, from products with `input_matrices`, [C, F] each."""
    hidden = activation(products[0])
    for product in products[1:]:
        hidden *= product
    return checkpoint_name(multiply(hidden.astype(products[0].dtype), wo, group_sizes), "moe_expert_out")


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
