"""In how many chunks the tokens of a layer pass that was not told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import H, K, config_of, loss_of, numbers, on_mesh, parameters_of
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from moe_layer import assert_close

import jax_deepep as ep
from jax_deepep import capacity
from jax_deepep.moe import MoEConfig, build_config, moe

LARGE = {"num_experts_per_tok": 8, "max_tokens": 65536, "hidden_size": 7168, "implementation": "xla"}


def large_layer(num_experts: int, **choices: Any) -> MoEConfig:
    comm = ep.Communicator(mesh_named("expert"), num_experts=num_experts, **LARGE)
    return build_config(num_experts, 8, 7168, 2048, comm=comm, **choices)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("num_tokens", [1, 300, 4096, 20000, 65536])
@pytest.mark.parametrize("num_experts", [256, 2048], ids="{} experts".format)
def test_the_fewest_chunks_whose_worst_case_is_small(num_experts: int, num_tokens: int, dtype: Any) -> None:
    config = large_layer(num_experts)
    num_chunks = config.chunks_of(num_tokens, dtype)
    worst_case = config.comm.size * num_tokens * min(8, config.comm.num_local_experts)
    live = 8 * num_tokens

    def fits(num_chunks: int) -> bool:
        rows = worst_case / num_chunks
        return rows <= 1.25 * live or rows * 7168 * jnp.dtype(dtype).itemsize <= 2**31

    rows_per_expert = live / config.comm.num_local_experts
    assert num_chunks == 1 or (not fits(num_chunks - 1) and rows_per_expert / num_chunks >= 128)
    assert fits(num_chunks) or rows_per_expert / (num_chunks + 1) < 128
    # A capacity bounds rows without chunks, and what is said stays.
    assert large_layer(num_experts, capacity_factor=2.0).chunks_of(num_tokens, dtype) == 1
    assert large_layer(num_experts, expert_capacity=4096).chunks_of(num_tokens, dtype) == 1
    assert large_layer(num_experts, num_chunks=3).chunks_of(num_tokens, dtype) == 3


def results_of(config: MoEConfig, parameters: Any, x: Any) -> Any:
    """Return ((output, aux), gradients) of the layer, in full."""

    def loss(parameters: Any, x: Any) -> Any:
        out, aux = moe(config, parameters, x)
        return loss_of(out) + aux.balance_loss, (out, aux)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
    return fetch(results), fetch(gradients)


def test_a_layer_passes_its_tokens_in_these_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "MOST_ROW_BYTES", 0)
    monkeypatch.setattr(capacity, "LEAST_ROWS_PER_EXPERT", 1)
    config = config_of("expert")
    parameters = on_mesh(config, parameters_of(config))
    x = put_on_mesh(numbers(8, 6, H), config.mesh, P(config.token_axes))
    num_tokens = 8 * 6 // config.num_token_shards
    num_chunks = config.chunks_of(num_tokens, jnp.float32)
    worst_case = config.comm.size * min(K, config.comm.num_local_experts) * num_tokens
    assert num_chunks == max(1, -(-4 * worst_case // (5 * K * num_tokens)))

    program = str(jax.make_jaxpr(lambda *operands: moe(config, *operands))(parameters, x))
    assert num_chunks == 1 or f"length={num_chunks}\n" in program

    explicit, whole = (dataclasses.replace(config, num_chunks=n) for n in (num_chunks, 1))
    chosen = results_of(config, parameters, x)
    jax.tree.map(np.testing.assert_array_equal, chosen, results_of(explicit, parameters, x))
    assert_close(chosen, results_of(whole, parameters, x))
