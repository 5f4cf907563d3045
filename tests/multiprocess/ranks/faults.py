"""Faults, one after the other: what the victim does, and what the others find.

Arguments: one "FAULT:VICTIM", or "FAULT:VICTIM:SEED", for each. Every process has one device and is a rank of
the only group, as long as it lives: after a fault that ends its victim, the others continue without it.
"""

import os
import random
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from fault_settings import is_over_network
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from live_group import (
    LIVE,
    Step,
    barrier,
    fault,
    first_step,
    is_aborted,
    is_same,
    report,
    report_aborted,
)
from rank_side import ARGUMENTS, BARRIER_S, RANK, error_of, join, leave_without_the_dead

import jax_deepep as ep
from jax_deepep.communicator import native_module


def dies_before_the_op() -> None:
    step, _ = first_step()
    if fault.is_here:
        os.kill(os.getpid(), signal.SIGKILL)
    report_aborted(step, step.run())


def raises_before_the_op() -> None:
    step, _ = first_step()
    if fault.is_here:
        raise ValueError("the data loader of this rank failed")
    report_aborted(step, step.run())


def raises_during_an_op() -> None:
    """The last rank does not arrive, so that the op of the victim would keep waiting."""
    step = Step.of(8, 16, timeout_s=300.0)
    barrier("programs are compiled")
    if fault.is_here:
        threading.Thread(target=step.run, daemon=True).start()
        while step.comm._native.num_running_ops == 0:
            time.sleep(0.01)
        raise ValueError("this rank failed")
    if LIVE[-1] == RANK:
        while error_of(step.comm.check) == "no error":
            time.sleep(0.01)
    aborted = is_aborted(step.run())
    report("left", aborted=aborted, error=error_of(step.comm.check))


def cannot_launch() -> None:
    """What peers read is a constant of the victim's program, which a captured op cannot copy."""
    step, _ = first_step()
    constant = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)  # not a number that XLA spreads itself

    def program(x, topk_idx, topk_weights):
        x = jnp.asarray(constant) if fault.is_here else x
        return ep.dispatch(x, topk_idx, topk_weights, comm=step.comm)[0].tokens

    mapped = jax.shard_map(
        program, mesh=step.comm.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    compiled = jax.jit(mapped).lower(*step.operands).compile()
    barrier("the victim's program is compiled")

    def run() -> None:
        for _ in range(3):  # the first run of a program captures nothing
            jax.block_until_ready(compiled(*step.operands))

    launch_error = error_of(run)
    error = error_of(step.comm.check)
    report("notified", launch_error=launch_error, error=error, aborted=is_aborted(step.run()))
    barrier("the end")


def dies_after_the_op() -> None:
    step, first = first_step()
    results = step.run()
    if fault.is_here:
        os.kill(os.getpid(), signal.SIGKILL)
    step.comm.check()
    step.comm.close()
    report("unharmed", same=is_same(results, first))


def dies_in_a_loop() -> None:
    """The victim dies in the fifth iteration of one program: the others have run the same op before."""
    step, _ = first_step()

    def die(number, rank):
        if (number, rank) == (4, LIVE.index(fault.victim)):
            os.kill(os.getpid(), signal.SIGKILL)
        return np.float32(0)

    def program(x, topk_idx, topk_weights):
        def iterate(x, number):
            here = jax.lax.axis_index("expert")
            nothing = jax.pure_callback(die, jax.ShapeDtypeStruct((), jnp.float32), number, here)
            dispatched, handle = ep.dispatch(x + nothing, topk_idx, topk_weights, comm=step.comm)
            return ep.combine(dispatched.tokens, handle, comm=step.comm), None

        return jax.lax.scan(iterate, x, jnp.arange(10))[0]

    mapped = jax.shard_map(
        program, mesh=step.comm.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    jax.block_until_ready(jax.jit(mapped)(*step.operands))
    report_aborted(step, step.run())


def compiles_beside() -> None:
    """While the victim compiles a program, another thread of it compiles others."""
    done = threading.Event()

    def compile_others() -> None:
        for size in range(1, 10_000):
            jax.jit(lambda x: x + 1).lower(jnp.zeros(size)).compile()
            if done.is_set():
                return

    thread = threading.Thread(target=compile_others)
    if fault.is_here:
        thread.start()
    try:
        step = Step.of(8, 16)
    finally:
        done.set()
    barrier("programs are compiled")
    results = step.run()
    step.comm.check()
    report("unharmed", aborted=is_aborted(results))
    if fault.is_here:
        thread.join()
    barrier("the end")


def calls_share_a_number() -> None:
    """Calls of one program, none of which waits for another, are treated as one."""
    comm = Step.of(8, 16).comm
    x = jax.make_array_from_callback(
        (8 * len(LIVE), 16), NamedSharding(comm.mesh, P("expert")), lambda _: np.ones((8, 16), np.float32)
    )

    def compiled_with_restarts_of_the_count(number: int) -> jax.stages.Compiled:
        def program(x):
            rank = jax.lax.axis_index("expert")
            experts = [2 * rank + jnp.full(8, local, jnp.int32) for local in (0, 1)]
            topk_idx = jnp.stack(experts, axis=1)
            weights = 0.5 + 0 * topk_idx.astype(jnp.float32)
            scales = range(number, number + 20)
            return sum(ep.dispatch(x * s, topk_idx, weights, comm=comm)[0].tokens for s in scales)

        done = threading.Event()
        begin_program = native_module.load("cpu").begin_program

        def restart_the_count() -> None:
            while not done.is_set():
                begin_program(True)
                time.sleep(0)

        mapped = jax.shard_map(program, mesh=comm.mesh, in_specs=P("expert"), out_specs=P("expert"))
        thread = threading.Thread(target=restart_the_count)
        thread.start()
        try:
            return jax.jit(mapped).lower(x).compile()
        finally:
            done.set()
            thread.join()

    error, number = "no error", 0
    while error == "no error":  # on a busy machine, no restart may fall between two calls
        compiled = compiled_with_restarts_of_the_count(number)
        barrier(f"program {number} is compiled")
        sent = np.asarray(compiled(x).addressable_data(0))
        error, number = error_of(comm.check), number + 1
    report("notified", error=error, aborted=bool(np.isnan(sent).all()))
    comm.close()
    barrier("the end")


def _run_until_aborted(step: Step, first: dict[str, np.ndarray], sent: int) -> dict[str, np.ndarray]:
    """Send the victim a signal at some moment; return the first results that are not right."""
    for number in range(100_000):
        results = step.run()
        if not all(np.array_equal(results[name], first[name]) for name in ("out", "gradient of x")):
            report("steps before", steps=number)
            return results
        if fault.is_here and number == 0:  # all others are in the loop as well
            _signal_after_a_moment(sent)
    raise AssertionError("the victim never went away")


def _signal_after_a_moment(number: int) -> None:
    delay_s = random.Random(fault.seed).uniform(0, 0.5)

    def send() -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def dies_during_ops() -> None:
    step, first = first_step(num_tokens=256, hidden_size=1024)
    results = _run_until_aborted(step, first, signal.SIGKILL)
    _report_partly_aborted(step, results)


def _report_partly_aborted(step: Step, results: dict[str, np.ndarray]) -> None:
    """The broken step may have completed its first ops: the following ones are NaN nevertheless."""
    error = error_of(step.comm.check)
    last = is_aborted({name: results[name] for name in ("gradient of x", "gradient of topk_weights")})
    report("broke in a step", error=error, gradients=last)
    report_aborted(step, step.run())


def stalls_before_the_op() -> None:
    step, first = first_step()
    other = Step.of(8, 16)
    barrier("other program is compiled")
    other_first = other.run()
    barrier("other first step")
    continued = threading.Event()
    signal.signal(signal.SIGCONT, lambda *_: continued.set())
    report("ready")
    if fault.is_here:  # the test stops this process now, and continues it later
        deadline = time.monotonic() + BARRIER_S
        while not continued.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)  # not in `wait`, which a signal handled by another thread does not interrupt
    results = step.run()
    if fault.is_here and is_over_network(os.environ):
        # A thread of its own receives only now, and in order: what peers sent, then that they have given up.
        _report_partly_aborted(step, results)
    else:
        report_aborted(step, results)
    _go_on_with_others(step, first, other, other_first)


def stalls_during_ops() -> None:
    step, first = first_step(num_tokens=256, hidden_size=1024)
    other = Step.of(8, 16)
    barrier("other program is compiled")
    other_first = other.run()
    barrier("other first step")
    results = _run_until_aborted(step, first, signal.SIGSTOP)
    _report_partly_aborted(step, results)
    _go_on_with_others(step, first, other, other_first)


def _go_on_with_others(
    step: Step, first: dict[str, np.ndarray], other: Step, other_first: dict[str, np.ndarray]
) -> None:
    """The late rank is back: nothing else is affected, and a new communicator works."""
    before = {name: array.copy() for name, array in first.items()}
    barrier("all are back")
    num_tokens, hidden_size = step.operands[0].shape
    new = Step.of(num_tokens // len(LIVE), hidden_size)
    barrier("new program is compiled")
    other_again, new_results = other.run(), new.run()
    other.comm.check()
    new.comm.check()
    report(
        "unharmed",
        other=is_same(other_again, other_first),
        new=is_same(new_results, before),
        earlier=is_same(first, before),
        still_broken=error_of(step.comm.check),
    )
    barrier("done")


def process_0_dies() -> None:
    step, _ = first_step()
    if fault.is_here:
        os.kill(os.getpid(), signal.SIGKILL)
    step.run()
    step.comm.check()
    os._exit(0)  # not reached: JAX ends the others


join()
for fault.label in ARGUMENTS:
    name, victim, *seed = fault.label.split(":")
    fault.victim, fault.seed = int(victim), "".join(seed)
    globals()[name]()
    if name.startswith(("dies", "raises")):
        LIVE.remove(fault.victim)
if any(label.startswith("dies") for label in ARGUMENTS):
    leave_without_the_dead()
