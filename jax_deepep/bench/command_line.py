"""Shared parts of the command lines; argparse prepends the option to these errors."""

import argparse
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.problem import AXIS, DTYPES, WORST, Problem
from jax_deepep.bench.processes import start_jax

SIZES = {
    "tokens": "T, tokens per device",
    "hidden": "H, elements of a row",
    "intermediate": "F, inner size of an expert",
    "topk": "K, experts per token",
    "experts": "E, experts over all devices",
    "devices": "R, devices of the group",
}
_OF_LAYERS = ("tokens", "hidden", "intermediate", "topk", "experts")


def positive_int(text: str) -> int:
    """Return an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return number


def positive_ints(text: str) -> list[int]:
    """Return integers of at least 1, separated by commas."""
    return [positive_int(number) for number in text.split(",")]


def positive_number(text: str) -> float:
    """Return a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def add_sizes(
    parser: argparse.ArgumentParser,
    names: Sequence[str],
    defaults: Mapping[str, Any],
    types: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each size; None where there is no default."""
    group = parser.add_argument_group("shape")
    for name in names:
        default = defaults.get(name)
        shown = "" if default is None else " (%(default)s)"
        group.add_argument(
            f"--{name}", type=(types or {}).get(name, positive_int), default=default, help=SIZES[name] + shown
        )


def add_layer(parser: argparse.ArgumentParser, default: Problem, capacity_factor: str = WORST) -> None:
    """Add the options of the problem of a layer: `start_layer`."""

    def capacity(text: str) -> str:
        return WORST if text == WORST else f"{positive_number(text):g}x"

    add_sizes(parser, _OF_LAYERS, vars(default))
    parser.add_argument("--devices", type=positive_int, help="R, devices of the group (all; on a CPU 8)")
    parser.add_argument("--dtype", default=default.dtype, choices=DTYPES)
    parser.add_argument("--capacity-factor", type=capacity, default=capacity_factor, dest="capacity",
                        help='a number, or "worst" (%(default)s)')  # fmt: skip


def start_layer(options: argparse.Namespace) -> tuple[Problem, Mesh] | None:
    """Start JAX, and return the problem that the options of `add_layer` make on its devices.

    Returns None where they make none, and prints why.
    """
    start_jax(options.devices or Problem.devices)
    devices = jax.devices()[: options.devices]
    names = (*_OF_LAYERS, "dtype", "capacity")
    try:
        problem = Problem(devices=len(devices), **{name: getattr(options, name) for name in names})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    return problem, Mesh(np.array(devices), (AXIS,))


def add_trials(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the number of trials."""
    parser.add_argument(
        "--trials", "--repeats", dest="trials", type=positive_int, default=default,
        help="trials of every case, interleaved (%(default)s)",
    )  # fmt: skip
