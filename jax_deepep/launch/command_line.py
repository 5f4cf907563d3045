"""The arguments of `python -m jax_deepep.launch`."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jax_deepep.launch.rank_environment import RankSettings

_EXAMPLES = """\
examples:
  python -m jax_deepep.launch -n 8 -- python train.py
  python -m jax_deepep.launch -n 4 --platform cpu --devices-per-process 2 -- pytest tests
  python -m jax_deepep.launch -n 8 --share-gpu -- pytest tests
  python -m jax_deepep.launch -n 8 --hosts node0,node1 -- python train.py     the same line on node0 and node1
  srun --ntasks-per-node=1 python -m jax_deepep.launch -n 8 -- python train.py

In the program, jax.distributed.initialize() without arguments finds its rank. The launcher returns the
status of the rank that failed first, 128+s if signal s killed it. It listens on the loopback address only,
unless several hosts take part; ports are chosen when needed.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nFor all arguments: {self.prog} --help\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check; a mistake ends the program with status 2 and a remedy."""
    parser = _Parser(
        prog="python -m jax_deepep.launch",
        usage="%(prog)s -n N [options] -- COMMAND [ARGUMENT ...]",
        description="Run a JAX program as N processes on this host, and end them all when one fails.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-n", type=_count, required=True, metavar="N", help="number of processes on this host"
    )
    parser.add_argument(
        "--platform", choices=("cpu", "cuda"),
        help="platform of JAX in the ranks (JAX_PLATFORMS); default: JAX's choice",
    )  # fmt: skip
    parser.add_argument(
        "--devices-per-process", type=_count, metavar="K",
        help="devices of each process: K virtual ones on CPU, else the host's next K GPUs; default 1",
    )  # fmt: skip
    parser.add_argument(
        "--share-gpu", action="store_true", help="all processes on one GPU, under a private MPS daemon"
    )
    # With 0.8, eight ranks left NCCL too little memory on 80 GB, and enough on 141 GB (3.5 GB per rank).
    parser.add_argument(
        "--memory-fraction", type=_fraction, metavar="F",
        help="with --share-gpu: fraction of the GPU's memory for XLA in all ranks together, F/N each "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION); CUDA and NCCL need the rest; default "
        f"{RankSettings.memory_fraction:g}",
    )  # fmt: skip
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR",
        help="where rankR.log goes for each rank; default: a new temporary folder",
    )  # fmt: skip
    parser.add_argument(
        "--console", choices=("auto", "all", "first"), default="auto",
        help="whose output is shown: all ranks', or the first one's of this host; "
        "auto (default) shows the first one's of pytest, all of other programs",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=_seconds, default=5.0, metavar="SECONDS",
        help="time between SIGTERM and SIGKILL when ranks are ended; default %(default)g",
    )  # fmt: skip
    several = parser.add_argument_group(
        "several hosts",
        "Detected under SLURM, Open MPI, PMI, and in a Kubernetes Indexed Job; "
        "these override what was detected.",
    )
    several.add_argument("--hosts", metavar="H0,H1,…", help="all hosts, rank 0's first; or their number")
    several.add_argument(
        "--coordinator", metavar="HOST[:PORT]",
        help="address of the first host; the launchers connect to PORT "
        "(on a single host: JAX's coordinator gets it); "
        "default: the first of --hosts, and a port derived from the job",
    )  # fmt: skip
    several.add_argument(
        "--node-rank", type=int, metavar="I",
        help="index of this host, from 0; default: found by its name",
    )  # fmt: skip
    several.add_argument(
        "--start-timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="the longest to wait for the other hosts; default %(default)g",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        options.command = options.command[1:]
    _check(parser, options)
    return options


def _check(parser: _Parser, options: argparse.Namespace) -> None:
    if not options.command:
        parser.error(
            "COMMAND: expected the program to run, got nothing; put it after '--': -- python train.py"
        )
    if options.share_gpu and options.platform == "cpu":
        parser.error("--share-gpu: expected a GPU, got --platform cpu; leave one of the two out")
    if options.memory_fraction is not None and not options.share_gpu:
        parser.error(
            f"--memory-fraction: expected --share-gpu with it, got {options.memory_fraction:g} alone; where "
            "ranks do not share a GPU, set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if options.share_gpu and (options.devices_per_process or 1) != 1:
        parser.error(
            f"--devices-per-process: expected 1 with --share-gpu, got {options.devices_per_process}; leave "
            "it out"
        )


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 4096, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, up to 1, for example 0.5")


def _seconds(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "seconds >= 0, for example 10")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    with contextlib.suppress(ValueError):
        if fits(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
