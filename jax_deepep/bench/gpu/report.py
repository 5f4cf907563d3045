"""Results as tables, Markdown and JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_deepep.bench.gpu.measurement import Result
from jax_deepep.bench.gpu.rival import Rival
from jax_deepep.bench.tables import Table
from jax_deepep.bench.timing import Spread

MEANING = (
    "Device us: from the first instruction of the op's kernel to its last, waits for the others included; "
    "all ranks begin together, with a flushed cache; of the slowest rank in each round, median (p10–p90). "
    "Host us: the same of a program that holds the op alone, from its launch until its results are there. "
    "Floor: the best of the bench's plain kernels that move the same rows between the same ranks with as "
    "many SMs, on the device. MB: rows that all ranks receive × bytes of a row, each counted once. Rows are "
    "bfloat16. C is the smallest capacity, a multiple of 128 (of 8 below 1024 rows), that drops nothing."
)

COLUMNS = (
    "op", "layout", "floor is", "SMs", "MB", "device us", "host us", "floor us", "op / floor", "GB/s",
)  # fmt: skip


def microseconds(spread: Spread) -> str:
    """Return median and percentiles."""
    return spread.text(1e6, digits=0)


def _cells(result: Result) -> list[str]:
    floor = result.floors[result.best_floor]
    return [
        result.op,
        result.problem.layout,
        result.best_floor,
        str(result.num_sms),
        f"{result.bytes_moved / 1e6:.1f}",
        microseconds(result.device),
        microseconds(result.host),
        microseconds(floor),
        f"{result.over_floor:.2f}",
        f"{result.rate:.0f}",
    ]


def table_of(results: Sequence[Result]) -> Table:
    """Return the results on one problem as a table."""
    first = results[0]
    title = f"{first.problem.name} (rounds: {first.device.runs})"
    return Table(title, COLUMNS, [_cells(result) for result in results], text_columns=3)


def table_of_rival(rival: Rival) -> Table:
    """Return XLA's way as a table, or why there is none."""
    rows = [[op, microseconds(spread)] for op, spread in rival.host.items()]
    failure = [[f"not measured: {rival.failure}", "–"]] if rival.failure else []
    columns = ("argsort + gather + jax.lax.ragged_all_to_all, there and back", "host us")
    return Table(rival.problem.name, columns, rows + failure)


def write_json(
    results: Sequence[Result], rivals: Sequence[Rival], around: dict[str, Any], path: Path
) -> None:
    """Write all numbers and what they depend on."""
    entries = [
        {
            **dataclasses.asdict(result),
            "best_floor": result.best_floor,
            "over_floor": result.over_floor,
            "gigabytes_per_second": result.rate,
        }
        for result in results
    ]
    document = {
        **around,
        "meaning": MEANING,
        "results": entries,
        "rivals": [dataclasses.asdict(rival) for rival in rivals],
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
