"""python -m jax_deepep.bench model: dispatch and combine on 1 to 64 nodes, from rates of links and SMs."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from jax_deepep.bench.command_line import add_sizes, positive_int, positive_ints
from jax_deepep.bench.copies import Copies, Routing, drawn_copies, uniform_copies
from jax_deepep.bench.link_checks import Check, error_tables, measured, published
from jax_deepep.bench.link_model import (
    MACHINES,
    NUM_SMS,
    Machine,
    Mode,
    Op,
    Phases,
    phases,
)
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.report import NONE, Table
from jax_deepep.ops.wire import OF_COMBINE
from jax_deepep.quantization.formats import FORMATS, Format

TOKENS: dict[Mode, int] = {"throughput": 4096, "low_latency": 128}
BFLOAT16 = "none"
WIRES: dict[str, Format | None] = {BFLOAT16: None, **{of.name: of.name for of in FORMATS.values()}}


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Attributes:
        problem: the sizes, with the ranks of all nodes.
        nodes: G.
        routing: the distribution of choices.
        copies: of a token.
        machine: links and SMs.
        mode, num_sms: of the ops.
    """

    problem: Problem
    nodes: int
    routing: Routing
    copies: Copies
    machine: Machine
    mode: Mode
    num_sms: int

    def phases(self, op: Op, wire: Format | None) -> Phases | None:
        """Return the times of an op; None where combine does not take the format."""
        if op == "combine" and wire is not None and wire not in OF_COMBINE:
            return None
        return phases(op, self.problem, self.nodes, self.copies, self.machine,
                      mode=self.mode, num_sms=self.num_sms, wire=wire)  # fmt: skip


def settings(options: argparse.Namespace) -> Iterator[list[Setting]]:
    """Yield what each table shows."""

    @cache
    def copies_of(problem: Problem, nodes: int, routing: Routing) -> Copies:
        if routing == "uniform":
            return uniform_copies(problem, nodes)
        return drawn_copies(problem, nodes, routing, num_groups=options.num_groups,
                            topk_groups=options.topk_groups, skew=options.skew)  # fmt: skip

    for mode in options.modes:
        tokens, num_sms = options.tokens or TOKENS[mode], options.num_sms or NUM_SMS[mode]
        for name in options.machines:
            lines = []
            for routing in options.routings:
                for nodes in options.nodes:
                    ranks = nodes * options.ranks_per_node
                    problem = Problem(
                        hidden=options.hidden, topk=options.topk, experts=max(options.experts, ranks),
                        devices=ranks, layout=options.layout,
                    )  # fmt: skip
                    copies = copies_of(problem, nodes, routing)
                    problem = dataclasses.replace(problem, tokens=tokens)
                    lines.append(Setting(problem, nodes, routing, copies, MACHINES[name], mode, num_sms))
            yield lines


def predictions(lines: Sequence[Setting], wires: Sequence[str]) -> Table:
    """Return a table of times, of copies per token, and of the bytes of plain rows between nodes."""
    one = lines[0]
    columns = ["routing", "nodes", "E", "nodes of a token", "ranks of a token", "network MB"]
    columns += [_name(op, wire) for wire in wires for op in get_args(Op)]
    cells = []
    for line in lines:
        copies, problem = line.copies, line.problem
        crossing = copies.nodes * (line.nodes - 1) / line.nodes * problem.tokens
        row = [line.routing, str(line.nodes), str(problem.experts)]
        row += [f"{copies.nodes:.2f}", f"{copies.ranks:.2f}", f"{crossing * problem.row_bytes / 1e6:.1f}"]
        row += [_times(line.phases(op, WIRES[wire])) for wire in wires for op in get_args(Op)]
        cells.append(row)
    title = (
        f"us, pipelined (in turn): {one.machine.name}, {one.mode} mode, T={one.problem.tokens} "
        f"H={one.problem.hidden} K={one.problem.topk} {one.problem.layout}-major, {one.num_sms} SMs"
    )
    return Table(title, columns, cells, text_columns=("routing",))


def _name(op: str, wire: str) -> str:
    return f"{op}, {'bfloat16' if wire == BFLOAT16 else wire}"


def _times(of: Phases | None) -> str:
    if of is None:
        return NONE
    pipelined, in_turn = f"{of.pipelined:.0f}", f"{of.in_turn:.0f}"
    return pipelined if pipelined == in_turn else f"{pipelined} ({in_turn})"


def draw(
    tables: Sequence[Sequence[Setting]], wires: Sequence[str], checks: Sequence[Check], path: Path
) -> None:
    """Draw the times by nodes, from pipelined to in turn, and modelled over reported times.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    rows = -(-(len(tables) + bool(checks)) // 2)
    figure = Figure(figsize=(11, 1 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, lines in zip(panels, tables, strict=False):
        shown = [line for line in lines if line.routing == lines[0].routing]
        for wire in wires:
            for op in get_args(Op):
                times = [line.phases(op, WIRES[wire]) for line in shown]
                if None not in times:
                    _band(axes, [line.nodes for line in shown], times, _name(op, wire))
        one = shown[0]
        axes.set_title(
            f"{one.machine.name}, {one.mode}, T={one.problem.tokens}, {one.routing}", fontsize="medium"
        )
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="us: pipelined to in turn")
        axes.set_xticks([line.nodes for line in shown], [str(line.nodes) for line in shown], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize="small")
    for axes in panels[len(tables) + bool(checks) :]:
        axes.set_axis_off()
    if checks:
        _scatter(panels[len(tables)], checks)
    figure.savefig(path, dpi=120)


def _band(axes: Any, nodes: Sequence[int], times: Sequence[Any], name: str) -> None:
    pipelined = [of.pipelined for of in times]
    [line] = axes.plot(nodes, pipelined, marker=".", label=name)
    axes.fill_between(nodes, pipelined, [of.in_turn for of in times], color=line.get_color(), alpha=0.15)


def _scatter(axes: Any, checks: Sequence[Check]) -> None:
    for source in dict.fromkeys(check.source for check in checks):
        group = [check for check in checks if check.source == source]
        ratios = [check.modelled / check.reported for check in group]
        axes.scatter([check.reported for check in group], ratios, s=12, label=source)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="reported us", ylabel="modelled / reported", ylim=(0, 1.3))
    axes.legend(fontsize="xx-small", loc="lower right")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench model",
        description="Predict dispatch and combine on several nodes, from the rates of links and SMs, in two "
        "ways: rows pass on from link to link in chunks (pipelined), or a node's rows as a whole (in turn). "
        "Compare the model with what was published, and measured by us. Nothing is measured here. Without "
        "--tokens, throughput mode has 4096, low latency 128.",
    )
    sizes = {"hidden": 7168, "topk": 8, "experts": 256}  # DeepSeek-V3
    add_sizes(parser, ("tokens", *sizes), sizes)
    add = parser.add_argument
    add(
        "--nodes",
        type=positive_ints,
        default=[1, 2, 4, 8, 16, 32, 64],
        help="numbers of nodes (1,2,4,8,16,32,64)",
    )
    add("--ranks-per-node", type=positive_int, default=8, help="GPUs of a node (%(default)s)")
    add("--machines", nargs="+", choices=MACHINES, default=[*MACHINES], help="with CX7 400G per GPU (all)")
    add("--modes", nargs="+", choices=get_args(Mode), default=[*get_args(Mode)], help="(all)")
    add("--layout", choices=("token", "expert"), default="token", help="of the received rows (%(default)s)")
    add("--num-sms", type=positive_int, help="of an op (24, low latency 96)")
    add(
        "--wires",
        nargs="+",
        choices=WIRES,
        default=["none", "fp8"],
        help="formats of rows on links (none fp8)",
    )
    add(
        "--routings",
        nargs="+",
        choices=get_args(Routing),
        default=[*get_args(Routing)],
        help="choices of experts (all)",
    )
    add("--num-groups", type=positive_int, default=8, help="of group_limited (%(default)s)")
    add("--topk-groups", type=positive_int, default=4, help="of group_limited (%(default)s)")
    add("--skew", type=float, default=1.0, help="s in the popularity 1 / n^s of skewed (%(default)s)")
    add("--no-checks", dest="checks", action="store_false", help="leave out the comparison with measurements")
    add("--plot", type=Path, metavar="PATH", help="draw there (PNG, SVG, PDF)")
    options = parser.parse_args(arguments)
    try:
        options.tables = list(settings(options))
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    """Predict, print and draw; return the exit status."""
    options = parse(arguments)
    checks = [*published(), *measured()] if options.checks else []
    for table in error_tables(checks) if checks else []:
        print(table.markdown())
    for lines in options.tables:
        print(predictions(lines, options.wires).markdown())
    if options.plot:
        draw(options.tables, options.wires, checks, options.plot)
        print(f"drawn: {options.plot}")
    return 0
