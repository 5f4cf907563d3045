"""A verb as an XLA custom call: its primitive, what it does of an op, and in which order ops run.

Every custom call takes an operand `after` and returns `ended`, which is never written nor read: on GPUs, each
op takes that of the previous one on its channel. Without this dependence XLA could run independent ops in
different orders on different ranks, or at once, as branches of a CUDA graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.communicator import native_module
from jax_deepep.jax_compat import ShapedArray, ad, batching, mlir
from jax_deepep.ops.checks import check_groups, check_platform
from jax_deepep.ops.handle import RouteShape
from jax_deepep.quantization.formats import Format


class Site(NamedTuple):
    """Static: on which channel a custom call runs, and what it does of an op there.

    "none" is what remains of a start whose done is not used: its token, without a custom call.
    """

    channel: int = 0
    part: Literal["whole", "start", "done", "none"] = "whole"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """A verb and its operands, as its primitive takes them after the rank.

    Attributes:
        operands, primitive, shape, flags: as the primitive takes them.
        into: the last operand, or None: the first result is in its memory (XLA copies it, if it is used
            otherwise), where what the op does not write stays as it is.
    """

    operands: tuple[jax.Array, ...]
    primitive: jax_compat.Primitive = field(metadata={"static": True})
    shape: RouteShape = field(metadata={"static": True})
    flags: tuple[tuple[str, Any], ...] = field(metadata={"static": True})
    into: jax.Array | None = None

    def bind(self, site: Site, *operands: jax.Array) -> list[jax.Array]:
        """Bind the primitive; `operands` are all but the rank."""
        rank = self.shape.rank()
        with without_debugging_nans():
            results: list[jax.Array] = self.primitive.bind(
                rank, *operands, shape=self.shape, site=site, **dict(self.flags)
            )
        return results

    def run(self) -> list[jax.Array]:
        """Do all of the op, and return its results."""
        return _bind_whole(partial(self.bind, Site()), self.shape, self._all_operands())

    def _all_operands(self) -> tuple[jax.Array, ...]:
        return self.operands if self.into is None else (*self.operands, self.into)

    def start(self, channel: int) -> tuple["Call", list[jax.Array], jax.Array]:
        """Begin the op; return it with the operands in use, its results, not valid yet, and a token.

        What comes after the token in the program runs while the op does. Only `done` may use the results, so
        that XLA never copies them before they are valid.
        """
        operands = _behind_barriers(self._all_operands())
        *results, token = self.bind(Site(channel, "start"), *operands)
        # Without `into`: its memory is that of a result now, and for another use XLA would copy it.
        return replace(self, operands=tuple(operands[: len(self.operands)]), into=None), results, token

    def done(self, channel: int, results: Sequence[jax.Array], token: jax.Array) -> list[jax.Array]:
        """End the op, after the token; return the results in the same memory.

        The operands are those that start returned, so that XLA does not reuse their memory before.
        """
        return _behind_barriers(self.bind(Site(channel, "done"), token, *self.operands, *results))


def _bind_whole(
    bind: Callable[..., list[jax.Array]], shape: RouteShape, operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """Bind an op that is not in parts; on GPUs, behind barriers."""
    if shape.comm.platform == "cpu":
        return bind(*operands)
    return _behind_barriers(bind(*_behind_barriers(operands)))


def _behind_barriers(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return operands or results so that XLA for GPUs makes no fusion of the op and slices, or their updates.

    It would add that beside the custom call, which stays if anything else uses its results, or if it has a
    side effect: in loops the op would run twice, and XLA would reuse the memory of a start while the op is in
    flight. Nor does such a fusion return the memory of operands.
    """
    # One barrier each: the arrays may vary over different axes.
    with without_debugging_nans():
        return [lax.optimization_barrier(array) for array in arrays]


@contextmanager
def without_debugging_nans() -> Iterator[None]:
    """Keep `jax_debug_nans` from blaming an op, where JAX runs op by op, for results that it does not write.

    Those, such as rows after the last group, may be NaN by chance.
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def define_primitive(
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

    def lower(
        ctx: Any, rank: Any, *operands: Any, shape: RouteShape, site: Site, wire: Any, **flags: Any
    ) -> Any:
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
            after, operands = operands[0], operands[1:]
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
        elif flags.get("with_into"):
            aliases = {1 + len(types): 0}  # of the last operand
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
            wire=np.int64(code_of(wire)),
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
            'communicator with implementation="xla" for it, and MoE layers with grouped_matmul="ragged_dot".'
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
            return _bind_whole(
                partial(primitive.bind, site=Site(), **parameters), parameters["shape"], values
            )

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


def code_of(wire: Format | None) -> int:
    """Return a format, or None, as native modules have it."""
    return native_module.numbers().wires["None" if wire is None else wire]


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
