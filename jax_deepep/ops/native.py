"""implementation="native": the verbs as XLA custom calls, one JAX primitive each.

A primitive defines shapes and attributes only; the kernels are in `xla_ffi/`. An optional operand or
result that is absent is passed as one element, with a flag.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepep import jax_compat
from jax_deepep.capacity import num_groups
from jax_deepep.communicator import native_module
from jax_deepep.jax_compat import ShapedArray
from jax_deepep.ops.custom_call import Call, code_of, define_primitive
from jax_deepep.ops.handle import Handle, Routes, RouteShape
from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import FORMATS, Format


def _sizes(shape: RouteShape) -> dict[str, int]:
    """Return the arguments of the size functions of a native module."""
    comm = shape.comm
    return {
        "num_ranks": comm.size,
        "num_experts": comm.num_experts,
        "num_topk": comm.num_experts_per_tok,
        "num_tokens": shape.num_tokens,
    }


def _keeps_pairs(shape: RouteShape) -> bool:
    """Return whether the ops of this platform and mode need the table of pairs."""
    comm = shape.comm
    return comm.platform == "cuda" and (shape.layout == "expert" or shape.mode == "low_latency")


def _has_scratch(shape: RouteShape) -> bool:
    return shape.comm.platform == "cuda" and shape.mode == "throughput"


def _has_sums(shape: RouteShape, y: jax.Array, wire: Format | None) -> bool:
    """Return whether a device sums or encodes rows in scratch, before peers read them."""
    return _has_scratch(shape) and _sums_of(shape, y, wire)[1] > 0


def _sums_of(shape: RouteShape, y: ShapedArray | jax.Array, wire: Format | None) -> tuple[int, int]:
    """Return (rows, bytes) of the scratch for sums."""
    numbers = native_module.numbers()
    return numbers.combine_sums(
        **_sizes(shape),
        ranks_per_node=shape.comm.topology.ranks_per_node,
        layout=numbers.layouts[shape.layout],
        capacity=shape.capacity,
        row_size=y.shape[1],
        element_bytes=y.dtype.itemsize,
        wire=code_of(wire),
    )


def _encodes_received(shape: RouteShape, wire: Format | None) -> bool:
    """Return whether combine encodes received rows in scratch, those of other devices' tokens."""
    return wire is not None and _has_scratch(shape) and shape.layout == "token"


def _is_encoded(shape: RouteShape, x: jax.Array, wire: Format | None) -> bool:
    """Return whether rows of x are encoded in scratch, from where peers read them."""
    return wire is not None and _has_scratch(shape) and jnp.issubdtype(x.dtype, jnp.floating)


def _encoded_rows(
    shape: RouteShape, x: ShapedArray, wire: Format | None, with_encoded: bool
) -> tuple[int, ...]:
    """Return the shape of the scratch for them, int32."""
    if not with_encoded:
        return (1,)
    size = native_module.numbers().wire_row_bytes(wire=code_of(wire), size=x.shape[1])
    return (shape.num_tokens, size // 4)


def _received_types(
    shape: RouteShape, x: ShapedArray, wire: Format | None, keep_quantized: bool
) -> list[ShapedArray]:
    """Return the types of received rows, their scales and their row scales."""
    array, capacity = partial(jax_compat.array_like, x), shape.capacity
    if not keep_quantized:
        return [array((capacity, x.shape[1]), x.dtype), array((1,), jnp.float32), array((1,), jnp.float32)]
    assert wire is not None
    leaves = FORMATS[wire].leaves(shape.comm.hidden_size)
    types = [array((capacity, *of_row), jnp.dtype(dtype)) for dtype, of_row in leaves.values()]
    return types if "row_scale" in leaves else [*types, array((1,), jnp.float32)]


def received_rows(
    results: Sequence[jax.Array], width: int, *, wire: Format | None, keep_quantized: bool
) -> jax.Array | BlockScaled:
    """Return received rows, of `width` elements, as the ops do, from the first results of a call."""
    rows, scales, row_scale = results[:3]
    if not keep_quantized:
        return rows[:, :width]
    assert wire is not None
    return BlockScaled(rows, scales, row_scale if FORMATS[wire].has_row_scale else None, format=wire)


def _or_placeholder(value: jax.Array | None, dtype: Any) -> jax.Array:
    return jnp.zeros((1,), dtype) if value is None else value


def _whole_words(x: jax.Array) -> jax.Array:
    """Pad rows of integers to the whole words in which they are copied."""
    missing = -x.shape[1] % (native_module.numbers().payload_alignment // x.dtype.itemsize)
    if jnp.issubdtype(x.dtype, jnp.floating) or missing == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, missing)))


def _dispatch_types(
    rank: ShapedArray,
    x: ShapedArray,
    topk_idx: ShapedArray,
    topk_weights: ShapedArray,
    *,
    shape: RouteShape,
    wire: Format | None,
    keep_quantized: bool,
    with_pairs: bool,
    with_scratch: bool,
    with_encoded: bool,
    **_: Any,  # flags that change no type
) -> list[ShapedArray]:
    capacity, num_topk = shape.capacity, shape.comm.num_experts_per_tok
    groups = num_groups(shape.layout, shape.comm.num_local_experts)
    expert_major = shape.layout == "expert"
    numbers, sizes = native_module.numbers(), _sizes(shape)
    array = partial(jax_compat.array_like, x)
    return [
        *_received_types(shape, x, wire, keep_quantized),  # then the leaves of Handle, `pairs` near the end
        array((capacity,), jnp.int32),  # source
        array(topk_idx.shape, jnp.int32),  # destination
        array((capacity,) if expert_major else (capacity, num_topk), jnp.float32),  # weights
        array((1,) if expert_major else (capacity, num_topk), jnp.int32),  # local_experts
        array((groups,), jnp.int32),  # group_sizes
        array((groups,), jnp.int32),  # num_rows
        array((), jnp.int32),  # num_received
        array((), jnp.int32),  # num_dropped
        array((), jnp.int32),  # num_invalid
        array(numbers.pair_table_shape(**sizes) if with_pairs else (1,), jnp.int32),  # pairs
        array((numbers.dispatch_scratch_ints(**sizes) if with_scratch else 1,), jnp.int32),  # scratch
        array(_encoded_rows(shape, x, wire, with_encoded), jnp.int32),  # encoded
    ]


dispatch_p = define_primitive("dispatch", _dispatch_types, num_results=15)


def dispatch_call(
    shape: RouteShape,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    wire: Format | None = None,
    keep_quantized: bool = False,
    first_token: int = 0,
) -> Call:
    """Return the custom call of `dispatch`; its tokens are the rows of x from `first_token` on."""
    flags = {
        "wire": wire,
        "keep_quantized": keep_quantized,
        "with_pairs": _keeps_pairs(shape),
        "with_scratch": _has_scratch(shape),
        "with_encoded": _is_encoded(shape, x, wire),
        "first_token": first_token,
    }
    return Call((_whole_words(x), topk_idx, topk_weights), dispatch_p, shape, tuple(flags.items()))


def dispatched(
    shape: RouteShape,
    width: int,
    results: Sequence[jax.Array],
    *,
    wire: Format | None,
    keep_quantized: bool,
) -> tuple[Any, Handle[Any]]:
    """Return the results of a dispatch of rows of `width` elements as `dispatch` does."""
    tokens = received_rows(results, width, wire=wire, keep_quantized=keep_quantized)
    leaves = results[3:]
    source, destination, weights, local_experts, group_sizes, num_rows, *counts, pairs, _, _ = leaves
    num_received, num_dropped, num_invalid = counts
    return tokens, Handle(
        source=source,
        destination=destination,
        weights=weights,
        local_experts=local_experts if shape.layout == "token" else None,
        pairs=pairs if _keeps_pairs(shape) else None,
        group_sizes=group_sizes,
        num_rows=num_rows,
        num_received=num_received,
        num_dropped=num_dropped,
        num_invalid=num_invalid,
        route_shape=shape,
    )


def dispatch(
    shape: RouteShape,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    wire: Format | None = None,
    keep_quantized: bool = False,
) -> tuple[Any, Handle[Any]]:
    """Implement `implementations.dispatch`."""
    call = dispatch_call(shape, x, topk_idx, topk_weights, wire=wire, keep_quantized=keep_quantized)
    return dispatched(shape, x.shape[1], call.run(), wire=wire, keep_quantized=keep_quantized)


def _cached_dispatch_types(
    rank: ShapedArray,
    x: ShapedArray,
    source: ShapedArray,
    destination: ShapedArray,
    group_sizes: ShapedArray,
    weights: ShapedArray,
    y: ShapedArray,
    pairs: ShapedArray,
    *,
    shape: RouteShape,
    wire: Format | None,
    keep_quantized: bool,
    with_products: bool,
    with_encoded: bool,
    **_: Any,
) -> list[ShapedArray]:
    array = partial(jax_compat.array_like, x)
    return [
        *_received_types(shape, x, wire, keep_quantized),  # rows
        array((shape.capacity if with_products else 1,), jnp.float32),  # products
        array(_encoded_rows(shape, x, wire, with_encoded), jnp.int32),  # encoded
    ]


cached_dispatch_p = define_primitive("cached_dispatch", _cached_dispatch_types, num_results=5)


def cached_dispatch_call(
    shape: RouteShape,
    x: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    y: jax.Array | None = None,
    zero_rest: bool = False,
    wire: Format | None = None,
    keep_quantized: bool = False,
    first_token: int = 0,
) -> Call:
    """Return the custom call of `cached_dispatch`, likewise."""
    operands = (
        _whole_words(x),
        routes.source,
        routes.destination,
        routes.group_sizes,
        _or_placeholder(weights, jnp.float32),
        _or_placeholder(y, x.dtype),
        _or_placeholder(routes.pairs, jnp.int32),
    )
    flags = {
        "wire": wire,
        "keep_quantized": keep_quantized,
        "zero_rest": zero_rest,
        "weighted": weights is not None,
        "with_products": y is not None,
        "with_pairs": routes.pairs is not None,
        "with_encoded": _is_encoded(shape, x, wire),
        "first_token": first_token,
    }
    return Call(operands, cached_dispatch_p, shape, tuple(flags.items()))


def cached_dispatch(
    shape: RouteShape,
    x: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    y: jax.Array | None = None,
    zero_rest: bool = False,
    wire: Format | None = None,
    keep_quantized: bool = False,
) -> tuple[Any, jax.Array | None]:
    """Implement `implementations.cached_dispatch`."""
    call = cached_dispatch_call(
        shape, x, routes, weights=weights, y=y, zero_rest=zero_rest, wire=wire, keep_quantized=keep_quantized
    )
    *received, products, _ = call.run()
    rows = received_rows(received, x.shape[1], wire=wire, keep_quantized=keep_quantized)
    return rows, products if y is not None else None


def _combine_types(
    rank: ShapedArray,
    y: ShapedArray,
    destination: ShapedArray,
    weights: ShapedArray,
    bias: ShapedArray,
    row_gradients: ShapedArray,
    pairs: ShapedArray,
    group_sizes: ShapedArray,
    source: ShapedArray,
    *into: ShapedArray,
    shape: RouteShape,
    wire: Format | None,
    with_gradients: bool,
    with_sums: bool,
    out_tokens: int,
    **_: Any,
) -> list[ShapedArray]:
    array = partial(jax_compat.array_like, y)
    entries = destination.shape if with_gradients else (1,)
    num_rows, num_bytes = _sums_of(shape, y, wire)
    has_plain_rows = wire is None and shape.comm.topology.num_nodes == 1  # and nothing else
    sums = array((num_rows, y.shape[1]), y.dtype) if has_plain_rows else array((num_bytes // 4,), jnp.int32)
    return [
        array((out_tokens, y.shape[1]), y.dtype),  # out
        array(entries, jnp.float32),  # gradients
        sums if with_sums else array((1,), y.dtype),  # sums
    ]


combine_p = define_primitive("combine", _combine_types, num_results=3)


def combine_call(
    shape: RouteShape,
    y: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_gradients: jax.Array | None = None,
    wire: Format | None = None,
    first_token: int = 0,
    out_tokens: int | None = None,
    into: jax.Array | None = None,
) -> Call:
    """Return the custom call of `combine`.

    Its tokens are rows of `out` and of `bias`, which have `out_tokens` rows (None: only these), from
    `first_token` on; other rows of `out` are those of `into`, or arbitrary without it.
    """
    with_source = _encodes_received(shape, wire)
    operands = (
        y,
        routes.destination,
        _or_placeholder(weights, jnp.float32),
        _or_placeholder(bias, y.dtype),
        _or_placeholder(row_gradients, jnp.float32),
        _or_placeholder(routes.pairs, jnp.int32),
        routes.group_sizes,
        _or_placeholder(routes.source if with_source else None, jnp.int32),
    )
    flags = {
        "wire": wire,
        "weighted": weights is not None,
        "with_bias": bias is not None,
        "with_gradients": row_gradients is not None,
        "with_pairs": routes.pairs is not None,
        "with_source": with_source,
        "with_sums": _has_sums(shape, y, wire),
        "first_token": first_token,
        "out_tokens": shape.num_tokens if out_tokens is None else out_tokens,
        "with_into": into is not None,
    }
    return Call(operands, combine_p, shape, tuple(flags.items()), into)


def combine(
    shape: RouteShape,
    y: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_gradients: jax.Array | None = None,
    wire: Format | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Implement `implementations.combine`."""
    call = combine_call(shape, y, routes, weights=weights, bias=bias, row_gradients=row_gradients, wire=wire)
    out, gradients, _ = call.run()
    return out, gradients if row_gradients is not None else None
