"""Processes of one device each, half of them on each of two hosts, as they pretend: which mesh is native."""

import glob
import os

import jax
import numpy as np
import oracle
from meshes import run_per_device
from problems import Problem, inputs_of
from rank_side import NUM_PROCESSES, RANK, error_of, join, meet, report

import jax_deepep as ep
from jax_deepep import jax_compat

HOST = 2 * RANK // NUM_PROCESSES
os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {HOST}"
# Where there are two GPUs, each host has its own; where there is one, both have it, at the same PCI address.
os.environ["CUDA_VISIBLE_DEVICES"] = str(HOST % max(1, len(glob.glob("/dev/nvidia[0-9]*"))))

MESHES = ("data × expert 2", "expert × data", "expert")


def is_right(comm: ep.Communicator, problem: Problem) -> bool:
    """Return whether dispatch and combine have the oracle's bits, in every group."""
    inputs = inputs_of(problem)

    def program(x, topk_idx, topk_weights, y):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return dispatched.tokens, ep.combine(y, handle, comm=comm)

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.y)
    tokens, out = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    x, y = inputs.by_group(inputs.x), inputs.by_group(inputs.y)
    written = np.concatenate([routes.written for routes in inputs.routes])
    carried = inputs.from_oracle(lambda routes, group: oracle.carry(routes, x[group]))
    combined = inputs.from_oracle(lambda routes, group: oracle.combine(routes, y[group], weighted=True))
    return np.array_equal(tokens[written], carried[written]) and np.array_equal(out, combined)


join()
assert jax.local_device_count() == 1
for mesh_name in MESHES:
    problem = Problem(f"hosts, {mesh_name}", mesh_name, routing="some_none")
    comm = problem.communicator("auto", timeout_s=60.0)
    native = comm.implementation == "native"
    report(
        mesh_name,
        implementation=comm.implementation,
        description=comm.describe(),
        right=is_right(comm, problem) if native else None,
        error="" if native else error_of(lambda problem=problem: problem.communicator("native")),
    )
    meet(f"after {mesh_name}")
left = jax_compat.coordination_client().key_value_dir_get_bytes("jax_deepep")
report("keys", left=[key for key, _ in left])
meet("the end")
