"""Results have the documented dtypes under all settings of JAX: x64, strict promotion."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import E, H, K, config_of, numbers, on_mesh, parameters_of
from jax.sharding import PartitionSpec as P
from meshes import put_on_mesh

import jax_deepep as ep
from jax_deepep import balancing, gating
from jax_deepep.moe import init_parameters, moe, physical_parameters

I32, F32, BF16, BOOL = (np.dtype(name) for name in ("int32", "float32", "bfloat16", "bool"))
LOGITS = numbers(6, E)
LOAD = np.arange(E, dtype=np.int32)


def layer(dtype: Any, **choices: Any) -> Callable[[], Any]:
    """Return a call of a layer, with gradients."""

    def run():
        config = config_of("data × expert", dtype=dtype, **choices)
        parameters = on_mesh(config, parameters_of(config))
        expert_map = None
        if config.num_physical_experts:
            expert_map = np.arange(config.num_physical_experts, dtype=np.int32) % E

        def loss(parameters, x):
            own = physical_parameters(config, parameters, expert_map, keep_home=False)
            out, aux = moe(config, own, x, expert_map)
            return out.astype(jnp.float32).sum() + aux.balance_loss, (out, aux)

        x = put_on_mesh(numbers(8, 6, H).astype(jnp.bfloat16), config.mesh, P(None))
        gradients, (out, aux) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
        of_parameters, of_x = gradients
        return out, aux.expert_load, aux.balance_loss, aux.num_dropped, of_parameters["wo"], of_x

    return run


def ops(implementation: str, layout: str) -> Callable[[], Any]:
    """Return a call of dispatch and combine, with gradients."""

    def run():
        mesh = config_of("expert").mesh
        comm = ep.Communicator(
            mesh,
            num_experts=E,
            num_experts_per_tok=K,
            max_tokens=4,
            hidden_size=H,
            implementation=implementation,
        )

        def device(x, topk_idx, topk_weights):
            def loss(x, topk_weights):
                dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, layout=layout)
                out = ep.combine(dispatched.tokens, handle, comm=comm)
                return out.astype(jnp.float32).sum(), (out, dispatched, handle)

            gradients, (out, dispatched, handle) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
                x, topk_weights
            )
            counts = handle.num_received, handle.num_dropped, handle.num_invalid
            rows = (dispatched.tokens, dispatched.mask, handle.source, handle.weights, handle.num_rows)
            return jax.tree.map(lambda value: value[None], (out, gradients, rows, counts))

        x = put_on_mesh(numbers(4 * mesh.size, H).astype(jnp.bfloat16), mesh, P("expert"))
        idx = put_on_mesh(np.tile(np.arange(K, dtype=np.int32), (4 * mesh.size, 1)), mesh, P("expert"))
        weights = put_on_mesh(np.abs(numbers(4 * mesh.size, K)), mesh, P("expert"))
        return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(
            x, idx, weights
        )

    return run


OF_OPS = [BF16, BF16, F32, BF16, BOOL, I32, F32, I32, I32, I32, I32]
CALLS = {
    "group_limited_topk": (
        partial(ep.group_limited_topk, LOGITS, num_experts_per_tok=2, num_groups=4, topk_groups=2), [I32, F32]
    ),
    "group_limited_topk, softmax with bias": (
        partial(
            ep.group_limited_topk, LOGITS.astype(jnp.bfloat16), num_experts_per_tok=2, scale=2.5,
            score_function="softmax", bias=np.float32(LOAD),
        ),
        [I32, F32],
    ),
    "router_probabilities": (partial(gating.router_probabilities, LOGITS), [F32]),
    "expert_load": (partial(gating.expert_load, np.int32([[0, -1]]), E), [I32]),
    "balance_loss": (partial(gating.balance_loss, LOAD, np.abs(LOGITS[0])), [F32]),
    "update_bias": (partial(gating.update_bias, np.float32(LOAD), LOAD), [F32]),
    "to_physical_experts": (
        partial(
            balancing.to_physical_experts, np.int32([[0, 1]]), np.int32([5]), np.int32([0, 1, 0, 1]),
            num_experts=2,
        ),
        [I32],
    ),
    "init_parameters": (
        lambda: init_parameters(
            config_of("expert", use_bias_correction=True), jax.random.key(0), jnp.bfloat16
        ),
        [BF16, F32, BF16, BF16, BF16],
    ),
    "quantize_dequantize, fp8": (partial(ep.quantize_dequantize, LOGITS, "fp8"), [F32]),
    "quantize_dequantize, nvfp4": (partial(ep.quantize_dequantize, LOGITS, "nvfp4"), [F32]),
    "layer in chunks": (layer(None, num_chunks=2), [F32, I32, F32, I32, F32, BF16]),
    "layer with replicas": (
        layer(jnp.bfloat16, num_physical_experts=2 * E, score_function="sigmoid", capacity_factor=1.5,
              shared_intermediate_size=8),
        [BF16, I32, F32, I32, F32, BF16],
    ),
    "layer with an activation in float32": (
        layer(BF16, activation=lambda x: jax.nn.silu(x.astype(jnp.float32)), shared_intermediate_size=8),
        [BF16, I32, F32, I32, F32, BF16],
    ),
    "native ops": (ops("native", "expert"), OF_OPS),
    "native ops, token-major": (ops("native", "token"), OF_OPS),
    "xla ops": (ops("xla", "expert"), OF_OPS),
    "xla ops, token-major": (ops("xla", "token"), OF_OPS),
}  # fmt: skip


@pytest.mark.collectives
@pytest.mark.parametrize("name", CALLS)
def test_dtypes_hold(name: str) -> None:
    call, dtypes = CALLS[name]
    call = jax.jit(call) if isinstance(call, partial) else call  # which calls no compiled function yet
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert [leaf.dtype for leaf in jax.tree.leaves(call())] == dtypes
