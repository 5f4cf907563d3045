"""Many steps in one program, as a model decodes, and a few of the size of training, with gradients.

Every row is checked where it arrives. Routing, the number of tokens and which ranks come late are random in
every step, and a capacity drops rows. A run takes few steps; JAX_DEEPEP_MANY_STEPS is the number of small
ones. On two GPUs, with every op captured (implementations.py has the flags), 100,000 take half a minute.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import LOW_LATENCY
from jax import lax
from meshes import device_axis, fetch, mesh_named

import jax_deepep as ep

NUM_STEPS = int(os.environ.get("JAX_DEEPEP_MANY_STEPS", "40"))  # of all cases together
STEPS_PER_CALL = min(500, NUM_STEPS)


class Case(NamedTuple):
    layout: str
    num_tokens: int
    capacity: int | None


CASES = [
    Case("token", 1, None), Case("expert", 8, None), Case("token", 32, 24), Case("expert", 32, 40),
]  # fmt: skip


def rows_of(rank, token, step, hidden_size):
    """Return bfloat16 [..., H], whole numbers below 16: those of another rank, token or step differ.

    Sums of up to eight of them with weights of 1/2 and 1 are exact in bfloat16.
    """
    digits = [token // 16**i % 16 for i in range(3)] + [step // 16**i % 16 for i in range(5)]
    facts = jnp.stack(jnp.broadcast_arrays(rank, *digits), axis=-1)
    columns = jnp.arange(hidden_size - facts.shape[-1])
    mixture = facts[..., :1] * 7 + facts[..., 1:2] * 5 + facts[..., 3:4] * 3 + columns
    return jnp.concatenate([facts, mixture % 16], axis=-1).astype(jnp.bfloat16)


def late(key: jax.Array) -> jax.Array:
    """Return 0.0, now and then after a while."""
    often, long = jax.random.split(key)
    spins = jnp.where(jax.random.uniform(often) < 0.05, jax.random.randint(long, (), 1, 40), 0)
    matrix = lax.fori_loop(0, spins, lambda _, m: jnp.tanh(m @ m), jnp.full((128, 128), 0.01))
    return jnp.minimum(jnp.abs(matrix[0, 0]), 0).astype(jnp.bfloat16)


def wrong_in_step(
    case: Case, comm: ep.Communicator, rank: jax.Array, step: jax.Array, with_gradient: bool = False
) -> jax.Array:
    """Run a step, and return how many of its results are not what the routing of all ranks demands."""
    size, tokens, local_experts = comm.size, case.num_tokens, comm.num_experts // comm.size
    rows = functools.partial(rows_of, hidden_size=comm.hidden_size)
    key = jax.random.fold_in(jax.random.key(0), step)
    keys = jax.random.split(key, 5)
    # The routing of all ranks, [R, T, K]: on every rank the same.
    shape = (size, tokens, comm.num_experts)
    topk_idx = jnp.argsort(jax.random.uniform(keys[0], shape), axis=-1)[..., : comm.num_experts_per_tok]
    is_token = jnp.arange(tokens)[None] < jax.random.randint(keys[1], (size, 1), 0, tokens + 1)
    chosen = jax.random.uniform(keys[2], topk_idx.shape) < jax.random.uniform(keys[3])
    topk_idx = jnp.where(chosen & is_token[..., None], topk_idx, -1)
    weights = 2.0 ** jax.random.randint(keys[4], topk_idx.shape, -1, 1).astype(jnp.float32)

    own_idx, own_weights = topk_idx[rank].astype(jnp.int32), weights[rank]

    def round_trip(x):
        dispatched, handle = ep.dispatch(
            x, own_idx, own_weights, comm=comm, layout=case.layout, capacity=case.capacity
        )
        y = dispatched.tokens
        if case.layout == "token":
            y = y * dispatched.topk_weights.sum(axis=1, keepdims=True).astype(y.dtype)
        return ep.combine(jnp.where(dispatched.mask[:, None], y, 0), handle), (dispatched.tokens, handle)

    sent = rows(rank, jnp.arange(tokens), step)
    x = sent + late(jax.random.fold_in(key, rank))
    if with_gradient:
        out, pull_back, (received, handle) = jax.vjp(round_trip, x, has_aux=True)
    else:
        out, (received, handle) = round_trip(x)

    # has [R, L or 1, R, T]: whether a row group of a device gets a row of a token, in the order of its rows.
    has = (topk_idx[None] == jnp.arange(comm.num_experts)[:, None, None, None]).any(axis=-1)
    has = has.reshape(size, local_experts, size, tokens)
    if case.layout == "token":
        has = has.any(axis=1, keepdims=True)
    row = jnp.cumsum(has.reshape(size, -1), axis=1).reshape(has.shape) - 1
    capacity = received.shape[0]
    kept = has & (row < capacity)
    source = jnp.arange(size)[:, None] * comm.max_tokens + jnp.arange(tokens)
    own_rows = jnp.where(kept[rank], row[rank], capacity)
    sources = jnp.full(capacity, -1).at[own_rows].set(jnp.broadcast_to(source, own_rows.shape), mode="drop")
    expected = rows(sources // comm.max_tokens, sources % comm.max_tokens, step)
    wrong = (handle.source != sources).sum()
    wrong += ((received != expected) & (sources >= 0)[:, None]).sum()

    owner, expert = jnp.divmod(jnp.maximum(own_idx, 0), local_experts)
    group = expert if case.layout == "expert" else jnp.zeros_like(expert)
    arrived = (own_idx >= 0) & kept[owner, group, rank, jnp.arange(tokens)[:, None]]
    factor = jnp.where(arrived, own_weights, 0).sum(axis=1, keepdims=True)
    wrong += (out != factor * sent).sum()
    if with_gradient:
        cotangent = rows(rank + 1, jnp.arange(tokens), step)
        wrong += (pull_back(cotangent)[0] != factor * cotangent).sum()
    return wrong


@pytest.fixture(autouse=True)
def rank_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def program(case: Case, comm: ep.Communicator, num_steps: int, with_gradient: bool = False):
    """Return a function of the number of the first step: how many results were wrong, by rank."""

    def steps(first):
        rank = lax.axis_index(comm.axis_names)

        def step(wrong, number):
            return wrong + wrong_in_step(case, comm, rank, first + number, with_gradient), None

        start = lax.pcast(jnp.int32(0), comm.axis_names, to="varying")
        return lax.scan(step, start, jnp.arange(num_steps))[0][None]

    return jax.jit(
        jax.shard_map(steps, mesh=comm.mesh, in_specs=jax.P(), out_specs=device_axis(comm.mesh, "expert"))
    )


@pytest.mark.parametrize("implementation", ["native", LOW_LATENCY])
def test_many_steps(implementation: str) -> None:
    mesh = mesh_named("expert")
    mode = "throughput" if implementation == "native" else implementation
    comm = ep.Communicator(
        mesh, num_experts=mesh.size * 4, num_experts_per_tok=3, max_tokens=32, hidden_size=64,
        implementation="native", mode=mode,
    )  # fmt: skip
    programs = [program(case, comm, STEPS_PER_CALL) for case in CASES]
    order = np.random.default_rng(0)  # the same on all ranks
    first, done = 0, []
    while first < NUM_STEPS or len(done) < len(CASES):
        which = len(done) if len(done) < len(CASES) else int(order.integers(len(CASES)))
        done.append((CASES[which], first, programs[which](jnp.int32(first))))
        first += STEPS_PER_CALL
        if len(done) % 8 == 0:
            jax.block_until_ready(done[-1][2])
    for case, begin, wrong in done:
        np.testing.assert_array_equal(fetch(wrong), 0, err_msg=f"{case}, steps from {begin}")
    comm.check()
    assert comm.stats().rows_received.sum() > 0
    comm.close()


@pytest.mark.parametrize("layout", ["token", "expert"])
def test_steps_of_the_size_of_training(layout: str) -> None:
    """On GPUs 4096 tokens of 7168 (1024 where many ranks share one), top-8 of 256 experts; on CPUs less."""
    mesh, topk = mesh_named("expert"), 8
    tokens, hidden_size, experts = 512, 512, 32
    if jax.default_backend() == "gpu":
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        tokens, hidden_size, experts = 4096 if memory >= 6 << 30 else 1024, 7168, 256
    capacity = tokens * topk if layout == "expert" else None
    with ep.Communicator(
        mesh, num_experts=experts // mesh.size * mesh.size, num_experts_per_tok=topk, max_tokens=tokens,
        hidden_size=hidden_size, implementation="native", mode="throughput",
    ) as comm:  # fmt: skip
        wrong = program(Case(layout, tokens, capacity), comm, 3, with_gradient=True)(jnp.int32(0))
        np.testing.assert_array_equal(fetch(wrong), 0)
        comm.check()
        assert comm.stats().rows_received.sum() > 0
