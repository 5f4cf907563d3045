"""python -m jax_deepep.bench overlap: ops in flight beside matmuls, and layers that compute beside theirs."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.command_line import add_layer, add_trials, positive_int, start_layer
from jax_deepep.bench.kernel_trace import CPU_REASON, overlapped_shares, trace_kernels
from jax_deepep.bench.layers import FORWARD, FORWARD_BACKWARD
from jax_deepep.bench.link_model import NUM_SMS
from jax_deepep.bench.overlap_cases import IN_FLIGHT, LAYERS, MATMUL, OP, PLAIN, layer_runs, op_runs
from jax_deepep.bench.overlap_model import modelled
from jax_deepep.bench.problem import FITTING, Problem, draw_inputs
from jax_deepep.bench.processes import end_jax
from jax_deepep.bench.report import Report, Result, Spread, Table, add_outputs
from jax_deepep.bench.trials import interleaved, queued

DEFAULT = Problem(256, 256, topk=4, experts=32, intermediate=512)
PARTS = ("ops", "layers", "model")
MODELLED_DEVICES = (2, 4, 8)
TOLERANCE = 1.05  # of the bound

MEANING = """\
Seconds per call, with several calls in flight, of the slowest rank; trials of a table are interleaved; median
(p10–p90). Ratios are taken inside a trial.
op beside a matmul: a program with an op and the matmul [N, N] · [N, N], plain, one after the other, or
  in-flight, the matmul between start and done. bound: 1.05 · max(op, matmul · S / (S − n)) with n of S SMs in
  the op.
layer: plain, with nothing in flight; in-flight, the default; two-batches, with two_batch_overlap.
model: `jax_deepep.bench.overlap_model`, on H200s of one node, without anything measured here.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench overlap",
        description="Time ops in flight beside matmuls, and MoE layers with and without ops in flight.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_layer(parser, DEFAULT, capacity_factor="1.25")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    parser.add_argument("--layouts", nargs="+", choices=("token", "expert"), default=["token", "expert"],
                        help="of the rows beside a matmul (both)")  # fmt: skip
    parser.add_argument("--matmul", type=positive_int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--num-sms", type=positive_int, metavar="n", help="of the ops (chosen by the op)")
    parser.add_argument("--shared", nargs="+", type=size_or_0, default=[0, DEFAULT.intermediate], metavar="F",
                        help="inner sizes of shared experts, 0 for none (%(default)s)")  # fmt: skip
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=tuple(LAYERS), help="(all)")
    parser.add_argument("--queued", type=positive_int, default=6, help="calls in flight (%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="DIR",
                        help="profile each program once, write the traces there, and show how much of each "
                        "op ran beside computing kernels")  # fmt: skip
    add_trials(parser, 10)
    add_outputs(parser)
    return parser.parse_args(arguments)


class Measurement:
    """Times programs, and traces them if that is asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._trials, self._calls, self._folder = options.trials, options.queued, options.trace

    def seconds(self, runs: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
        """Return seconds per call in each trial."""
        for run in runs.values():
            jax.block_until_ready(run())
        return interleaved({name: queued(run, self._calls) for name, run in runs.items()}, self._trials)

    def overlapped(self, name: str, run: Callable[[], Any]) -> dict[str, str]:
        """Return a column with the share of each op beside computing kernels, on the first GPU here."""
        if self._folder is None or jax.devices()[0].platform != "gpu":
            return {}
        first, *_ = trace_kernels(run, self._folder / name.replace(", ", "_").replace(" ", "_"))
        shares = overlapped_shares(first)
        return {"beside kernels": ", ".join(f"{kernel} {share:.0%}" for kernel, share in shares.items())}


def size_or_0(text: str) -> int:
    """Return an integer of at least 0."""
    return 0 if text == "0" else positive_int(text)


def bound_of(op: float, matmul: float, op_sms: int | None) -> float | None:
    """Return the seconds that an op and a matmul may take together; None where no SMs are shared."""
    num_sms = getattr(jax.devices()[0], "core_count", None)
    if num_sms is None or jax.devices()[0].platform != "gpu":
        return None
    taken = op_sms or NUM_SMS["throughput"]
    return TOLERANCE * max(op, matmul * num_sms / (num_sms - taken))


def ratio(one: np.ndarray, other: np.ndarray) -> float:
    """Return the median of the ratios in each trial."""
    return float(np.median(one / other))


def ops_beside_matmuls(
    options: argparse.Namespace, problem: Problem, mesh: Mesh, measurement: Measurement
) -> Iterator[Result]:
    """Measure one layout."""
    inputs = draw_inputs(problem, mesh)
    with inputs.problem.communicator(mesh, "native", mode="throughput", num_sms=options.num_sms) as comm:
        for case, runs in op_runs(comm, inputs, options.matmul).items():
            times = measurement.seconds(runs)
            values: dict[str, Any] = {"in-flight / plain": ratio(times[IN_FLIGHT], times[PLAIN])}
            if MATMUL in times:
                medians = {name: float(np.median(times[name])) for name in (OP, MATMUL, IN_FLIGHT)}
                bound = bound_of(medians[OP], medians[MATMUL], options.num_sms)
                if bound is not None:
                    values["/ bound"] = medians[IN_FLIGHT] / bound
            values |= measurement.overlapped(f"{case} {problem.layout}", runs[IN_FLIGHT])
            seconds = {name: Spread.of(of_name) for name, of_name in times.items()}
            yield Result(inputs.problem, "op beside a matmul", case, seconds, values=values)
        comm.check()


def layers_of(
    options: argparse.Namespace, problem: Problem, mesh: Mesh, shared: int, measurement: Measurement
) -> Iterator[Result]:
    """Measure layers with shared experts of one size."""
    comms = {
        name: problem.communicator(
            mesh, "xla" if name == "xla" else "native", num_sms=None if name == "xla" else options.num_sms
        )
        for name in options.layers
    }
    runs = {name: layer_runs(problem, mesh, comm, name, shared) for name, comm in comms.items()}
    times = {
        key: measurement.seconds({name: of_layer[key] for name, of_layer in runs.items()})
        for key in (FORWARD, FORWARD_BACKWARD)
    }
    for name, comm in comms.items():
        values: dict[str, Any] = {}
        if PLAIN in comms:
            values = {f"{key} / plain": ratio(of[name], of[PLAIN]) for key, of in times.items()}
        values |= measurement.overlapped(f"layer {name} {shared}", runs[name][FORWARD_BACKWARD])
        seconds = {key: Spread.of(of[name]) for key, of in times.items()}
        part = f"layer, shared experts F={shared}" if shared else "layer"
        yield Result(problem, part, name, seconds, values=values)
        comm.check()
        comm.close()


def model_table(problem: Problem, sizes: Sequence[int]) -> Table:
    """Return modelled times of a layer on other numbers of H200s, over those of plain ones, and of xla's."""
    columns = ["devices", "shared", "pass", "plain us"]
    columns += ["in-flight / plain", "two-batches / plain", "xla / in-flight"]
    rows = []
    for devices in MODELLED_DEVICES:
        if problem.experts % devices:
            continue
        of_devices = dataclasses.replace(problem, devices=devices)
        for shared in sizes:
            for name in (FORWARD, FORWARD_BACKWARD):
                times = modelled(of_devices, shared, backward=name != FORWARD)
                ratios = [times.in_flight / times.plain, times.two_batches / times.plain]
                ratios.append(times.xla / times.in_flight)
                cells = (f"{of:.3f}" for of in ratios)
                rows.append([str(devices), str(shared), name, f"{times.plain:.0f}", *cells])
    return Table(f"model: {problem.name}", columns, rows, text_columns=("pass",))


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    started = start_layer(options)
    if started is None:
        return 2
    problem, mesh = started
    measurement = Measurement(options)
    report = Report(options, MEANING)
    if "ops" in options.parts:
        for layout in options.layouts:
            of_ops = dataclasses.replace(problem, layout=layout, intermediate=None, capacity=FITTING)
            report.add(ops_beside_matmuls(options, of_ops, mesh, measurement))
    if "layers" in options.parts:
        for shared in options.shared:
            report.add(layers_of(options, problem, mesh, shared, measurement))
    if jax.process_index() == 0:
        if options.trace and mesh.devices.flat[0].platform != "gpu":
            print(CPU_REASON)
        if "model" in options.parts:
            print(model_table(problem, options.shared).markdown())
    report.draw()
    end_jax()
    return 0
