"""A MoE layer as a pure function of its parameters, shared by the Flax modules and plain JAX.

Every device runs

    route → dispatch → the experts' networks → combine (+ shared experts)

Rows are weighted inside the networks, before the last product: so combine only adds, and gradients of the
router's weights need nothing after it: Σ (gradient of y · woᵀ) ⊙ hidden, summed over F.

Policies of `jax.checkpoint` can name: "moe_dispatched", the received rows [C, H] and their routes, without
which the backward pass dispatches again; "moe_hidden", the products with wi_0 and wi_1, [C, F] each (not with
grouped_matmul="blocks").
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import jax_compat
from jax_deepep.capacity import round_up
from jax_deepep.checks import check_array, check_bool, check_rows_dtype
from jax_deepep.deprecation import renamed_arguments
from jax_deepep.moe.aux import Call, MoEAux, Scope, Sequences, global_aux, local_aux
from jax_deepep.moe.chunk import ROUTER, Tokens, apply_to_chunk
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.routing import Given, check_given, given_by

Parameters = Mapping[str, jax.Array]
Router = Callable[[jax.Array], jax.Array | tuple[jax.Array, jax.Array]]


@renamed_arguments(placement="expert_map")
def moe(
    config: MoEConfig,
    parameters: Parameters,
    x: jax.Array,
    expert_map: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    router: Router | None = None,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    aux: Scope = "global",
    router_logits: bool = False,
    sequence_loss: bool = False,
) -> tuple[jax.Array, MoEAux | Any]:
    """Send every token through its experts, on all devices of the mesh. Differentiable.

    **Collective:** takes global arrays, outside of `shard_map`; every process of the mesh calls it.

    Args:
        config: static.
        parameters: arrays of the names and shapes in `config.parameters`, with any sharding. With that of
            `config.spec(name)`, only the router and rows along the fsdp axis are communicated.
        x: [..., H] float. Tokens are sharded over `config.token_axes`; a batch whose first axis is sharded
            over them in this order is not moved. Uneven numbers of tokens are padded. On a mesh of Explicit
            axes the output has the sharding of x. On one of Auto axes x may have Explicit ones of the same
            names and sizes; the output has Auto ones.
        expert_map: int32 [P], the expert of every physical expert, with `config.num_physical_experts`; the
            matrices in `parameters` are then those of physical experts, see `physical_parameters`.
        mask: bool [...], False for what is not a token, such as padding: it goes to no expert, uses no
            capacity, is not counted, and its output is 0. Values of x and of the output's gradient there,
            NaN included, have no effect.
        router: a function of x that replaces x · gate. It returns logits [..., E], which the layer uses like
            its own, or (`topk_idx`, `topk_weights`). It may close over parameters.
        topk_idx: int32 [..., K], the experts of each token, −1 for none. Without `topk_weights` the router
            gives their weights, with gradients, and tokens with −1 in all entries are routed as usual. So
            the `topk_idx` of an earlier call's aux repeats its choice.
        topk_weights: float [..., K], the weights, differentiable; the router is then not used.
        aux: "global", or, for steps without an exchange, "local" or "off" (returns None): see `MoEAux`.
        router_logits: whether aux has `router_logits`.
        sequence_loss: whether aux has `sequence_balance_loss`: x is [..., S, H], and S tokens are a sequence.
            The last three arguments are static.

    Returns:
        ([..., H], `MoEAux`; None with `aux="off"`).

    Raises:
        ValueError, TypeError: a wrong argument, or more tokens than the communicator takes.
    """
    _check(config, parameters, x, expert_map)
    given_arrays = {
        "mask": mask,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "expert_map": expert_map,
    }
    for name, value in {"x": x, **parameters, **given_arrays}.items():
        _check_axes(config, name, value)
    if mask is not None:
        check_given(config, Given(mask=mask), x.shape[:-1])
        x = _zero_outside(config, x, mask)
    given = given_by(router, x, mask, topk_idx, topk_weights)
    check_given(config, given, x.shape[:-1])
    if aux not in ("global", "local", "off"):
        raise ValueError(f'aux: expected "global", "local" or "off", got {aux!r}; pass one of them.')
    check_bool("router_logits", router_logits)
    check_bool("sequence_loss", sequence_loss)
    if router_logits and (given.topk_weights is not None or aux == "off"):
        raise ValueError(
            "router_logits: expected False with topk_weights or aux='off', got True; leave it out."
        )
    dtype = config.dtype
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):  # the documented common dtype, even in strict mode
            dtype = jnp.result_type(x, *(value for name, value in parameters.items() if name not in ROUTER))
    length = x.shape[-2] if x.ndim > 1 else 1
    num_tokens = x.size // config.hidden_size
    num_chunks = config.chunks_of(-(-num_tokens // config.num_token_shards), dtype)
    call = Call(aux, router_logits, sequence_loss, num_tokens, max(length, 1), jnp.dtype(dtype), num_chunks)
    operands = (dict(parameters), x, expert_map, given)
    return _layer(config, call, *jax.tree.map(functools.partial(_with_axis_types, config), operands))


@functools.partial(jax.jit, static_argnums=0)  # for the same reason as `_layer`
def _zero_outside(config: MoEConfig, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return x with zeros where `mask` is False: a product of NaN and 0 would be NaN."""
    mask = with_sharding(config, mask, P(*_spec(x)[:-1]))
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _spec(x: jax.Array) -> tuple[Any, ...]:
    spec = jax.typeof(x).sharding.spec
    return (*spec, *(None for _ in range(x.ndim - len(spec))))


# Jitted: outside of the user's jit, shard_map would compile its operations one by one, in every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    config: MoEConfig,
    call: Call,
    parameters: Parameters,
    x: jax.Array,
    expert_map: jax.Array | None,
    given: Given,
) -> tuple[jax.Array, MoEAux | None]:
    padded = _padded(config, call.num_tokens, call.num_chunks * config.batches_per_chunk)
    split = P(config.token_axes)

    def flat(value: jax.Array, last: tuple[int, ...]) -> jax.Array:
        """Return [padded tokens, *last], sharded over the token axes."""

        def flatten(value: jax.Array) -> jax.Array:
            tokens = value.reshape(-1, *last)
            return jnp.pad(tokens, ((0, padded - call.num_tokens), *((0, 0) for _ in last)))

        return with_sharding(config, value, split, flatten)

    leading = len(x.shape) - 1
    of_tokens = jax.tree.map(lambda value: flat(value, value.shape[leading:]), (x, given))
    specs = {name: P() if name in ROUTER else config.spec(name) for name in parameters}
    weights = {name: with_sharding(config, parameters[name], spec) for name, spec in specs.items()}
    expert_map = None if expert_map is None else with_sharding(config, expert_map, P())
    of_devices = P() if call.aux == "global" else split
    per_device = jax.shard_map(
        functools.partial(_per_device, config, call),
        mesh=config.mesh,
        in_specs=(specs, split, P()),
        out_specs=(split, of_devices, split),
    )
    out, sums, per_token = per_device(weights, of_tokens, expert_map)

    def unflatten(value: jax.Array, last: Any = None) -> jax.Array:
        """Return [..., size], with the sharding of x."""
        shape = (*x.shape[:-1], value.shape[-1])
        own = P(*_spec(x)[:-1], last)
        return with_sharding(config, value, own, lambda v: v[: call.num_tokens].reshape(shape))

    result = unflatten(out, _spec(x)[-1])
    if call.aux == "off":
        return result, None
    topk_idx, logits = jax.tree.map(unflatten, per_token)
    return result, MoEAux(**sums, topk_idx=topk_idx, router_logits=logits)


def with_sharding(
    config: MoEConfig,
    value: jax.Array,
    spec: P,
    change: Callable[[jax.Array], jax.Array] = lambda value: value,
) -> jax.Array:
    """Return `change(value)`, sharded by `spec` over the Explicit axes of the mesh; XLA decides on others."""
    explicit = tuple(
        name
        for name, kind in zip(config.mesh.axis_names, config.mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    if not explicit:
        return change(value)

    def of_explicit(names: Any) -> Any:
        if isinstance(names, tuple):
            return tuple(filter(of_explicit, names)) or None
        return names if names in explicit else None

    sharding = NamedSharding(config.mesh, P(*map(of_explicit, spec)))
    return jax.sharding.auto_axes(change, axes=explicit, out_sharding=sharding)(value)


def _check(config: Any, parameters: Parameters, x: Any, expert_map: Any) -> None:
    if not isinstance(config, MoEConfig):
        raise TypeError(
            f"config: expected a MoEConfig, got {type(config).__name__}; it is static: jax.jit(moe, "
            "static_argnums=0)."
        )
    if manual := jax_compat.manual_axes():
        raise ValueError(
            f"x: expected a global array, got a call in a shard_map over {manual}; call the layer outside of "
            "it, or use jax_deepep.dispatch and combine inside."
        )
    _check_context_mesh(config)
    config.check_expert_map(expert_map)
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters: expected a mapping of names to arrays, got {type(parameters).__name__}; "
            "init_parameters makes them."
        )
    if parameters.keys() != config.parameters.keys():
        raise ValueError(f"parameters: expected {sorted(config.parameters)}, got {sorted(parameters)}.")
    for name, (shape, axes) in config.parameters.items():
        if axes[0] == "exp":
            shape = (config.comm.num_experts, *shape[1:])
        check_array(name, parameters[name], shape, names=f"[{', '.join(a or '·' for a in axes)}]")
        check_rows_dtype(name, parameters[name])
    check_rows_dtype("x", x)
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x: expected shape [..., hidden_size={config.hidden_size}], got {list(x.shape)}.")
    num_tokens, num_chunks = x.size // config.hidden_size, config.num_chunks or 1
    num_batches = num_chunks * config.batches_per_chunk
    of_batch = _padded(config, num_tokens, num_batches) // (config.num_token_shards * num_batches)
    if of_batch > config.comm.max_tokens:
        parts = "" if num_chunks == 1 else f" in each of {num_chunks} chunks"
        if config.two_batch_overlap:
            parts += " in each half"
        needed = -(-of_batch * num_chunks // config.comm.max_tokens)
        raise ValueError(
            f"x: expected at most max_tokens={config.comm.max_tokens} tokens on each device{parts}, got "
            f"{of_batch} on each of {config.num_token_shards} devices; make the communicator with max_tokens="
            f"{of_batch}, or split the tokens into num_chunks={needed} chunks."
        )


def _check_context_mesh(config: MoEConfig) -> None:
    here, own = jax.sharding.get_abstract_mesh(), config.mesh.abstract_mesh
    if here.empty or (here.axis_names, here.axis_sizes, here.axis_types) == (
        own.axis_names, own.axis_sizes, own.axis_types
    ):  # fmt: skip
        return
    raise ValueError(
        f"comm: expected a communicator of the mesh that jax.set_mesh set, {_described(here)}, got one of "
        f"{_described(own)}; use one mesh for both, with the same axis_types."
    )


def _check_axes(config: MoEConfig, name: str, value: Any) -> None:
    """Raise if an array is typed as sharded over other axes."""
    if not isinstance(value, jax.Array):
        return
    mesh, own = jax.typeof(value).sharding.mesh, config.mesh.abstract_mesh
    same = (mesh.axis_names, mesh.axis_sizes) == (own.axis_names, own.axis_sizes)
    if AxisType.Explicit in mesh.axis_types and not same:
        raise ValueError(
            f"{name}: expected an array on the mesh of the communicator, {_described(own)}, got one on "
            f"{_described(mesh)}; use one mesh for both, or move it by jax.device_put."
        )


def _with_axis_types(config: MoEConfig, value: Any) -> Any:
    """Return an array with Explicit axes as one on the layer's mesh, where some of these are Auto.

    JAX 0.12 cannot compile both in one program; `jax.make_mesh` makes Explicit axes by default.
    """
    if not isinstance(value, jax.Array):
        return value
    sharding = jax.typeof(value).sharding
    kinds = sharding.mesh.axis_types
    if AxisType.Explicit not in kinds or kinds == config.mesh.axis_types:
        return value
    return jax.device_put(value, NamedSharding(config.mesh, sharding.spec))


def _described(mesh: Any) -> str:
    kinds = ", ".join(
        f"{name}={size} ({kind.name})"
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return f"[{kinds}]"


def _padded(config: MoEConfig, num_tokens: int, num_batches: int) -> int:
    # At least one token per device: without, the router would use empty arrays inside the shard_map, on which
    # XLA of JAX 0.11.2 crashes.
    return round_up(max(num_tokens, 1), config.num_token_shards * num_batches)


def _per_device(
    config: MoEConfig,
    call: Call,
    parameters: dict[str, jax.Array],
    of_tokens: tuple[jax.Array, Given],
    expert_map: jax.Array | None,
) -> tuple[jax.Array, dict[str, Any], tuple[jax.Array | None, jax.Array | None]]:
    """Apply the layer to the tokens [T, H] of one device; return what `MoEAux` has behind it."""
    # Marked here as differing between devices, the gradients of weights are summed over the devices once:
    # marked inside of the scan, once in every chunk; and of weights that are gathered, each device sums the
    # part that it keeps. The router computes the same along the tensor axis.
    weights = {
        name: jax_compat.as_varying(
            value, frozenset(config.token_axes if name in ROUTER else config.mesh.axis_names)
        )
        for name, value in parameters.items()
    }
    weights = {
        name: value if name in ROUTER else _gathered(config, call.dtype, name, value)
        for name, value in weights.items()
    }
    num_tokens = len(of_tokens[0])
    number = max(call.num_tokens // call.sequence_length, 1)
    sequences = Sequences(call.sequence_length, number, num_tokens)
    device = lax.axis_index(config.token_axes)
    position = device * num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)

    apply = functools.partial(apply_to_chunk, config, call, sequences, device, weights, expert_map)
    tokens = Tokens(position, *of_tokens)
    if call.num_chunks == 1:
        out, per_token, counts = apply(tokens)
    else:
        recomputed = jax.checkpoint(apply, prevent_cse=False)
        chunks = jax.tree.map(lambda v: v.reshape(call.num_chunks, -1, *v.shape[1:]), tokens)
        _, (out, per_token, counts) = lax.scan(lambda carry, chunk: (carry, recomputed(chunk)), None, chunks)
        out, per_token = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), (out, per_token))
        counts = jax.tree.map(lambda v: v.sum(axis=0, dtype=v.dtype), counts)

    sums: dict[str, Any] = {}
    if call.aux == "global":
        out, sums = global_aux(config, call, sequences, device, counts, out)
    elif call.aux == "local":
        sums = local_aux(config, counts)
    if config.tensor_axes:
        out = lax.psum(out, config.tensor_axes)  # each device computed with its part of F
    return out, sums, (None, None) if call.aux == "off" else per_token


def _gathered(config: MoEConfig, dtype: Any, name: str, value: jax.Array) -> jax.Array:
    """Gather a weight that is sharded over the fsdp axis, for products in `dtype`."""
    _, logical_axes = config.parameters[name]
    fsdp = config.axis_rules["embed"]
    if not fsdp or "embed" not in logical_axes:
        return value
    axis = logical_axes.index("embed")
    if dtype.itemsize < value.dtype.itemsize:
        return _gather_in(dtype, fsdp, axis, value)
    return lax.all_gather(value, fsdp, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather_in(dtype: Any, axis_name: str, axis: int, value: jax.Array) -> jax.Array:
    """Gather `value` in `dtype`, and return it in its own, in which gradients of devices are summed."""
    gathered = lax.all_gather(value.astype(dtype), axis_name, axis=axis, tiled=True)
    return gathered.astype(value.dtype)


def _gather_forward(dtype, axis_name, axis, value):
    return _gather_in(dtype, axis_name, axis, value), None


def _gather_backward(dtype, axis_name, axis, _, gradient):
    return (lax.psum_scatter(gradient, axis_name, scatter_dimension=axis, tiled=True),)


_gather_in.defvjp(_gather_forward, _gather_backward)
