"""A MoE layer as a pure function of its parameters: what the Flax modules and plain JAX share.

A device's tokens take this way:

    route → dispatch → the experts' networks → combine (+ shared experts)

Policies of `jax.checkpoint` can name: "moe_dispatched", the received rows [C, H] and the routes: with these
kept, the backward pass does not dispatch again; "moe_hidden", the products with wi_0 and wi_1 [C, F] each;
"moe_expert_out", what combine takes [C, H]. The last two do not exist with grouped_matmul="blocks".
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating, jax_compat
from jax_deepep.balancing import to_slots
from jax_deepep.capacity import round_up
from jax_deepep.checks import check_array, check_rows_dtype
from jax_deepep.moe.aux import Call, Counts, MoEAux, Scope, Sequences, Sums, global_aux, local_aux
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.experts import routed_experts, shared_experts
from jax_deepep.moe.fair_drops import leave_out
from jax_deepep.moe.routing import Given, Routing, check_given, given_by, route
from jax_deepep.ops.combine import combine
from jax_deepep.ops.dispatch import dispatch
from jax_deepep.ops.handle import ExpertMajor

Parameters = Mapping[str, jax.Array]
Router = Callable[[jax.Array], jax.Array | tuple[jax.Array, jax.Array]]
ROUTER = ("gate", "gate_bias")


def moe(
    config: MoEConfig,
    parameters: Parameters,
    x: jax.Array,
    placement: jax.Array | None = None,
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
        parameters: arrays of the names and shapes in `config.parameters`. They may lie on the mesh in any
            way; in that of `config.spec(name)` only the router and rows along the fsdp axis have to move.
        x: [..., H] float. Tokens are split over `config.token_axes`; a batch whose first axis is split over
            them in this order does not move. If they do not divide evenly, they are padded.
            On a mesh of Explicit axes the output lies as x does.
        placement: int32 [P], which expert every slot holds, with `config.num_physical_experts`; the experts'
            matrices in `parameters` are those of the slots then, see `physical_parameters`.
        mask: bool [...], False for what is no token, such as padding: it goes to no expert, takes no room,
            counts nowhere, and its output is 0. Whatever x and a gradient of the output hold there, NaN
            too, reaches nothing.
        router: a function of x that takes the place of x · gate. It returns logits [..., E], from which the
            layer goes on as ever, or (`topk_idx`, `topk_weights`). It may close over parameters.
        topk_idx: int32 [..., K], the experts of each token, −1 for none. Without `topk_weights` the router
            gives their weights, with gradients, and a token with −1 everywhere is routed as ever: so the
            `topk_idx` of an earlier call's aux makes this one repeat its choice.
        topk_weights: float [..., K], the weights, differentiable; the router is not used then.
        aux: "global", or "local" or "off" (None is returned) for steps without an exchange: see `MoEAux`.
        router_logits: whether aux has them.
        sequence_loss: whether aux has `sequence_balance_loss`: x is [..., S, H], and S tokens are a sequence.
            These three are static.

    Returns:
        ([..., H], `MoEAux`; None with `aux="off"`).

    Raises:
        ValueError, TypeError: a wrong argument, or more tokens than the communicator takes.
    """
    _check(config, parameters, x, placement)
    if mask is not None:
        check_given(config, Given(mask=mask), x.shape[:-1])
        x = _without_rest(config, x, mask)
    given = given_by(router, x, mask, topk_idx, topk_weights)
    check_given(config, given, x.shape[:-1])
    if aux not in ("global", "local", "off"):
        raise ValueError(f'aux: expected "global", "local" or "off", got {aux!r}; pass one of them.')
    if router_logits and (given.topk_weights is not None or aux == "off"):
        raise ValueError(
            "router_logits: expected False with topk_weights or aux='off', got True; there are none then."
        )
    dtype = config.dtype
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):  # the common one, as documented, is asked for
            dtype = jnp.result_type(x, *(value for name, value in parameters.items() if name not in ROUTER))
    length = x.shape[-2] if x.ndim > 1 else 1
    num_tokens = x.size // config.hidden_size
    num_chunks = config.chunks_of(-(-num_tokens // config.num_token_shards), dtype)
    call = Call(aux, router_logits, sequence_loss, num_tokens, max(length, 1), jnp.dtype(dtype), num_chunks)
    return _layer(config, call, parameters, x, placement, given)


@functools.partial(jax.jit, static_argnums=0)  # as is `_layer`
def _without_rest(config: MoEConfig, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return x with zeros for what is no token: even a product of its NaN with 0 would be NaN."""
    mask = placed(config, mask, P(*_spec(x)[:-1]))
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _spec(x: jax.Array) -> tuple[Any, ...]:
    spec = jax.typeof(x).sharding.spec
    return (*spec, *(None for _ in range(x.ndim - len(spec))))


# Compiled: outside of the user's jit, shard_map would compile its operations one by one, in every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    config: MoEConfig,
    call: Call,
    parameters: Parameters,
    x: jax.Array,
    placement: jax.Array | None,
    given: Given,
) -> tuple[jax.Array, MoEAux | None]:
    padded = _padded(config, call.num_tokens, call.num_chunks)
    split = P(config.token_axes)

    def flat(value: jax.Array, last: tuple[int, ...]) -> jax.Array:
        """Return [padded tokens, *last], split over the devices."""

        def flatten(value: jax.Array) -> jax.Array:
            tokens = value.reshape(-1, *last)
            return jnp.pad(tokens, ((0, padded - call.num_tokens), *((0, 0) for _ in last)))

        return placed(config, value, split, flatten)

    leading = len(x.shape) - 1
    of_tokens = jax.tree.map(lambda value: flat(value, value.shape[leading:]), (x, given))
    specs = {name: P() if name in ROUTER else config.spec(name) for name in parameters}
    weights = {name: placed(config, parameters[name], spec) for name, spec in specs.items()}
    slots = None if placement is None else placed(config, placement, P())
    of_devices = P() if call.aux == "global" else split
    per_device = jax.shard_map(
        functools.partial(_per_device, config, call),
        mesh=config.mesh,
        in_specs=(specs, split, P()),
        out_specs=(split, of_devices, split),
    )
    out, sums, per_token = per_device(weights, of_tokens, slots)

    def unflatten(value: jax.Array, last: Any = None) -> jax.Array:
        """Return [..., size], placed as x is."""
        shape = (*x.shape[:-1], value.shape[-1])
        own = P(*_spec(x)[:-1], last)
        return placed(config, value, own, lambda v: v[: call.num_tokens].reshape(shape))

    result = unflatten(out, _spec(x)[-1])
    if call.aux == "off":
        return result, None
    topk_idx, logits = jax.tree.map(unflatten, per_token)
    return result, MoEAux(**sums, topk_idx=topk_idx, router_logits=logits)


def placed(
    config: MoEConfig,
    value: jax.Array,
    spec: P,
    change: Callable[[jax.Array], jax.Array] = lambda value: value,
) -> jax.Array:
    """Return `change(value)`, on a mesh of Explicit axes placed as `spec` says; elsewhere XLA places it."""
    explicit = tuple(
        name
        for name, kind in zip(config.mesh.axis_names, config.mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    if not explicit:
        return change(value)
    placement = NamedSharding(config.mesh, spec)
    return jax.sharding.auto_axes(change, axes=explicit, out_sharding=placement)(value)


def _check(config: Any, parameters: Parameters, x: Any, placement: Any) -> None:
    if not isinstance(config, MoEConfig):
        raise TypeError(
            f"config: got {type(config).__name__}; takes a MoEConfig, which is static: "
            "jax.jit(moe, static_argnums=0)."
        )
    if manual := jax_compat.manual_axes():
        raise ValueError(
            f"x: got in a call inside of a shard_map over {manual}; takes arrays of all devices, outside of "
            "any: what one device does there is jax_deepep.dispatch and combine."
        )
    _check_context_mesh(config)
    config.check_placement(placement)
    if parameters.keys() != config.parameters.keys():
        raise ValueError(f"parameters: got {sorted(parameters)}; takes {sorted(config.parameters)}.")
    for name, (shape, axes) in config.parameters.items():
        if axes[0] == "exp":
            shape = (config.comm.num_experts, *shape[1:])
        check_array(name, parameters[name], shape, names=f"[{', '.join(a or '·' for a in axes)}]")
        check_rows_dtype(name, parameters[name])
    check_rows_dtype("x", x)
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x: got shape {x.shape}; takes [..., hidden_size] = [..., {config.hidden_size}].")
    num_tokens, num_chunks = x.size // config.hidden_size, config.num_chunks or 1
    of_chunk = _padded(config, num_tokens, num_chunks) // (config.num_token_shards * num_chunks)
    if of_chunk > config.comm.max_tokens:
        chunks = "" if num_chunks == 1 else f" in each of {num_chunks} chunks"
        needed = -(-of_chunk * num_chunks // config.comm.max_tokens)
        raise ValueError(
            f"x: got {num_tokens} tokens, {of_chunk} on each of {config.num_token_shards} devices{chunks}; "
            f"the communicator takes at most max_tokens={config.comm.max_tokens}. Make it with max_tokens="
            f"{of_chunk}, or pass the tokens in num_chunks={needed} chunks."
        )


def _check_context_mesh(config: MoEConfig) -> None:
    here, own = jax.sharding.get_abstract_mesh(), config.mesh.abstract_mesh
    if here.empty or (here.axis_names, here.axis_sizes, here.axis_types) == (
        own.axis_names, own.axis_sizes, own.axis_types
    ):  # fmt: skip
        return
    raise ValueError(
        f"comm: expected a communicator of the mesh that jax.set_mesh set, {_described(here)}, got one of "
        f"{_described(own)}; make both with one mesh, of the same axis_types."
    )


def _described(mesh: Any) -> str:
    kinds = ", ".join(
        f"{name}={size} ({kind.name})"
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return f"[{kinds}]"


def _padded(config: MoEConfig, num_tokens: int, num_chunks: int) -> int:
    # At least one token for every device: the router would use arrays without elements inside the shard_map,
    # on which XLA of JAX 0.11.2 crashes.
    return round_up(max(num_tokens, 1), config.num_token_shards * num_chunks)


def _per_device(
    config: MoEConfig,
    call: Call,
    parameters: dict[str, jax.Array],
    of_tokens: tuple[jax.Array, Given],
    placement: jax.Array | None,
) -> tuple[jax.Array, dict[str, Any], tuple[jax.Array | None, jax.Array | None]]:
    """Apply the layer to the tokens [T, H] of one device; return what `MoEAux` has behind it."""
    weights = {
        name: value if name in ROUTER else _gathered(config, name, value)
        for name, value in parameters.items()
    }
    # Marked here as differing between devices, the gradients of weights are summed over the devices once:
    # marked inside of the scan, once in every chunk. The router computes the same along the tensor axis.
    weights = {
        name: jax_compat.as_varying(
            value, frozenset(config.token_axes if name in ROUTER else config.mesh.axis_names)
        )
        for name, value in weights.items()
    }
    num_tokens = len(of_tokens[0])
    number = max(call.num_tokens // call.sequence_length, 1)
    sequences = Sequences(call.sequence_length, number, num_tokens)
    device = lax.axis_index(config.token_axes)
    position = device * num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)

    apply = functools.partial(_chunk, config, call, sequences, device, weights, placement)
    if call.num_chunks == 1:
        out, per_token, counts = apply(position, *of_tokens)
    else:
        recomputed = jax.checkpoint(apply, prevent_cse=False)
        chunks = jax.tree.map(lambda v: v.reshape(call.num_chunks, -1, *v.shape[1:]), (position, *of_tokens))
        _, (out, per_token, counts) = lax.scan(lambda carry, chunk: (carry, recomputed(*chunk)), None, chunks)
        out, per_token = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), (out, per_token))
        counts = jax.tree.map(lambda v: v.sum(axis=0, dtype=v.dtype), counts)

    sums: dict[str, Any] = {}
    if call.aux == "global":
        out, sums = global_aux(config, call, sequences, device, counts, out)
    elif call.aux == "local":
        sums = local_aux(config, counts)
    if config.tensor_axes:
        out = lax.psum(out, config.tensor_axes)  # every device had a part of each expert's F
    return out, sums, (None, None) if call.aux == "off" else per_token


def _gathered(config: MoEConfig, name: str, value: jax.Array) -> jax.Array:
    """Gather the rows of a weight that are split over the fsdp axis."""
    _, logical_axes = config.parameters[name]
    for position, axis in enumerate(logical_axes):
        if axis == "embed" and config.axis_rules["embed"]:
            value = lax.all_gather(value, config.axis_rules["embed"], axis=position, tiled=True)
    return value


def _chunk(
    config: MoEConfig,
    call: Call,
    sequences: Sequences,
    device: jax.Array,
    parameters: dict[str, jax.Array],
    placement: jax.Array | None,
    position: jax.Array,
    x: jax.Array,
    given: Given,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None], Counts]:
    """Return (output [T, H], the two fields of `MoEAux` that tell of every token, `Counts`)."""
    is_token = position < call.num_tokens
    if given.mask is not None:
        is_token &= given.mask
    routing = route(config, parameters, x, is_token, given)
    topk_idx = routing.topk_idx
    if placement is not None:
        # What names no expert must name no slot.
        topk_idx = jnp.where(topk_idx < config.num_experts, topk_idx, config.comm.num_experts)
        topk_idx = to_slots(topk_idx, position, placement, num_experts=config.num_experts)
    capacity, alignment = config.rows(len(x))
    topk_idx = leave_out(config, topk_idx, routing.topk_weights, capacity, alignment)

    # Marked before dispatch as differing along the tensor axis too, or the gradients of all received rows
    # would be summed along it in place of those of the tokens.
    all_axes = frozenset(config.mesh.axis_names)
    x, topk_weights = (jax_compat.as_varying(value, all_axes) for value in (x, routing.topk_weights))
    x = x.astype(call.dtype)
    weights = {name: value.astype(call.dtype) for name, value in parameters.items() if name not in ROUTER}
    dispatched, handle = dispatch(
        x,
        topk_idx,
        topk_weights,
        comm=config.comm,
        capacity=capacity,
        expert_capacity=config.expert_capacity,
        alignment=alignment,
    )
    assert isinstance(dispatched, ExpertMajor)
    y = routed_experts(
        dispatched.tokens,
        dispatched.group_sizes,
        weights,
        activation=config.activation,
        choice=config.experts_by,
        alignment=alignment,
    )
    bias = shared_experts(x, weights, activation=config.activation)
    out = combine(y, handle, comm=config.comm, bias=bias)
    if given.mask is not None:  # a shared expert may make something of nothing
        out = jnp.where(given.mask[:, None], out, jnp.zeros((), out.dtype))
    drops = None
    if config.may_drop(len(x)):
        dropped = jnp.where(handle.destination < 0, routing.counted, -1)
        drops = gating.expert_load(dropped, config.num_experts)
    logits = routing.logits if call.router_logits else None
    of_sequences = None
    if call.sequence_loss:
        of_sequences = functools.partial(
            sequences.sums, position // sequences.length - sequences.first(device)
        )
    counts = _counts(config, is_token, routing, drops, handle.num_received, of_sequences)
    return out, (routing.topk_idx, logits), counts


def _counts(
    config: MoEConfig,
    is_token: jax.Array,
    routing: Routing,
    drops: jax.Array | None,
    num_received: jax.Array,
    of_sequences: Callable[[jax.Array], jax.Array] | None,
) -> Counts:
    """Count what the tokens of one device, or one chunk of them, chose."""
    num_tokens, num_experts = len(is_token), config.num_experts
    if routing.logits is None:
        probability, z = jnp.zeros((num_tokens, num_experts), jnp.float32), jnp.zeros((), jnp.float32)
    else:
        probability = gating.router_probabilities(routing.logits, config.score_function)
        probability = jnp.where(is_token[:, None], probability, 0)
        z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
        z = jnp.where(is_token, z, 0).sum()
    every = Sums(
        gating.expert_load(routing.counted, num_experts),
        probability.sum(axis=0),
        is_token.sum(dtype=jnp.int32),
    )
    sequences = None
    if of_sequences is not None:
        is_chosen = jax.vmap(functools.partial(gating.expert_load, num_experts=num_experts))(routing.counted)
        sequences = Sums(*map(of_sequences, (is_chosen, probability, is_token.astype(jnp.int32))))
    return Counts(every, sequences, z, drops, num_received)
