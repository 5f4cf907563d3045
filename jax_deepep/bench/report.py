"""Results of all commands, as tables, JSON and a plot."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_deepep.bench.environment import environment
from jax_deepep.bench.problem import Problem

NONE = "–"


@dataclass(frozen=True)
class Spread:
    """Seconds of many trials.

    Attributes:
        median, p10, p90: seconds.
        trials: number of trials.
    """

    median: float
    p10: float
    p90: float
    trials: int

    @classmethod
    def of(cls, seconds: Any) -> "Spread":
        """Summarise `seconds`."""
        p10, median, p90 = np.percentile(seconds, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), len(seconds))

    def text(self, per_second: float) -> str:
        """Return "median (p10–p90)" in a unit with `per_second` per second."""
        digits = 0 if per_second * self.median >= 100 else 1 if per_second * self.median >= 10 else 2
        median, p10, p90 = (f"{per_second * s:.{digits}f}" for s in (self.median, self.p10, self.p90))
        return f"{median} ({p10}–{p90})"


@dataclass(frozen=True)
class Result:
    """The measurement of one case on one problem.

    Attributes:
        problem: the shape.
        part: the table with the case: "ops", "chain", "layer", …
        case: its name there.
        seconds: of the case, by the kind of timer; baselines and bytes are compared with the first.
        baselines: seconds of the same work, by name.
        bytes_moved: in `seconds`; 0 where not applicable.
        values: further values by name; tables show only numbers and texts.
        failure: why there are no numbers, or "".
    """

    problem: Problem
    part: str
    case: str
    seconds: dict[str, Spread] = field(default_factory=dict)
    baselines: dict[str, Spread] = field(default_factory=dict)
    bytes_moved: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def primary(self) -> Spread | None:
        """The first of `seconds`."""
        return next(iter(self.seconds.values()), None)

    @property
    def best_baseline(self) -> str | None:
        """The name of the fastest baseline."""
        return min(self.baselines, key=lambda name: self.baselines[name].median, default=None)

    @property
    def over_baseline(self) -> float | None:
        """Time of the case over that of the best baseline."""
        if self.primary is None or self.best_baseline is None:
            return None
        return self.primary.median / self.baselines[self.best_baseline].median

    @property
    def rate(self) -> float | None:
        """GB/s (10⁹ bytes per second)."""
        return self.bytes_moved / self.primary.median / 1e9 if self.primary and self.bytes_moved else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived values."""
        derived = ("best_baseline", "over_baseline", "rate")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Result":
        """Invert `to_json`."""
        values: dict[str, Any] = {name: entry[name] for name in cls.__dataclass_fields__}
        values["problem"] = Problem(**entry["problem"])
        for name in ("seconds", "baselines"):
            values[name] = {timed: Spread(**spread) for timed, spread in entry[name].items()}
        return cls(**values)


@dataclass(frozen=True)
class Table:
    """Cells under a title; all columns are numbers, except for `text_columns`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: tuple[str, ...] = ("case", "best baseline")

    def markdown(self) -> str:
        """Return the table as Markdown under its title, in columns of even width."""
        left = [name in self.text_columns for name in self.columns]
        widths = [max(3, *map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            sized = zip(cells, widths, left, strict=True)
            return (
                "| "
                + " | ".join(c.ljust(width) if text else c.rjust(width) for c, width, text in sized)
                + " |"
            )

        rule = line(
            [("-" * w if text else "-" * (w - 1) + ":") for w, text in zip(widths, left, strict=True)]
        )
        return "\n".join([f"**{self.title}**", "", line(self.columns), rule, *map(line, self.rows), ""])


def tables_of(results: Iterable[Result], unit: str) -> list[Table]:
    """Return a table for each part and problem, times in "ms" or "us", without empty columns."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.part, result.problem.name), []).append(result)
    return [_table(f"{part}: {name}", group, unit) for (part, name), group in groups.items()]


def _table(title: str, group: list[Result], unit: str) -> Table:
    per_second = {"ms": 1e3, "us": 1e6}[unit]

    def number(value: float | None, digits: int) -> str:
        return NONE if value is None else f"{value:.{digits}f}"

    def spread(value: Spread | None) -> str:
        return NONE if value is None else value.text(per_second)

    columns: dict[str, Callable[[Result], str]] = {
        "case": lambda r: f"{r.case}: {r.failure}" if r.failure else r.case
    }
    for name in dict.fromkeys(name for result in group for name in result.values):
        columns[name] = lambda r, name=name: _cell(r.values.get(name))  # type: ignore[misc]
    columns["MB"] = lambda r: number(r.bytes_moved / 1e6 or None, 1)
    for name in dict.fromkeys(name for result in group for name in result.seconds):
        columns[f"{name} {unit}"] = lambda r, name=name: spread(r.seconds.get(name))  # type: ignore[misc]
    columns["best baseline"] = lambda r: r.best_baseline or NONE
    columns[f"baseline {unit}"] = lambda r: spread(r.baselines.get(r.best_baseline or ""))
    columns["/ baseline"] = lambda r: number(r.over_baseline, 2)
    columns["GB/s"] = lambda r: number(r.rate, 1)
    cells = {name: [cell(result) for result in group] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {NONE}}
    trials = next((str(r.primary.trials) for r in group if r.primary), None)
    title = f"{title} (trials: {trials})" if trials else title
    return Table(title, list(cells), list(zip(*cells.values(), strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return NONE
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_plot(results: Sequence[Result], unit: str, path: Path) -> None:
    """Draw the times of all cases and their best baselines, a panel per table.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.primary:
            groups.setdefault(f"{result.part}: {result.problem.name}", []).append(result)
    figure = Figure(figsize=(9, 1 + 2.8 * len(groups)), layout="constrained")
    panels = figure.subplots(max(len(groups), 1), squeeze=False)[:, 0]
    for axes, (title, group) in zip(panels, groups.items(), strict=False):
        timed = list(dict.fromkeys(name for result in group for name in result.seconds))
        bars = {name: [result.seconds.get(name) for result in group] for name in timed}
        if any(result.baselines for result in group):
            bars["best baseline"] = [result.baselines.get(result.best_baseline or "") for result in group]
        width = 0.8 / len(bars)
        for index, (name, spreads) in enumerate(bars.items()):
            heights = [(spread.median if spread else 0) * {"ms": 1e3, "us": 1e6}[unit] for spread in spreads]
            axes.bar([case + index * width for case in range(len(group))], heights, width, label=name)
        axes.set_xticks([case + 0.4 - width / 2 for case in range(len(group))], [r.case for r in group])
        axes.set(ylabel=unit, title=title)
        axes.title.set_fontsize("medium")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_json(path: Path, environment: Mapping[str, Any], meaning: str, results: Sequence[Result]) -> None:
    """Write results and their environment."""
    document = {**environment, "meaning": meaning, "results": [result.to_json() for result in results]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Return the environment and the results that `write_json` wrote."""
    document = json.loads(path.read_text())
    return document, [Result.from_json(entry) for entry in document.pop("results")]


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options for output files."""
    outputs = parser.add_argument_group("results")
    outputs.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    outputs.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there")
    outputs.add_argument("--plot", type=Path, metavar="PATH", help="draw there (PNG, SVG, PDF)")


class Report:
    """Prints and stores results in the first process, as soon as they are measured.

    Args:
        options: of a command line with `add_outputs`.
        meaning: explains the numbers.
    """

    def __init__(self, options: argparse.Namespace, meaning: str) -> None:
        self.results: list[Result] = []
        self._options = options
        self._meaning = meaning
        self._first = jax.process_index() == 0
        self._unit = "us" if jax.devices()[0].platform == "gpu" else "ms"
        self._environment = environment()
        if self._first:
            facts = self._environment
            print(f"{facts['processor']}, {facts['cores']} cores; {facts['devices']}; {facts['versions']}")
            print(meaning, flush=True)

    def add(self, results: Iterable[Result]) -> None:
        """Print the table of the results and rewrite the files."""
        results = list(results)
        self.results += results
        if not self._first:
            return
        print("\n".join(table.markdown() for table in tables_of(results, self._unit)), flush=True)
        if self._options.json:
            write_json(self._options.json, self._environment, self._meaning, self.results)
        if self._options.markdown:
            tables = tables_of(self.results, self._unit)
            self._options.markdown.write_text("\n".join(table.markdown() for table in tables))

    def draw(self, draw: Callable[[Path], None] | None = None) -> None:
        """Draw the plot, if requested: bars of times, or `draw`."""
        if self._first and self._options.plot:
            if draw is None:
                write_plot(self.results, self._unit, self._options.plot)
            else:
                draw(self._options.plot)
