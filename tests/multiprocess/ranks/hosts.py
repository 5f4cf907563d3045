"""Which meshes are native over four processes that pretend to be on two hosts, the first two on one.

On CPU, where each process has two devices, also the rows between the hosts, hosts with different numbers of
ranks, hosts that cannot connect, and a mesh on one host whose groups share some processes.
"""

import glob
import os
from dataclasses import replace

import jax
import numpy as np
import oracle
from meshes import device_axis, per_device, put_on_mesh, run_per_device
from problems import Problem, inputs_of
from rank_side import NUM_PROCESSES, RANK, barrier, error_of, join, report

import jax_deepep as ep
from jax_deepep import jax_compat
from jax_deepep.communicator.node_sockets import NodeSockets

HOST = 2 * RANK // NUM_PROCESSES
os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {HOST}"
# Where there are two GPUs, each host has its own; where there is one, both have it, at the same PCI address.
os.environ["CUDA_VISIBLE_DEVICES"] = str(HOST % max(1, len(glob.glob("/dev/nvidia[0-9]*"))))

MESHES = ("data × expert", "expert × data", "expert")


def is_right(comm: ep.Communicator, problem: Problem) -> bool:
    """Return whether dispatch and combine have the oracle's bits, in every group."""
    inputs = inputs_of(replace(problem, num_nodes=comm.topology.num_nodes))

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


def is_right_by_nvshmem(problem: Problem) -> None:
    """Between hosts of GPUs, if it is installed; else the native communicator raises."""
    comm = problem.communicator("native", timeout_s=60.0)
    assert "puts by NVSHMEM" in comm.describe()
    assert is_right(comm, problem)


def report_rows(comm: ep.Communicator, problem: Problem) -> None:
    """Report the rows that each op sends between ranks, and how many tokens have experts on each node."""
    inputs = inputs_of(replace(problem, num_nodes=comm.topology.num_nodes))
    [routes] = inputs.routes
    node = np.where(routes.row_of >= 0, inputs.topk_idx // routes.num_local // routes.ranks_per_node, -1)
    on_nodes = [(node == n).any(axis=-1).sum(axis=1).tolist() for n in range(comm.topology.num_nodes)]

    def dispatch(x, topk_idx, topk_weights):
        return ep.dispatch(x, topk_idx, topk_weights, comm=comm)[1]

    def again(x, handle):
        return ep.dispatch(x, handle=handle)[0].tokens

    axis = device_axis(comm.mesh, comm.axis_name)
    x, topk_idx, topk_weights, y = put_on_mesh(
        (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.y), comm.mesh, axis
    )
    handle = None
    for name, function, arguments in [
        ("dispatch", dispatch, (x, topk_idx, topk_weights)),
        ("cached dispatch", again, (x,)),
        ("combine", lambda y, handle: ep.combine(y, handle), (y,)),
    ]:
        comm.stats()
        barrier(f"counters are zero before {name}")
        operands = arguments if handle is None else (*arguments, handle)
        result = jax.block_until_ready(jax.jit(per_device(function, comm.mesh, comm.axis_name))(*operands))
        handle = result if handle is None else handle
        barrier(f"rows of {name} have arrived")
        stats = comm.stats()
        report(
            f"rows of {name}",
            sent=stats.rows_sent[0].tolist(),
            received=stats.rows_received[0].tolist(),
            between_nodes=np.transpose(on_nodes).tolist(),
        )
        barrier(f"rows of {name} are counted")


join()
for mesh_name in MESHES:
    problem = Problem(f"hosts, {mesh_name}", mesh_name, routing="some_none")
    comm = problem.communicator("auto", timeout_s=60.0)
    native = comm.implementation == "native"
    report(
        mesh_name,
        implementation=comm.implementation,
        description=comm.describe(),
        ranks_per_node=comm.ranks_per_node,
        right=is_right(comm, problem) if native else None,
        error="" if native else error_of(lambda problem=problem: is_right_by_nvshmem(problem)),
    )
    if mesh_name == "expert" and native:
        report_rows(comm, problem)
    barrier(f"after {mesh_name}")
if jax.local_device_count() == 2:
    os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {min(RANK, 1)}"
    problem = Problem("uneven hosts", "expert")
    comm = problem.communicator("auto", timeout_s=60.0)
    report("uneven hosts", implementation=comm.implementation, description=comm.describe())
    os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {HOST}"
    offer = NodeSockets.offer.fget
    if HOST == 0:  # at a port where nobody listens
        NodeSockets.offer = property(lambda sockets: {**offer(sockets), "port": 9})
    problem = Problem("no connection", "expert")
    comm = problem.communicator("auto", timeout_s=12.0)
    report("no connection", implementation=comm.implementation, description=comm.describe())
    del os.environ["JAX_DEEPEP_HOST_ID"]
    # Processes 1 and 2 have devices in both groups, and lay out their memory for both: process 0, which has
    # none in the second group, must know of it to find the first group's part.
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
