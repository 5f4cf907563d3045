"""The steps of a layer on one device and their gradients, in the order in which `overlapped` has them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.experts import input_matrices, routed_experts, shared_experts
from jax_deepep.moe.grouped_matmul.mosaic_products import Term
from jax_deepep.moe.halves import Activation, Halves, Products, halves_of
from jax_deepep.ops import pairs, verbs
from jax_deepep.ops.custom_call import Call
from jax_deepep.ops.handle import Handle, RouteShape
from jax_deepep.ops.pairs import Beside, Ended
from jax_deepep.ops.wire import Wire

CHANNEL = 1  # of ops in flight; whole ops are on channel 0

Weights = dict[str, jax.Array]


class Batch(NamedTuple):
    """Where tokens of one device go: the operands of dispatch after x, [B, K] each."""

    topk_idx: jax.Array
    topk_weights: jax.Array


class Received(NamedTuple):
    """The rows of a dispatch [C, H], and its handle."""

    tokens: jax.Array
    handle: Handle[Any]


class Saved(NamedTuple):
    """What the gradients of a batch need besides the weights.

    Attributes:
        received: by dispatch.
        products: of the received rows with `input_matrices`; none in blocks.
        pull_back: in blocks: the gradient of the output → those of the received rows, of their weights, and
            of the experts' weights.
    """

    received: Received
    products: Products
    pull_back: Callable[[jax.Array], tuple[jax.Array, jax.Array, Weights]] | None = None


class ExpertGradients(NamedTuple):
    """What the routed experts of a batch contribute to gradients.

    Attributes:
        rows: the gradients of the received rows.
        row_weights: those of the rows' weights.
        inputs, wo: terms of the gradients of `input_matrices`, and of wo, by name; none in blocks.
        weights: in blocks: the gradients of the weights.
    """

    rows: jax.Array
    row_weights: jax.Array
    inputs: dict[str, Term]
    wo: dict[str, Term]
    weights: Weights


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a batch, each a method. `beside` and `operands` are those of `pairs.run_beside`.

    The B tokens of a batch are rows of arrays [T, H] of all batches, of which its ops read and write these
    alone: XLA would copy what it slices for an op, and what ops return to join it.

    Attributes:
        shape: of the dispatches.
        wire, combine_wire: of the ops.
        activation: of the experts.
        choice: the result of `grouped_matmul.chosen`.
        alignment: rows per block.
        beside_ops: whether ops are in flight beside the routed experts.
        num_tokens: T.
        first_token: of the batch, among them.
    """

    shape: RouteShape
    wire: Wire
    combine_wire: Wire
    activation: Activation
    choice: Any
    alignment: int
    beside_ops: bool
    num_tokens: int
    first_token: int

    def _rows_in(self, into: jax.Array | None) -> dict[str, Any]:
        """Return which rows of an array of all tokens a combine writes; others are those of `into`."""
        return {"first_token": self.first_token, "out_tokens": self.num_tokens, "into": into}

    def dispatch(
        self, x: jax.Array, batch: Batch, beside: Beside | None = None, *operands: jax.Array
    ) -> tuple[Received, Any]:
        """Return (the received rows, the results of `beside`); x is that of all batches."""
        verb, sent = verbs.dispatch(self.wire), (x, *batch)
        call = verb.call(self.shape, *sent, first_token=self.first_token)
        results, computed = pairs.run_beside(call, CHANNEL, beside, *operands)
        received = verb.outputs(self.shape, sent, results)
        return Received(*checkpoint_name(received, verb.name)), computed

    def shared_experts(self, x: jax.Array, weights: Weights) -> jax.Array:
        """Return the output of the shared experts [T, H]."""
        return shared_experts(x, weights, activation=self.activation)

    def experts(self, received: Received, weights: Weights) -> jax.Array:
        """Return the output of the routed experts [C, H], weighted."""
        tokens, handle = received
        return routed_experts(
            tokens, handle.weights, handle.group_sizes, weights,
            activation=self.activation, choice=self.choice, alignment=self.alignment,
            beside_ops=self.beside_ops,
        )  # fmt: skip

    def _halves(self, tokens: jax.Array) -> Halves:
        return halves_of(
            self.choice, self.alignment, self.activation, tokens.dtype, beside_ops=self.beside_ops
        )

    def experts_saved(
        self, weights: Weights, handle: Handle[Any], saves: bool, tokens: jax.Array
    ) -> tuple[jax.Array, Saved]:
        """Return (the output of the routed experts, what their gradients need if it `saves` that)."""
        received = Received(tokens, handle)
        if not saves:
            return self.experts(received, weights), Saved(received, ())
        if self.choice == "blocks":

            def experts(tokens: jax.Array, row_weights: jax.Array, weights: Weights) -> jax.Array:
                return self.experts(
                    Received(tokens, dataclasses.replace(handle, weights=row_weights)), weights
                )

            y, pull_back = jax.vjp(experts, tokens, handle.weights, weights)
            return y, Saved(received, (), pull_back)
        halves, sizes, matrices = self._halves(tokens), handle.group_sizes, input_matrices(weights)
        products, hidden = halves.first(tokens, handle.weights, tuple(matrices.values()), sizes)
        return halves.second(hidden, weights["wo"], sizes), Saved(received, products)

    def combine(
        self, y: jax.Array, handle: Handle[Any], bias: jax.Array | None, into: jax.Array | None,
        beside: Beside | None = None, *operands: jax.Array,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Return (the output [T, H], the results of `beside`); bias and `into` are those of all batches.

        Of other batches, the output has the rows of `into`, or arbitrary ones without it.
        """
        verb, forward = verbs.combine(self.combine_wire), (y, None, bias, handle.routes)
        call = verb.call(self.shape, *forward, **self._rows_in(into))
        results, computed = pairs.run_beside(call, CHANNEL, beside, *operands)
        return verb.outputs(self.shape, forward, results), computed

    def gradients_of_combine(
        self, saved: Saved, out: jax.Array, beside: Callable[..., Any] | None = None, *operands: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return (the gradient of the experts' output, the results of `beside`).

        `out` is the cotangent of the output of all batches; `beside` is as in `gradients_of_dispatch`.
        """
        verb, routes = verbs.combine(self.combine_wire), saved.received.handle.routes
        forward = (None, None, None, routes)  # the gradient of a bias is `out`
        call = verb.transpose(self.shape, verb.saved(forward, None), out, first_token=self.first_token)
        results, computed = self._run_beside(call, beside, operands)
        of_y, *_ = verb.gradients(forward, call.operands, results)
        return of_y, computed

    def gradients_of_experts(self, saved: Saved, weights: Weights, of_y: jax.Array) -> ExpertGradients:
        """Return what a batch contributes, given the gradient of y."""
        if saved.pull_back is not None:
            of_rows, of_row_weights, of_weights = saved.pull_back(of_y)
            return ExpertGradients(of_rows, of_row_weights, {}, {}, of_weights)
        (tokens, handle), matrices = saved.received, input_matrices(weights)
        sizes, halves = handle.group_sizes, self._halves(tokens)
        of_products, of_row_weights, hidden = halves.gradients_of_products(
            saved.products, handle.weights, weights["wo"], sizes, of_y
        )
        of_rows = halves.gradient_of_rows(tokens, tuple(matrices.values()), sizes, of_products)
        inputs = {
            name: Term(tokens, of_product, sizes)
            for name, of_product in zip(matrices, of_products, strict=True)
        }
        return ExpertGradients(of_rows, of_row_weights, inputs, {"wo": Term(hidden, of_y, sizes)}, {})

    def gradients_of_weights(
        self, weights: Weights, of_batches: Sequence[dict[str, Term]]
    ) -> dict[str, jax.Array | Ended]:
        """Return the gradients of the weights of which the batches have terms, the sums of these.

        Args:
            weights: of the routed experts.
            of_batches: `ExpertGradients.inputs` or `.wo`.
        """
        gradients: dict[str, jax.Array | Ended] = {}
        for name, term in of_batches[0].items():
            halves = self._halves(term.rows)
            terms = [of_batch[name] for of_batch in of_batches]
            gradients[name] = halves.gradient_of_matrices(weights[name], terms)
        return gradients

    def gradients_of_dispatch(
        self, saved: Saved, of_experts: ExpertGradients, into: jax.Array | None,
        beside: Callable[..., Any] | None = None, *operands: Any,
    ) -> tuple[jax.Array, Batch, Any]:  # fmt: skip
        """Return (the gradients of x, and of the batch, the results of `beside`).

        Args:
            saved: of the batch.
            of_experts: of its routed experts.
            into: the gradients of x, of other batches; None where there are none yet.
            beside, operands: of which all results are computed before the op ends.
        """
        verb, handle = verbs.dispatch(self.wire), saved.received.handle
        outputs = (of_experts.rows, dataclasses.replace(handle, weights=of_experts.row_weights))
        call = verb.transpose(self.shape, handle.routes, outputs, **self._rows_in(into))
        results, computed = self._run_beside(call, beside, operands)
        of_x, *routing = verb.gradients(saved.received, call.operands, results)
        return of_x, Batch(*routing), computed

    @staticmethod
    def _run_beside(
        call: Call, beside: Callable[..., Any] | None, operands: tuple[Any, ...]
    ) -> tuple[list[jax.Array], Any]:
        function = None if beside is None else lambda *operands: (beside(*operands), None)
        results, (computed, _) = pairs.run_beside(call, CHANNEL, function, *operands)
        return results, computed
