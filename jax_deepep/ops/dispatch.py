"""dispatch: send every token to the devices of its experts."""

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from jax_deepep.capacity import INT32_MAX, Layout, worst_case_rows
from jax_deepep.checks import check_array, checked_integer
from jax_deepep.communicator import Communicator
from jax_deepep.ops import autodiff
from jax_deepep.ops.checks import (
    check_call_site,
    check_comm,
    check_fits_mode,
    check_sent_rows,
    communicator_of,
    vary_together,
)
from jax_deepep.ops.handle import ExpertMajor, Handle, Received, RouteShape, TokenMajor
from jax_deepep.ops.reverse_mode import only_in_reverse
from jax_deepep.ops.wire import Wire, check_block_scaled, checked_wire
from jax_deepep.quantization.block_scaled import BlockScaled, without_gradient
from jax_deepep.quantization.formats import Format
from jax_deepep.quantization.packed_rows import pack


@overload
def dispatch(
    x: jax.Array | BlockScaled,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    comm: Communicator,
    layout: Literal["expert"] = "expert",
    capacity: int | None = None,
    expert_capacity: int | None = None,
    alignment: int = 1,
    wire: Wire | Format | None = None,
) -> tuple[ExpertMajor, Handle[ExpertMajor]]: ...


@overload
def dispatch(
    x: jax.Array | BlockScaled,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    comm: Communicator,
    layout: Literal["token"],
    capacity: int | None = None,
    expert_capacity: None = None,
    alignment: int = 1,
    wire: Wire | Format | None = None,
) -> tuple[TokenMajor, Handle[TokenMajor]]: ...


@overload
def dispatch(
    x: jax.Array | BlockScaled,
    *,
    handle: Handle[Received],
    comm: Communicator | None = None,
    layout: Layout = "expert",
    capacity: int | None = None,
    expert_capacity: int | None = None,
    alignment: int = 1,
    wire: Wire | Format | None = None,
) -> tuple[Received, Handle[Received]]: ...


def dispatch(
    x: jax.Array | BlockScaled,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    comm: Communicator | None = None,
    layout: Layout = "expert",
    capacity: int | None = None,
    expert_capacity: int | None = None,
    alignment: int = 1,
    wire: Wire | Format | None = None,
    handle: Handle[Any] | None = None,
) -> tuple[Any, Handle[Any]]:
    """Send every token to the devices of its experts, each row directly to its final position.

    **Collective:** every device of the expert-parallel group calls it with the same shapes, inside
    `shard_map` with all mesh axes larger than 1 manual; inside `lax.cond` or `lax.while_loop` the
    predicate must be the same on the whole group.

    Equivalent on one device (R = 1, E experts, nothing dropped) to:
        t, k = jnp.divmod(jnp.argsort(topk_idx.ravel(), stable=True), K); tokens = x[t]

    Args:
        x: [T, H] bfloat16, float16 or float32; T ≤ `comm.max_tokens`, H = `comm.hidden_size`.
            Differentiable. Or [T, W] int8, uint8, int16, uint16, int32 or uint32, any W ≥ 1 of at most
            4 · H bytes: opaque payload (ids, a format of your own), copied bit for bit, without a gradient.
            Or `BlockScaled` [T, H], copied bit for bit.
        topk_idx: int32 [T, K], global expert ids, −1 = no expert.
        topk_weights: float32 [T, K], router weights. Differentiable, whatever the dtype of x.
        comm: the communicator, static; optional with `handle`, and then checked.
        layout: "expert" for rows grouped by local expert (`ExpertMajor`), "token" for one row per
            (token, device) (`TokenMajor`).
        capacity: C, rows of the result, a multiple of `alignment`; None = the worst case, R · T · min(K, L)
            rows (token-major R · T), with which nothing is dropped: 14 GiB on each of 64 devices with
            T = 4096, K = 8, E = 256 and H = 7168 in bfloat16, of which 0.44 GiB are used on average. Rows
            that do not fit are dropped, last in the order first; padding counts.
        expert_capacity: most rows of each expert; those beyond it are dropped, last in its order first;
            layout "expert" only. None = no limit.
        alignment: rows of a group are padded with zero rows to a multiple of this.
        wire: the format in which rows cross links: None, as they are; "fp8", "fp8_ue8m0", "mxfp8" or "nvfp4":
            tokens are `quantize_dequantize(x, wire)`, bit for bit, with the gradient of plain rows;
            or `Wire`, with the format of the gradient, or to return `BlockScaled` tokens.
        handle: send other data along the routes of an earlier dispatch: no counting, no exchange
            of layout. `topk_idx` and `topk_weights` are left out then, and layout, capacity and
            alignment are those of the handle.

    Returns:
        (`ExpertMajor` or `TokenMajor`, `Handle`); `tokens` has the dtype and the width of x, and is
        `BlockScaled` if x is or with `keep_quantized`. The handle serves `combine`, and more dispatches of
        any dtype.

    Raises:
        ValueError, TypeError: an invalid argument; the message has the expected and the given value.
        CommunicatorError: the communicator is closed, or broken (`PeerTimeoutError`).
    """
    options = {
        "layout": layout,
        "capacity": capacity,
        "expert_capacity": expert_capacity,
        "alignment": alignment,
    }
    request = checked_request("dispatch", x, topk_idx, topk_weights, comm, options, wire, handle)
    if handle is not None:
        tokens = autodiff.cached_dispatch(request.shape, request.wire, *request.operands)
        return received(tokens, handle), handle
    results = autodiff.dispatch(request.shape, request.wire, *request.operands)
    tokens, handle = autodiff.without_integer_tangents(results)
    return received(tokens, handle), handle


class Request(NamedTuple):
    """A dispatch whose arguments have been checked.

    Attributes:
        shape: of the routes.
        wire: formats of the op and its gradient.
        operands: of `autodiff.cached_dispatch` with a handle, of `autodiff.dispatch` without.
    """

    shape: RouteShape
    wire: Wire
    operands: Any


def checked_request(
    op: str,
    x: jax.Array | BlockScaled,
    topk_idx: jax.Array | None,
    topk_weights: jax.Array | None,
    comm: Communicator | None,
    options: dict[str, Any],
    wire: Any,
    handle: Handle[Any] | None,
    num_tokens: int | None = None,
) -> Request:
    """Check the arguments of a dispatch, with `options` layout, capacity, expert_capacity and alignment.

    It sends `num_tokens` of the tokens in x (None: all), if it has no handle.

    Raises:
        ValueError, TypeError, CommunicatorError: as `dispatch`.
    """
    if handle is not None:
        comm = communicator_of(handle, comm, op)
    check_comm(comm, op)
    assert comm is not None
    if isinstance(x, BlockScaled):
        check_block_scaled(x, comm.hidden_size)
    else:
        check_sent_rows("x", x, comm.hidden_size)
    wire = checked_wire("dispatch", wire, x)
    if isinstance(x, BlockScaled):
        wire = Wire(x.format, keep_quantized=True)
        x = pack(x)
    elif wire.keep_quantized:
        x, wire = without_gradient(x), Wire(wire.format, keep_quantized=True)
    else:
        check_fits_mode("x", x, comm)
    axes = check_call_site(comm, op)
    if handle is not None:
        _check_along(handle, x, topk_idx, topk_weights, options)
        operands = only_in_reverse(op, vary_together(axes, x, handle.routes))
        return Request(handle.route_shape, wire, operands)
    if topk_idx is None or topk_weights is None:
        raise TypeError(
            "topk_idx, topk_weights: expected arrays, got None; pass both, or handle= of an earlier "
            "dispatch to send other data along the same routes."
        )
    num_tokens = x.shape[0] if num_tokens is None else num_tokens
    num_topk = comm.num_experts_per_tok
    if num_tokens > comm.max_tokens:
        raise ValueError(
            f"x: expected at most max_tokens={comm.max_tokens} tokens, got {num_tokens}; make the "
            "communicator with a larger max_tokens."
        )
    routing = {"names": "[T, num_experts_per_tok]"}
    check_array("topk_idx", topk_idx, (num_tokens, num_topk), dtype=jnp.int32, **routing)
    check_array("topk_weights", topk_weights, (num_tokens, num_topk), dtype=jnp.float32, **routing)
    shape = _route_shape(comm, num_tokens=num_tokens, **options)
    operands = only_in_reverse(op, vary_together(axes, x, topk_idx, topk_weights))
    return Request(shape, wire, operands)


def _route_shape(
    comm: Communicator,
    *,
    num_tokens: int,
    layout: Any,
    capacity: int | None,
    expert_capacity: int | None,
    alignment: int,
) -> RouteShape:
    """Check the static arguments and complete them."""
    if layout not in ("expert", "token"):
        raise ValueError(f'layout: expected "expert" or "token", got {layout!r}.')
    alignment = checked_integer("alignment", alignment, minimum=1)
    if expert_capacity is not None:
        expert_capacity = checked_integer("expert_capacity", expert_capacity, minimum=0)
        if layout == "token":
            raise ValueError(
                f"expert_capacity: expected None with layout='token', whose rows belong to no single "
                f"expert, got {expert_capacity}; use layout='expert', or capacity."
            )
    worst_case = worst_case_rows(
        layout=layout,
        num_ranks=comm.size,
        num_tokens=num_tokens,
        num_experts_per_tok=comm.num_experts_per_tok,
        num_local_experts=comm.num_local_experts,
        alignment=alignment,
    )
    is_worst_case = capacity is None
    capacity = worst_case if capacity is None else checked_integer("capacity", capacity, minimum=0)
    if capacity % alignment:
        raise ValueError(
            f"capacity: expected a multiple of alignment={alignment}, got {capacity}; pass "
            f"{capacity - capacity % alignment + alignment}, for example."
        )
    if comm.size * capacity > INT32_MAX:
        got = f"None, which stands for the worst case of {capacity}" if is_worst_case else capacity
        raise ValueError(
            f"capacity: expected at most {INT32_MAX // comm.size} rows on each of {comm.size} devices (row "
            f"numbers are int32), got {got}; pass a smaller capacity, or dispatch the tokens in several ops."
        )
    mode = comm.mode_of(num_tokens)
    return RouteShape(comm, layout, num_tokens, capacity, alignment, expert_capacity, mode)


def _check_along(
    handle: Handle[Any],
    x: jax.Array,
    topk_idx: jax.Array | None,
    topk_weights: jax.Array | None,
    options: dict[str, Any],
) -> None:
    """Raise unless the arguments agree with the handle."""
    shape = handle.route_shape
    for name, value in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None together with handle=, which has the routes, got an array; leave it "
                "out."
            )
    defaults = {"layout": "expert", "alignment": 1}
    for name, value in options.items():
        default, own = defaults.get(name), getattr(shape, name)
        if value not in (default, own):
            raise ValueError(
                f"{name}: expected {default!r} or the handle's, {own!r}, got {value!r}; leave it out."
            )
    if x.shape[0] != shape.num_tokens:
        raise ValueError(
            f"x: expected as many tokens as in the dispatch that made the handle, {shape.num_tokens}, got "
            f"{x.shape[0]}."
        )


def received(tokens: jax.Array | BlockScaled, handle: Handle[Any]) -> ExpertMajor | TokenMajor:
    """Return received rows in the type of their layout."""
    if isinstance(tokens, BlockScaled):
        tokens = jax.lax.stop_gradient(tokens)  # scales are floats, but have no gradient
    mask = handle.source >= 0
    if handle.route_shape.layout == "expert":
        return ExpertMajor(tokens, handle.group_sizes, handle.num_rows, handle.weights, mask)
    assert handle.local_experts is not None  # token-major
    return TokenMajor(tokens, handle.local_experts, handle.weights, handle.num_rows[0], mask)
