"""Which meshes are native over four processes that pretend to be on two hosts, the first two on one.

On CPU, where each process has two devices, also a mesh on one host whose groups share some processes.
"""

import glob
import os

import jax
import numpy as np
import oracle
from meshes import run_per_device
from problems import Problem, inputs_of
from rank_side import NUM_PROCESSES, RANK, barrier, error_of, join, report

import jax_deepep as ep
from jax_deepep import jax_compat

HOST = 2 * RANK // NUM_PROCESSES
os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {HOST}"
# Where there are two GPUs, each host has its own; where there is one, both have it, at the same PCI address.
os.environ["CUDA_VISIBLE_DEVICES"] = str(HOST % max(1, len(glob.glob("/dev/nvidia[0-9]*"))))

MESHES = ("data × expert", "expert × data", "expert")


def is_right(comm: ep.Communicator, problem: Problem) -> bool:
    """Return whether dispatch and combine have the oracle's bits, in every group."""
    inputs = inputs_of(problem)

    def program(x, topk_idx, topk_weights, y):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return dispatched.tokens, ep.combine(y, handle, comm=comm)

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.y)
    tokens, out = run_per_device(program, comm.mesh, comm.axis_name, *arrays)
    x, y = inputs.by_group(inputs.x), inputs.by_group(inputs.y)
    written = np.concatenate([routes.written for routes in inputs.routes])
    copied = inputs.from_oracle(lambda routes, group: oracle.copy_rows(routes, x[group]))
    combined = inputs.from_oracle(lambda routes, group: oracle.combine(routes, y[group], weighted=True))
    return np.array_equal(tokens[written], copied[written]) and np.array_equal(out, combined)


join()
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
    barrier(f"after {mesh_name}")
if jax.local_device_count() == 2:
    # Processes 1 and 2 have devices in both groups, and lay out their memory for both: process 0, which has
    # none in the second group, must know of it to find the first group's part.
    del os.environ["JAX_DEEPEP_HOST_ID"]
    devices = np.array(jax.devices())[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("data", "expert"))
    problem = Problem("groups that share processes", "data × expert", routing="some_none")
    comm = ep.Communicator(
        mesh, num_experts=problem.num_experts, num_experts_per_tok=problem.num_topk,
        max_tokens=problem.max_tokens, hidden_size=problem.hidden_size, timeout_s=60.0,
    )  # fmt: skip
    report("groups that share processes", implementation=comm.implementation, right=is_right(comm, problem))
    barrier("after groups that share processes")
left = jax_compat.coordination_client().key_value_dir_get_bytes("jax_deepep")
report("keys", left=[key for key, _ in left])
barrier("the end")
