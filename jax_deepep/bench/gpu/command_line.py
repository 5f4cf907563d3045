"""The command line of the bench on GPUs, in every rank."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.gpu import report, rival
from jax_deepep.bench.gpu.measurement import Result, measure
from jax_deepep.bench.gpu.rounds import Rounds, exchange_with_all
from jax_deepep.bench.gpu.routed_inputs import draw
from jax_deepep.bench.numbers import positive_int
from jax_deepep.bench.problems import AXIS, Problem
from jax_deepep.bench.surroundings import surroundings
from jax_deepep.bench.tables import markdown, print_tables

SMALL_TOKENS = (1, 8, 32, 128)


def _numbers(text: str) -> list[int]:
    return [positive_int(number) for number in text.split(",")]


def _numbers_of_sms(text: str) -> list[int | None]:
    return [None if number == "auto" else positive_int(number) for number in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.launch -n N [--share-gpu] -- python -m jax_deepep.bench",
        description="Time dispatch, combine and their gradients on N GPUs, or on N ranks that share one.",
        epilog=report.MEANING,
    )
    parser.add_argument(
        "--tokens", type=_numbers, default=[4096], metavar="T,…", help="tokens per rank (4096)"
    )
    parser.add_argument("--small", action="store_true", help=f"T in {SMALL_TOKENS} too")
    parser.add_argument(
        "--hidden", type=positive_int, default=7168, help="H, elements of a row (%(default)s)"
    )
    parser.add_argument("--topk", type=positive_int, default=8, help="K, experts per token (%(default)s)")
    parser.add_argument("--experts", type=positive_int, default=256, help="E, over all ranks (%(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", choices=("token", "expert"), default=["token", "expert"], help="(both)"
    )
    parser.add_argument(
        "--num-sms",
        type=_numbers_of_sms,
        default=[8, 16, None],
        metavar="S,…",
        help="SMs of each rank; auto: as many as an op takes by itself (8,16,auto)",
    )
    parser.add_argument("--repeats", type=positive_int, default=30, help="rounds (%(default)s)")
    parser.add_argument(
        "--rival", action="store_true", help="time argsort + gather + jax.lax.ragged_all_to_all too"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there")
    return parser.parse_args(arguments)


def problems_of(options: argparse.Namespace, num_ranks: int) -> list[Problem]:
    """Return what to measure; capacities follow from the inputs."""
    all_tokens = [*options.tokens, *(SMALL_TOKENS if options.small else ())]
    return [
        Problem(
            tokens=tokens,
            hidden=options.hidden,
            topk=options.topk,
            experts=options.experts,
            devices=num_ranks,
            layout=layout,
        )
        for tokens in all_tokens
        for layout in options.layouts
    ]


def _check_devices(devices: Sequence[jax.Device]) -> None:
    if devices[0].platform != "gpu" or jax.local_device_count() != 1:
        raise ValueError(
            f"devices: got {jax.local_device_count()} of platform {devices[0].platform} in this process; "
            "under the launcher, the bench takes one GPU per process. On a CPU, run it without the launcher."
        )


class _Reporter:
    """Shows and stores results on rank 0, each as soon as it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._first = jax.process_index() == 0
        self._tables: list[report.Table] = []
        self.results: list[Result] = []
        self.rivals: list[rival.Rival] = []
        if self._first:
            self._around = {**surroundings(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
            print(f"{self._around['devices']}; {self._around['versions']}; commit {self._around['commit']}")
            print(report.MEANING, flush=True)

    def show(self, table: report.Table) -> None:
        """Print a table and write the files anew."""
        if not self._first:
            return
        self._tables.append(table)
        print_tables([table])
        sys.stdout.flush()
        if self._options.markdown:
            self._options.markdown.write_text(markdown(self._tables))
        if self._options.json:
            report.write_json(self.results, self.rivals, self._around, self._options.json)


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    jax.distributed.initialize()
    devices = jax.devices()
    try:
        _check_devices(devices)
        problems = problems_of(options, len(devices))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mesh = Mesh(np.array(devices), (AXIS,))
    rounds = Rounds(mesh)
    reporter = _Reporter(options)
    for problem in problems:
        inputs = draw(problem, mesh)
        of_problem = [
            result
            for num_sms in options.num_sms
            for result in measure(rounds, inputs, num_sms, options.repeats)
        ]
        reporter.results += of_problem
        reporter.show(report.table_of(of_problem))
    if options.rival:
        # Last, because a collective that fails may not come back.
        for problem in problems:
            if problem.layout == "expert":
                reporter.rivals.append(rival.measure(rounds, draw(problem, mesh), options.repeats))
                reporter.show(report.table_of_rival(reporter.rivals[-1]))
    rounds.close()
    # No rank leaves while another still needs the coordinator.
    exchange_with_all("end", {})
    jax.distributed.shutdown()
    return 0
