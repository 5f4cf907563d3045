"""implementation="native": the verbs as XLA custom calls, one JAX primitive each.

A primitive defines shapes and attributes only; the kernels are in `xla_ffi/`. An optional operand or
result that is absent is passed as one element, with a flag.

Every custom call takes an operand `after` and returns `ended`, which is never written nor read: on GPUs, each
op takes that of the previous one on its channel. Without this dependence XLA could run independent ops in
different orders on different ranks, or at once, as branches of a CUDA graph.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.capacity import num_groups
from jax_deepep.communicator import native_module
from jax_deepep.jax_compat import ShapedArray, ad, batching, mlir
from jax_deepep.ops.checks import check_groups, check_platform
from jax_deepep.ops.handle import Handle, Routes, RouteShape


def _define_primitive(verb: str, output_types: Callable[..., list[ShapedArray]]) -> jax_compat.Primitive:
    """Make the primitive of a verb from `output_types(*operand types, **parameters)`.

    All parameters become attributes of the custom call, with `shape` spelled out.
    """
    primitive = jax_compat.Primitive(f"jax_deepep_{verb}")
    primitive.multiple_results = True
    primitive.def_impl(partial(jax_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(output_types)

    def lower(ctx: Any, rank: Any, *operands: Any, shape: RouteShape, channel: int, **flags: Any) -> Any:
        check_platform(shape.comm, jax_compat.platforms_of_lowering(ctx))
        if (mesh := jax_compat.mesh_of_lowering(ctx)) is not None:
            check_groups(shape.comm, mesh)
        native_module.watch_compilations()
        call = jax_compat.index_in_program(ctx, "jax_deepep")
        attributes = _attributes(shape, call, channel, with_limits=verb == "dispatch")
        chain = jax_compat.last_in_block(ctx, (shape.comm.id, channel))
        rank_type, *types = ctx.avals_in
        ctx = ctx.replace(
            avals_in=[rank_type, rank_type, *types],
            avals_out=[*ctx.avals_out, jax_compat.array_like(rank_type, (), jnp.int32)],
        )
        call_op = jax.ffi.ffi_lowering(f"jax_deepep_{verb}")
        *results, ended = call_op(ctx, rank, chain.get("ended", rank), *operands, **attributes, **flags)
        if shape.comm.platform == "cuda":
            chain["ended"] = ended
        return results

    # Not cacheable: every call has its own index in its program.
    mlir.register_lowering(primitive, lower, cacheable=False)

    def differentiate(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "gradient: expected one of first order, got the gradient of a gradient of native ops; make the "
            'communicator with implementation="xla" for it.'
        )

    ad.primitive_jvps[primitive] = differentiate

    def batch(operands: Sequence[Any], dims: Sequence[Any], **parameters: Any) -> tuple[list[Any], list[int]]:
        # One op after the other: each of them is a rendezvous of the ranks of a group anyway.
        mapped = [i for i, dim in enumerate(dims) if dim is not None]

        def one(slices: Sequence[jax.Array]) -> list[jax.Array]:
            values = list(operands)
            for i, value in zip(mapped, slices, strict=True):
                values[i] = value
            results: list[jax.Array] = primitive.bind(*values, **parameters)
            return results

        stacked = [jnp.moveaxis(operands[i], dims[i], 0) for i in mapped]
        results = lax.map(one, stacked)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch
    return primitive


def site_attribute(shape: RouteShape, call: int, channel: int) -> np.ndarray:
    """Return what every custom call has in common: `SiteAttribute` in `xla_ffi/handlers/platform.h`."""
    mode = native_module.numbers().modes[shape.mode]
    return np.array([shape.comm.id, shape.comm.fingerprint, call, mode, channel], np.int64)


def _attributes(shape: RouteShape, call: int, channel: int, *, with_limits: bool) -> dict[str, Any]:
    attributes = {
        "site": site_attribute(shape, call, channel),
        "layout": native_module.numbers().layouts[shape.layout],
    }
    if with_limits:
        limit = shape.expert_capacity
        attributes["alignment"] = shape.alignment
        attributes["expert_capacity"] = native_module.numbers().no_limit if limit is None else limit
    return attributes


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


def _has_sums(shape: RouteShape) -> bool:
    """Return whether a token can have several rows on a device whose ops sum them in scratch."""
    if not _has_scratch(shape) or shape.layout == "token":
        return False
    return native_module.numbers().combine_sum_rows(**_sizes(shape)) > 0


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
    channel: int,
    with_pairs: bool,
    with_scratch: bool,
) -> list[ShapedArray]:
    capacity, num_topk = shape.capacity, shape.comm.num_experts_per_tok
    groups = num_groups(shape.layout, shape.comm.num_local_experts)
    expert_major = shape.layout == "expert"
    numbers, sizes = native_module.numbers(), _sizes(shape)
    array = partial(jax_compat.array_like, x)
    return [
        array((capacity, x.shape[1]), x.dtype),  # tokens, then the leaves of Handle, `pairs` near the end
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
    ]


dispatch_p = _define_primitive("dispatch", _dispatch_types)


def dispatch(
    shape: RouteShape, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> tuple[jax.Array, Handle[Any]]:
    """Implement `implementations.dispatch`."""
    tokens, *leaves = dispatch_p.bind(
        shape.rank(),
        _whole_words(x),
        topk_idx,
        topk_weights,
        shape=shape,
        channel=0,
        with_pairs=_keeps_pairs(shape),
        with_scratch=_has_scratch(shape),
    )
    source, destination, weights, local_experts, group_sizes, num_rows, *counts, pairs, _ = leaves
    num_received, num_dropped, num_invalid = counts
    return tokens[:, : x.shape[1]], Handle(
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
    channel: int,
    zero_rest: bool,
    weighted: bool,
    with_products: bool,
    with_pairs: bool,
) -> list[ShapedArray]:
    array = partial(jax_compat.array_like, x)
    return [
        array((shape.capacity, x.shape[1]), x.dtype),  # rows
        array((shape.capacity if with_products else 1,), jnp.float32),  # products
    ]


cached_dispatch_p = _define_primitive("cached_dispatch", _cached_dispatch_types)


def cached_dispatch(
    shape: RouteShape,
    x: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    y: jax.Array | None = None,
    zero_rest: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Implement `implementations.cached_dispatch`."""
    rows, products = cached_dispatch_p.bind(
        shape.rank(),
        _whole_words(x),
        routes.source,
        routes.destination,
        routes.group_sizes,
        _or_placeholder(weights, jnp.float32),
        _or_placeholder(y, x.dtype),
        _or_placeholder(routes.pairs, jnp.int32),
        shape=shape,
        channel=0,
        zero_rest=zero_rest,
        weighted=weights is not None,
        with_products=y is not None,
        with_pairs=routes.pairs is not None,
    )
    return rows[:, : x.shape[1]], products if y is not None else None


def _combine_types(
    rank: ShapedArray,
    y: ShapedArray,
    destination: ShapedArray,
    weights: ShapedArray,
    bias: ShapedArray,
    row_gradients: ShapedArray,
    pairs: ShapedArray,
    *,
    shape: RouteShape,
    channel: int,
    weighted: bool,
    with_bias: bool,
    with_gradients: bool,
    with_pairs: bool,
    with_sums: bool,
) -> list[ShapedArray]:
    array = partial(jax_compat.array_like, y)
    entries = destination.shape if with_gradients else (1,)
    sum_rows = native_module.numbers().combine_sum_rows(**_sizes(shape))
    return [
        array((shape.num_tokens, y.shape[1]), y.dtype),  # out
        array(entries, jnp.float32),  # gradients
        array((sum_rows, y.shape[1]) if with_sums else (1,), y.dtype),  # sums
    ]


combine_p = _define_primitive("combine", _combine_types)


def combine(
    shape: RouteShape,
    y: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_gradients: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Implement `implementations.combine`."""
    out, gradients, _ = combine_p.bind(
        shape.rank(),
        y,
        routes.destination,
        _or_placeholder(weights, jnp.float32),
        _or_placeholder(bias, y.dtype),
        _or_placeholder(row_gradients, jnp.float32),
        _or_placeholder(routes.pairs, jnp.int32),
        shape=shape,
        channel=0,
        weighted=weights is not None,
        with_bias=bias is not None,
        with_gradients=row_gradients is not None,
        with_pairs=routes.pairs is not None,
        with_sums=_has_sums(shape),
    )
    return out, gradients if row_gradients is not None else None
