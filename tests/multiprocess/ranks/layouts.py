"""The same programs, whichever processes hold the eight devices: reports a digest of every result.

Process 0 does more than the others: it compiles programs that they do not have, prints one, runs
further programs, and makes a further communicator.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from meshes import device_axis, expert_axes, mesh_named, per_device, put_on_mesh
from problems import Problem, inputs_of
from rank_side import RANK, barrier, join, report

import jax_deepep as ep

TIMEOUT_S = 60.0
NUM_RUNS = 3  # of every program, one launched behind the other

PROBLEM = Problem(
    "layouts", "expert", num_tokens=24, max_tokens=32, hidden_size=40, num_experts=16, num_topk=4,
    routing="some_none",
)  # fmt: skip
TOKEN_MAJOR = replace(PROBLEM, layout="token")


def forward_and_backward(comm: ep.Communicator, problem: Problem, inputs) -> dict[str, jax.Array]:
    """Use every op and every gradient once, with values of one device."""
    x, x2, topk_idx, topk_weights, y, bias = inputs

    def layer(x, topk_weights, bias):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
        again, _ = ep.dispatch(x2, handle=handle, comm=comm)
        rows = dispatched.tokens * again.tokens
        if problem.layout == "token":
            rows = rows * jnp.sum(dispatched.topk_weights, axis=1, keepdims=True).astype(rows.dtype)
        out = ep.combine(jnp.where(dispatched.mask[:, None], rows, 0), handle, comm=comm, bias=bias)
        given = ep.combine(y, handle, comm=comm, weighted=False)
        # Rows after the last group are not written.
        dispatched = replace(dispatched, tokens=jnp.where(dispatched.mask[:, None], dispatched.tokens, 0))
        results = {"dispatched": dispatched, "source": handle.source, "received": handle.num_received,
                   "dropped": handle.num_dropped, "out": out, "given": given}  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2), results

    gradients, results = jax.grad(layer, argnums=(0, 1, 2), has_aux=True)(x, topk_weights, bias)
    return {**results, "gradients": gradients}


def independent_ops(comm: ep.Communicator, problem: Problem, inputs) -> dict[str, jax.Array]:
    """Run ops that wait for nothing but their peers: every device may reach them in another order."""
    x, x2, topk_idx, topk_weights, _, bias = inputs
    results = {}
    for number in range(6):
        layout = ("expert", "token")[number % 2]
        idx = jnp.roll(topk_idx, number // 2, axis=0)
        operand = jnp.tanh((x, x2)[number // 3] @ jnp.full((x.shape[1], x.shape[1]), 0.1 * number, x.dtype))
        dispatched, handle = ep.dispatch(operand, idx, topk_weights, comm=comm, layout=layout)
        results[f"out {number}"] = ep.combine(dispatched.tokens, handle, comm=comm, bias=bias)
    return results


def inner_function_twice(comm: ep.Communicator, problem: Problem, inputs) -> dict[str, jax.Array]:
    """Call one jitted function from two places, which depend on each other, and from a third."""
    x, x2, topk_idx, topk_weights, _, bias = inputs

    @jax.jit
    def layer(x, bias):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return ep.combine(dispatched.tokens, handle, comm=comm, bias=bias)

    return {"chained": layer(layer(x, bias), x2), "apart": layer(x2, bias)}


CASES: dict[str, tuple[Problem, Callable]] = {
    "expert-major": (PROBLEM, forward_and_backward),
    "token-major, bfloat16": (replace(TOKEN_MAJOR, dtype="bfloat16", hidden_size=37), forward_and_backward),
    "drops, alignment, bfloat16": (
        replace(PROBLEM, dtype="bfloat16", capacity=48, expert_capacity=30, alignment=8, routing="skewed"),
        forward_and_backward,
    ),
    "token-major, drops": (replace(TOKEN_MAJOR, capacity=64, routing="skewed"), forward_and_backward),
    "groups of neighbours": (replace(PROBLEM, mesh_name="data × expert"), forward_and_backward),
    "groups far apart": (replace(PROBLEM, mesh_name="expert × data"), forward_and_backward),
    "pairs": (replace(PROBLEM, mesh_name="data × expert 2"), forward_and_backward),
    "two axes": (replace(TOKEN_MAJOR, mesh_name="node × expert"), forward_and_backward),
    "two nodes": (replace(PROBLEM, dtype="bfloat16", num_nodes=2), forward_and_backward),
    "independent ops": (replace(PROBLEM, num_tokens=32), independent_ops),
    "one inner function": (PROBLEM, inner_function_twice),
}  # fmt: skip


def do_something_on_process_0(problem: Problem, operands: tuple[np.ndarray, ...]) -> None:
    """Make a communicator and run a program of which the other processes know nothing."""
    if RANK != 0:
        return
    comm = ep.Communicator(
        mesh_named("one device"), num_experts=problem.num_experts, num_experts_per_tok=problem.num_topk,
        max_tokens=problem.max_tokens, hidden_size=problem.hidden_size,
    )  # fmt: skip
    x, _, topk_idx, topk_weights, _, _ = (operand[0] for operand in operands)

    @jax.jit
    def program(x, topk_idx, topk_weights):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return ep.combine(dispatched.tokens, handle, comm=comm)

    jax.block_until_ready([program(x, topk_idx, topk_weights) for _ in range(2)])


def compile_more_on_process_0(comm: ep.Communicator, problem: Problem, operands) -> None:
    """Compile, on process 0 alone, a program of all processes that is never run."""
    if RANK != 0:
        return

    def program(x, topk_idx, topk_weights):
        for _ in range(2):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
            x = ep.combine(dispatched.tokens, handle, comm=comm)
        return x

    x, _, topk_idx, topk_weights, _, _ = operands
    mapped = per_device(program, problem.mesh, problem.axis_name)
    compiled = jax.jit(mapped).lower(x, topk_idx, topk_weights).compile()
    print(len(compiled.as_text()), "characters of a program of process 0")


def digests(results) -> dict[str, str]:
    """Return a digest of every device's results, by the device's number in the order (group, rank)."""
    hashes: dict[str, hashlib._Hash] = {}
    for path, array in jax.tree.leaves_with_path(results):
        for shard in array.addressable_shards:
            device = str(shard.index[0].start or 0)
            value = np.asarray(shard.data)
            digest = hashes.setdefault(device, hashlib.sha256())
            digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
            digest.update(value.tobytes())
    return {device: digest.hexdigest() for device, digest in hashes.items()}


def run(name: str) -> None:
    problem, program = CASES[name]
    inputs = inputs_of(problem)
    arrays = (inputs.x, inputs.x2, inputs.topk_idx, inputs.topk_weights, inputs.y, inputs.bias)
    comm = problem.communicator("native", timeout_s=TIMEOUT_S)
    operands = put_on_mesh(arrays, comm.mesh, device_axis(comm.mesh, expert_axes(problem.mesh_name)))
    do_something_on_process_0(problem, arrays)
    compile_more_on_process_0(comm, problem, operands)
    mapped = per_device(lambda *inputs: program(comm, problem, inputs), comm.mesh, comm.axis_name)
    compiled = jax.jit(mapped).lower(*operands).compile()
    all_results = [compiled(*operands) for _ in range(NUM_RUNS)]
    first, *others = [digests(results) for results in all_results]
    comm.check()
    report(
        name,
        digests=first,
        repeatable=all(other == first for other in others),
        between_processes="shared memory between" in comm.describe(),
    )
    comm.close()


join()
for case in CASES:
    run(case)
    barrier(f"after {case}")
