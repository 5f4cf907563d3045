"""combine: return the experts' results to the tokens and sum them."""

from typing import Any

import jax

from jax_deepep.checks import check_array, check_rows_dtype
from jax_deepep.communicator import Communicator
from jax_deepep.ops import autodiff
from jax_deepep.ops.checks import check_call_site, check_fits_mode, communicator_of, vary_together
from jax_deepep.ops.handle import ExpertMajor, Handle, TokenMajor
from jax_deepep.ops.reverse_mode import only_in_reverse
from jax_deepep.ops.wire import Wire, checked_wire
from jax_deepep.quantization.formats import Format


def combine(
    y: jax.Array,
    handle: Handle[Any],
    *,
    comm: Communicator | None = None,
    weighted: bool | None = None,
    bias: jax.Array | None = None,
    wire: Wire | Format | None = None,
) -> jax.Array:
    """Sum the rows of every token over its experts, on the device that the token came from.

    The device d of the experts sums p_d = Σ_k w[t, k] · y[row(t, k)] over its own k in ascending
    order, in float32 with products and sums rounded separately, rounded once to `y.dtype`. Then
    out[t] = bias[t] + p_0 + p_1 + …, in float32 from left to right over the devices that hold a
    row of t, rounded once to `y.dtype`. On several nodes (`comm.ranks_per_node`) there is a level more:
    out[t] = bias[t] + p'_0 + p'_1 + … over the nodes, and p'_n = Σ_d p_d over the devices d of node n that
    hold a row of t, likewise, rounded once to `y.dtype`. Every native implementation gives exactly these
    bits; "xla" gives them up to float32 rounding, because XLA may contract a multiply and an add.

    **Collective:** as `jax_deepep.dispatch`.

    Args:
        y: [C, H] bfloat16, float16 or float32, in the layout of the dispatch. Rows without a
            token are ignored, whatever they hold. Differentiable.
        handle: what the dispatch returned. Its router weights are differentiable.
        comm: None, or the communicator of the dispatch, which is then checked.
        weighted: multiply each row by its router weight. None = True for expert-major rows, False
            for token-major rows, whose sums over local experts are the caller's.
        bias: [T, H] of `y.dtype` or None, added to the sum (a shared expert, a residual).
            Differentiable.
        wire: the format in which a p_d of another device, or the sum of another node, crosses the link:
            None, as above; "fp8", "fp8_ue8m0" or "mxfp8": quantised from its float32 sum, as by `quantize`,
            and added as float32; or `Wire`, with the format of the gradient, which is a dispatch. A node's
            sums for a token are added up on the device with the index of the token's.

    Returns:
        [T, H] of `y.dtype`. A token with no expert yields its bias, or 0.

    Raises:
        ValueError, TypeError: an invalid argument; the message has the expected and the given value.
        CommunicatorError: the communicator is closed, or broken (`PeerTimeoutError`).
    """
    formats, operands = checked_operands("combine", y, handle, comm, weighted, bias, wire)
    return autodiff.combine(handle.route_shape, formats, *operands)


def checked_operands(
    op: str,
    y: jax.Array,
    handle: Handle[Any],
    comm: Communicator | None,
    weighted: bool | None,
    bias: jax.Array | None,
    wire: Any,
) -> tuple[Wire, Any]:
    """Check the arguments of a combine and return the formats and operands of `autodiff.combine`.

    Raises:
        ValueError, TypeError, CommunicatorError: as `combine`.
    """
    comm = communicator_of(handle, comm, op)
    if isinstance(y, ExpertMajor | TokenMajor):
        raise TypeError(
            f"y: expected an array [capacity, hidden_size], got dispatch's {type(y).__name__}; pass what "
            "your experts return for its `tokens`."
        )
    check_rows_dtype("y", y)
    shape = handle.route_shape
    check_array("y", y, (shape.capacity, comm.hidden_size), names="[capacity, hidden_size]")
    formats = checked_wire("combine", wire, y)
    check_fits_mode("y", y, comm)
    if weighted is None:
        weighted = shape.layout == "expert"
    if not isinstance(weighted, bool):
        raise TypeError(f"weighted: expected True, False or None, got {weighted!r}.")
    if weighted and shape.layout == "token":
        raise ValueError(
            "weighted: expected None or False for token-major rows, got True; such a row stands for all "
            "experts of a token on the device: weight and sum them with dispatched.topk_weights before "
            "combine."
        )
    if bias is not None:
        sizes = (shape.num_tokens, comm.hidden_size)
        check_array("bias", bias, sizes, dtype=y.dtype, names="[T, hidden_size]")
    axes = check_call_site(comm, op)
    weights = handle.weights if weighted else None
    operands = vary_together(axes, y, weights, bias, handle.routes)
    return formats, only_in_reverse(op, operands)
