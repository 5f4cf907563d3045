"""python -m jax_deepep.bench formats: how much the formats of low precision change rows."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepep.bench.command_line import add_sizes, positive_int
from jax_deepep.bench.report import Table
from jax_deepep.quantization.block_scaled import quantize_dequantize
from jax_deepep.quantization.formats import FORMATS

ROWS_AT_ONCE = 256  # so that memory does not grow with the number of rows

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "normal / 1000": lambda rng, shape: rng.normal(size=shape) / 1000,
    "Student t, 3 degrees": lambda rng, shape: rng.standard_t(3, size=shape),
    "normal, 0.1 % times 50": lambda rng, shape: (
        rng.normal(size=shape) * np.where(rng.random(shape) < 1e-3, 50, 1)
    ),
}


def cast(x: jax.Array) -> jax.Array:
    """Return x rounded to float8_e4m3fn without a scale, saturating."""
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    return jnp.clip(x, -largest, largest).astype(jnp.float8_e4m3fn).astype(x.dtype)


ROUNDINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{name: partial(quantize_dequantize, format=of.name) for name, of in FORMATS.items()},
    "float8_e4m3fn, no scales": cast,
}


@dataclass(frozen=True)
class Errors:
    """How far rounded rows are from x.

    Attributes:
        rms: the norm of all errors over the norm of x.
        largest: the largest error of an element over the largest magnitude of its row.
    """

    rms: float
    largest: float


def measure(distribution: str, rows: int, hidden: int, seed: int = 0) -> dict[str, Errors]:
    """Draw bfloat16 rows; return the errors of each rounding of them to bfloat16."""
    rng = np.random.default_rng(seed)
    programs = {name: jax.jit(rounding) for name, rounding in ROUNDINGS.items()}
    errors = dict.fromkeys(ROUNDINGS, 0.0)  # squares
    largest = dict.fromkeys(ROUNDINGS, 0.0)
    squares = 0.0
    for start in range(0, rows, ROWS_AT_ONCE):
        shape = (min(ROWS_AT_ONCE, rows - start), hidden)
        x = jnp.asarray(DISTRIBUTIONS[distribution](rng, shape), jnp.bfloat16)
        exact = np.asarray(x, np.float64)
        squares += float(np.square(exact).sum())
        of_rows = np.abs(exact).max(axis=-1)
        for name, program in programs.items():
            error = np.abs(np.asarray(program(x), np.float64) - exact)
            errors[name] += float(np.square(error).sum())
            largest[name] = max(largest[name], float((error.max(axis=-1) / of_rows).max()))
    return {name: Errors((errors[name] / squares) ** 0.5, largest[name]) for name in ROUNDINGS}


def table(rows: int, hidden: int, seed: int) -> Table:
    """Return the errors of all formats and distributions in percent."""
    measured = {name: measure(name, rows, hidden, seed) for name in DISTRIBUTIONS}
    cells = [
        [name, *(f"{100 * of[name].rms:.2f}, {100 * of[name].largest:.2f}" for of in measured.values())]
        for name in ROUNDINGS
    ]
    title = f"% of the norm (RMS), % of the row's maximum (largest): {rows} bfloat16 rows of H={hidden}"
    return Table(title, ["format", *DISTRIBUTIONS], cells, text_columns=("format",))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench formats",
        description="Print the errors of rows that crossed in each format, as a table in Markdown.",
    )
    add_sizes(parser, ("hidden",), {"hidden": 7168})
    parser.add_argument("--rows", type=positive_int, default=4096, help="rows of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (%(default)s)")
    options = parser.parse_args(arguments)
    if options.hidden % 2:
        parser.error(f"hidden: expected an even number, because nvfp4 has two elements in a byte, "
                     f"got {options.hidden}")  # fmt: skip
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit status."""
    options = parse(arguments)
    print(table(options.rows, options.hidden, options.seed).markdown())
    return 0
