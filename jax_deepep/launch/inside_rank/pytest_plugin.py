"""pytest under the launcher: every rank runs the same tests, and the launcher makes one report of them.

The launcher activates this plugin through `PYTEST_PLUGINS`; in a pytest that no launcher started it
does nothing. It joins the job before any test touches a backend, puts a deadline on every test, and records
events for the launcher (`pytest_report`).
"""

import contextlib
import faulthandler
import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import pytest

from jax_deepep import jax_compat
from jax_deepep.launch.inside_rank import python_program
from jax_deepep.launch.rank_identity import LaunchedRank, launched_rank
from jax_deepep.launch_variables import PREFIX

_DEFAULT_TIMEOUT_S = 300.0
_TIMEOUT_VARIABLE = PREFIX + "TEST_TIMEOUT"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the deadline, as an option and as an ini value."""
    parser.getgroup("jax_deepep.launch").addoption(
        "--launch-test-timeout", type=float, default=None, metavar="SECONDS",
        help="Under python -m jax_deepep.launch: a test that takes longer ends the run "
        "with the stacks of every rank. "
        f"Also the ini value launch_test_timeout, or the variable {_TIMEOUT_VARIABLE}. "
        f"Default {_DEFAULT_TIMEOUT_S:g}.",
    )  # fmt: skip
    parser.addini("launch_test_timeout", "deadline of a test under python -m jax_deepep.launch, in seconds")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Join the job, before conftest files and plugins can start a backend."""
    identity = launched_rank()
    plugins = [name for name in os.environ.get("PYTEST_PLUGINS", "").split(",") if name]
    if identity is None or __name__ not in plugins:
        return
    # A pytest that a test starts is no rank: it must not join the job a second time.
    plugins.remove(__name__)
    os.environ["PYTEST_PLUGINS"] = ",".join(plugins)
    _reject_conflicts(config)
    _keep_files_apart(config, identity)
    config.pluginmanager.register(_RankSession(config, identity), "jax_deepep_launch_rank")


def _reject_conflicts(config: pytest.Config) -> None:
    if config.getoption("numprocesses", default=None):
        raise pytest.UsageError(
            "-n/--numprocesses (pytest-xdist): the launcher's ranks are the processes; leave it out"
        )
    with contextlib.suppress(ValueError):
        if float(config.getini("faulthandler_timeout") or 0) > 0:
            raise pytest.UsageError(
                "faulthandler_timeout: Python has one such timer, and the launcher's deadline needs it; "
                "use --launch-test-timeout, or -o faulthandler_timeout=0"
            )


def _keep_files_apart(config: pytest.Config, identity: LaunchedRank) -> None:
    """Give each rank its own files. Rank 0 keeps the given names."""
    if identity.rank == 0:
        return
    for option in ("xmlpath", "basetemp"):
        path = config.getoption(option, default=None)
        if path:
            path = Path(str(path))
            setattr(
                config.option, option, str(path.with_name(f"{path.stem}.rank{identity.rank}{path.suffix}"))
            )
    cache = getattr(config, "cache", None)
    if cache is not None:
        cache.set = lambda key, value: None


class _RankSession:
    """The hooks of one rank's session."""

    def __init__(self, config: pytest.Config, identity: LaunchedRank) -> None:
        self._identity = identity
        self._timeout_s = _timeout(config)
        self._deadline = 0.0
        self._num_tests = 0
        self._orderly = False
        self._status = 0
        self._events = identity.state_file("pytest").open("a", buffering=1)
        self._stacks = identity.stacks_file.open("a", buffering=1)
        if not identity.state_file("dumps").exists():  # pytest was started by a shell script, say
            python_program.dump_stacks_on_request(str(identity.state))
        self._arm()
        if not jax.distributed.is_initialized():
            jax.distributed.initialize()

    def _arm(self) -> None:
        # A C thread, not a Python one: it fires also when a native call hangs with the GIL held. It does not
        # end the process: its connections would break, and the other ranks would continue before their stacks
        # are dumped. The launcher sees the dump, requests those of the others, and then ends all.
        self._deadline = time.monotonic() + self._timeout_s
        faulthandler.dump_traceback_later(self._timeout_s, file=self._stacks)

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self) -> None:
        """Restart the timer: pytest's own faulthandler plugin has just cancelled it.

        It does so whenever a test fails, and what follows, such as a fixture's teardown, may hang as well.
        """
        faulthandler.dump_traceback_later(max(self._deadline - time.monotonic(), 0.001), file=self._stacks)

    def _write(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps(event) + "\n")

    def pytest_report_header(self) -> str:
        return (
            f"jax_deepep.launch: rank {self._identity.rank} of {self._identity.num_ranks}, "
            f"{self._timeout_s:g} s per test, logs of all ranks in {self._identity.log_dir}"
        )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"collected": [item.nodeid for item in session.items]})

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._arm()
        self._write({"started": item.nodeid})
        result = yield
        if not (item.session.shouldstop or item.session.shouldfail):
            self._wait_for_all()
        self._write({"finished": item.nodeid})
        self._arm()  # for the time between tests and after the last one
        return result

    def _wait_for_all(self) -> None:
        """Wait until all ranks have finished a test, outside of any program.

        Otherwise a collective of the next test, on a rank whose test failed early, would be matched with one
        of this test on the others, and one failure would become many.
        """
        self._num_tests += 1
        milliseconds = int(2000 * self._timeout_s)  # longer than the deadline of the test
        jax_compat.coordination_client().wait_at_barrier(f"{PREFIX}test/{self._num_tests}", milliseconds)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note_failure(report, report.when or "call")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note_failure(report, "collection")

    def _note_failure(self, report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
        if report.failed:
            text = report.longreprtext
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else text
            self._write({"failed": report.nodeid, "when": when, "message": message, "text": text})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self._status = int(exitstatus)
        ran_through = self._status in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
        self._orderly = ran_through and not session.shouldstop and not session.shouldfail

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self) -> None:
        self._write({"reported": True})

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave the job together with the others, or report a failure if they may still run tests."""
        if self._orderly:
            self._arm()
            jax.distributed.shutdown()  # type: ignore[no-untyped-call]
        elif self._status != 0:
            # Stopped early (-x, an internal error, a collection error): the other ranks may wait for this one
            # in a collective. The launcher ends them when it reads this.
            python_program.report_failure(str(self._identity.state), self._status)
        faulthandler.cancel_dump_traceback_later()


def _timeout(config: pytest.Config) -> float:
    given: Any = config.getoption("--launch-test-timeout")
    if given is None:
        given = (
            config.getini("launch_test_timeout") or os.environ.get(_TIMEOUT_VARIABLE) or _DEFAULT_TIMEOUT_S
        )
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(
            f"--launch-test-timeout: expected seconds > 0, for example 300, got {given!r}"
        )
    return seconds
