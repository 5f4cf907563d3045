"""The experts' networks, on rows of expert-major order and on all tokens."""

from collections.abc import Callable, Mapping

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.grouped_matmul import GroupedMatmul

Activation = Callable[[jax.Array], jax.Array]


def routed_experts(
    rows: jax.Array,
    group_sizes: jax.Array,
    parameters: Mapping[str, jax.Array],
    *,
    activation: Activation,
    multiply: GroupedMatmul,
) -> jax.Array:
    """Apply to each group of rows the network of its expert.

    activation(rows · wi_0) · wo, or with `wi_1` activation(rows · wi_0) ⊙ (rows · wi_1) · wo. Rows after
    the last group are never read, nor are their gradients.

    Args:
        rows: [C, H].
        group_sizes: int32 [L].
        parameters: `wi_0` and optionally `wi_1` [L, H, F], `wo` [L, F, H], of the dtype of rows.
        activation: elementwise.
        multiply: the grouped matmul.

    Returns:
        [C, H].
    """

    def inwards(name: str) -> jax.Array:
        return checkpoint_name(multiply(rows, parameters[name], group_sizes), "moe_hidden")

    hidden = activation(inwards("wi_0"))
    if "wi_1" in parameters:
        hidden *= inwards("wi_1")
    out = multiply(hidden, parameters["wo"], group_sizes)
    return checkpoint_name(out, "moe_expert_out")


def shared_experts(
    x: jax.Array, parameters: Mapping[str, jax.Array], *, activation: Activation
) -> jax.Array | None:
    """Return what the experts that every token goes to add, [T, H]; None without such experts."""
    if "shared_wi_0" not in parameters:
        return None
    hidden = activation(x @ parameters["shared_wi_0"])
    if "shared_wi_1" in parameters:
        hidden *= x @ parameters["shared_wi_1"]
    return hidden @ parameters["shared_wo"]
