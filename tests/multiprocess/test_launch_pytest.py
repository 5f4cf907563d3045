"""pytest under the launcher: the same tests on every rank, and one report of them."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launcher_runs import launch, program
from own_processes import starts_its_own_processes

from jax_deepep.launch.inside_rank.pytest_plugin import _reject_conflicts

pytestmark = starts_its_own_processes

SUM = """
import jax, jax.numpy as jnp, pathlib, pytest, time
from jax.experimental.multihost_utils import process_allgather

def test_every_rank_is_here():
    ranks = process_allgather(jnp.ones(()) * jax.process_index())
    assert ranks.sum() == sum(range(jax.process_count()))
"""


def run_pytest(folder: Path, text: str, *options: str, ranks: int = 2) -> tuple[int, str]:
    program(folder, SUM + text, "test_sample.py")
    return launch(
        "-n", str(ranks), "--platform", "cpu", "--grace", "1", "--log-dir", folder / "log",
        "--", sys.executable, "-m", "pytest", "test_sample.py", *options, cwd=folder,
    )  # fmt: skip


def test_a_failure_on_one_rank_is_reported_with_the_rank(tmp_path: Path) -> None:
    text = """
def test_only_rank_one_fails():
    assert jax.process_index() == 0, "not rank zero"

def test_all_fail():
    assert jax.process_count() == 99

def test_rank_one_is_through_before_the_others():
    assert jax.process_index() == 0
    time.sleep(1)
    pathlib.Path("rank_zero_is_through").touch()

def test_the_next_one_begins_when_all_are_through():
    assert pathlib.Path("rank_zero_is_through").exists()
    test_every_rank_is_here()
"""
    status, output = run_pytest(tmp_path, text, "--junitxml", "report.xml")
    assert status == 1, output
    assert "1 failed, 4 passed" in output
    assert "FAILED test_sample.py::test_only_rank_one_fails on rank 1 of ranks 0-1" in output
    assert "FAILED test_sample.py::test_all_fail on ranks 0-1 of ranks 0-1" in output
    assert "[1] E       AssertionError: not rank zero" in output
    summary = output[output.index("[launch] FAILED") :]
    assert summary.count("test_all_fail on") == 1
    assert "3 failed, 2 passed" in (tmp_path / "log" / "rank1.log").read_text()
    assert (tmp_path / "report.xml").exists()
    assert (tmp_path / "report.rank1.xml").exists()


def test_a_hang_ends_with_the_stacks_of_every_rank(tmp_path: Path) -> None:
    text = """
def rank_one_sleeps_here():
    time.sleep(300)

def test_hangs():
    if jax.process_index() == 1:
        rank_one_sleeps_here()
    assert process_allgather(jnp.ones(())).sum() == 2
"""
    # The other rank's deadline is later, so that its stacks are dumped only on request.
    (tmp_path / "conftest.py").write_text(
        "import os\n"
        "def pytest_cmdline_main(config):\n"
        "    config.option.launch_test_timeout = {'0': 200.0, '1': 12.0}["
        "os.environ['JAX_DEEPEP_LAUNCH_RANK']]\n"
    )
    status, output = run_pytest(tmp_path, text)
    assert status == 1, output
    assert "NOT FINISHED test_sample.py::test_hangs on ranks 0-1 of ranks 0-1" in output
    stacks = output[output.index("stacks of rank") :]
    assert stacks.index("stacks of rank 0") < stacks.index("stacks of rank 1")
    of_zero, of_one = stacks.split("stacks of rank 1")
    assert "in test_hangs" in of_zero
    assert "process_allgather" in of_zero
    assert "Timeout (" in of_one
    assert "in rank_one_sleeps_here" in of_one
    assert "rank 1 failed first: a test ran past its deadline" in output


def test_a_hang_after_a_failure_ends_the_same_way(tmp_path: Path) -> None:
    """And the failure is reported, although its rank was killed before its own report."""
    text = """
@pytest.fixture
def end_takes_too_long():
    yield
    time.sleep(300 if jax.process_index() == 0 else 0)

def test_fails_and_hangs(end_takes_too_long):
    assert jax.process_index() == 1, "zero is wrong"

def test_never_begun():
    pass
"""
    status, output = run_pytest(tmp_path, text, "--launch-test-timeout", "12")
    assert status == 1, output
    assert "FAILED test_sample.py::test_fails_and_hangs on rank 0 of ranks 0-1" in output
    assert "[0] E       AssertionError: zero is wrong" in output
    assert "NOT FINISHED test_sample.py::test_fails_and_hangs on ranks 0-1 of ranks 0-1" in output
    of_zero, of_one = re.findall(r"stacks of rank \d:\n(.*?)(?=\[launch\])", output, re.DOTALL)
    if "end_takes_too_long" not in of_zero:  # the first rank past the deadline comes last
        of_zero, of_one = of_one, of_zero
    assert "in end_takes_too_long" in of_zero
    assert "pytest_plugin.py" in of_one


def test_different_collections_are_reported_and_a_rank_that_stops_early_keeps_none_waiting(
    tmp_path: Path,
) -> None:
    text = """
import pytest

@pytest.mark.parametrize("rank", [jax.process_index()])
def test_own(rank):
    assert rank == 0

def test_needs_all_ranks():
    test_every_rank_is_here()
"""
    status, output = run_pytest(tmp_path, text, "-x")
    assert status == 1, output
    assert "did not collect the same tests: number 2 is test_sample.py::test_own[0] on rank 0" in output
    assert "FAILED test_sample.py::test_own[1] on rank 1 of ranks 0-1" in output


def test_bad_options_are_explained(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "", "--launch-test-timeout", "0", ranks=1)
    assert status == 4, output
    assert "--launch-test-timeout: expected seconds > 0, for example 300, got 0.0" in output


def test_two_timers_of_the_fault_handler_are_rejected() -> None:
    config = SimpleNamespace(
        getoption=lambda name, default: default, getini={"faulthandler_timeout": "5"}.get
    )
    with pytest.raises(pytest.UsageError, match="use --launch-test-timeout"):
        _reject_conflicts(config)
