"""The commands of python -m jax_deepep.bench: see COMMANDS."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("ops", "moe", "matmuls", "overlap", "routing", "formats", "model", "check")


def main(arguments: Sequence[str]) -> int:
    """Run a command, `ops` where none is named; return the exit status."""
    command, rest = "ops", list(arguments)
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
    if command not in COMMANDS:
        print(f"command: expected {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}, got {command!r}; "
              "each has its --help.", file=sys.stderr)  # fmt: skip
        return 2
    status: int = importlib.import_module(f"jax_deepep.bench.{command}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
