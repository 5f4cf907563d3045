"""Dispatch, experts and combine of a layer: what is computed while which op is in flight.

    forward     dispatch           beside the shared experts
                combine
    backward    combine            beside the shared experts
                dispatch           beside the gradients of wi_0 and wi_1

With two batches, A and B, one communicates while the other computes:

    forward     dispatch of A      beside the shared experts of A and B
                dispatch of B      beside the experts of A
                combine of A       beside the experts of B
                combine of B
    backward    combine of B       beside the shared experts of A and B
                combine of A       beside the experts of B, without the gradients of wi_0 and wi_1
                dispatch of B      beside these, and the experts of A, without those of wi_0 and wi_1
                dispatch of A      beside these

dispatch and combine of the backward pass are the gradients of these ops. An op with nothing beside it is a
whole op. One op is in flight at a time: two would share the link, so that the first one, which is waited for,
would end later. grouped_matmul="blocks" has no separate gradients of wi_0 and wi_1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.steps import Batch, Saved, Steps, Weights
from jax_deepep.ops import autodiff, native
from jax_deepep.ops.dispatch import checked_request
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.wire import checked_wire


class Applied(NamedTuple):
    """The results of a batch.

    Attributes:
        out: [T, H], the sum of routed and shared experts.
        destination, num_received: of the handle of its dispatch.
    """

    out: jax.Array
    destination: jax.Array
    num_received: jax.Array


def apply_experts(
    config: MoEConfig, choice: Any, batches: Sequence[Batch], shared: Weights, options: dict[str, Any]
) -> list[Applied]:
    """Send the tokens of one or two batches through the experts.

    Args:
        config: static.
        choice: the result of `grouped_matmul.chosen`.
        batches: of the same shapes.
        shared: the weights of the shared experts; empty without any.
        options: layout="expert", capacity, expert_capacity and alignment of each dispatch.

    Returns:
        The results of each batch.
    """
    requests = [
        checked_request("dispatch", *batch.sent, config.comm, options, config.wire, None) for batch in batches
    ]
    batches = [
        Batch(batch.weights, *request.operands) for batch, request in zip(batches, requests, strict=True)
    ]
    combine_wire = checked_wire("combine", config.combine_wire, batches[0].x)
    steps = Steps(
        requests[0].shape, requests[0].wire, combine_wire,
        config.activation, choice, options["alignment"], beside_ops=len(batches) > 1,
    )  # fmt: skip
    if implementation_of(steps.shape) is not native:
        return [_apply_plainly(steps, batch, shared) for batch in batches]
    results: list[Applied] = autodiff.without_integer_tangents(_apply(steps, batches, shared))
    return results


def _apply_plainly(steps: Steps, batch: Batch, shared: Weights) -> Applied:
    tokens, handle = autodiff.without_integer_tangents(
        autodiff.dispatch(steps.shape, steps.wire, *batch.sent)
    )
    bias = steps.shared_experts(batch.x, shared) if shared else None
    y = steps.experts(tokens, batch.weights, handle.group_sizes)
    out = autodiff.combine(steps.shape, steps.combine_wire, y, handle.weights, bias, handle.routes)
    return Applied(out, handle.destination, handle.num_received)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(steps: Steps, batches: list[Batch], shared: Weights) -> list[Applied]:
    return _forward(steps, batches, shared, saves=False)[0]


def _forward(
    steps: Steps, batches: list[Batch], shared: Weights, saves: bool = True
) -> tuple[list[Applied], tuple[list[Saved], Any]]:
    """Return the results, and what `_backward` needs of the batches and of the shared experts."""
    a, *others = batches
    biases: list[Any] = [None] * len(batches)
    pull_back = None
    if shared:
        xs = _joined([batch.x for batch in batches])
        at_a, (bias, pull_back) = steps.dispatch(a, lambda x: jax.vjp(steps.shared_experts, x, shared), xs)
        biases = jnp.split(bias, len(batches))
    else:
        at_a, _ = steps.dispatch(a)
    experts_a = partial(steps.experts_saved, a, at_a.handle, saves)
    if not others:
        y_a, of_a = experts_a(at_a.tokens)
        out_a, _ = steps.combine(y_a, at_a.handle, biases[0])
        outs, saved = [out_a], [of_a]
    else:
        (b,) = others
        at_b, (y_a, of_a) = steps.dispatch(b, experts_a, at_a.tokens)
        experts_b = partial(steps.experts_saved, b, at_b.handle, saves)
        out_a, (y_b, of_b) = steps.combine(y_a, at_a.handle, biases[0], experts_b, at_b.tokens)
        out_b, _ = steps.combine(y_b, at_b.handle, biases[1])
        outs, saved = [out_a, out_b], [of_a._replace(y=y_a), of_b._replace(y=y_b)]
    handles = [of.received.handle for of in saved]
    results = [
        Applied(out, handle.destination, handle.num_received)
        for out, handle in zip(outs, handles, strict=True)
    ]
    return results, (saved, pull_back)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Return one array of all batches: XLA sees that it is what was split."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _backward(
    steps: Steps, residuals: tuple[list[Saved], Any], cotangents: list[Applied]
) -> tuple[list[Batch], Weights]:
    saved, pull_back = residuals
    outs = [cotangent.out for cotangent in cotangents]
    *others, last = saved
    of_shared: Any = (None, {})
    if pull_back is None:
        (of_y, of_weights), _ = steps.gradients_of_combine(last, outs[-1])
    else:
        (of_y, of_weights), of_shared = steps.gradients_of_combine(last, outs[-1], pull_back, _joined(outs))
    experts = partial(steps.gradients_of_experts, last)
    if not others:
        of_experts = experts(of_y)
        sent, of_matrices, _ = steps.gradients_of_dispatch(last, of_experts, of_weights)
        gradients = [(of_experts.weights | of_matrices, sent)]
    else:
        (a,) = others
        (of_y_a, of_weights_a), of_experts = steps.gradients_of_combine(a, outs[0], experts, of_y)
        experts_a = partial(steps.gradients_of_experts, a)
        sent, of_matrices, of_experts_a = steps.gradients_of_dispatch(
            last, of_experts, of_weights, experts_a, of_y_a
        )
        sent_a, of_matrices_a, _ = steps.gradients_of_dispatch(a, of_experts_a, of_weights_a)
        gradients = [
            (of_experts_a.weights | of_matrices_a, sent_a), (of_experts.weights | of_matrices, sent)
        ]  # fmt: skip
    of_x, of_shared_weights = of_shared
    of_xs = [None] * len(saved) if of_x is None else jnp.split(of_x, len(saved))
    batches = [_gradients_of(*of, these) for of, these in zip(gradients, of_xs, strict=True)]
    return batches, of_shared_weights


def _gradients_of(weights: Weights, sent: Any, of_x: jax.Array | None) -> Batch:
    """Return the gradients of a batch; `of_x` is what the shared experts add to that of x."""
    x, *routing = sent
    return Batch(weights, x if of_x is None else x + of_x, *routing)


_apply.defvjp(_forward, _backward)
