"""Parts of a layer without communication, for `bench matmuls`: networks of experts, and the router."""

import argparse
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep.bench.layers import FORWARD, FORWARD_BACKWARD, UNFUSED, experts_programs
from jax_deepep.bench.problem import WORST, Problem
from jax_deepep.bench.report import Result, Spread
from jax_deepep.bench.trials import Timer, interleaved, queued
from jax_deepep.moe.grouped_matmul.mosaic import mosaic_matmul
from jax_deepep.moe.grouped_matmul.triton import triton_matmul
from jax_deepep.moe.halves import FusedHalves, Halves

FUSED, TRITON = "mosaic", "triton"
CASES = (TRITON, UNFUSED, FUSED)
# Parts of networks: which operands each has, of those in `matmuls.operands_of`.
HALVES = {
    "gate and up": ("rows", "matrices", "others"),
    "gradients of gate and up": ("rows", "second", "gate", "hidden"),
    "gradient of rows, both": ("gate", "hidden", "matrices", "others"),
}
CAPACITIES = ("1.25x", WORST)
PRECISIONS = {
    "HIGHEST": lax.Precision.HIGHEST,
    "BF16_BF16_F32_X6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
    "BF16_BF16_F32_X3": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
}


def half_of(part: str, halves: Halves) -> Callable[..., Any]:
    """Return a part of a network as a function of its operands and of group sizes."""

    def ones(rows: Any) -> jax.Array:
        return jnp.ones(len(rows), jnp.float32)

    def first(rows: Any, matrices: Any, others: Any, sizes: Any) -> Any:
        products, hidden = halves.first(rows, ones(rows), (matrices, others), sizes)
        return *products, hidden

    def of_products(of_y: Any, wo: Any, gate: Any, up: Any, sizes: Any) -> Any:
        return halves.gradients_of_products((gate, up), ones(of_y), wo, sizes, of_y)[:2]

    def of_rows(gate: Any, up: Any, matrices: Any, others: Any, sizes: Any) -> Any:
        rows = jnp.zeros((len(gate), matrices.shape[1]), gate.dtype)
        return halves.gradient_of_rows(rows, (matrices, others), sizes, (gate, up))

    parts: tuple[Callable[..., Any], ...] = (first, of_products, of_rows)
    return dict(zip(HALVES, parts, strict=True))[part]


def half_cases(part: str, dense: Any, block: int) -> dict[str, Callable[..., Any]]:
    """Return the cases of a part; `dense` multiplies groups of one size."""
    silu = jax.nn.silu
    halves = {
        "dense": Halves(dense, silu),
        TRITON: Halves(partial(triton_matmul, block=block), silu),
        UNFUSED: Halves(partial(mosaic_matmul, block=block), silu),
        FUSED: FusedHalves(partial(mosaic_matmul, block=block), silu, block),
    }
    return {name: half_of(part, of) for name, of in halves.items()}


def networks(problem: Problem, shape: str, options: argparse.Namespace) -> list[Result]:
    """Measure a device's experts, forward and with all gradients, under each capacity."""
    cases = [case for case in CASES if case.partition(",")[0] in options.matmuls]
    programs: dict[tuple[str, str], dict[str, Future[Any]]] = {}
    with ThreadPoolExecutor() as threads:
        for capacity in CAPACITIES:
            for case in cases:
                both = experts_programs(dataclasses.replace(problem, capacity=capacity), case)
                programs[case, capacity] = {
                    name: threads.submit(_compiled, *program) for name, program in both.items()
                }
    timers: dict[tuple[str, str, str], Timer] = {}
    temporary, failures = {}, {}
    for key, of_case in programs.items():
        try:
            for name, future in of_case.items():
                run, temporary[key] = future.result()
                jax.block_until_ready(run())
                timers[*key, name] = queued(run, options.queued)
        except Exception as error:  # one case that fails does not lose the others
            failures[key] = repr(error).splitlines()[0][:120]
    names = {" | ".join(key): key for key in timers}
    times = interleaved({name: timers[key] for name, key in names.items()}, options.trials)
    seconds = {names[name]: Spread.of(values) for name, values in times.items()}
    assert problem.intermediate is not None
    flops = 6.0 * problem.tokens * problem.topk * problem.hidden * problem.intermediate
    results = []
    for key in programs:
        part, label = f"{shape}, network", f"{key[0]}, C={key[1]}"
        if key in failures:
            results.append(Result(problem, part, label, failure=failures[key]))
            continue
        spreads = {name: seconds[*key, name] for name in (FORWARD, FORWARD_BACKWARD)}
        values = {
            "TF/s, forward": flops / spreads[FORWARD].median / 1e12,
            "TF/s": 3 * flops / spreads[FORWARD_BACKWARD].median / 1e12,
            "temporary MiB": temporary[key],
        }
        smallest = seconds.get((key[0], CAPACITIES[0], FORWARD_BACKWARD))
        if smallest is not None:
            values[f"of C={CAPACITIES[0]}"] = spreads[FORWARD_BACKWARD].median / smallest.median
        results.append(Result(problem, part, label, spreads, values=values))
    return results


def _compiled(function: Callable[..., Any], operands: Any) -> tuple[Callable[[], Any], float]:
    """Return (the compiled function of these operands, MiB of temporaries)."""
    program = jax.jit(function).lower(*operands).compile()
    size = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    return partial(program, *operands), size / 2**20


def router(problem: Problem, shape: str, options: argparse.Namespace) -> list[Result]:
    """Measure x · gate in each precision, and its largest error relative to the largest logit."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (problem.tokens, problem.hidden), problem.dtype)
    gate = jax.random.normal(keys[1], (problem.hidden, problem.experts)) / problem.hidden**0.5
    exact = np.asarray(x, np.float64) @ np.asarray(gate, np.float64)
    results, timers, values = {}, {}, {}
    for name, precision in PRECISIONS.items():

        def both(x: jax.Array, gate: jax.Array, precision: Any = precision) -> Any:
            def logits(x: jax.Array, gate: jax.Array) -> jax.Array:
                return jnp.matmul(x.astype(jnp.float32), gate, precision=precision)

            out, pull_back = jax.vjp(logits, x, gate)
            return out, pull_back(out)

        try:
            program = jax.jit(both).lower(x, gate).compile()
            out, _ = jax.block_until_ready(program(x, gate))
        except Exception as error:  # CPUs lack the others
            failure = repr(error).splitlines()[0][:120]
            results[name] = Result(problem, f"{shape}, router", name, failure=failure)
            continue
        wrong = np.abs(np.asarray(out, np.float64) - exact).max() / np.abs(exact).max()
        timers[name] = queued(partial(program, x, gate), options.queued)
        values[name] = {"error": f"{wrong:.1e}"}
    for name, times in interleaved(timers, options.trials).items():
        spreads = {FORWARD_BACKWARD: Spread.of(times)}
        results[name] = Result(problem, f"{shape}, router", name, spreads, values=values[name])
    return [results[name] for name in PRECISIONS]
