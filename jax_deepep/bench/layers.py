"""Programs of MoE layers: one device's experts, and layers on all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.bench.problem import AXIS, WORST, Problem
from jax_deepep.capacity import bounded_rows, round_up, worst_case_rows
from jax_deepep.communicator import Communicator
from jax_deepep.moe import MoEConfig, init_parameters, moe
from jax_deepep.moe.experts import routed_experts
from jax_deepep.moe.grouped_matmul import alignment_for
from jax_deepep.moe.grouped_matmul.mosaic import mosaic_matmul
from jax_deepep.moe.parameters import of_experts

GATHERED, UNFUSED = "gathered", "mosaic, not fused"
FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"
Program = tuple[Callable[..., Any], tuple[Any, ...]]  # a function to be jitted, and its operands


def gathered_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int) -> jax.Array:
    """Multiply all blocks in one batched product, each with a copy of its matrix."""
    blocks = rows.reshape(-1, block, rows.shape[1])
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(blocks)) * block, side="right")
    live = expert < len(matrices)
    blocks = jnp.where(live[:, None, None], blocks, 0)
    products = jnp.einsum("bth,bhf->btf", blocks, matrices[jnp.where(live, expert, 0)])
    return products.reshape(len(rows), -1)


def capacity_factor_of(problem: Problem) -> float | None:
    """Return the `capacity_factor` of `MoEConfig`; None for the worst case."""
    return None if problem.capacity == WORST else float(problem.capacity.removesuffix("x"))


def rows_of_one_device(
    problem: Problem, alignment: int
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array]:
    """Return rows [C, H], the experts' weights, group sizes [L] of uniform routing, and a gradient [C, H].

    Padding rows are zero and rows after the last group NaN, as a dispatch may leave them; their gradient is
    zero, as not every case here can have NaN there.
    """
    assert problem.intermediate is not None
    random = np.random.default_rng(0)
    num_local, live = problem.num_local_experts, problem.tokens * problem.topk
    counts = np.bincount(random.integers(0, num_local, live), minlength=num_local)
    group_sizes = round_up(counts, alignment)
    sizes = {
        "num_ranks": problem.devices,
        "num_tokens": problem.tokens,
        "num_experts_per_tok": problem.topk,
        "num_local_experts": num_local,
        "alignment": alignment,
    }
    factor = capacity_factor_of(problem)
    if factor is None:
        capacity = worst_case_rows(layout="expert", **sizes)
    else:
        capacity = bounded_rows(capacity_factor=factor, **sizes)
    first = np.cumsum(group_sizes) - group_sizes
    position = np.concatenate([start + np.arange(count) for start, count in zip(first, counts, strict=True)])
    key, dtype = jax.random.key(0), jnp.dtype(problem.dtype)

    @jax.jit
    def drawn(key: jax.Array, rest: float) -> jax.Array:
        rows = jnp.full((capacity, problem.hidden), rest, dtype).at[: group_sizes.sum()].set(0)
        return rows.at[position].set(jax.random.normal(key, (live, problem.hidden), dtype))

    shape = (num_local, problem.hidden, problem.intermediate)
    shapes = {"wi_0": shape, "wi_1": shape, "wo": (num_local, problem.intermediate, problem.hidden)}
    weights = {name: of_experts(key, shape, dtype) for name, shape in shapes.items()}
    return drawn(key, jnp.nan), weights, jnp.asarray(group_sizes, jnp.int32), drawn(jax.random.key(1), 0.0)


def experts_programs(problem: Problem, name: str) -> dict[str, Program]:
    """Return the experts of one device with the grouped matmul `name`: forward, and with all gradients."""
    mean_rows = problem.tokens * problem.topk * problem.devices / problem.experts
    functions = {GATHERED: ("blocks", gathered_matmul), UNFUSED: ("mosaic", mosaic_matmul)}
    aligned_as, function = functions.get(name, (name, None))
    alignment = alignment_for(aligned_as, mean_rows)
    choice = name if function is None else partial(function, block=alignment)
    rows, weights, group_sizes, of_out = rows_of_one_device(problem, alignment)
    row_weights = jnp.ones(len(rows), jnp.float32)

    def forward(rows, row_weights, weights, group_sizes):
        return routed_experts(
            rows,
            row_weights,
            group_sizes,
            weights,
            activation=jax.nn.silu,
            choice=choice,
            alignment=alignment,
        )

    def step(rows, row_weights, weights, group_sizes, of_out):
        def experts(rows, row_weights, weights):
            return forward(rows, row_weights, weights, group_sizes)

        out, pull_back = jax.vjp(experts, rows, row_weights, weights)
        return *pull_back(of_out), out

    operands = (rows, row_weights, weights, group_sizes)
    return {FORWARD: (forward, operands), FORWARD_BACKWARD: (step, (*operands, of_out))}


def dense_moe(problem: Problem, parameters: dict[str, jax.Array], x: jax.Array, mesh: Mesh) -> jax.Array:
    """Apply the layer without dispatch: gather all tokens, send each through all experts of the device."""

    def per_device(parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        tokens = lax.all_gather(x, AXIS, tiled=True)
        logits = jnp.matmul(tokens, parameters["gate"], preferred_element_type=jnp.float32)
        topk_idx, weights = gating.group_limited_topk(
            logits, num_experts_per_tok=problem.topk, score_function="softmax"
        )
        first = lax.axis_index(AXIS) * (problem.num_local_experts)

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


def config_of(problem: Problem, comm: Communicator, **choices: Any) -> MoEConfig:
    """Return the configuration of a layer; `choices` are further fields."""
    assert problem.intermediate is not None
    capacity_factor = capacity_factor_of(problem)
    sizes = (problem.experts, problem.topk, problem.hidden, problem.intermediate)
    return MoEConfig(comm, *sizes, capacity_factor=capacity_factor, **choices)


def tokens_of(problem: Problem, mesh: Mesh) -> jax.Array:
    """Return random tokens [R * T, H] of all devices."""
    draw = partial(jax.random.normal, shape=(problem.devices * problem.tokens, problem.hidden))
    split = NamedSharding(mesh, P(AXIS))
    return jax.jit(lambda key: draw(key).astype(problem.dtype), out_shardings=split)(jax.random.key(1))


def decode_step(
    problem: Problem, mesh: Mesh, comm: Communicator, depth: int, matmul: Any
) -> dict[str, Program]:
    """Return what a model of `depth` layers does with its experts to decode: one after the other, forward."""
    config, parameters = _layers(problem, comm, depth, matmul)

    def step(parameters, x):
        for of_layer in parameters:
            x = x + moe(config, of_layer, x)[0]
        return x

    return {FORWARD: (step, (parameters, tokens_of(problem, mesh)))}


def loop_programs(
    problem: Problem, mesh: Mesh, comm: Communicator, depth: int, matmul: Any
) -> dict[str, Program]:
    """Return `depth` layers in a loop, which saves what gradients need: forward, and with all gradients."""
    config, parameters = _layers(problem, comm, depth, matmul)
    shardings = {name: NamedSharding(mesh, P(None, *config.spec(name))) for name in parameters[0]}

    def stack(*of_layers):
        return jax.tree.map(lambda *values: jnp.stack(values), *of_layers)

    def forward(parameters, x):
        return lax.scan(lambda x, of_layer: (x + moe(config, of_layer, x)[0], None), x, parameters)[0]

    stacked = jax.jit(stack, out_shardings=shardings)(*parameters)
    return _with_gradients(forward, stacked, tokens_of(problem, mesh))


def _layers(
    problem: Problem, comm: Communicator, depth: int, matmul: Any
) -> tuple[MoEConfig, list[dict[str, jax.Array]]]:
    """Return the configuration of `depth` layers, and the parameters of each."""
    config = config_of(problem, comm, grouped_matmul=matmul)
    keys = jax.random.split(jax.random.key(0), depth)
    return config, [init_parameters(config, key, jnp.dtype(problem.dtype)) for key in keys]


def layer_programs(
    problem: Problem,
    mesh: Mesh,
    comm: Communicator | None,
    num_chunks: int = 1,
    matmul: Any = "auto",
    **choices: Any,
) -> dict[str, Program]:
    """Return a layer: forward, and with all gradients; `comm` None = `dense_moe`.

    `choices` are further fields of `MoEConfig`.
    """
    maker = comm or problem.communicator(mesh, "xla")
    config = config_of(problem, maker, num_chunks=num_chunks, grouped_matmul=matmul, **choices)
    parameters = init_parameters(config, jax.random.key(0), jnp.dtype(problem.dtype))
    x = tokens_of(problem, mesh)

    def forward(parameters, x):
        return moe(config, parameters, x)[0] if comm else dense_moe(problem, parameters, x, mesh)

    return _with_gradients(forward, parameters, x)


def _with_gradients(
    forward: Callable[..., jax.Array], parameters: dict[str, jax.Array], x: jax.Array
) -> dict[str, Program]:
    def loss(parameters, x):
        return jnp.mean(forward(parameters, x).astype(jnp.float32) ** 2)

    step = jax.grad(loss, argnums=(0, 1))
    return {FORWARD: (forward, (parameters, x)), FORWARD_BACKWARD: (step, (parameters, x))}
