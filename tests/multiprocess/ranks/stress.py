"""Many steps with random routing and random stalls, every row of which is checked.

Arguments: the number of steps, and the ranks of a node. Rows hold whole numbers that encode device, token
and step, and weights are powers of two, so that every result is exact and a row of another token or step is
detected.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from leftovers import shared_segments
from meshes import device_axis, per_device, put_on_mesh
from rank_side import ARGUMENTS, RANK, barrier, join, report

import jax_deepep as ep

NUM_STEPS, RANKS_PER_NODE = map(int, ARGUMENTS)
NUM_WARM_UP = 64  # steps before memory and descriptors are counted for the first time
IN_FLIGHT = 8  # steps launched before the oldest is checked

NUM_TOKENS, HIDDEN_SIZE, NUM_TOPK, EXPERTS_PER_DEVICE = 32, 64, 3, 4
TIMEOUT_S = 60.0
LAYOUTS = ("expert", "token")


@dataclass(frozen=True)
class Inputs:
    """NumPy arrays [devices, ...] of one step, the same in every process."""

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    naps_ms: np.ndarray

    @classmethod
    def of(cls, step: int, num_devices: int) -> "Inputs":
        rng = np.random.default_rng(step)
        tokens = (num_devices, NUM_TOKENS)
        num_experts = num_devices * EXPERTS_PER_DEVICE
        topk_idx = rng.permuted(np.broadcast_to(np.arange(num_experts), (*tokens, num_experts)), axis=-1)
        topk_idx = np.where(rng.random((*tokens, NUM_TOPK)) < rng.random(), topk_idx[..., :NUM_TOPK], -1)
        weights = 2.0 ** rng.integers(-2, 1, size=(*tokens, NUM_TOPK))
        naps_ms = np.where(rng.random(num_devices) < 0.02, rng.uniform(1, 6, num_devices), 0)
        return cls(
            rows_of(np.arange(num_devices)[:, None], np.arange(NUM_TOKENS)[None, :], step),
            topk_idx.astype(np.int32),
            weights.astype(np.float32),
            naps_ms.astype(np.float32),
        )


def rows_of(device: np.ndarray, token: np.ndarray, step: int) -> np.ndarray:
    """Return the row of every (device, token) at a step: [..., H] float32, whole numbers below 4096."""
    facts = np.stack(np.broadcast_arrays(device, token, step % 4096, step // 4096), axis=-1)
    columns = np.arange(HIDDEN_SIZE - facts.shape[-1])
    mixture = (facts @ np.array([1009, 31, 7, 3]))[..., None] * (columns + 1)
    return np.concatenate([facts, mixture % 4093], axis=-1).astype(np.float32)


def nap(milliseconds: np.ndarray) -> np.ndarray:
    time.sleep(float(milliseconds.sum()) / 1000)
    return np.zeros_like(milliseconds)


def program_of(comm: ep.Communicator, layout: str):
    """Return the compiled step; the expert of every row multiplies it by its local number + 1."""

    def step(x, topk_idx, topk_weights, nap_ms):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, layout=layout)
        zero = jax.pure_callback(nap, jax.typeof(nap_ms), nap_ms)  # one device lets the others wait
        negative, _ = ep.dispatch(-x + zero, handle=handle, comm=comm)
        if layout == "expert":
            ends = jnp.cumsum(dispatched.group_sizes)
            scale = 1.0 + jnp.sum(jnp.arange(dispatched.mask.size)[:, None] >= ends, axis=1)
        else:
            # Weights are 0 where there is no expert.
            scale = jnp.sum((dispatched.topk_idx + 1) * dispatched.topk_weights, axis=1)
        out = ep.combine(dispatched.tokens * scale[:, None], handle, comm=comm)
        return dispatched.tokens, negative.tokens, handle.source, out

    return jax.jit(per_device(step, comm.mesh, comm.axis_name))


def check(step: int, inputs: Inputs, results, comm: ep.Communicator, layout: str) -> None:
    """Compare the results of this process's devices with what the inputs demand."""
    expert_of = inputs.topk_idx.astype(np.int64)
    device_of = np.where(expert_of >= 0, expert_of // EXPERTS_PER_DEVICE, -1)
    for tokens, negative, source, out in zip(*map(by_device, results), strict=True):
        (device, tokens), negative, source, out = tokens, negative[1], source[1], out[1]
        if layout == "expert":
            experts = device * EXPERTS_PER_DEVICE + np.arange(EXPERTS_PER_DEVICE)
            arrivals = [np.argwhere((expert_of == expert).any(axis=-1)) for expert in experts]
            arrivals = np.concatenate(arrivals)
        else:
            arrivals = np.argwhere((device_of == device).any(axis=-1))
        where = f"step {step}, {layout}, device {device}"
        expected_source = np.full(source.shape, -1)
        expected_source[: len(arrivals)] = arrivals @ [comm.max_tokens, 1]
        np.testing.assert_array_equal(source, expected_source, err_msg=where)
        expected = rows_of(arrivals[:, 0], arrivals[:, 1], step)
        np.testing.assert_array_equal(tokens[: len(arrivals)], expected, err_msg=where)
        np.testing.assert_array_equal(negative[: len(arrivals)], -expected, err_msg=where)
        local = expert_of[device] % EXPERTS_PER_DEVICE + 1
        factor = np.where(expert_of[device] >= 0, local * inputs.topk_weights[device], 0).sum(axis=-1)
        np.testing.assert_array_equal(out, factor[:, None] * inputs.x[device], err_msg=where)


def by_device(array: jax.Array) -> list[tuple[int, np.ndarray]]:
    """Return (device, value) of this process's devices."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [(shard.index[0].start or 0, np.asarray(shard.data)[0]) for shard in shards]


def figures() -> dict[str, float]:
    """Return what must not grow."""
    process = Path("/proc/self")
    resident_pages = int((process / "statm").read_text().split()[1])
    return {
        "resident_mib": round(resident_pages * os.sysconf("SC_PAGESIZE") / 2**20, 1),
        "descriptors": len(list((process / "fd").iterdir())),
        "segments_open": len(shared_segments()),
        "threads": len(list((process / "task").iterdir())),
    }


join()
mesh = jax.make_mesh((jax.device_count(),), ("expert",))
comm = ep.Communicator(
    mesh, num_experts=mesh.size * EXPERTS_PER_DEVICE, num_experts_per_tok=NUM_TOPK, max_tokens=NUM_TOKENS + 1,
    hidden_size=HIDDEN_SIZE, implementation="native", timeout_s=TIMEOUT_S, ranks_per_node=RANKS_PER_NODE,
)  # fmt: skip
programs = {layout: program_of(comm, layout) for layout in LAYOUTS}
spec = device_axis(mesh, "expert")
stalls = np.random.default_rng(os.getpid())
in_flight = []
before = {}
begin = time.monotonic()
for step in range(NUM_STEPS):
    if step == NUM_WARM_UP:
        comm.check()
        before = figures()
        begin = time.monotonic()
    if stalls.random() < 0.05:
        time.sleep(stalls.uniform(0, 0.005))
    layout = LAYOUTS[step % 2]
    inputs = Inputs.of(step, mesh.size)
    operands = put_on_mesh((inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.naps_ms), mesh, spec)
    in_flight.append((step, inputs, programs[layout](*operands), comm, layout))
    if len(in_flight) > IN_FLIGHT:
        check(*in_flight.pop(0))
while in_flight:
    check(*in_flight.pop(0))
comm.check()
seconds = time.monotonic() - begin
barrier("all steps are done")  # a row counts as sent when its receiver has it
stats = comm.stats()
own = [rank for rank, device in enumerate(mesh.devices.flat) if device.process_index == RANK]
report(
    "figures",
    before=before,
    after=figures(),
    milliseconds_per_step=round(1000 * seconds / max(1, NUM_STEPS - NUM_WARM_UP), 2),
    rows_received=int(stats.rows_received[0, own].sum()),
    rows_sent=int(stats.rows_sent[0, own].sum()),
    seconds_waited=round(float(stats.seconds_waited.max()), 2),
)
barrier("the end")
comm.close()
