"""The steps of a layer on one device and their gradients, in the order in which `overlapped` has them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_deepep.moe.experts import (
    Activation,
    Halves,
    Products,
    halves_of,
    input_matrices,
    routed_experts,
    shared_experts,
)
from jax_deepep.ops import pairs, verbs
from jax_deepep.ops.handle import Handle, RouteShape
from jax_deepep.ops.pairs import Beside
from jax_deepep.ops.wire import Wire

CHANNEL = 1  # of ops in flight; whole ops are on channel 0

Weights = dict[str, jax.Array]


class Batch(NamedTuple):
    """Where tokens of one device go, and the weights of the routed experts.

    Attributes:
        weights: by name; each batch has its own gradients of them.
        topk_idx, topk_weights: [B, K].
    """

    weights: Weights
    topk_idx: jax.Array
    topk_weights: jax.Array

    @property
    def routing(self) -> tuple[jax.Array, jax.Array]:
        """The operands of dispatch after x."""
        return self.topk_idx, self.topk_weights


class Received(NamedTuple):
    """The rows of a dispatch [C, H], and its handle."""

    tokens: jax.Array
    handle: Handle[Any]


class Saved(NamedTuple):
    """What the gradients of a batch need.

    Attributes:
        received: by dispatch.
        matrices: the weights that multiply received rows, [L, H, F] each; none in blocks.
        y: the operand of combine.
        pull_back: the cotangent of y → those of the products with `matrices` (in blocks, of the rows), and of
            the other weights; None where there are no gradients.
    """

    received: Received
    matrices: Weights
    y: jax.Array
    pull_back: Callable[[jax.Array], tuple[Products, Weights]] | None


class ExpertGradients(NamedTuple):
    """Gradients of the routed experts but for `Saved.matrices`.

    Attributes:
        rows: of the received rows.
        products: of their products with these matrices.
        weights: of the other weights.
    """

    rows: jax.Array
    products: Products
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
        verb, sent = verbs.dispatch(self.wire), (x, *batch.routing)
        call = verb.call(self.shape, *sent, first_token=self.first_token)
        results, computed = pairs.run_beside(call, CHANNEL, beside, *operands)
        received = verb.outputs(self.shape, sent, results)
        return Received(*checkpoint_name(received, verb.name)), computed

    def shared_experts(self, x: jax.Array, weights: Weights) -> jax.Array:
        """Return the output of the shared experts [T, H]."""
        return shared_experts(x, weights, activation=self.activation)

    def experts(self, tokens: jax.Array, weights: Weights, group_sizes: jax.Array) -> jax.Array:
        """Return the output of the routed experts [C, H]."""
        return routed_experts(
            tokens, group_sizes, weights,
            activation=self.activation, choice=self.choice, alignment=self.alignment,
            beside_ops=self.beside_ops,
        )  # fmt: skip

    def _halves(self, tokens: jax.Array, *, beside_op: bool = False) -> Halves:
        beside_ops = self.beside_ops or beside_op
        return halves_of(self.choice, self.alignment, self.activation, tokens.dtype, beside_ops=beside_ops)

    def experts_saved(
        self, batch: Batch, handle: Handle[Any], saves: bool, tokens: jax.Array
    ) -> tuple[jax.Array, Saved]:
        """Return (the output of the routed experts, what their gradients need if it `saves` that)."""
        sizes, received = handle.group_sizes, Received(tokens, handle)
        if not saves:
            y = self.experts(tokens, batch.weights, sizes)
            return y, Saved(received, {}, y, None)
        matrices = {} if self.choice == "blocks" else input_matrices(batch.weights)
        others = {name: value for name, value in batch.weights.items() if name not in matrices}
        if not matrices:
            y, pull_back = jax.vjp(
                lambda rows, others: self.experts(rows[0], others, sizes), (tokens,), others
            )
            return y, Saved(received, matrices, y, pull_back)
        halves = self._halves(tokens)
        products, hidden = halves.first(tokens, tuple(matrices.values()), sizes)
        y, pull_back = jax.vjp(
            lambda products, others: halves.second(products, hidden, others["wo"], sizes), products, others
        )
        return y, Saved(received, matrices, y, pull_back)

    def combine(
        self, y: jax.Array, handle: Handle[Any], bias: jax.Array | None, into: jax.Array | None,
        beside: Beside | None = None, *operands: jax.Array,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Return (the output [T, H], the results of `beside`); bias and `into` are those of all batches.

        Of other batches, the output has the rows of `into`, or arbitrary ones without it.
        """
        verb, forward = verbs.combine(self.combine_wire), (y, handle.weights, bias, handle.routes)
        call = verb.call(self.shape, *forward, **self._rows_in(into))
        results, computed = pairs.run_beside(call, CHANNEL, beside, *operands)
        return verb.outputs(self.shape, forward, results), computed

    def gradients_of_combine(
        self, saved: Saved, out: jax.Array, beside: Callable[..., Any] | None = None, *operands: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Return ((the gradients of y, and of the rows' weights), the results of `beside`).

        `out` is the cotangent of the output of all batches.
        """
        verb, handle = verbs.combine(self.combine_wire), saved.received.handle
        forward = (saved.y, handle.weights, None, handle.routes)  # the gradient of a bias is `out`
        call = verb.transpose(self.shape, verb.saved(forward, None), out, first_token=self.first_token)
        function = None if beside is None else lambda *operands: (beside(*operands), None)
        results, (computed, _) = pairs.run_beside(call, CHANNEL, function, *operands)
        of_y, of_weights, *_ = verb.gradients(forward, call.operands, results)
        return (of_y, of_weights), computed

    def gradients_of_experts(self, saved: Saved, of_y: jax.Array) -> ExpertGradients:
        """Return those of the routed experts but for `saved.matrices`."""
        assert saved.pull_back is not None
        products, others = saved.pull_back(of_y)
        if not saved.matrices:
            return ExpertGradients(products[0], (), others)
        tokens, handle = saved.received
        matrices, halves = tuple(saved.matrices.values()), self._halves(tokens)
        of_rows = _gradient(
            lambda rows: halves.first(rows, matrices, handle.group_sizes)[0], tokens, products
        )
        return ExpertGradients(of_rows, products, others)

    def gradients_of_dispatch(
        self, saved: Saved, of_experts: ExpertGradients, weights: jax.Array, into: jax.Array | None,
        beside: Callable[..., Any] | None = None, *operands: jax.Array,
    ) -> tuple[jax.Array, Batch, Any]:  # fmt: skip
        """Return the gradients of x, of the batch, and the results of `beside`.

        Args:
            saved: of the batch.
            of_experts: the gradients of its routed experts.
            weights: of the rows' weights.
            into: the gradients of x, of other batches; None where there are none yet.
            beside, operands: what is computed after the gradients of the matrices.
        """
        verb, handle = verbs.dispatch(self.wire), saved.received.handle

        def function(products: tuple[jax.Array, ...], *operands: jax.Array) -> tuple[Any, None]:
            of_matrices = self._gradients_of_matrices(saved, products)
            return (of_matrices, None if beside is None else beside(*operands)), None

        outputs = (of_experts.rows, dataclasses.replace(handle, weights=weights))
        call = verb.transpose(self.shape, handle.routes, outputs, **self._rows_in(into))
        results, (computed, _) = pairs.run_beside(
            call, CHANNEL, function if saved.matrices or beside else None, of_experts.products, *operands
        )
        of_matrices, others = computed or ({}, None)
        of_x, *routing = verb.gradients(saved.received, call.operands, results)
        return of_x, Batch(of_experts.weights | of_matrices, *routing), others

    def _gradients_of_matrices(self, saved: Saved, products: Products) -> Weights:
        tokens, handle = saved.received
        halves = self._halves(tokens, beside_op=True)
        gradients = _gradient(
            lambda matrices: halves.first(tokens, matrices, handle.group_sizes)[0],
            tuple(saved.matrices.values()),
            products,
        )
        return dict(zip(saved.matrices, gradients, strict=True))


def _gradient(function: Callable[[Any], Products], operand: Any, cotangent: Products) -> Any:
    _, transposed = jax.vjp(function, operand)
    return transposed(cotangent)[0]
