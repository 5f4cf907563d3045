"""Programs that differ between processes, or seem to, one after the other, each on a separate communicator.

Arguments: the rank that differs, and the cases. Every process has one device and is one rank. No wait may
last: timeout_s is beyond what the test waits for.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from rank_side import ARGUMENTS, NUM_PROCESSES, RANK, barrier, error_of, join, report

import jax_deepep as ep
from jax_deepep.communicator import native_module

DIFFERENT = int(ARGUMENTS[0]) == RANK
CASES = ARGUMENTS[1].split(",")
MAX_TOKENS, HIDDEN = 16, 16


def make() -> ep.Communicator:
    mesh = jax.make_mesh((NUM_PROCESSES,), ("expert",))
    return ep.Communicator(
        mesh, num_experts=2 * NUM_PROCESSES, num_experts_per_tok=2, max_tokens=MAX_TOKENS, hidden_size=HIDDEN,
        implementation="native", timeout_s=300.0,
    )  # fmt: skip


def compiled(comm: ep.Communicator, body: Callable, num_tokens: int = 8) -> Callable[[], jax.Array]:
    """Return a compiled program without operands to give: `body` of [num_tokens, H] on every device."""
    sharding = jax.NamedSharding(comm.mesh, P("expert"))
    shape = (NUM_PROCESSES * num_tokens, HIDDEN)
    x = jax.make_array_from_callback(shape, sharding, lambda _: np.ones((num_tokens, HIDDEN), np.float32))
    mapped = jax.shard_map(body, mesh=comm.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    program = jax.jit(mapped).lower(x).compile()
    return lambda: program(x)


def layer(comm: ep.Communicator, x: jax.Array, **options) -> jax.Array:
    rank = jax.lax.axis_index("expert")
    first = (2 * rank + jnp.arange(x.shape[0])) % (2 * NUM_PROCESSES)
    topk_idx = jnp.stack([first, (first + 1) % (2 * NUM_PROCESSES)], axis=1)
    weights = jnp.full(topk_idx.shape, 0.5, jnp.float32)
    dispatched, handle = ep.dispatch(x, topk_idx, weights, comm=comm, **options)
    return ep.combine(dispatched.tokens, handle, comm=comm)


def two_layers(comm: ep.Communicator, x: jax.Array, *alignments: int) -> jax.Array:
    for alignment in alignments:
        x = layer(comm, x, alignment=alignment)
    return x


# What all run, and what the one that differs runs instead; and its tokens.
DIFFERENT_PROGRAMS: dict[str, tuple[Callable, Callable, int]] = {
    "num_tokens": (layer, layer, 16),
    "capacity": (layer, lambda comm, x: layer(comm, x, capacity=32), 8),
    "dtype": (layer, lambda comm, x: layer(comm, x.astype(jnp.bfloat16)).astype(x.dtype), 8),
    "alignment": (layer, lambda comm, x: layer(comm, x, alignment=4), 8),
    "layout": (layer, lambda comm, x: layer(comm, x, layout="token"), 8),
    "skipped layer": (lambda comm, x: two_layers(comm, x, 1, 1), lambda comm, x: two_layers(comm, x, 1), 8),
    "another order": (
        lambda comm, x: two_layers(comm, x, 1, 4), lambda comm, x: two_layers(comm, x, 4, 1), 8
    ),
    "around the ops": (layer, lambda comm, x: layer(comm, 3 * x), 8),
}  # fmt: skip


def different(name: str) -> None:
    """All run the usual program before, so that the rank that differs has compiled it, too."""
    usual, other, num_tokens = DIFFERENT_PROGRAMS[name]
    comm = make()
    usual_program = compiled(comm, lambda x: usual(comm, x))
    for _ in range(2):
        usual_program()
    program = compiled(comm, lambda x: other(comm, x), num_tokens) if DIFFERENT else usual_program
    out = program()
    error = error_of(comm.check)
    report(name, error=error, aborted=bool(np.isnan(out.addressable_data(0)).all()))
    comm.close()


def two_threads(name: str) -> None:
    """Right programs that look like different ones: every other rank arrives at the second one first."""
    comm = make()

    def program_of(scale: int, late: bool) -> Callable[[], jax.Array]:
        def come() -> np.float32:
            time.sleep(0.5 * late)  # long enough for the other program to reach its op
            return np.float32(0)

        def body(x: jax.Array) -> jax.Array:
            zero = jax.pure_callback(come, jax.ShapeDtypeStruct((), jnp.float32))
            return layer(comm, scale * x + zero)

        return compiled(comm, body)

    results = {}

    def run(scale: int, late: bool) -> None:
        program = program_of(scale, late)
        barrier(f"program {scale} is compiled")
        results[scale] = float(program().addressable_data(0).mean())

    thread = threading.Thread(target=run, args=(2, RANK % 2 == 0))
    thread.start()
    run(1, RANK % 2 == 1)
    thread.join()
    comm.check()
    comm.close()
    report(name, results=[results[1], results[2]])


def cleared_listeners(name: str) -> None:
    """The one that differs has compiled other programs while the listeners were not registered."""
    comm = make()
    compiled_without_a_word, done = threading.Event(), threading.Event()

    def compile_others() -> None:
        for alignment in (2, 4):
            compiled(comm, lambda x, alignment=alignment: layer(comm, x, alignment=alignment))
        jax.monitoring.clear_event_listeners()
        jax.jit(lambda x: 2 * x).lower(jnp.ones(3)).compile()  # it begins, and the event of its end is lost
        compiled_without_a_word.set()
        done.wait(60)  # stays alive, so that it might still be compiling

    thread = threading.Thread(target=compile_others)
    if DIFFERENT:
        thread.start()
        compiled_without_a_word.wait(60)
    means = [float(compiled(comm, lambda x: layer(comm, x))().addressable_data(0).mean())]
    if DIFFERENT:  # as a JAX would that clears this list, too
        jax.monitoring.unregister_scalar_listener(native_module._compilations._begin)
        compiled(comm, lambda x: layer(comm, 3 * x))
    program = compiled(comm, lambda x: layer(comm, 2 * x))
    done.set()
    means.append(float(program().addressable_data(0).mean()))
    comm.check()
    comm.close()
    report(name, means=means)
    if DIFFERENT:
        thread.join()


def close_before_the_others(name: str) -> None:
    """The one that differs closes its communicator, which still serves a compiled program; others run on."""
    comm = make()
    program = compiled(comm, lambda x: layer(comm, x))
    out = program()
    jax.block_until_ready(out)
    held = comm.buffer_bytes
    barrier("before the close")
    if DIFFERENT:
        comm.close()
        comm.close()
        report(name, held=held, holds=comm.buffer_bytes, error=error_of(program), text=comm.describe())
    else:
        later = program()
        error = error_of(comm.check)
        report(name, error=error, aborted=bool(np.isnan(later.addressable_data(0)).all()),
               rows=int(comm.stats().rows_sent.sum()))  # fmt: skip
        comm.close()
    assert comm.buffer_bytes == 0
    report("all closed", rows=int(comm.stats().rows_sent.sum()))
    barrier("all have closed")
    report("nothing is mapped", maps=Path("/proc/self/maps").read_text().count("memfd:jax_deepep"))
    del program


OTHER_CASES = {
    "two threads": two_threads,
    "cleared listeners": cleared_listeners,
    "close": close_before_the_others,
}

join()
for case in CASES:
    OTHER_CASES.get(case, different)(case)
    barrier(f"after {case}")
