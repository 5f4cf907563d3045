"""Tables on the terminal and in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells under a title; numbers stand in all columns but the first `text_columns`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def print_tables(tables: Sequence[Table]) -> None:
    """Print as tables where rich is installed, as Markdown where it is not."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(markdown(tables))
        return
    console = Console(width=None if Console().is_terminal else 140)
    for table in tables:
        rich_table = RichTable(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            rich_table.add_column(column, justify="right" if number >= table.text_columns else "left")
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)


def markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown, each under its title."""
    lines = []
    for table in tables:
        lines += [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |"]
        aligned = ("--:" if number >= table.text_columns else "---" for number in range(len(table.columns)))
        lines.append("|" + "|".join(aligned) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)
