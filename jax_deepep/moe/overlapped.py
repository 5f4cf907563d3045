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
                combine of A       beside the experts of B, without the gradients of weights
                dispatch of B      beside the experts of A, and the gradient of wo, of A and B
                dispatch of A      beside the gradients of wi_0 and wi_1, of A and B

dispatch and combine of the backward pass are the gradients of these ops. An op with nothing beside it is a
whole op. One op is in flight at a time: two would share the link, so that the first one, which is waited for,
would end later. With grouped_matmul="blocks", experts have the gradients of weights too.

With grouped_matmul="mosaic" gradients of weights are sums over the rows of both batches, written once; others
multiply the rows of each, and add. x, the output and their gradients are arrays of both batches, of which an
op reads or writes its own rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.halves import added
from jax_deepep.moe.steps import Batch, ExpertGradients, Received, Saved, Steps, Weights
from jax_deepep.ops import autodiff, native
from jax_deepep.ops.dispatch import checked_request
from jax_deepep.ops.handle import Handle
from jax_deepep.ops.implementations import implementation_of
from jax_deepep.ops.pairs import Ended, values_of
from jax_deepep.ops.wire import checked_wire


class Applied(NamedTuple):
    """The results of all batches.

    Attributes:
        out: [T, H], the sum of routed and shared experts.
        destination: int32 [T, K], of the handles of the dispatches.
        num_received: int32 [], their sum.
    """

    out: jax.Array
    destination: jax.Array
    num_received: jax.Array

    @classmethod
    def of(cls, out: jax.Array, handles: Sequence[Handle[Any]]) -> "Applied":
        """Return the results of batches with these handles."""
        destinations = [handle.destination for handle in handles]
        received = [handle.num_received for handle in handles]
        return cls(out, joined(destinations), sum(received[1:], received[0]))


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Return an array of all batches."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def parted(array: jax.Array, number: int) -> list[jax.Array]:
    """Return the part of each batch."""
    return [array] if number == 1 else jnp.split(array, number)


def apply_experts(
    config: MoEConfig,
    choice: Any,
    x: jax.Array,
    batches: Sequence[Batch],
    weights: Weights,
    shared: Weights,
    options: dict[str, Any],
) -> Applied:
    """Send the tokens of one or two batches through the experts.

    Args:
        config: static.
        choice: the result of `grouped_matmul.chosen`.
        x: [T, H], the tokens of the batches, one after the other.
        batches: where these go; of the same shapes.
        weights, shared: of the routed and of the shared experts, in any dtype; `shared` may be empty.
        options: layout="expert", capacity, expert_capacity and alignment of each dispatch.
    """
    num_tokens = len(x) // len(batches)
    requests = [
        checked_request("dispatch", x, *batch, config.comm, options, config.wire, None, num_tokens)
        for batch in batches
    ]
    x = requests[0].operands[0]
    batches = [Batch(*request.operands[1:]) for request in requests]
    of_first = Steps(
        requests[0].shape, requests[0].wire, checked_wire("combine", config.combine_wire, x),
        config.activation, choice, options["alignment"], beside_ops=len(batches) > 1,
        num_tokens=len(x), first_token=0,
    )  # fmt: skip

    def cast(weights: Weights) -> Weights:
        return {name: value.astype(x.dtype) for name, value in weights.items()}

    if implementation_of(of_first.shape) is not native:
        parts = parted(x, len(batches))
        # Cast for each batch (XLA does it once), so that their gradients are added in the weights' dtype.
        applied = [
            _apply_one(of_first, part, batch, cast(weights), cast(shared))
            for part, batch in zip(parts, batches, strict=True)
        ]
        outs, handles = zip(*applied, strict=True)
        return Applied.of(joined(outs), handles)
    steps = tuple(replace(of_first, first_token=i * num_tokens) for i in range(len(batches)))
    whole: Applied = autodiff.without_integer_tangents(_apply(steps, x, batches, cast(weights), cast(shared)))
    return whole


def _apply_one(
    steps: Steps, x: jax.Array, batch: Batch, weights: Weights, shared: Weights
) -> tuple[jax.Array, Handle[Any]]:
    tokens, handle = autodiff.without_integer_tangents(autodiff.dispatch(steps.shape, steps.wire, x, *batch))
    bias = steps.shared_experts(x, shared) if shared else None
    y = steps.experts(Received(tokens, handle), weights)
    out = autodiff.combine(steps.shape, steps.combine_wire, y, None, bias, handle.routes)
    return out, handle


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    steps: Sequence[Steps], x: jax.Array, batches: list[Batch], weights: Weights, shared: Weights
) -> Applied:
    return _forward(steps, x, batches, weights, shared, saves=False)[0]


def _forward(
    steps: Sequence[Steps],
    x: jax.Array,
    batches: list[Batch],
    weights: Weights,
    shared: Weights,
    saves: bool = True,
) -> tuple[Applied, tuple[list[Saved], Weights, Any]]:
    """Return the results, and what `_backward` needs of the batches and of the shared experts.

    Args:
        steps: of each batch.
        x, batches, weights, shared: as `apply_experts`, in the dtype of x.
        saves: whether there are gradients.
    """
    (a, *others), (steps_a, *other_steps) = batches, steps
    bias = pull_back = None
    if shared:
        at_a, (bias, pull_back) = steps_a.dispatch(
            x, a, lambda x: jax.vjp(steps_a.shared_experts, x, shared), x
        )
    else:
        at_a, _ = steps_a.dispatch(x, a)
    experts_a = partial(steps_a.experts_saved, weights, at_a.handle, saves)
    if not others:
        y_a, of_a = experts_a(at_a.tokens)
        out, _ = steps_a.combine(y_a, at_a.handle, bias, None)
        saved = [of_a]
    else:
        (b,), (steps_b,) = others, other_steps
        at_b, (y_a, of_a) = steps_b.dispatch(x, b, experts_a, at_a.tokens)
        experts_b = partial(steps_b.experts_saved, weights, at_b.handle, saves)
        out, (y_b, of_b) = steps_a.combine(y_a, at_a.handle, bias, None, experts_b, at_b.tokens)
        out, _ = steps_b.combine(y_b, at_b.handle, bias, out)
        saved = [of_a, of_b]
    return Applied.of(out, [of.received.handle for of in saved]), (saved, weights, pull_back)


def _backward(
    steps: Sequence[Steps], residuals: tuple[list[Saved], Weights, Any], cotangents: Applied
) -> tuple[jax.Array, list[Batch], Weights, Weights]:
    saved, weights, pull_back = residuals
    out = cotangents.out
    (*others, last), (*other_steps, steps_last) = saved, steps
    of_shared: Any = (None, {})
    if pull_back is None:
        of_y, _ = steps_last.gradients_of_combine(last, out)
    else:
        of_y, of_shared = steps_last.gradients_of_combine(last, out, pull_back, out)
    experts = partial(steps_last.gradients_of_experts, last, weights)
    of_matrices = partial(steps_last.gradients_of_weights, weights)
    if not others:
        of_experts = experts(of_y)
        of_wo = values_of(of_matrices([of_experts.wo]))
        of_x, of_batch, of_inputs = steps_last.gradients_of_dispatch(
            last, of_experts, None, of_matrices if of_experts.inputs else None, [of_experts.inputs]
        )
        of_batches, of_blocks = [of_batch], of_experts.weights
    else:
        (a,), (steps_a,) = others, other_steps
        of_y_a, of_experts = steps_a.gradients_of_combine(a, out, experts, of_y)

        def experts_a(of_y: jax.Array) -> tuple[ExpertGradients, dict[str, jax.Array | Ended]]:
            of_a = steps_a.gradients_of_experts(a, weights, of_y)
            return of_a, of_matrices([of_a.wo, of_experts.wo])

        of_x, of_batch, (of_a, of_wo) = steps_last.gradients_of_dispatch(
            last, of_experts, None, experts_a, of_y_a
        )
        of_x, of_batch_a, of_inputs = steps_a.gradients_of_dispatch(
            a, of_a, of_x, of_matrices if of_a.inputs else None, [of_a.inputs, of_experts.inputs]
        )
        of_batches = [of_batch_a, of_batch]
        of_blocks = {
            name: added([of_a.weights[name], gradient]) for name, gradient in of_experts.weights.items()
        }
    of_shared_x, of_shared_weights = of_shared
    of_x = of_x if of_shared_x is None else of_x + of_shared_x
    return of_x, of_batches, of_blocks | of_wo | (of_inputs or {}), of_shared_weights


_apply.defvjp(_forward, _backward)
