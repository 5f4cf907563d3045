"""Two-batch overlap: the results of one half after the other."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import E, F, H, K, config_of, loss_of, numbers, on_mesh, parameters_of
from flax import nnx
from implementations import ON_GPUS, assert_same_bits
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import fetch, put_on_mesh
from moe_layer import assert_close

import jax_deepep as ep
from jax_deepep import flax as ep_flax
from jax_deepep.flax import linen
from jax_deepep.moe import MoEConfig, build_config, moe

pytestmark = pytest.mark.filterwarnings("ignore:jax_deepep.flax.linen.MoE. no logical axis rule")

BATCH = (8, 6)
SHARED: dict[str, Any] = {"shared_intermediate_size": 8}
BY_DOT: dict[str, Any] = {"grouped_matmul": "ragged_dot"}
WIRES: dict[str, Any] = {"wire": "fp8", "combine_wire": ep.Wire(None, backward="fp8")}

CASES = {
    "": ("data × expert", BY_DOT, BATCH),
    "shared experts": ("expert", {**SHARED, **BY_DOT, "gated": False}, BATCH),
    "blocks, uneven": ("expert", {"axis_types": AxisType.Explicit}, (3, 5)),
    "blocks, uneven, shared experts": ("expert", {**SHARED, "axis_types": AxisType.Explicit}, (3, 5)),
    "fsdp, tensor": ("fsdp × expert × tensor", {**SHARED, **BY_DOT}, BATCH),
    "drops, wires": ("expert", {**BY_DOT, **WIRES, "capacity_factor": 1.0, "expert_capacity": 3}, BATCH),
}


def results_of(layer: Callable[..., Any], config: MoEConfig, x: np.ndarray, *routing: np.ndarray) -> Any:
    """Return ((output, aux), gradients) of `layer(parameters, x, *routing)`, unsharded."""

    def loss(parameters, x, *routing):
        out, aux = layer(parameters, x, *routing)
        losses = aux.balance_loss if aux.sequence_balance_loss is None else aux.sequence_balance_loss
        return loss_of(out.astype(jnp.float32)) + losses, (out, aux)

    is_even = x.shape[0] % config.num_token_shards == 0
    split = P(config.token_axes if is_even else None)
    x, *routing = (put_on_mesh(value, config.mesh, split) for value in (x, *routing))
    argnums = (0, 1, 3) if routing else (0, 1)
    step = jax.jit(jax.grad(loss, argnums=argnums, has_aux=True))
    gradients, results = step(on_mesh(config, parameters_of(config)), x, *routing)
    return fetch(results), fetch(gradients)


def both_ways(config: MoEConfig) -> list[MoEConfig]:
    """Return the layer with two batches, and with chunks, which are the same halves, in a loop."""
    return [dataclasses.replace(config, **how) for how in ({"two_batch_overlap": True}, {"num_chunks": 2})]


@pytest.mark.parametrize(
    ("mesh_name", "choices", "shape"),
    [pytest.param(*case, id=name, marks=() if name else pytest.mark.nightly) for name, case in CASES.items()],
)
def test_the_bits_of_one_half_after_the_other(mesh_name: str, choices: Any, shape: tuple[int, ...]) -> None:
    """Outputs, what was dropped, and gradients; without the router, whose sums XLA rounds differently.

    So it does with the shared experts, which take both halves at once: with them, up to rounding.
    """
    config = config_of(mesh_name, **choices)
    x = numbers(*shape, H)
    topk_idx = np.argsort(numbers(*shape, E, seed=1))[..., :K].astype(np.int32)
    topk_idx[0, 1] = -1
    routing = (topk_idx, np.abs(numbers(*shape, K, seed=2)))

    def layer_of(config):
        return lambda parameters, x, topk_idx, topk_weights: moe(
            config, parameters, x, topk_idx=topk_idx, topk_weights=topk_weights
        )

    overlapped, chunks = (results_of(layer_of(way), config, x, *routing) for way in both_ways(config))
    if config.shared_intermediate_size:
        assert_close(overlapped, chunks)
    else:
        jax.tree.map(assert_same_bits, overlapped, chunks)
    assert np.any(overlapped[0][1].num_dropped) == ("expert_capacity" in choices)


@pytest.mark.skipif(ON_GPUS, reason="reads what XLA makes for CPUs")
def test_nothing_copies_halves_of_tokens() -> None:
    """Ops read and write their rows of x, of the output and of their gradients; the router reads all of x."""
    config = config_of("expert", **SHARED, **BY_DOT, two_batch_overlap=True)
    num_tokens = math.prod(BATCH) // config.num_token_shards

    def loss(parameters, x, routing):
        topk_idx, topk_weights = routing or (None, None)
        return loss_of(moe(config, parameters, x, topk_idx=topk_idx, topk_weights=topk_weights)[0])

    def arrays_of(routing):
        """Return how many results of instructions are halves, and how many are copies of all tokens."""
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        operands = put_on_mesh((numbers(*BATCH, H), routing), config.mesh, P("expert"))
        text = step.lower(on_mesh(config, parameters_of(config)), *operands).compile().as_text()
        halves = re.findall(rf"= f32\[{num_tokens // 2},{H}\]", text)
        return len(halves), len(re.findall(rf"= f32\[{num_tokens},{H}\]\S* copy\(", text))

    topk_idx = np.argsort(numbers(*BATCH, E, seed=1))[..., :K].astype(np.int32)
    assert arrays_of((topk_idx, numbers(*BATCH, K))) == (0, 0)
    assert arrays_of(None) == (0, 0)


def test_routers_and_losses() -> None:
    """Of both halves, with a mask; a pass of `jax.checkpoint` computes them again."""
    config = config_of("data × expert", **SHARED)
    x, mask = numbers(*BATCH, H), np.arange(6)[None] < np.arange(8)[:, None] + 2

    def layer_of(config):
        return jax.checkpoint(
            lambda parameters, x: moe(
                config, parameters, x, mask=mask, sequence_loss=True, router_logits=True
            )
        )

    assert_close(*(results_of(layer_of(way), config, x) for way in both_ways(config)))


def test_xla_and_chunks_of_two_batches() -> None:
    config = config_of("expert", **SHARED, **BY_DOT)
    sizes = {name: getattr(config.comm, name) for name in ("num_experts", "max_tokens", "hidden_size")}
    xla = ep.Communicator(config.mesh, num_experts_per_tok=K, implementation="xla", **sizes)
    configs = [
        dataclasses.replace(config, comm=xla, two_batch_overlap=True),
        dataclasses.replace(config, num_chunks=3, two_batch_overlap=True),
        config,
    ]
    expected, *others = (
        results_of(lambda *operands, way=way: moe(way, *operands), way, numbers(*BATCH, H)) for way in configs
    )
    for other in others:
        assert_close(other, expected)


def test_modules() -> None:
    """Of NNX and Linen; the communicator takes the tokens of a half."""
    config = config_of("expert", **SHARED, two_batch_overlap=True)
    num_tokens = math.prod(BATCH) // config.num_token_shards
    choices: dict[str, Any] = {**SHARED, "two_batch_overlap": True, "max_tokens": num_tokens}
    with jax.set_mesh(config.mesh):
        own = build_config(E, K, H, F, **choices)
        layer = ep_flax.MoE(E, K, H, F, rngs=nnx.Rngs(0), **choices)
        other = linen.MoE(E, K, H, F, **choices)
    assert own.comm.max_tokens == layer.config.comm.max_tokens == other.comm.max_tokens == num_tokens // 2
    x = put_on_mesh(numbers(*BATCH, H), config.mesh, P("expert"))
    state = nnx.to_pure_dict(nnx.state(layer))
    graph = nnx.graphdef(layer)
    programs = [
        lambda parameters, x: moe(config, parameters, x)[0],
        lambda parameters, x: nnx.merge(graph, nnx.State(parameters))(x)[0],
        lambda parameters, x: other.apply({"params": parameters}, x)[0],
    ]
    expected, *results = (fetch(jax.jit(program)(state, x)) for program in programs)
    for result in results:
        assert_same_bits(result, expected)


def test_more_tokens_than_the_communicator_takes() -> None:
    config = config_of("expert", two_batch_overlap=True)
    x = numbers(66 * config.num_token_shards, H)
    words = r"x: expected at most max_tokens=32 .* on each device in each half, got 33 .* num_chunks=2 chunks"
    with pytest.raises(ValueError, match=words):
        moe(config, parameters_of(config), x)
    with pytest.raises(TypeError, match="two_batch_overlap: expected True or False, got 2; pass a bool"):
        config_of("expert", two_batch_overlap=2)
