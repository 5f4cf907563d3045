"""The programs that are timed: one device's experts, and layers on all of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.bench.moe.problem import MoEProblem
from jax_deepep.bench.problems import AXIS
from jax_deepep.communicator import Communicator
from jax_deepep.moe import MoEConfig, init_parameters, moe
from jax_deepep.moe.experts import routed_experts
from jax_deepep.moe.grouped_matmul import alignment_for

GATHERED = "gathered"
Program = tuple[Callable[..., Any], tuple[Any, ...]]  # a function to be jitted, and its operands


def gathered_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int) -> jax.Array:
    """Multiply all blocks in one batched product, each with a copy of its matrix."""
    blocks = rows.reshape(-1, block, rows.shape[1])
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(blocks)) * block, side="right")
    live = expert < len(matrices)
    blocks = jnp.where(live[:, None, None], blocks, 0)
    products = jnp.einsum("bth,bhf->btf", blocks, matrices[jnp.where(live, expert, 0)])
    return products.reshape(len(rows), -1)


def experts_programs(problem: MoEProblem, name: str) -> dict[str, Program]:
    """Return the networks of one device's experts by grouped matmul `name`, and with all their gradients."""
    mean_rows = problem.tokens * problem.topk * problem.devices / problem.experts
    alignment = alignment_for("blocks" if name == GATHERED else name, mean_rows)
    choice = partial(gathered_matmul, block=alignment) if name == GATHERED else name
    rows, weights, group_sizes = problem.rows_of_one_device(alignment)
    live = jnp.arange(len(rows))[:, None] < group_sizes.sum()

    def forward(rows, weights, group_sizes):
        return routed_experts(
            rows, group_sizes, weights, activation=jax.nn.silu, choice=choice, alignment=alignment
        )

    def step(rows, weights, group_sizes):
        out, pull_back = jax.vjp(lambda *operands: forward(*operands, group_sizes), rows, weights)
        return pull_back(jnp.where(live, out, 0))

    operands = (rows, weights, group_sizes)
    return {"forward": (forward, operands), "forward + backward": (step, operands)}


def dense_moe(problem: MoEProblem, parameters: dict[str, jax.Array], x: jax.Array, mesh: Mesh) -> jax.Array:
    """Apply the layer without dispatch: gather all tokens, send each through all experts of the device."""

    def per_device(parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        tokens = lax.all_gather(x, AXIS, tiled=True)
        logits = jnp.matmul(tokens, parameters["gate"], preferred_element_type=jnp.float32)
        topk_idx, weights = gating.group_limited_topk(
            logits, num_experts_per_tok=problem.topk, score_function="softmax"
        )
        first = lax.axis_index(AXIS) * (problem.experts // problem.devices)

        @jax.checkpoint
        def add_expert(out, of_expert):
            number, wi_0, wi_1, wo = of_expert
            weight = jnp.sum(jnp.where(topk_idx == first + number, weights, 0), axis=1)
            y = (jax.nn.silu(tokens @ wi_0) * (tokens @ wi_1)) @ wo
            return out + weight[:, None].astype(out.dtype) * y, None

        experts = tuple(parameters[name] for name in ("wi_0", "wi_1", "wo"))
        out, _ = lax.scan(add_expert, jnp.zeros_like(tokens), (jnp.arange(len(experts[0])), *experts))
        return lax.psum_scatter(out, AXIS, tiled=True)

    specs = {name: P() if name == "gate" else P(AXIS) for name in parameters}
    return jax.shard_map(per_device, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=P(AXIS))(parameters, x)


def layer_programs(
    problem: MoEProblem, mesh: Mesh, comm: Communicator | None, num_chunks: int = 1, matmul: Any = "auto"
) -> dict[str, Program]:
    """Return a layer, and a training step's gradients of it; `comm` None = `dense_moe`."""
    maker = comm or Communicator(mesh, AXIS, **sizes_of(problem), implementation="xla")
    config = MoEConfig(
        maker,
        problem.experts,
        problem.topk,
        problem.hidden,
        problem.intermediate,
        num_chunks=num_chunks,
        grouped_matmul=matmul,
        capacity_factor=problem.capacity_factor,
    )
    parameters = init_parameters(config, jax.random.key(0), jnp.dtype(problem.dtype))
    draw = partial(jax.random.normal, shape=(problem.devices * problem.tokens, problem.hidden))
    x = jax.jit(lambda key: draw(key).astype(problem.dtype), out_shardings=NamedSharding(mesh, P(AXIS)))(
        jax.random.key(1)
    )

    def forward(parameters, x):
        return moe(config, parameters, x)[0] if comm else dense_moe(problem, parameters, x, mesh)

    def loss(parameters, x):
        return jnp.mean(forward(parameters, x).astype(jnp.float32) ** 2)

    step = jax.grad(loss, argnums=(0, 1))
    return {"forward": (forward, (parameters, x)), "forward + backward": (step, (parameters, x))}


def sizes_of(problem: MoEProblem, num_chunks: int = 1) -> dict[str, Any]:
    """Return the sizes of a communicator."""
    return {
        "num_experts": problem.experts,
        "num_experts_per_tok": problem.topk,
        "max_tokens": -(-problem.tokens // num_chunks),
        "hidden_size": problem.hidden,
    }
