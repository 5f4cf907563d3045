"""The command line: python -m jax_deepep.bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_deepep.bench.cpu_devices import prepare_cpu
from jax_deepep.bench.measurement import measure
from jax_deepep.bench.numbers import positive_int, positive_number
from jax_deepep.bench.problems import DEFAULT_PROBLEMS, DTYPES, Problem
from jax_deepep.bench.report import BYTES_MOVED, markdown_table, print_table, write_json, write_plot
from jax_deepep.bench.surroundings import surroundings
from jax_deepep.launch import launched_rank

SHAPE_OPTIONS = ("tokens", "hidden", "topk", "experts", "devices", "dtype", "layout", "capacity")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    default = Problem()
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench",
        description="Time dispatch, combine and their gradients, natively and in JAX collectives, against "
        "memcpy. Any option of the shape selects one problem; without one, a list of them is measured. "
        "For GPUs, run it under python -m jax_deepep.launch; it has other options there. "
        "Further commands, each with its --help: moe times MoE layers, routing draws where rows go.",
        epilog=BYTES_MOVED,
    )
    shape = parser.add_argument_group("shape")
    shape.add_argument("--tokens", type=positive_int, help=f"T, tokens per device ({default.tokens})")
    shape.add_argument("--hidden", type=positive_int, help=f"H, elements of a row ({default.hidden})")
    shape.add_argument("--topk", type=positive_int, help=f"K, experts per token ({default.topk})")
    shape.add_argument(
        "--experts", type=positive_int, help=f"E, experts over all devices ({default.experts})"
    )
    shape.add_argument("--devices", type=positive_int, help=f"R, devices of the group ({default.devices})")
    shape.add_argument("--dtype", choices=DTYPES, help=f"of the rows ({default.dtype})")
    shape.add_argument("--layout", choices=("expert", "token"), help=f"of the rows ({default.layout})")
    shape.add_argument(
        "--capacity", help='rows a device can receive: "worst" (the default), "4096", or "1.25x" the mean'
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--implementations", nargs="+", choices=("native", "xla"), default=["native", "xla"], help="(both)"
    )
    run.add_argument("--repeats", type=positive_int, default=30, help="rounds per op (%(default)s)")
    run.add_argument(
        "--limit-s",
        type=positive_number,
        default=2.0,
        help="seconds per op: fewer rounds if more (%(default)s)",
    )
    run.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    run.add_argument("--plot", type=Path, metavar="PATH", help="draw GB/s there (PNG, SVG, PDF)")
    run.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables of RESULTS.md there")
    return parser.parse_args(arguments)


def problems_of(options: argparse.Namespace) -> tuple[Problem, ...]:
    """Return what to measure."""
    given = {name: value for name in SHAPE_OPTIONS if (value := getattr(options, name)) is not None}
    return (Problem(**given),) if given else DEFAULT_PROBLEMS


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    if arguments[:1] == ["moe"]:
        from jax_deepep.bench.moe import command_line as of_layers  # not needed elsewhere

        return of_layers.main(arguments[1:])
    if arguments[:1] == ["routing"]:
        from jax_deepep.bench import routing  # likewise

        return routing.main(arguments[1:])
    if launched_rank() is not None:
        from jax_deepep.bench.gpu import command_line  # likewise

        return command_line.main(arguments)
    options = parse(arguments)
    try:
        problems = problems_of(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prepare_cpu(max(problem.devices for problem in problems))
    around = surroundings()
    print(f"{around['processor']}, {around['cores']} cores; {around['devices']}; {around['versions']}")
    print(BYTES_MOVED, flush=True)
    results = []
    for problem in problems:
        of_problem = list(
            measure(problem, options.implementations, repeats=options.repeats, limit_s=options.limit_s)
        )
        print_table(of_problem)
        sys.stdout.flush()
        results += of_problem
    if options.json:
        write_json(results, around, options.json)
    if options.markdown:
        options.markdown.write_text(markdown_table(results))
    if options.plot:
        write_plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
