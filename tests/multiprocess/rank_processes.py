"""Runs a script of `ranks/` as several plain processes, and always ends them all.

The library's launcher ends every rank when one dies. Here the survivors are tested: ranks are
independent, with a common deadline. A rank prints its findings as lines of JSON (see
`ranks/rank_side.py`); the rest of its output is shown when something fails.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import leftovers
import pytest
from quick_compilation import QUICK_COMPILATION

from jax_deepep.launch.hosts.rendezvous import reserve_port

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent
REPORT = "REPORT "  # begins a line of findings, as `report` of ranks/rank_side.py writes it


def pretended_hosts(ranks_per_host: int) -> dict[str, str]:
    """Return the environment of ranks on several hosts: on GPUs NVSHMEM, over memory by default."""
    return {
        "RANKS_PER_HOST": str(ranks_per_host),
        "NVSHMEM_REMOTE_TRANSPORT": os.environ.get("NVSHMEM_REMOTE_TRANSPORT", "none"),
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    }


@dataclass
class RankProcess:
    rank: int
    process: subprocess.Popen
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def reports(self) -> list[dict[str, Any]]:
        lines = self.text().split("\n")[:-1]  # the last one may not be complete
        return [json.loads(line.removeprefix(REPORT)) for line in lines if line.startswith(REPORT)]

    def signal(self, number: int) -> None:
        """Send a signal to the rank and to all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


@dataclass
class RankProcesses:
    """The ranks of one run: a context manager that leaves none of them behind.

    Args:
        script: name of a file of `ranks/`, without ".py".
        num_processes: how many.
        arguments: further ones of the script.
        num_devices: of each process.
        platform: of their devices: "cpu", or "cuda" for ranks that share GPUs. By time slices: under MPS,
            the fault of one would be the fault of all.
        deadline_s: seconds that the run may last; an error that shows every rank's output afterwards.
    """

    script: str
    num_processes: int
    arguments: tuple[Any, ...] = ()
    num_devices: int = 1
    platform: str = "cpu"
    deadline_s: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)
    ranks: list[RankProcess] = field(default_factory=list)

    def __enter__(self) -> "RankProcesses":
        self.id = uuid.uuid4().hex
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self._deadline = time.monotonic() + self.deadline_s
        self._shared_before = leftovers.named_shared_memory()
        self._port = reserve_port("127.0.0.1", 0)
        address = f"127.0.0.1:{self._port.getsockname()[1]}"
        # Rank 0 hosts JAX's coordinator, whose end aborts the others, so it must be the last to leave. It
        # reads this pipe as its standard input: end of file means that all others have ended.
        others_live, hold = os.pipe()
        try:
            for rank in range(self.num_processes):
                self.ranks.append(self._start(rank, address, others_live, hold))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        finally:
            os.close(others_live)
            os.close(hold)
        return self

    def _start(self, rank: int, address: str, others_live: int, hold: int) -> RankProcess:
        output = Path(self._directory.name) / f"rank{rank}.log"
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_", "NPROC"))
        }
        environment |= {
            leftovers.RUN: self.id,
            "JAX_PLATFORMS": {"cuda": "cuda,cpu"}.get(self.platform, self.platform),  # callbacks run on CPUs
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05",  # of a GPU, in addition to the test's own process
            "PYTHONPATH": os.pathsep.join(
                [str(SOURCE), str(SOURCE / "tests"), str(HERE), os.environ.get("PYTHONPATH", "")]
            ),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            **self.environment,
            "XLA_FLAGS": " ".join(
                [
                    f"--xla_force_host_platform_device_count={self.num_devices}",
                    QUICK_COMPILATION,
                    # Programs that differ between ranks would wait for each other's tuning.
                    "--xla_gpu_shard_autotuning=false",
                    self.environment.get("XLA_FLAGS", ""),
                ]
            ),
        }
        command = [sys.executable, HERE / "ranks" / f"{self.script}.py", address, rank, self.num_processes]
        with output.open("wb") as log:
            process = subprocess.Popen(
                [str(word) for word in [*command, *self.arguments]],
                stdin=others_live if rank == 0 else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=() if rank == 0 else (hold,),
                start_new_session=True,
            )
        return RankProcess(rank, process, output)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fail with every rank's output at the deadline."""
        while not condition():
            if time.monotonic() > self._deadline:
                self._make_show_their_stacks()
                pytest.fail(f"{what} did not happen within {self.deadline_s:g} s\n{self.describe()}")
            time.sleep(0.02)

    def _make_show_their_stacks(self) -> None:
        """End the ranks by a signal that makes Python print the stack of every thread."""
        for rank in self.ranks:
            rank.signal(signal.SIGABRT)
        time.sleep(2)

    def wait_for_report(self, rank: int, name: str) -> dict[str, Any]:
        """Wait until a rank has reported under a name; fail if it ends without."""

        def found() -> list[dict[str, Any]]:
            return [report for report in self.ranks[rank].reports() if report["name"] == name]

        def found_or_ended() -> bool:
            ended = self.ranks[rank].process.poll() is not None
            return bool(found()) or ended

        self.wait_until(found_or_ended, f"the report {name!r} of rank {rank}")
        if not (reports := found()):
            pytest.fail(f"rank {rank} ended without its report {name!r}\n{self.describe()}")
        return reports[0]

    def finish(self, expected: dict[int, int] | None = None) -> list[int]:
        """Wait until every rank has ended by itself; return the exit codes.

        Args:
            expected: exit codes that are not 0, by rank; None: any.
        """
        self.wait_until(
            lambda: all(rank.process.poll() is not None for rank in self.ranks), "the end of all ranks"
        )
        codes = [rank.process.returncode for rank in self.ranks]
        if expected is not None:
            wanted = [expected.get(rank, 0) for rank in range(self.num_processes)]
            assert codes == wanted, f"exit codes {codes}, expected {wanted}\n{self.describe()}"
        return codes

    def describe(self) -> str:
        """Return the output of every rank."""
        return "\n".join(
            f"--- rank {rank.rank}, exit code {rank.process.poll()} ---\n{rank.text()}" for rank in self.ranks
        )

    def assert_nothing_is_left(self) -> None:
        """Assert that the ended ranks left no process and no shared memory behind."""
        assert leftovers.processes_of_run(self.id) == []
        reports = [report for rank in self.ranks for report in rank.reports()]
        inodes = {inode for report in reports for inode in report["segments"]}
        if self.platform == "cpu":
            assert inodes, "no rank reported its shared memory\n" + self.describe()
        assert inodes & leftovers.shared_segments_of_all_processes() == set()
        assert leftovers.named_shared_memory_since(self._shared_before) == set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for rank in self.ranks:
            # The rank may be gone while one that it started is not: the group, not the process.
            try:
                os.killpg(rank.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for rank in self.ranks:
            rank.process.wait(timeout=20)
        if kind is not None and not issubclass(kind, pytest.fail.Exception):
            print(self.describe())
        self._directory.cleanup()
        self._port.close()
