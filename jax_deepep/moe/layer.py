"""A MoE layer as a pure function of its parameters: what the Flax modules and plain JAX share.

A device's tokens take this way:

    route → dispatch → the experts' networks → combine (+ shared experts)

Values that `jax.checkpoint` policies can name: "moe_dispatched" (the received rows, and the routes),
"moe_hidden" (inside of the experts, [C, F]), "moe_expert_out" (what combine takes).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating, jax_compat
from jax_deepep.capacity import round_up
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.experts import routed_experts, shared_experts
from jax_deepep.moe.grouped_matmul import chosen, grouped_matmul
from jax_deepep.ops.checks import check_array
from jax_deepep.ops.combine import combine
from jax_deepep.ops.dispatch import dispatch

Parameters = Mapping[str, jax.Array]
ROUTER = ("gate", "gate_bias")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEAux:
    """What a MoE layer tells besides its output, over all tokens of all devices.

    Attributes:
        expert_load: int32 [E], tokens that chose each expert, dropped rows included.
        balance_loss: float32 [], see `jax_deepep.balance_loss`; 1 when all loads are equal.
        num_dropped: int32 [], rows that did not fit into the capacity.
    """

    expert_load: jax.Array
    balance_loss: jax.Array
    num_dropped: jax.Array


def moe(config: MoEConfig, parameters: Parameters, x: jax.Array) -> tuple[jax.Array, MoEAux]:
    """Send every token through its experts, on all devices of the mesh. Differentiable.

    **Collective:** takes global arrays, outside of `shard_map`; every process of the mesh calls it.

    Args:
        config: static.
        parameters: arrays of the names and shapes in `config.parameters`. They may lie on the mesh in any
            way; `config.spec(name)` is the one in which nothing has to move.
        x: [..., H] float. Tokens are split over `config.token_axes`; a batch whose first axis is split over
            them in this order does not move. If they do not divide evenly, they are padded.

    Returns:
        ([..., H], `MoEAux`).

    Raises:
        ValueError: a parameter or x has the wrong shape, or there are more tokens than the communicator takes.
    """
    _check(config, parameters, x)
    dtype = config.dtype
    if dtype is None:
        dtype = jnp.result_type(x, *(value for name, value in parameters.items() if name not in ROUTER))
    tokens = x.reshape(-1, config.hidden_size)
    num_tokens = len(tokens)
    padded = round_up(num_tokens, config.num_token_shards * config.num_chunks)
    tokens = jnp.pad(tokens, ((0, padded - num_tokens), (0, 0)))
    per_device = functools.partial(_per_device, config, dtype, num_tokens)
    if config.mesh.size == 1:
        out, aux = per_device(dict(parameters), tokens)
    else:
        split = P(config.token_axes)
        specs = {name: P() if name in ROUTER else config.spec(name) for name in parameters}
        placed = {name: _placed(config, parameters[name], spec) for name, spec in specs.items()}
        out, aux = jax.shard_map(
            per_device, mesh=config.mesh, in_specs=(specs, split), out_specs=(split, P())
        )(placed, _placed(config, tokens, split))
    return out[:num_tokens].reshape(x.shape), aux


def _placed(config: MoEConfig, value: jax.Array, spec: P) -> jax.Array:
    """Return `value` as a shard_map over Explicit axes wants it: lying on the mesh already."""
    if AxisType.Explicit not in config.mesh.axis_types:
        return value
    return jax.sharding.reshard(value, NamedSharding(config.mesh, spec))


def _check(config: MoEConfig, parameters: Parameters, x: jax.Array) -> None:
    if parameters.keys() != config.parameters.keys():
        raise ValueError(f"parameters: got {sorted(parameters)}; takes {sorted(config.parameters)}.")
    for name, (shape, axes) in config.parameters.items():
        check_array(name, parameters[name], shape, names=f"[{', '.join(a or '·' for a in axes)}]")
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x: got shape {x.shape}; takes [..., hidden_size] = [..., {config.hidden_size}].")


def _per_device(
    config: MoEConfig, dtype: Any, num_tokens: int, parameters: dict[str, jax.Array], x: jax.Array
) -> tuple[jax.Array, MoEAux]:
    """Apply the layer to the tokens [T, H] of one device; `num_tokens` of all devices are no padding."""
    mesh_axes = () if config.mesh.size == 1 else config.mesh.axis_names
    token_axes = tuple(name for name in config.token_axes if name in mesh_axes)
    weights = {
        name: _gathered(config, name, value) if mesh_axes and name not in ROUTER else value
        for name, value in parameters.items()
    }
    # Marked here as differing between devices, the gradients of weights are summed over the devices once:
    # marked inside of the scan, once in every chunk. The router computes the same along the tensor axis.
    weights = {
        name: jax_compat.as_varying(value, frozenset(token_axes if name in ROUTER else mesh_axes))
        for name, value in weights.items()
    }
    position = lax.axis_index(token_axes) * len(x) + jnp.arange(len(x))
    is_token = position < num_tokens

    apply = functools.partial(_chunk, config, dtype, frozenset(mesh_axes), weights)
    if config.num_chunks == 1:
        out, counts = apply(x, is_token)
    else:
        apply = jax.checkpoint(apply, prevent_cse=False)
        chunks = jax.tree.map(lambda v: v.reshape(config.num_chunks, -1, *v.shape[1:]), (x, is_token))
        _, (out, counts) = lax.scan(lambda carry, chunk: (carry, apply(*chunk)), None, chunks)
        out = out.reshape(x.shape)
        counts = jax.tree.map(lambda v: v.sum(axis=0), counts)

    load, probability, num_dropped = lax.psum(counts, token_axes)
    if tensor_axes := tuple(name for name in config.tensor_axes if name in mesh_axes):
        out = lax.psum(out, tensor_axes)  # every device had a part of each expert's F
        num_dropped = lax.pmax(num_dropped, tensor_axes)  # which are equal
    return out, MoEAux(load, gating.balance_loss(load, probability / num_tokens), num_dropped)


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
    axes: frozenset[str],
    parameters: dict[str, jax.Array],
    x: jax.Array,
    is_token: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Return (output [T, H], (load [E], sum of the router's probabilities [E], dropped rows []))."""
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
    topk_idx = jnp.where(is_token[:, None], topk_idx, -1)
    probability = gating.router_probabilities(logits, config.score_function)
    probability = jnp.where(is_token[:, None], probability, 0).sum(axis=0)

    # Marked before dispatch as differing along the tensor axis too, or the gradients of all received rows
    # would be summed along it in place of those of the tokens.
    x, topk_weights = (jax_compat.as_varying(value, axes) for value in (x, topk_weights))
    x = x.astype(dtype)
    weights = {name: value.astype(dtype) for name, value in parameters.items() if name not in ROUTER}
    sizes = config.rows(len(x))
    dispatched, handle = dispatch(x, topk_idx, topk_weights, comm=config.comm, **sizes)
    multiply = grouped_matmul(chosen(config.grouped_matmul, config.comm.platform), sizes["alignment"])
    y = routed_experts(
        dispatched.tokens, dispatched.group_sizes, weights, activation=config.activation, multiply=multiply
    )
    bias = shared_experts(x, weights, activation=config.activation)
    out = combine(y, handle, comm=config.comm, bias=bias)
    load = gating.expert_load(topk_idx, config.num_experts)
    return out, (load, probability, handle.num_dropped)
