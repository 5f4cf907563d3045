"""CPU seconds of every folder of tests, in a table at the end of a run, against `cpu_budgets.toml`."""

import os
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
BUDGETS: dict[str, float] = tomllib.loads((TESTS / "cpu_budgets.toml").read_text())
ROOM = 1.5  # CPU seconds grow with the load of a machine, too
# A run fails over a folder's budget only where this is set: machines differ.
ARE_CHECKED = "JAX_DEEPEP_CPU_BUDGETS" in os.environ


def cpu_seconds() -> float:
    """Return user and system time of this process and of those that it started and has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CpuBudgets:
    """A plugin of pytest."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self.seconds[item.path.relative_to(TESTS).parts[0]] += cpu_seconds() - before

    @property
    def exceeded(self) -> set[str]:
        return {folder for folder, spent in self.seconds.items() if spent > ROOM * BUDGETS.get(folder, 0)}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if ARE_CHECKED and self.exceeded:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.seconds:
            terminalreporter.section("CPU seconds")
        for folder, spent in sorted(self.seconds.items()):
            budget = f"budget {BUDGETS[folder]}" if folder in BUDGETS else "no budget in cpu_budgets.toml"
            over = f", exceeded by more than half{': FAILED' * ARE_CHECKED}" * (folder in self.exceeded)
            terminalreporter.write_line(f"{folder:20}{spent:7.0f}  ({budget}{over})")
