"""python -m jax_deepep.bench moe: MoE layers, and their grouped matmuls."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jax_deepep.bench.command_line import add_layer, add_trials, positive_int, start_layer
from jax_deepep.bench.kernel_trace import CPU_REASON, kernel_shares
from jax_deepep.bench.layers import (
    GATHERED,
    Program,
    decode_step,
    experts_programs,
    layer_programs,
    loop_programs,
)
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.processes import end_jax
from jax_deepep.bench.report import Report, Result, Spread, add_outputs
from jax_deepep.bench.trials import Timer, interleaved, queued, wall_clock
from jax_deepep.communicator import Implementation
from jax_deepep.moe.grouped_matmul import NAMES

DEFAULT = Problem(256, 256, topk=4, experts=32, dtype="float32", intermediate=512)
DENSE = "dense"
LAYERS = ("native", "xla", DENSE)
EXPERTS, LAYER, LOOP, DECODE = "experts of one device", "layer", "loop", "decode step"
DECODE_CASES: dict[str, tuple[Implementation, str]] = {  # with the mode
    "native": ("native", "auto"), "native, throughput": ("native", "throughput"), "xla": ("xla", "auto"),
}  # fmt: skip

MEANING = """\
A jitted program from its launch until its results are ready, of the slowest rank; median (p10–p90).
queued: per call, with several in flight, as in a training loop.
forward + backward: with the gradients of all parameters and of x.
loop: layers in a `lax.scan`, which saves what gradients need.
decode step: layers one after the other, forward, as in a step of decoding T sequences per device.
temporary MiB: memory that XLA allocates on a device for forward + backward besides operands and results.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench moe",
        description="Time MoE layers, and the grouped matmuls that they may use, forward and backward.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_layer(parser, DEFAULT)
    matmuls = ("ragged_dot", GATHERED, "blocks", "triton", "mosaic")
    parser.add_argument(
        "--matmuls", nargs="*", choices=matmuls, help="grouped matmuls of the experts (those of the platform)"
    )
    parser.add_argument(
        "--layer-matmul", choices=NAMES, default="auto", help="grouped matmul of the layers (%(default)s)"
    )
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=LAYERS,
                        help="native, xla, dense: all tokens through all experts (all three)")  # fmt: skip
    parser.add_argument(
        "--chunks", nargs="+", type=positive_int, default=[1], help="num_chunks of native (1)"
    )
    parser.add_argument(
        "--loop-layers", type=positive_int, metavar="N",
        help="also N layers in a loop, by native and by xla, where --layers has them",
    )  # fmt: skip
    parser.add_argument(
        "--decode-layers", type=positive_int, metavar="N",
        help="also a decode step of N layers, by native in both modes and by xla, where --layers has them",
    )  # fmt: skip
    parser.add_argument("--queued", type=positive_int, default=6, help="calls in flight (%(default)s)")
    add_trials(parser, 10)
    add_outputs(parser)
    return parser.parse_args(arguments)


def measure(
    problem: Problem, part: str, case: str, programs: dict[str, Program], *, trials: int, calls: int
) -> Result:
    """Compile and time the programs of one case, with the same number of runs in every process."""
    timers: dict[str, Timer] = {}
    values: dict[str, Any] = {}
    on_gpus = jax.devices()[0].platform == "gpu"
    for name, (function, operands) in programs.items():
        try:
            compiled = jax.jit(function).lower(*operands).compile()
            run = partial(compiled, *operands)
            jax.block_until_ready(run())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return Result(problem, part, case, failure=str(error).partition(";")[0].splitlines()[0][:120])
        timers[name] = partial(wall_clock, run)
        timers[f"{name}, queued"] = queued(run, calls)
        memory = compiled.memory_analysis()
        values["temporary MiB"] = float(getattr(memory, "temp_size_in_bytes", 0)) / 2**20
        # The shares in one process, though all of them run the program.
        shares = kernel_shares(run) if on_gpus else {"not measured": CPU_REASON}
        values.setdefault("kernel shares", {})[name] = shares
    seconds = {name: Spread.of(times) for name, times in interleaved(timers, trials).items()}
    return Result(problem, part, case, seconds, values=values)


def results_of(options: argparse.Namespace, problem: Problem, mesh: Mesh) -> Iterator[Result]:
    """Measure one case after the other, so that only one is in memory."""
    timed = partial(measure, problem, trials=options.trials, calls=options.queued)
    matmuls = options.matmuls
    if matmuls is None:
        on_cpu = jax.devices()[0].platform == "cpu"
        matmuls = ["ragged_dot", GATHERED, "blocks"] if on_cpu else ["ragged_dot", "triton", "mosaic"]
    for name in matmuls:
        yield timed(EXPERTS, name, experts_programs(problem, name))
    for name in options.layers:
        if name == DENSE:
            yield timed(LAYER, name, layer_programs(problem, mesh, None))
            continue
        for chunks in options.chunks if name == "native" else [1]:
            with problem.communicator(mesh, name, max_tokens=-(-problem.tokens // chunks)) as comm:
                programs = layer_programs(problem, mesh, comm, chunks, options.layer_matmul)
                yield timed(LAYER, name if chunks == 1 else f"{name}, {chunks} chunks", programs)
        if options.loop_layers:
            with problem.communicator(mesh, name) as comm:
                programs = loop_programs(problem, mesh, comm, options.loop_layers, options.layer_matmul)
                yield timed(f"{LOOP}, {options.loop_layers} layers", name, programs)
    for case, (implementation, mode) in DECODE_CASES.items() if options.decode_layers else ():
        if implementation not in options.layers:
            continue
        with problem.communicator(mesh, implementation, mode=mode) as comm:
            programs = decode_step(problem, mesh, comm, options.decode_layers, options.layer_matmul)
            yield timed(f"{DECODE}, {options.decode_layers} layers", case, programs)


def show_shares(results: Sequence[Result]) -> None:
    """Print the kernels of each program, or why there are none."""
    if jax.devices()[0].platform == "cpu":
        print(CPU_REASON)
        return
    for result in results:
        for name, shares in result.values.get("kernel shares", {}).items():
            text = ", ".join(f"{kernel} {share:.1%}" for kernel, share in shares.items())
            print(f"{result.part}, {result.case}, {name}: {text}")


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    started = start_layer(options)
    if started is None:
        return 2
    problem, mesh = started
    report = Report(options, MEANING)
    report.add(results_of(options, problem, mesh))
    if jax.process_index() == 0:
        show_shares(report.results)
    report.draw()
    end_jax()
    return 0
