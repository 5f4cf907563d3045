"""implementation="native": the verbs as XLA custom calls, one JAX primitive each.

A primitive defines shapes and attributes only; the kernels are in `xla_ffi/`. An optional operand or
result that is absent is passed as one element, with a flag.

Every custom call takes an operand `after` and returns `ended`, which is never written nor read: on GPUs, each
op takes that of the previous one on its channel. Without this dependence XLA could run independent ops in
different orders on different ranks, or at once, as branches of a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn

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


class Site(NamedTuple):
    """Static: on which channel a custom call runs, and what it does of an op there.

    "none" is what remains of a start whose done is not used: its token, without a custom call.
    """

    channel: int = 0
    part: Literal["whole", "start", "done", "none"] = "whole"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """A verb and its operands, as its primitive takes them after the rank."""

    operands: tuple[jax.Array, ...]
    primitive: jax_compat.Primitive = field(metadata={"static": True})
    shape: RouteShape = field(metadata={"static": True})
    flags: tuple[tuple[str, bool], ...] = field(metadata={"static": True})

    def bind(self, site: Site, *operands: jax.Array) -> list[jax.Array]:
        """Bind the primitive; `operands` are all but the rank."""
        results: list[jax.Array] = self.primitive.bind(
            self.shape.rank(), *operands, shape=self.shape, site=site, **dict(self.flags)
        )
        return results

    def run(self) -> list[jax.Array]:
        """Do all of the op, and return its results."""
        return self.bind(Site(), *self.operands)

    def start(self, channel: int) -> tuple[list[jax.Array], jax.Array]:
        """Begin the op; return its results, which are not valid yet, and a token.

        What comes after the token in the program runs while the op does. Only `done` may use the results, so
        that XLA never copies them before they are valid.
        """
        *results, token = self.bind(Site(channel, "start"), *self.operands)
        return results, token

    def done(self, channel: int, results: Sequence[jax.Array], token: jax.Array) -> list[jax.Array]:
        """End the op, after the token; return the results in the same memory.

        The operands are those of start, so that XLA does not reuse their memory before.
        """
        return self.bind(Site(channel, "done"), token, *self.operands, *results)


def _define_primitive(
    verb: str, output_types: Callable[..., list[ShapedArray]], num_results: int
) -> jax_compat.Primitive:
    """Make the primitive of a verb from `output_types(*operand types, shape=, **flags)`.

    All parameters become attributes of the custom call, with `shape` spelled out.
    """
    primitive = jax_compat.Primitive(f"jax_deepep_{verb}")
    primitive.multiple_results = True
    primitive.def_impl(partial(jax_compat.apply_primitive, primitive))

    def types(rank: ShapedArray, *operands: ShapedArray, site: Site, **parameters: Any) -> list[ShapedArray]:
        if site.part == "done":
            return list(operands[-num_results:])
        token = jax_compat.array_like(operands[0], (), jnp.float32)
        if site.part == "none":
            return [token]
        results = output_types(rank, *operands, **parameters)
        return results if site.part == "whole" else [*results, token]

    primitive.def_abstract_eval(types)

    def lower(ctx: Any, rank: Any, *operands: Any, shape: RouteShape, site: Site, **flags: Any) -> Any:
        check_platform(shape.comm, jax_compat.platforms_of_lowering(ctx))
        if (mesh := jax_compat.mesh_of_lowering(ctx)) is not None:
            check_groups(shape.comm, mesh)
        native_module.watch_compilations()
        on_gpus = shape.comm.platform == "cuda"
        if site.part == "none":
            return mlir.lower_fun(lambda *_: [jnp.zeros((), jnp.float32)])(ctx, rank, *operands)
        if site.part == "done" and not on_gpus:
            return operands[-num_results:]  # of a future: XLA waits for it
        chain = jax_compat.last_in_block(ctx, (shape.comm.id, site.channel))
        if site.part == "done":
            if (call := chain.pop("started", None)) is None:
                raise ValueError(f"{verb}_done: expected to be lowered in the same computation as its start.")
            after, *operands = operands
            after_type, *types = ctx.avals_in[1:]
        else:
            if "started" in chain:
                raise ValueError(
                    f"{verb}: expected a channel without an op in flight, got channel {site.channel}, whose "
                    "op the same computation ends later; call done first."
                )
            call = jax_compat.index_in_program(ctx, "jax_deepep")
            after, after_type = chain.get("ended", (rank, ctx.avals_in[0]))
            types = ctx.avals_in[1:]
        ended_type = jax_compat.array_like(ctx.avals_in[0], (), jnp.float32)
        returned = list(ctx.avals_out) if site.part == "start" else [*ctx.avals_out, ended_type]
        aliases = {}
        if site.part == "done":
            first = 2 + len(types) - num_results
            aliases = {first + i: i for i in range(num_results)}
        captured = site.part == "whole" or shape.mode == "low_latency" or not on_gpus
        call_op = jax.ffi.ffi_lowering(
            f"jax_deepep_{verb}" + ("" if captured else "_uncaptured"),
            operand_output_aliases=aliases,
            has_side_effect=on_gpus and site.part != "whole",  # XLA removes both parts or neither
        )
        results = call_op(
            ctx.replace(avals_in=[ctx.avals_in[0], after_type, *types], avals_out=returned),
            rank,
            after,
            *operands,
            **_attributes(shape, call, site if on_gpus else Site(), with_limits=verb == "dispatch"),
            **flags,
        )
        if on_gpus:
            chain["ended"] = (results[-1], ended_type)
            if site.part == "start":
                chain["started"] = call
        return results[: len(ctx.avals_out)]

    # Not cacheable: every call has its own index in its program.
    mlir.register_lowering(primitive, lower, cacheable=False)

    def differentiate(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "gradient: expected one of first order, got the gradient of a gradient of native ops; make the "
            'communicator with implementation="xla" for it.'
        )

    ad.primitive_jvps[primitive] = differentiate

    def batch(
        operands: Sequence[Any], dims: Sequence[Any], *, site: Site, **parameters: Any
    ) -> tuple[list[Any], list[Any]]:
        # One op after the other: each of them is a rendezvous of the ranks of a group anyway. Nothing is in
        # flight then: `start` does the whole op.
        if site.part == "done":
            return list(operands[-num_results:]), list(dims[-num_results:])
        if site.part == "none":
            first = [
                x if dim is None else lax.index_in_dim(x, 0, dim, keepdims=False)
                for x, dim in zip(operands, dims, strict=True)
            ]
            return primitive.bind(*first, site=site, **parameters), [None]
        mapped = [i for i, dim in enumerate(dims) if dim is not None]

        def one(slices: Sequence[jax.Array]) -> list[jax.Array]:
            values = list(operands)
            for i, value in zip(mapped, slices, strict=True):
                values[i] = value
            results: list[jax.Array] = primitive.bind(*values, site=Site(), **parameters)
            return results

        stacked = [jnp.moveaxis(operands[i], dims[i], 0) for i in mapped]
        results = lax.map(one, stacked)
        if site.part == "start":
            results.append(jnp.zeros_like(results[0], jnp.float32, shape=results[0].shape[:1]))
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch

    def without_unused(used: list[bool], equation: Any) -> tuple[list[bool], Any]:
        site, num_operands = equation.params["site"], len(equation.invars)
        if not any(used):
            return [False] * num_operands, None
        if site.part != "start" or any(used[:-1]):
            return [True] * num_operands, equation
        none = {**equation.params, "site": Site(site.channel, "none")}
        alone = equation.replace(invars=equation.invars[:2], outvars=equation.outvars[-1:], params=none)
        return [i < 2 for i in range(num_operands)], alone

    jax_compat.register_dce_rule(primitive, without_unused)
    return primitive


def site_attribute(shape: RouteShape, call: int, site: Site) -> np.ndarray:
    """Return what every custom call has in common: `SiteAttribute` in `xla_ffi/handlers/platform.h`."""
    mode, part = native_module.numbers().modes[shape.mode], native_module.numbers().parts[site.part]
    return np.array([shape.comm.id, shape.comm.fingerprint, call, mode, site.channel, part], np.int64)


def _attributes(shape: RouteShape, call: int, site: Site, *, with_limits: bool) -> dict[str, Any]:
    attributes = {
        "site": site_attribute(shape, call, site),
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


dispatch_p = _define_primitive("dispatch", _dispatch_types, num_results=12)


def dispatch_call(shape: RouteShape, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> Call:
    """Return the custom call of `dispatch`."""
    flags = {"with_pairs": _keeps_pairs(shape), "with_scratch": _has_scratch(shape)}
    return Call((_whole_words(x), topk_idx, topk_weights), dispatch_p, shape, tuple(flags.items()))


def dispatched(shape: RouteShape, width: int, results: Sequence[jax.Array]) -> tuple[jax.Array, Handle[Any]]:
    """Return the results of a dispatch of rows of `width` elements as `dispatch` does."""
    tokens, *leaves = results
    source, destination, weights, local_experts, group_sizes, num_rows, *counts, pairs, _ = leaves
    num_received, num_dropped, num_invalid = counts
    return tokens[:, :width], Handle(
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
    shape: RouteShape, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> tuple[jax.Array, Handle[Any]]:
    """Implement `implementations.dispatch`."""
    return dispatched(shape, x.shape[1], dispatch_call(shape, x, topk_idx, topk_weights).run())


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


cached_dispatch_p = _define_primitive("cached_dispatch", _cached_dispatch_types, num_results=2)


def cached_dispatch_call(
    shape: RouteShape,
    x: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    y: jax.Array | None = None,
    zero_rest: bool = False,
) -> Call:
    """Return the custom call of `cached_dispatch`."""
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
        "zero_rest": zero_rest,
        "weighted": weights is not None,
        "with_products": y is not None,
        "with_pairs": routes.pairs is not None,
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
) -> tuple[jax.Array, jax.Array | None]:
    """Implement `implementations.cached_dispatch`."""
    call = cached_dispatch_call(shape, x, routes, weights=weights, y=y, zero_rest=zero_rest)
    rows, products = call.run()
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


combine_p = _define_primitive("combine", _combine_types, num_results=3)


def combine_call(
    shape: RouteShape,
    y: jax.Array,
    routes: Routes,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_gradients: jax.Array | None = None,
) -> Call:
    """Return the custom call of `combine`."""
    operands = (
        y,
        routes.destination,
        _or_placeholder(weights, jnp.float32),
        _or_placeholder(bias, y.dtype),
        _or_placeholder(row_gradients, jnp.float32),
        _or_placeholder(routes.pairs, jnp.int32),
    )
    flags = {
        "weighted": weights is not None,
        "with_bias": bias is not None,
        "with_gradients": row_gradients is not None,
        "with_pairs": routes.pairs is not None,
        "with_sums": _has_sums(shape),
    }
    return Call(operands, combine_p, shape, tuple(flags.items()))


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
    call = combine_call(shape, y, routes, weights=weights, bias=bias, row_gradients=row_gradients)
    out, gradients, _ = call.run()
    return out, gradients if row_gradients is not None else None
