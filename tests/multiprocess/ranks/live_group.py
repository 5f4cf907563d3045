"""The processes that live, the fault that they go through, and the program that they run together."""

import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rank_side
from fault_settings import TIMEOUT_S
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rank_side import NUM_PROCESSES, RANK, error_of

import jax_deepep as ep

NUM_TOPK = 2
OPS_MODE = os.environ.get("OPS_MODE", "auto")  # low-latency mode, with few tokens
# Rows of float32 are too wide for a communicator with mode="low_latency".
ROW_TYPE = np.float16 if OPS_MODE == "low_latency" else np.float32
RANKS_PER_NODE = int(os.environ.get("RANKS_PER_NODE", "0")) or None

LIVE = list(range(NUM_PROCESSES))  # the processes of the group, in the order of their ranks


@dataclass
class Fault:
    """The present fault: its name for the test, the process that has it, and the seed of its moment."""

    label: str = ""
    victim: int = -1
    seed: str = ""

    @property
    def is_here(self) -> bool:
        return self.victim == RANK


fault = Fault()


def barrier(name: str) -> None:
    """Wait for the other processes that live; a name is used once in a fault."""
    rank_side.barrier(f"{fault.label}: {name}", LIVE)


def report(name: str, **findings: Any) -> None:
    """Tell the test what was found of the present fault."""
    rank_side.report(f"{fault.label}: {name}", **findings)


@dataclass(frozen=True)
class Step:
    """A compiled program of four ops, dispatch and combine and their gradients, and its operands."""

    comm: ep.Communicator
    program: jax.stages.Compiled
    operands: tuple[jax.Array, ...]

    @classmethod
    def of(cls, num_tokens: int, hidden_size: int, timeout_s: float = TIMEOUT_S) -> "Step":
        """Make a communicator and compile the program for it. Collective."""
        size = len(LIVE)
        devices = [device for device in jax.devices() if device.process_index in LIVE]
        mesh = jax.make_mesh((size,), ("expert",), devices=devices)
        comm = ep.Communicator(
            mesh, num_experts=2 * size, num_experts_per_tok=NUM_TOPK, max_tokens=num_tokens,
            hidden_size=hidden_size, implementation="native", timeout_s=timeout_s,
            ranks_per_node=RANKS_PER_NODE, mode=OPS_MODE,
        )  # fmt: skip

        def results(x, topk_idx, topk_weights):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
            out = ep.combine(3 * dispatched.tokens, handle, comm=comm)
            # Rows after the last group are not written, unless the op was aborted.
            written = dispatched.mask | (handle.num_received == 0)
            return out, {
                "tokens": jnp.where(written[:, None], dispatched.tokens, 0),
                "weights": dispatched.weights,
                "counts": jnp.concatenate([dispatched.group_sizes, dispatched.num_rows]),
                "totals": jnp.stack([handle.num_received, handle.num_dropped, handle.num_invalid])[None, :],
                "mask": dispatched.mask,
            }

        def with_gradients(x, topk_idx, topk_weights):
            def loss(x, topk_weights):
                out, rest = results(x, topk_idx, topk_weights)
                return jnp.sum(out * out), rest | {"out": out}

            gradients, rest = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, topk_weights)
            return rest | dict(zip(("gradient of x", "gradient of topk_weights"), gradients, strict=True))

        rng = np.random.default_rng(0)
        num_rows = size * num_tokens
        experts = np.tile(np.arange(2 * size, dtype=np.int32), (num_rows, 1))
        arrays = (
            rng.normal(size=(num_rows, hidden_size)).astype(ROW_TYPE),
            rng.permuted(experts, axis=1)[:, :NUM_TOPK],
            rng.uniform(0.5, 1.0, size=(num_rows, NUM_TOPK)).astype(np.float32),
        )
        sharding = NamedSharding(mesh, P("expert"))
        operands = tuple(jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]) for a in arrays)
        mapped = jax.shard_map(with_gradients, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        return cls(comm, jax.jit(mapped).lower(*operands).compile(), operands)

    def run(self) -> dict[str, np.ndarray]:
        """Run once; return this rank's part of the results."""
        results = self.program(*self.operands)
        return {name: np.asarray(array.addressable_data(0)) for name, array in results.items()}


def is_aborted(results: dict[str, np.ndarray]) -> bool:
    """Return whether all results are what an op leaves that met no peer: NaN, 0 and False."""
    floats = [array for array in results.values() if array.dtype.kind == "f"]
    others = [array for array in results.values() if array.dtype.kind != "f"]
    return all(np.isnan(array).all() for array in floats) and not any(array.any() for array in others)


def is_same(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(results[name], expected[name], equal_nan=True) for name in expected)


def report_aborted(step: Step, results: dict[str, np.ndarray]) -> None:
    """Report what the contract says about an op that a peer did not come to."""
    first, again = error_of(step.comm.check), error_of(step.comm.check)
    begin = time.monotonic()
    later = step.run()
    report(
        "aborted",
        results=is_aborted(results),
        error=first,
        sticky=first == again,
        later_results=is_aborted(later),
        later_seconds=time.monotonic() - begin,
        trace_error=error_of(lambda: _trace(step)),
        device_works=float(jnp.arange(4.0).sum()) == 6.0,
        state=step.comm.describe().splitlines()[-1],
    )


def _trace(step: Step) -> None:
    def dispatch(*operands):
        return ep.dispatch(*operands, comm=step.comm)[0].tokens

    mapped = jax.shard_map(dispatch, mesh=step.comm.mesh, in_specs=P("expert"), out_specs=P("expert"))
    jax.jit(mapped).lower(*step.operands)


def first_step(num_tokens: int = 8, hidden_size: int = 16) -> tuple[Step, dict[str, np.ndarray]]:
    """Run a first step that all ranks come to; three times, so that a CUDA graph of it is replayed after."""
    step = Step.of(num_tokens, hidden_size)
    barrier("programs are compiled")
    for _ in range(3):
        results = step.run()
    step.comm.check()
    report("first step", aborted=is_aborted(results))
    barrier("first step")
    return step, results
