"""Results as a table on the terminal, Markdown, JSON and a plot."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_deepep.bench.measurement import MEMCPY, Result
from jax_deepep.bench.tables import Table, markdown, print_tables

BYTES_MOVED = (
    "Bytes moved are the rows that all devices receive (live rows, without padding) × H × bytes per element, "
    "each counted once: dispatch copies them, combine reads them, dispatch + combine does both; backward of "
    "dispatch reads their gradients as combine does, backward of combine writes theirs as dispatch does. "
    "memcpy copies as many bytes between warm buffers, with one thread per usable core, in the same rounds."
)

COLUMNS = ("op", "MB moved", "native ms", "xla ms", "memcpy ms", "xla / native", "native GB/s", "of memcpy")


def _milliseconds(result: Result, contender: str) -> str:
    spread = result.seconds.get(contender)
    if spread is None:
        return "–"
    return spread.text(1e3, digits=1 if spread.median >= 0.01 else 2)


def _cells(result: Result) -> list[str]:
    native = "native" in result.seconds
    ratio = result.xla_over_native
    return [
        result.op,
        f"{result.bytes_moved / 1e6:.0f}",
        _milliseconds(result, "native"),
        _milliseconds(result, "xla"),
        _milliseconds(result, MEMCPY),
        "–" if ratio is None else f"{ratio:.1f}",
        f"{result.rate('native'):.2f}" if native else "–",
        f"{result.share_of_memcpy('native'):.0%}" if native else "–",
    ]


def _title(result: Result) -> str:
    launch = 1e3 * result.launch.median
    runs = result.seconds[MEMCPY].runs
    return f"{result.problem.name} (rounds: {runs}; launch of an empty program: {launch:.2f} ms)"


def _by_problem(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.problem.name, []).append(result)
    return list(groups.values())


def _tables(results: Sequence[Result]) -> list[Table]:
    return [Table(_title(group[0]), COLUMNS, [_cells(r) for r in group]) for group in _by_problem(results)]


def print_table(results: Sequence[Result]) -> None:
    """Print the results, as a table where rich is installed, as Markdown where it is not."""
    print_tables(_tables(results))


def markdown_table(results: Sequence[Result]) -> str:
    """Return the results as Markdown: one table per problem."""
    return markdown(_tables(results))


def write_json(results: Sequence[Result], surroundings: dict[str, Any], path: Path) -> None:
    """Write all results and what they depend on."""
    entries = [
        {
            "problem": result.problem.as_dict(),
            "op": result.op,
            "bytes_moved": result.bytes_moved,
            "seconds": {name: dataclasses.asdict(spread) for name, spread in result.seconds.items()},
            "gigabytes_per_second": {name: result.rate(name) for name in result.seconds},
            "share_of_memcpy": {name: result.share_of_memcpy(name) for name in result.seconds},
            "xla_over_native": result.xla_over_native,
            "launch_seconds": result.launch.median,
        }
        for result in results
    ]
    document = {**surroundings, "bytes_moved": BYTES_MOVED, "results": entries}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Draw GB/s by op, a panel per problem.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    groups = _by_problem(results)
    figure = Figure(figsize=(9, 2.8 * len(groups)), layout="constrained")
    for axes, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        contenders = list(group[0].seconds)
        width = 0.8 / len(contenders)
        for number, contender in enumerate(contenders):
            places = [place + number * width for place in range(len(group))]
            axes.bar(places, [result.rate(contender) for result in group], width, label=contender)
        middles = [place + width * (len(contenders) - 1) / 2 for place in range(len(group))]
        axes.set_xticks(middles, [result.op for result in group])
        axes.set(ylabel="GB/s", title=group[0].problem.name)
        axes.title.set_fontsize("medium")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
