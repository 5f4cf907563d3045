"""A MoE layer as a pure function of its parameters: what the Flax modules and plain JAX share.

A device's tokens take this way:

    route → dispatch → the experts' networks → combine (+ shared experts)

Policies of `jax.checkpoint` can name: "moe_dispatched", the received rows [C, H] and the routes: with these
kept, the backward pass does not dispatch again; "moe_hidden", the products with wi_0 and wi_1 [C, F] each;
"moe_expert_out", what combine takes [C, H]. The last two do not exist with grouped_matmul="blocks".
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating, jax_compat
from jax_deepep.balancing import to_slots
from jax_deepep.capacity import round_up
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.experts import routed_experts, shared_experts
from jax_deepep.moe.order import zero_after
from jax_deepep.ops.checks import check_array, check_rows_dtype
from jax_deepep.ops.combine import combine
from jax_deepep.ops.dispatch import dispatch
from jax_deepep.ops.handle import ExpertMajor

Parameters = Mapping[str, jax.Array]
ROUTER = ("gate", "gate_bias")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEAux:
    """What a MoE layer tells besides its output, over all tokens of all devices.

    Attributes:
        expert_load: int32 [E], tokens that chose each expert, dropped rows included.
        balance_loss: float32 [], see `jax_deepep.gating.balance_loss`; 1 when all loads are equal, 0 without
            any token.
        num_dropped: int32 [], rows that did not fit into the capacity.
    """

    expert_load: jax.Array
    balance_loss: jax.Array
    num_dropped: jax.Array


def moe(
    config: MoEConfig, parameters: Parameters, x: jax.Array, placement: jax.Array | None = None
) -> tuple[jax.Array, MoEAux]:
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

    Returns:
        ([..., H], `MoEAux`).

    Raises:
        ValueError, TypeError: a wrong parameter or x, or more tokens than the communicator takes.
    """
    _check(config, parameters, x, placement)
    return _layer(config, parameters, x, placement)


# Compiled: outside of the user's jit, shard_map would compile its operations one by one, in every call.
@functools.partial(jax.jit, static_argnums=0)
def _layer(
    config: MoEConfig, parameters: Parameters, x: jax.Array, placement: jax.Array | None
) -> tuple[jax.Array, MoEAux]:
    dtype = config.dtype
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):  # the common one, as documented, is asked for
            dtype = jnp.result_type(x, *(value for name, value in parameters.items() if name not in ROUTER))
    num_tokens = x.size // config.hidden_size
    padded = _padded(config, num_tokens)

    def flatten(x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, config.hidden_size)
        return jnp.pad(tokens, ((0, padded - num_tokens), (0, 0)))

    split = P(config.token_axes)
    specs = {name: P() if name in ROUTER else config.spec(name) for name in parameters}
    per_device = jax.shard_map(
        functools.partial(_per_device, config, dtype, num_tokens),
        mesh=config.mesh,
        in_specs=(specs, split, P()),
        out_specs=(split, P()),
    )
    weights = {name: placed(config, parameters[name], spec) for name, spec in specs.items()}
    slots = None if placement is None else placed(config, placement, P())
    out, aux = per_device(weights, placed(config, x, split, flatten), slots)
    return placed(
        config, out, jax.typeof(x).sharding.spec, lambda out: out[:num_tokens].reshape(x.shape)
    ), aux


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
    num_tokens, num_chunks = x.size // config.hidden_size, config.num_chunks
    of_chunk = _padded(config, num_tokens) // (config.num_token_shards * num_chunks)
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


def _padded(config: MoEConfig, num_tokens: int) -> int:
    # At least one token for every device: the router would use arrays without elements inside the shard_map,
    # on which XLA of JAX 0.11.2 crashes.
    return round_up(max(num_tokens, 1), config.num_token_shards * config.num_chunks)


def _per_device(
    config: MoEConfig,
    dtype: Any,
    num_tokens: int,
    parameters: dict[str, jax.Array],
    x: jax.Array,
    placement: jax.Array | None,
) -> tuple[jax.Array, MoEAux]:
    """Apply the layer to the tokens [T, H] of one device; `num_tokens` of all devices are no padding."""
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
    position = lax.axis_index(config.token_axes) * len(x) + jnp.arange(len(x), dtype=jnp.int32)

    apply = functools.partial(_chunk, config, dtype, num_tokens, weights, placement)
    if config.num_chunks == 1:
        out, counts = apply(x, position)
    else:
        recomputed = jax.checkpoint(apply, prevent_cse=False)
        chunks = jax.tree.map(lambda v: v.reshape(config.num_chunks, -1, *v.shape[1:]), (x, position))
        _, (out, counts) = lax.scan(lambda carry, chunk: (carry, recomputed(*chunk)), None, chunks)
        out = out.reshape(x.shape)
        counts = jax.tree.map(lambda v: v.sum(axis=0, dtype=v.dtype), counts)

    load, probability, num_dropped, num_received = counts
    # Our waits are bounded and say for whom: no collective of XLA comes before. Chunks are one loop, of which
    # the gradient of the balance loss under `jax.checkpoint` wants the load without dispatching again.
    zero, out = zero_after(num_received if config.num_chunks == 1 else load[0], out)
    if config.tensor_axes:
        out = lax.psum(out, config.tensor_axes)  # every device had a part of each expert's F
        zero, num_dropped = lax.pmax((zero, num_dropped), config.tensor_axes)  # the same on all of them
    load, probability, num_dropped = lax.psum(
        [value + zero.astype(value.dtype) for value in (load, probability, num_dropped)], config.token_axes
    )
    return out, MoEAux(load, gating.balance_loss(load, probability / max(num_tokens, 1)), num_dropped)


def _gathered(config: MoEConfig, name: str, value: jax.Array) -> jax.Array:
    """Gather the rows of a weight that are split over the fsdp axis."""
    _, logical_axes = config.parameters[name]
    for position, axis in enumerate(logical_axes):
        if axis == "embed" and config.axis_rules["embed"]:
            value = lax.all_gather(value, config.axis_rules["embed"], axis=position, tiled=True)
    return value


def _chunk(
    config: MoEConfig,
    dtype: Any,
    num_tokens: int,
    parameters: dict[str, jax.Array],
    placement: jax.Array | None,
    x: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return (output [T, H], (load [E], sum of the router's probabilities [E], rows dropped, come []))."""
    # float32 means float32 here, on GPUs too: a rounding may send a token elsewhere.
    gate = parameters["gate"].astype(jnp.float32)
    logits = jnp.matmul(x.astype(jnp.float32), gate, precision=lax.Precision.HIGHEST)
    topk_idx, topk_weights = gating.group_limited_topk(
        logits,
        num_experts_per_tok=config.num_experts_per_tok,
        num_groups=config.num_groups,
        topk_groups=config.topk_groups,
        bias=parameters.get("gate_bias"),
        score_function=config.score_function,
        normalize=config.normalize,
        scale=config.scale,
    )
    is_token = position < num_tokens
    topk_idx = jnp.where(is_token[:, None], topk_idx, -1)
    probability = gating.router_probabilities(logits, config.score_function)
    probability = jnp.where(is_token[:, None], probability, 0).sum(axis=0)
    load = gating.expert_load(topk_idx, config.num_experts)
    if placement is not None:
        topk_idx = to_slots(topk_idx, position, placement, num_experts=config.num_experts)

    # Marked before dispatch as differing along the tensor axis too, or the gradients of all received rows
    # would be summed along it in place of those of the tokens.
    all_axes = frozenset(config.mesh.axis_names)
    x, topk_weights = (jax_compat.as_varying(value, all_axes) for value in (x, topk_weights))
    x = x.astype(dtype)
    weights = {name: value.astype(dtype) for name, value in parameters.items() if name not in ROUTER}
    capacity, alignment = config.rows(len(x))
    dispatched, handle = dispatch(
        x, topk_idx, topk_weights, comm=config.comm, capacity=capacity, alignment=alignment
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
    return out, (load, probability, handle.num_dropped, handle.num_received)
