"""The victim arrives at a MoE layer only after the others were notified that it is missing.

Every process has one device and is one rank of the only group, so that rank and process are the same.
"""

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fault_settings import TIMEOUT_S
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rank_side import ARGUMENTS, BARRIER_S, NUM_PROCESSES, RANK, barrier, error_of, join, report

import jax_deepep as ep
from jax_deepep.moe import build_config, init_parameters, moe

VICTIM = int(ARGUMENTS[0])
NUM_EXPERTS, NUM_TOPK, NUM_TOKENS, HIDDEN_SIZE = 2 * NUM_PROCESSES, 2, 8, 16


def compiled_layer() -> tuple[ep.Communicator, jax.stages.Compiled, tuple[Any, ...]]:
    """Make a communicator and compile a layer with its gradients; return both, and operands. Collective."""
    mesh = jax.make_mesh((NUM_PROCESSES,), ("expert",))
    comm = ep.Communicator(
        mesh, num_experts=NUM_EXPERTS, num_experts_per_tok=NUM_TOPK, max_tokens=NUM_TOKENS,
        hidden_size=HIDDEN_SIZE, implementation="native", timeout_s=TIMEOUT_S,
    )  # fmt: skip
    config = build_config(NUM_EXPERTS, NUM_TOPK, HIDDEN_SIZE, 8, comm=comm)

    def results(parameters, x):
        def loss(parameters, x):
            out, aux = moe(config, parameters, x)
            return jnp.sum(out * out) + aux.balance_loss, out

        (_, of_x), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
        return out, of_x

    parameters = init_parameters(config, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(NUM_TOKENS * NUM_PROCESSES, HIDDEN_SIZE)).astype(np.float32)
    x = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("expert")), lambda index: x[index])
    return comm, jax.jit(results).lower(parameters, x).compile(), (parameters, x)


def is_aborted(results: tuple[jax.Array, ...]) -> bool:
    """Return whether this rank's part of all results is NaN."""
    return all(np.isnan(np.asarray(array.addressable_data(0))).all() for array in results)


def main() -> None:
    """Run twice; the victim is late to the second run."""
    comm, program, operands = compiled_layer()
    barrier("programs are compiled")
    first = is_aborted(program(*operands))
    comm.check()
    report("first step", aborted=first)
    barrier("first step")

    def wait_for_the_error() -> None:
        begin = time.monotonic()
        while not (error := comm._broken_message()) and time.monotonic() - begin < BARRIER_S / 2:
            time.sleep(0.05)
        report("notified", error=error, seconds=time.monotonic() - begin)
        barrier("the others were notified")

    thread = threading.Thread(target=wait_for_the_error)
    if RANK == VICTIM:
        barrier("the others were notified")
    else:
        thread.start()
    aborted = is_aborted(program(*operands))  # when the victim has reached the collectives of XLA, too
    if RANK != VICTIM:
        thread.join()
    report("ended", aborted=aborted, error=error_of(comm.check))
    barrier("the end")


join()
main()
