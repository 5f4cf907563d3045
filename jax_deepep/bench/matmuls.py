"""python -m jax_deepep.bench matmuls: the products of grouped matmuls, beside dense ones of as many FLOPs."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepep.bench.command_line import SIZES, add_sizes, add_trials, positive_int
from jax_deepep.bench.experts import HALVES, half_cases, networks, router
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.processes import end_jax, start_jax
from jax_deepep.bench.report import Report, Result, Spread, add_outputs
from jax_deepep.bench.trials import interleaved, queued
from jax_deepep.moe.grouped_matmul import alignment_for
from jax_deepep.moe.grouped_matmul.mosaic import Tiles, mosaic_matmul
from jax_deepep.moe.grouped_matmul.triton import triton_matmul

SHAPES = {
    "ds": Problem(4096, 7168, 8, 64, 2, capacity="1x", intermediate=2048),
    "qwen": Problem(8192, 2048, 8, 128, 2, capacity="1x", intermediate=768),
}
TILES = {
    "default": None,
    "1 phase": Tiles(),
    "4 phases": Tiles(phases=4),
    "stored at once": Tiles(deferred=False),
}
DENSE, TRITON, MOSAIC, RAGGED_DOT = "dense", "triton", "mosaic", "ragged_dot"
MATMULS = (DENSE, TRITON, MOSAIC, RAGGED_DOT)
PRODUCTS, NETWORK, ROUTER = "products", "network", "router"
PARTS = (PRODUCTS, NETWORK, ROUTER)
UNIFORM, SKEWED = "uniform", "skewed"
GROUPS = (UNIFORM, SKEWED)
# Which operands a product has, of these: rows [C, H], matrices [L, H, F], hidden [C, F], second [L, F, H]
OPERANDS = {
    "up": ("rows", "matrices"),
    "down": ("hidden", "second"),
    "gradient of rows": ("hidden", "matrices"),
    "gradient of matrices": ("rows", "hidden"),
    **HALVES,
}
EINSUM = {
    "up": "erh,ehf->erf",
    "down": "erf,efh->erh",
    "gradient of rows": "erf,ehf->erh",
    "gradient of matrices": "erh,erf->ehf",
}

MEANING = """\
Products of one device's experts: up [C, H] · [H, F], down [C, F] · [F, H], and both gradients of up; then
those of a network of gate, up and down with what lies between them, fused and not.
Every row is live; "uniform" groups have one size, sizes of "skewed" ones follow 1 / n.
dense: batched matmuls of as many FLOPs, in groups of one size.
mosaic: with several tiles, as `jax_deepep.moe.grouped_matmul.mosaic_kernel.Tiles` describes them.
network: the whole of it on the rows of a uniform routing, with room for C rows; TF/s count rows of tokens.
router: x · gate and its gradients; error: the largest one from float64, relative to the largest logit.
queued: per call, with several in flight.
deviation: the largest difference from the first case with these groups, relative to its largest element.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench matmuls",
        description="Time what one device of a layer computes, without communication.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices in (
        ("shapes", list(SHAPES)),
        ("parts", PARTS),
        ("products", list(OPERANDS)),
        ("groups", GROUPS),
        ("tiles", list(TILES)),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, help="(all)")
    fast = MATMULS[:-1]
    parser.add_argument("--matmuls", nargs="+", choices=MATMULS, default=fast, help=f"({', '.join(fast)})")
    add_sizes(parser, list(SIZES), {})  # they replace those of the shapes
    parser.add_argument("--queued", type=positive_int, default=8, help="calls in flight (%(default)s)")
    add_trials(parser, 5)
    add_outputs(parser)
    return parser.parse_args(arguments)


def group_sizes_of(groups: str, num_experts: int, rows: int, block: int) -> np.ndarray:
    """Return multiples of `block` whose sum is `rows`."""
    weights = np.ones(num_experts) if groups == UNIFORM else 1 / np.arange(1, num_experts + 1)
    blocks = np.floor(weights / weights.sum() * (rows // block)).astype(np.int32)
    blocks[: rows // block - blocks.sum()] += 1
    return blocks * block


def product_of(name: str, matmul: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a product as a function of its operands and of group sizes; XLA removes unused products."""
    if name in ("up", "down"):
        return matmul

    def of_rows(gradient: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
        rows = jnp.zeros((len(gradient), matrices.shape[1]), gradient.dtype)
        return jax.vjp(lambda rows: matmul(rows, matrices, group_sizes), rows)[1](gradient)[0]

    def of_matrices(rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
        matrices = jnp.zeros((len(group_sizes), rows.shape[1], gradient.shape[1]), rows.dtype)
        return jax.vjp(lambda matrices: matmul(rows, matrices, group_sizes), matrices)[1](gradient)[0]

    return of_rows if name == "gradient of rows" else of_matrices


def dense_product_of(name: str, num_experts: int) -> Callable[..., jax.Array]:
    """Return the product of as many groups of one size."""

    def product(left: jax.Array, right: jax.Array, _: jax.Array) -> jax.Array:
        left, right = (
            value.reshape(num_experts, -1, value.shape[-1]) if value.ndim == 2 else value
            for value in (left, right)
        )
        result = jnp.einsum(EINSUM[name], left, right)
        return result if name == "gradient of matrices" else result.reshape(-1, result.shape[-1])

    return product


def cases_of(options: argparse.Namespace, product: str, num_experts: int, block: int) -> dict[str, Any]:
    """Return the functions to be compared, dense and triton first."""
    if product in HALVES:
        all_cases = half_cases(product, dense_product_of("up", num_experts), block)
        return {name: case for name, case in all_cases.items() if name.partition(",")[0] in options.matmuls}
    cases: dict[str, Any] = {}
    if DENSE in options.matmuls:
        cases[DENSE] = dense_product_of(product, num_experts)
    if TRITON in options.matmuls:
        cases[TRITON] = product_of(product, partial(triton_matmul, block=block))
    if MOSAIC in options.matmuls:
        for name in options.tiles:
            matmul = partial(mosaic_matmul, block=block, tiles=TILES[name])
            cases[f"{MOSAIC}, {name}"] = product_of(product, matmul)
    if RAGGED_DOT in options.matmuls and product == "up":  # slow: its gradients say nothing new
        cases[RAGGED_DOT] = jax.lax.ragged_dot
    return cases


def operands_of(problem: Problem) -> dict[str, jax.Array]:
    """Return what `OPERANDS` names, of one device, every row live."""
    assert problem.intermediate is not None
    rows, num_experts = problem.tokens * problem.topk, problem.num_local_experts
    hidden, intermediate = problem.hidden, problem.intermediate
    shapes = {
        "rows": (rows, hidden),
        "matrices": (num_experts, hidden, intermediate),
        "others": (num_experts, hidden, intermediate),
        "hidden": (rows, intermediate),
        "gate": (rows, intermediate),
        "second": (num_experts, intermediate, hidden),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, problem.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def measure(
    options: argparse.Namespace, problem: Problem, part: str, compiled: dict[str, Future[Any]], operands: Any,
    flops: float,
) -> list[Result]:  # fmt: skip
    """Time the cases of one product and one kind of groups."""
    results, timers, deviations, reference = {}, {}, {}, None
    for name, program in compiled.items():
        try:
            run = partial(program.result(), *operands)
            out = jax.block_until_ready(run())
        except Exception as error:  # one case that fails does not lose the others
            results[name] = Result(problem, part, name, failure=repr(error).splitlines()[0][:120])
            continue
        timers[name] = queued(run, options.queued)
        if name != DENSE or part.endswith(UNIFORM):
            reference = out if reference is None else reference
            deviations[name] = f"{float(_deviation(out, reference)):.0e}"
    seconds = {name: Spread.of(times) for name, times in interleaved(timers, options.trials).items()}
    for name, spread in seconds.items():
        values = {"TF/s": flops / spread.median / 1e12, "deviation": deviations.get(name)}
        if DENSE in seconds:
            values["of dense"] = seconds[DENSE].median / spread.median
        results[name] = Result(problem, part, name, {"queued": spread}, values=values)
    return [results[name] for name in compiled]


def _compiled(case: Any, operands: Any) -> Any:
    return jax.jit(case).lower(*operands).compile()


@jax.jit
def _deviation(values: Any, reference: Any) -> jax.Array:
    def of_array(value: jax.Array, reference: jax.Array) -> jax.Array:
        difference = jnp.abs(value.astype(jnp.float32) - reference.astype(jnp.float32))
        return jnp.max(difference) / jnp.max(jnp.abs(reference.astype(jnp.float32)))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(of_array, values, reference))))


def results_of(options: argparse.Namespace, shape: str, problem: Problem) -> Iterator[list[Result]]:
    """Compile the programs of a shape side by side, and time one product after the other."""
    num_experts, rows = problem.num_local_experts, problem.tokens * problem.topk
    block = alignment_for(MOSAIC, rows / num_experts)
    if rows % (block * num_experts):
        raise ValueError(
            f"tokens: expected tokens * topk to be a multiple of {block * num_experts}, that is of {block} "
            f"rows for each of {num_experts} experts, got {rows}; choose another number."
        )
    operands = operands_of(problem)
    programs: dict[str, dict[str, Future[Any]]] = {product: {} for product in options.products}
    with ThreadPoolExecutor() as threads:
        for product, compiled in programs.items():
            avals = (*(operands[name] for name in OPERANDS[product]), jnp.zeros(num_experts, jnp.int32))
            for name, case in cases_of(options, product, num_experts, block).items():
                compiled[name] = threads.submit(_compiled, case, avals)
                if name == DENSE:  # XLA tries several ways on the GPU, which should be idle
                    compiled[name].exception()
    for product, compiled in programs.items():
        for groups in options.groups:
            group_sizes = jnp.asarray(group_sizes_of(groups, num_experts, rows, block))
            of_product = (*(operands[name] for name in OPERANDS[product]), group_sizes)
            flops = 2.0 * rows * operands["matrices"][0].size * (2 if "others" in OPERANDS[product] else 1)
            part = f"{shape}, {product}, {groups}"
            yield measure(options, problem, part, compiled, of_product, flops)


def main(arguments: Sequence[str]) -> int:
    """Measure and report; return the exit status."""
    options = parse(arguments)
    start_jax(1)
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    report = Report(options, MEANING)
    try:
        for shape in options.shapes:
            problem = dataclasses.replace(SHAPES[shape], **given)
            if PRODUCTS in options.parts:
                for results in results_of(options, shape, problem):
                    report.add(results)
            for part, measured in ((NETWORK, networks), (ROUTER, router)):
                if part in options.parts:
                    report.add(measured(problem, shape, options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.draw()
    end_jax()
    return 0
