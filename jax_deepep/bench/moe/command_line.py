"""The command line: python -m jax_deepep.bench moe, alone or in every rank under the launcher."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.cpu_devices import prepare_cpu
from jax_deepep.bench.moe.contenders import (
    GATHERED,
    Program,
    experts_programs,
    layer_programs,
    sizes_of,
)
from jax_deepep.bench.moe.problem import MoEProblem
from jax_deepep.bench.numbers import positive_int, positive_number
from jax_deepep.bench.problems import AXIS
from jax_deepep.bench.surroundings import surroundings
from jax_deepep.bench.tables import Table, markdown, print_tables
from jax_deepep.bench.timing import Spread, wall_clock
from jax_deepep.communicator import Communicator
from jax_deepep.launch import launched_rank
from jax_deepep.moe.grouped_matmul import NAMES

DEFAULT_DEVICES = 8
DENSE = "dense"
LAYERS = ("native", "xla", DENSE)
COLUMNS = ("contender", "forward ms", "forward + backward ms", "temporary MiB")


@dataclass(frozen=True)
class Result:
    """One contender.

    Attributes:
        of: "experts of one device" or "layer".
        name: the contender.
        seconds: of every run, by pass: from the launch until the results of this process are ready.
        temporary_bytes: what XLA needs on a device besides operands and results, forward + backward.
        failure: why there are no numbers, or "".
    """

    of: str
    name: str
    seconds: dict[str, list[float]]
    temporary_bytes: int
    failure: str = ""

    def cells(self) -> list[str]:
        """Return the row of the table."""
        if self.failure:
            return [f"{self.name}: {self.failure}", "–", "–", "–"]
        times = [Spread.of(seconds).text(1e3, digits=2) for seconds in self.seconds.values()]
        return [self.name, *times, f"{self.temporary_bytes / 2**20:.1f}"]


def factor_or_none(text: str) -> float | None:
    """Return a capacity factor; None for the worst case."""
    return None if text == "worst" else positive_number(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench moe",
        description="Time MoE layers, and the grouped matmuls that they may use, forward and backward.",
    )
    for name, default, meaning in (
        ("tokens", 256, "T, tokens per device"),
        ("hidden", 256, "H"),
        ("intermediate", 512, "F, inner size of an expert"),
        ("topk", 4, "K, experts per token"),
        ("experts", 32, "E, over all devices"),
        ("repeats", 10, "runs that count"),
    ):
        parser.add_argument(f"--{name}", type=positive_int, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--devices", type=positive_int, help="R (all; on a CPU 8)")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--capacity-factor", type=factor_or_none, default="worst",
                        help='a number, or "worst" (%(default)s)')  # fmt: skip
    matmuls = ("ragged_dot", GATHERED, "blocks", "triton")
    parser.add_argument(
        "--matmuls", nargs="*", choices=matmuls, help="to apply experts (what the platform has)"
    )
    parser.add_argument("--layer-matmul", choices=NAMES, default="auto", help="of the layers (%(default)s)")
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=LAYERS,
                        help="native, xla, dense: all tokens through all experts (all three)")  # fmt: skip
    parser.add_argument(
        "--chunks", nargs="+", type=positive_int, default=[1], help="num_chunks of native (1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there")
    return parser.parse_args(arguments)


def measure(of: str, name: str, programs: dict[str, Program], repeats: int) -> Result:
    """Compile and time the programs of one contender; every process makes as many runs."""
    seconds: dict[str, list[float]] = {}
    temporary = 0
    for which, (function, operands) in programs.items():
        try:
            compiled = jax.jit(function).lower(*operands).compile()
            jax.block_until_ready(compiled(*operands))
            jax.block_until_ready(compiled(*operands))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return Result(of, name, {}, 0, str(error).splitlines()[0][:80])
        run = partial(compiled, *operands)
        seconds[which] = [wall_clock(run) for _ in range(repeats)]
        temporary = int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0))
    return Result(of, name, seconds, temporary)


def results_of(options: argparse.Namespace, problem: MoEProblem, mesh: Mesh) -> Iterator[Result]:
    """Measure one contender after the other."""
    platform = jax.devices()[0].platform
    matmuls = options.matmuls
    if matmuls is None:
        matmuls = ["ragged_dot", GATHERED, "blocks"] if platform == "cpu" else ["ragged_dot", "triton"]
    for name in matmuls:
        yield measure("experts of one device", name, experts_programs(problem, name), options.repeats)
    for name in options.layers:
        if name == DENSE:
            yield measure("layer", name, layer_programs(problem, mesh, None), options.repeats)
            continue
        for chunks in options.chunks if name == "native" else [1]:
            comm = Communicator(mesh, AXIS, **sizes_of(problem, chunks), implementation=name)
            programs = layer_programs(problem, mesh, comm, chunks, options.layer_matmul)
            label = name if chunks == 1 else f"{name}, {chunks} chunks"
            yield measure("layer", label, programs, options.repeats)
            comm.close()


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    if launched_rank() is not None:
        jax.distributed.initialize()
    else:
        prepare_cpu(options.devices or DEFAULT_DEVICES)
    devices = jax.devices()[: options.devices]
    try:
        problem = MoEProblem(
            options.tokens, options.hidden, options.intermediate, options.topk, options.experts,
            len(devices), options.dtype, options.capacity_factor)  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mesh = Mesh(np.array(devices), (AXIS,))
    around: dict[str, Any] = surroundings()
    results = list(results_of(options, problem, mesh))
    if jax.process_index() == 0:
        print(f"{around['processor']}, {around['cores']} cores; {around['devices']}; {around['versions']}")
        tables = [
            Table(f"{of}: {problem.name}", COLUMNS, [r.cells() for r in results if r.of == of])
            for of in dict.fromkeys(result.of for result in results)
        ]
        print_tables(tables)
        if options.markdown:
            options.markdown.write_text(markdown(tables))
        if options.json:
            everything = {**around, "problem": asdict(problem), "results": [asdict(r) for r in results]}
            options.json.write_text(json.dumps(everything, indent=1))
    if launched_rank() is not None:
        jax.distributed.shutdown()
    sys.stdout.flush()
    return 0
