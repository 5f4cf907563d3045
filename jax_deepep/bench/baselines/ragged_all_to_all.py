"""Without this library: argsort, gather and `jax.lax.ragged_all_to_all`, and back.

One row is sent per (token, expert). Rows arrive by source and are then gathered into expert-major order, the
same as that of our dispatch, for a grouped matmul.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep.bench.problem import AXIS, Inputs, Problem
from jax_deepep.bench.processes import exchange_with_all
from jax_deepep.bench.report import Result, Spread
from jax_deepep.bench.trials import Case, Stopwatch, interleaved

PART = "argsort + gather + jax.lax.ragged_all_to_all"


def _before(sizes: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def send(problem: Problem, after: None, x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, ...]:
    """Dispatch; return the rows by local expert, and the operands of `bring_back`."""
    ranks, capacity = problem.devices, problem.capacity_rows
    local_experts = problem.experts // ranks
    me = lax.axis_index(AXIS)
    order = jnp.argsort(topk_idx.reshape(-1), stable=True)
    counts = jnp.bincount(topk_idx.reshape(-1), length=problem.experts).astype(jnp.int32)
    everyones = lax.all_gather(counts, AXIS).reshape(ranks, ranks, local_experts)
    sizes = jnp.sum(everyones, axis=2, dtype=jnp.int32)  # [source, target]
    received = lax.ragged_all_to_all(
        x[order // problem.topk],
        jnp.zeros((capacity, problem.hidden), x.dtype),
        input_offsets=_before(sizes[me]),
        send_sizes=sizes[me],
        output_offsets=_before(sizes)[me],
        recv_sizes=sizes[:, me],
        axis_name=AXIS,
    )
    # The experts of the rows in order of arrival; unused rows sort behind them.
    experts = jnp.tile(jnp.arange(local_experts, dtype=jnp.int32), ranks)
    experts = jnp.repeat(experts, everyones[:, me].reshape(-1), total_repeat_length=capacity)
    live = jnp.arange(capacity) < jnp.sum(sizes[:, me])
    by_expert = jnp.argsort(jnp.where(live, experts, local_experts), stable=True)
    return received[by_expert], order, by_expert, sizes[None]


def bring_back(
    problem: Problem,
    after: None,
    y: jax.Array,
    order: jax.Array,
    by_expert: jax.Array,
    sizes: jax.Array,
    topk_weights: jax.Array,
) -> jax.Array:
    """Combine: undo both orders, weight the rows and sum them."""
    me, sizes = lax.axis_index(AXIS), sizes[0]
    returned = lax.ragged_all_to_all(
        y[jnp.argsort(by_expert)],
        jnp.zeros((problem.tokens * problem.topk, problem.hidden), y.dtype),
        input_offsets=_before(sizes[:, me]),
        send_sizes=sizes[:, me],
        output_offsets=_before(sizes, axis=1)[:, me],
        recv_sizes=sizes[me],
        axis_name=AXIS,
    )
    rows = returned[jnp.argsort(order)].reshape(problem.tokens, problem.topk, problem.hidden)
    return jnp.sum(rows.astype(jnp.float32) * topk_weights[:, :, None], axis=1).astype(y.dtype)


def measure(stopwatch: Stopwatch, inputs: Inputs, trials: int) -> list[Result]:
    """Measure both on the host; after a failure, results have its reason in place of times."""
    problem, failure = inputs.problem, ""
    there = Case(partial(send, problem), (inputs.x, inputs.topk_idx))
    try:
        rows, *way_back = stopwatch.program(there)()
        back = Case(partial(bring_back, problem), (rows, *way_back, inputs.topk_weights))
        returned = stopwatch.program(back)()
        # The weights of a token have the sum 1.
        for shard, wanted in zip(returned.addressable_shards, inputs.x.addressable_shards, strict=True):
            error = np.abs(np.asarray(shard.data, np.float32) - np.asarray(wanted.data, np.float32))
            if not error.max() < 2**-4:
                failure = f"it returns other rows than were sent: a difference of {error.max():g}"
    except jax.errors.JaxRuntimeError as error:  # NCCL, for example, rejects ranks on one GPU
        failure = str(error).strip().splitlines()[0]
    failures = [facts["failure"] for facts in exchange_with_all("failure", {"failure": failure}).values()]
    if text := next(filter(None, failures), ""):
        return [Result(problem, PART, op, failure=text) for op in ("dispatch", "combine")]
    seconds = interleaved({"dispatch": stopwatch.host(there), "combine": stopwatch.host(back)}, trials)
    return [
        Result(problem, PART, op, {"host": Spread.of(of_op)}, bytes_moved=inputs.bytes_moved)
        for op, of_op in seconds.items()
    ]
