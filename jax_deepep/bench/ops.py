"""python -m jax_deepep.bench [ops]: the ops, their gradients, and chains of them."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.baselines import links, ragged_all_to_all, rows
from jax_deepep.bench.baselines.memcpy import Memcpy
from jax_deepep.bench.command_line import add_sizes, add_trials, positive_int, positive_ints, positive_number
from jax_deepep.bench.environment import custom_calls_are_captured
from jax_deepep.bench.op_cases import PAIR, PASSES, OpCases, chain, check_agreement
from jax_deepep.bench.problem import AXIS, DTYPES, FITTING, Inputs, Problem, draw_inputs
from jax_deepep.bench.processes import TIMEOUT_S, end_jax, start_jax
from jax_deepep.bench.report import Report, Result, Spread, add_outputs
from jax_deepep.bench.trials import Case, Stopwatch, interleaved, slopes
from jax_deepep.communicator import Mode
from jax_deepep.launch import launched_rank
from jax_deepep.quantization.formats import Format, checked_format

SMALL_TOKENS = [1, 8, 32, 128]
CPU_PROBLEMS = (
    Problem(capacity="1.25x"),
    Problem(layout="token", tokens=256),
    Problem(tokens=64, hidden=1024),
    Problem(hidden=512, topk=2, experts=16, dtype="float32"),
)
GPU_SHAPE = {"tokens": [4096], "hidden": 7168, "topk": 8, "experts": 256, "capacity": FITTING}

MEANING = """\
native, xla: a program with the op alone, from its launch until its results are ready.
device: the op's kernel from first to last instruction, with waits for other ranks, by the GPU's clock.
Trials of all cases of an op are interleaved; the slowest rank in each trial, median (p10–p90).
MB: the rows that all devices receive (live rows, without padding) × H × bytes per element, each counted once.
  dispatch copies them, combine reads them, dispatch + combine does both; backward of dispatch reads their
  gradients as combine does, backward of combine writes theirs as dispatch does.
chain: dispatch + combine many times in one program, per pair: the slope between two lengths; on GPUs by
  their clocks.
The best baseline is compared with the first time:
  memcpy copies the same number of bytes between warm buffers, with one thread per usable core.
  gather_rows, add_rows, sum_rows: plain kernels that move the same rows between the same ranks with as many
  SMs, on the device. Ops may be faster.
  link: the same number of rows pushed to the peers, or pulled, and nothing else, captured.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench ops",
        description="Time dispatch, combine, their gradients and chains of them, on CPU devices of this\n"
        "process or, under python -m jax_deepep.launch, on the devices of all ranks. Further commands,\n"
        "each with its --help: moe times MoE layers, routing plots where rows go.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = ("tokens", "hidden", "topk", "experts", "devices")
    add_sizes(parser, sizes, {}, {"tokens": positive_ints})
    parser.add_argument("--small", action="store_true", help=f"T in {SMALL_TOKENS} too")
    parser.add_argument("--dtype", choices=DTYPES, help="of the rows (bfloat16)")
    parser.add_argument("--layouts", "--layout", nargs="+", choices=("token", "expert"), help="of the rows")
    parser.add_argument(
        "--capacity", help="rows a device can receive: worst, fitting, 4096, or 1.25x the mean"
    )
    parser.add_argument("--implementations", nargs="+", choices=("native", "xla"),
                        help="(both; on GPUs native)")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=("auto", "throughput", "low_latency"), default=["auto"],
                        help="of the native ops, one after the other (auto)")  # fmt: skip
    parser.add_argument("--wires", nargs="+", type=_format, default=[None], metavar="FORMAT",
                        help="formats in which rows cross links: none, fp8, … (none)")  # fmt: skip
    parser.add_argument("--keep-quantized", action="store_true",
                        help="with formats, time a dispatch whose rows stay quantised too")  # fmt: skip
    parser.add_argument("--num-sms", type=_numbers_of_sms, default=[8, 16, None], metavar="S,…",
                        help="GPUs: SMs of each rank; auto: chosen by the op (8,16,auto)")  # fmt: skip
    parser.add_argument("--chain", type=positive_ints, metavar="N,M",
                        help="lengths of the chains, in pairs (8,48; on a CPU 1,3)")  # fmt: skip
    parser.add_argument("--no-chain", action="store_true", help="without chains")
    parser.add_argument("--ragged-all-to-all", action="store_true",
                        help="time argsort + gather + jax.lax.ragged_all_to_all too")  # fmt: skip
    add_trials(parser, 30)
    parser.add_argument("--limit-s", type=positive_number, default=2.0,
                        help="seconds per op in one process; bounds the trials (%(default)s)")  # fmt: skip
    add_outputs(parser)
    options = parser.parse_args(arguments)
    if options.chain and (len(options.chain) != 2 or options.chain[0] >= options.chain[1]):
        parser.error("argument --chain: expected two lengths, the shorter one first")
    return options


def _format(text: str) -> Format | None:
    try:
        return None if text == "none" else checked_format("FORMAT", text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers_of_sms(text: str) -> list[int | None]:
    return [None if number == "auto" else positive_int(number) for number in text.split(",")]


def problems_of(options: argparse.Namespace, devices: int, *, on_gpus: bool) -> tuple[Problem, ...]:
    """Return the problems to measure: the requested ones, or the default list."""
    names = ("tokens", "hidden", "topk", "experts", "dtype", "capacity")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not on_gpus and not (given or options.layouts or options.devices or options.small):
        return tuple(dataclasses.replace(problem, devices=devices) for problem in CPU_PROBLEMS)
    shape = {**(GPU_SHAPE if on_gpus else {}), **given}
    tokens = [*shape.pop("tokens", [Problem.tokens]), *(SMALL_TOKENS if options.small else [])]
    layouts = options.layouts or (["token", "expert"] if on_gpus else [Problem.layout])
    return tuple(
        Problem(tokens=count, layout=layout, devices=devices, **shape)
        for count in tokens
        for layout in layouts
    )


def measure(
    stopwatch: Stopwatch,
    inputs: Inputs,
    options: argparse.Namespace,
    mode: Mode,
    num_sms: int | None,
    wire: Format | None,
    limits: links.Links | None,
) -> Iterator[Result]:
    """Measure every op and the chain on one problem.

    Args:
        mode: of the native ops.
        num_sms: of each rank on GPUs, None = chosen by the op.
        wire: the format in which rows cross links, None = as they are.
        limits: of the links, or None.

    Raises:
        RuntimeError: implementations or baselines disagree, or a communicator broke.
    """
    problem, mesh = inputs.problem, stopwatch.mesh
    interleave = partial(interleaved, trials=options.trials, limit_s=options.limit_s)
    table = f", {num_sms or 'auto'} SMs" if stopwatch.on_gpus else ""
    table += "" if mode == "auto" else f", {mode}"
    table += "" if wire is None else f", {wire}"
    crossing = max(inputs.remote_tokens, 1)
    with contextlib.ExitStack() as stack:
        tested: dict[str, OpCases] = {}
        for name in options.implementations:
            of_native = {"num_sms": num_sms, "mode": mode} if name == "native" else {}
            comm = problem.communicator(mesh, name, timeout_s=TIMEOUT_S, **of_native)
            tested[name] = OpCases.of(
                stack.enter_context(comm), stopwatch, inputs, wire, keep_quantized=options.keep_quantized
            )
        first = tested.get("native") or next(iter(tested.values()))
        for other in tested.values():
            if other is not first:
                check_agreement(first, other)
        on_device = stopwatch.on_gpus and "native" in tested
        # They follow a handle of throughput mode.
        by_rows = on_device and first.shape.mode == "throughput" and wire is None
        row_cases = _row_cases(stopwatch, first, inputs) if by_rows else {}
        memcpy = None
        if not stopwatch.on_gpus and jax.process_count() == 1:
            memcpy = Memcpy(inputs.bytes_moved * max(PASSES.values()))
            stack.callback(memcpy.close)

        for op in first.cases:
            passes = PASSES[op]
            hosts = {name: stopwatch.host_of(ops.programs[op]) for name, ops in tested.items()}
            values: dict[str, int | float] = {}
            if on_device and op != PAIR:  # device time is that of the last op
                of_kind = f"{rows.kind_of(op, problem.layout)}:"
                timers = {
                    name: stopwatch.device(case, comm)
                    for name, case in row_cases.items()
                    if name.startswith(of_kind)
                }
                own = {"device": stopwatch.device(first.cases[op], comm)}
                measured = interleave({**own, **timers})
                own["device"]()
                values["SMs"] = max(last.num_sms for last in comm.last_ops())
                seconds = {"device": measured["device"], **interleave(hosts)}
            else:
                timers = {}
                if memcpy is not None:
                    timers["memcpy"] = stopwatch.host_of(partial(memcpy.copy, passes * inputs.bytes_moved))
                measured = interleave({**hosts, **timers})
                seconds = {name: measured[name] for name in hosts}
            if {"native", "xla"} <= seconds.keys():
                values["xla / native"] = float(np.median(seconds["xla"] / seconds["native"]))
            baselines = {name: Spread.of(measured[name]) for name in timers}
            if limits and op != PAIR:
                baselines |= limits.limits_of_op(crossing)
            spreads = {name: Spread.of(times) for name, times in seconds.items()}
            yield Result(problem, f"ops{table}", op, spreads, baselines, passes * inputs.bytes_moved, values)
        if not options.no_chain:
            baselines = limits.limits_of_pair(crossing) if limits else {}
            yield _chain_result(stopwatch, first, inputs, options, wire, f"chain{table}", baselines)
        comm.check()


def _row_cases(stopwatch: Stopwatch, ops: OpCases, inputs: Inputs) -> dict[str, Case]:
    """Return the kernels that move the same rows, if they support the problem."""
    if rows.unsupported_reason(inputs):
        return {}
    cases = rows.row_baselines(stopwatch.mesh, ops.shape, inputs, ops.dispatched)
    gradient, _ = jax.block_until_ready(ops.programs["dispatch backward"]())
    rows.check_row_baselines(stopwatch.mesh, cases, ops.dispatched, gradient)
    return cases


def _chain_result(
    stopwatch: Stopwatch,
    ops: OpCases,
    inputs: Inputs,
    options: argparse.Namespace,
    wire: Format | None,
    part: str,
    baselines: dict[str, Spread],
) -> Result:
    lengths = options.chain or ([8, 48] if stopwatch.on_gpus else [1, 3])
    timer = stopwatch.on_device if stopwatch.on_gpus else partial(stopwatch.host, flushed=False)
    timers = {str(length): timer(chain(ops.shape, inputs, length, wire)) for length in lengths}
    programs = interleaved(timers, options.trials, options.limit_s)
    per_pair = Spread.of(slopes(lengths, list(programs.values())))
    values = {
        "lengths": ", ".join(programs),
        "captured": "yes" if custom_calls_are_captured() else "no",
        "median seconds of programs": [float(np.median(times)) for times in programs.values()],
    }
    case = f"{ops.shape.comm.implementation} {PAIR}"
    moved = PASSES[PAIR] * inputs.bytes_moved
    return Result(inputs.problem, part, case, {"pair": per_pair}, baselines, moved, values)


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    start_jax(options.devices or Problem.devices)
    devices = jax.devices()
    try:
        if launched_rank() is None and devices[0].platform == "cpu":
            devices = devices[: options.devices or Problem.devices]
        if options.devices and options.devices != len(devices):
            raise ValueError(
                f"devices: expected {len(devices)}, as many as there are, got {options.devices}; leave it "
                f"out, or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={options.devices}."
            )
        on_gpus = devices[0].platform == "gpu"
        options.implementations = options.implementations or (["native"] if on_gpus else ["native", "xla"])
        problems = problems_of(options, len(devices), on_gpus=on_gpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mesh = Mesh(np.array(devices), (AXIS,))
    report = Report(options, MEANING)
    stopwatch = Stopwatch(mesh)
    limits = _limits(mesh, problems) if on_gpus else None
    if limits:
        report.add(limits.results(problems[0]))
    for problem in problems:
        inputs = draw_inputs(problem, mesh)
        of_problem = itertools.product(options.modes, options.num_sms if on_gpus else [None], options.wires)
        for mode, num_sms, wire in of_problem:
            report.add(measure(stopwatch, inputs, options, mode, num_sms, wire, limits))
    if options.ragged_all_to_all:
        # Last, because a collective that fails may hang.
        for problem in problems:
            if problem.layout == "expert":
                inputs = draw_inputs(problem, mesh)
                report.add(ragged_all_to_all.measure(stopwatch, inputs, options.trials))
    report.draw()
    stopwatch.close()
    end_jax()
    return 0


def _limits(mesh: Mesh, problems: Sequence[Problem]) -> links.Links | None:
    """Return the limits of the links, or print why there are none."""
    if reason := links.unsupported_reason(mesh):
        if jax.process_index() == 0:
            print(reason)
        return None
    most = max(problem.tokens * min(problem.topk, problem.devices - 1) for problem in problems)
    return links.Links(mesh, problems[0].hidden, most)
