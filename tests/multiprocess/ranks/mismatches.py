"""Processes that make their communicators with different arguments, and one that makes none.

Arguments: the rank that differs. Every process has one device and is one rank.
"""

import time

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from rank_side import ARGUMENTS, NUM_PROCESSES, RANK, barrier, error_of, join, report

import jax_deepep as ep
from jax_deepep.communicator import build_identity

DIFFERENT = int(ARGUMENTS[0]) == RANK
OTHERS = {
    "num_experts": 2 * NUM_PROCESSES,
    "num_experts_per_tok": 1,
    "max_tokens": 5,
    "hidden_size": 24,
    "timeout_s": 9.0,
    "implementation": "xla",
    "mode": "throughput",
    "ranks_per_node": NUM_PROCESSES,
}
# Invalid in one process, which must not raise before all are notified.
WRONG = {"max_tokens": 0, "num_experts": 2.5, "hidden_size": 2**31, "axis_name": "exprt", "ranks_per_node": 2}


def make(**different) -> ep.Communicator:
    arguments = {
        "num_experts": NUM_PROCESSES,
        "num_experts_per_tok": 2,
        "max_tokens": 4,
        "hidden_size": 16,
        "timeout_s": 4.0,
        "implementation": "native",
    }
    mesh = different.pop("mesh", None) or jax.make_mesh((NUM_PROCESSES,), ("expert",))
    return ep.Communicator(mesh, **arguments | different)


def norm_of_dispatched(comm: ep.Communicator) -> float:
    """Send every rank's row of ones to the two experts of a token."""

    def program(x):
        topk_idx = jnp.tile(jnp.array([[0, 1]], jnp.int32), (comm.max_tokens, 1))
        weights = jnp.full(topk_idx.shape, 0.5, jnp.float32)
        topk_idx = jax.lax.pcast(topk_idx, ("expert",), to="varying")
        weights = jax.lax.pcast(weights, ("expert",), to="varying")
        dispatched, handle = ep.dispatch(x, topk_idx, weights, comm=comm)
        return ep.combine(dispatched.tokens, handle, comm=comm)

    sharding = jax.NamedSharding(comm.mesh, P("expert"))
    x = jnp.ones((NUM_PROCESSES * comm.max_tokens, comm.hidden_size), device=sharding)
    out = jax.jit(jax.shard_map(program, mesh=comm.mesh, in_specs=P("expert"), out_specs=P("expert")))(x)
    return float(out.addressable_data(0).mean())


join()
for kind, arguments in (("", OTHERS), ("wrong ", WRONG)):
    for name, value in arguments.items():
        barrier(f"before {kind}{name}")
        report(f"{kind}{name}", error=error_of(lambda n=name, v=value: make(**({n: v} if DIFFERENT else {}))))

barrier("before another build")
for name in ("_python_sources", "_native_sources"):
    function = getattr(build_identity, name)
    if DIFFERENT:
        setattr(build_identity, name, lambda *_: "f00d")
    report(name, error=error_of(make))
    setattr(build_identity, name, function)

barrier("before all are wrong")
errors = [error_of(lambda n=name, v=value: make(**{n: v})) for name, value in WRONG.items()]
report("all wrong", errors=errors)

others = [device for device in jax.devices() if device.process_index != RANK]
mesh_of_others = jax.sharding.Mesh(others, "expert")
report("mesh of others", error=error_of(lambda: make(mesh=mesh_of_others, num_experts=len(others))))

barrier("before the equal ones")
comm = make(timeout_s=60.0)
report("equal arguments", mean=norm_of_dispatched(comm))

barrier("before the absence")
begin = time.monotonic()
if not DIFFERENT:
    report("absence", error=error_of(make), seconds=time.monotonic() - begin)
barrier("the end")
