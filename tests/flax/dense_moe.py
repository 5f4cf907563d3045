"""The MoE layer without communication: every token through every expert, in plain einsums."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from meshes import expert_axes, mesh_named, put_on_mesh

from jax_deepep import gating
from jax_deepep.moe import MoEConfig, build_config

E, K, H, F = 8, 3, 16, 32
MAX_TOKENS = 64


def config_of(
    mesh_name: str, axis_types: AxisType | tuple[AxisType, ...] = AxisType.Auto, **choices: Any
) -> MoEConfig:
    """Return a layer on one of the tests' meshes; `choices` may replace E and K."""
    sizes = (choices.pop("num_experts", E), choices.pop("num_experts_per_tok", K), H, F)
    mesh = mesh_named(mesh_name, axis_types)
    return build_config(*sizes, mesh=mesh, axis_name=expert_axes(mesh_name), max_tokens=MAX_TOKENS, **choices)


@functools.cache
def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return float32 numbers around 0."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters_of(config: MoEConfig) -> dict[str, np.ndarray]:
    """Return unsharded parameters."""
    return {
        name: numbers(*shape, seed=number) / np.float32(shape[-2] ** 0.5 if len(shape) > 1 else 4)
        for number, (name, (shape, _)) in enumerate(config.parameters.items())
    }


def on_mesh(config: MoEConfig, parameters: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Shard parameters as the layer does."""
    return {name: put_on_mesh(value, config.mesh, config.spec(name)) for name, value in parameters.items()}


def dense_moe(config: MoEConfig, parameters: Any, x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (output, balance loss, tokens per expert) without a capacity, from unsharded arrays."""
    tokens = x.reshape(-1, H)
    logits = tokens @ parameters["gate"]
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

    def network(prefix: str, expert_axis: str) -> jax.Array:
        wi_0, wi_1, wo = (parameters.get(prefix + name) for name in ("wi_0", "wi_1", "wo"))
        hidden = config.activation(jnp.einsum(f"th,{expert_axis}hf->t{expert_axis}f", tokens, wi_0))
        if wi_1 is not None:
            hidden *= jnp.einsum(f"th,{expert_axis}hf->t{expert_axis}f", tokens, wi_1)
        return jnp.einsum(f"t{expert_axis}f,{expert_axis}fh->t{expert_axis}h", hidden, wo)

    chosen = jax.nn.one_hot(topk_idx, config.num_experts)  # [T, K, E]
    out = jnp.einsum("tk,tke,teh->th", topk_weights, chosen, network("", "e"))
    if config.shared_intermediate_size:
        out += network("shared_", "")
    probability = gating.router_probabilities(logits, config.score_function).mean(axis=0)
    load = chosen.sum(axis=(0, 1))
    return out.reshape(x.shape), gating.balance_loss(load, probability), load


def loss_of(out: jax.Array) -> jax.Array:
    """Return a sum whose gradient differs from one element of `out` to the next."""
    return jnp.sum(jnp.sin(out) * jnp.linspace(0.5, 1.5, out.size).reshape(out.shape))
