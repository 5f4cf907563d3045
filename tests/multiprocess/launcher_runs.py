"""Start the launcher in a subprocess that cannot outlive its test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax_deepep
from jax_deepep.launch.rank_environment import without_launch

ROOT = Path(jax_deepep.__file__).parent.parent
TIMEOUT_S = 90.0


def environment(**variables: str) -> dict[str, str]:
    """Return the variables for a launcher: none of an outer launcher's or of a cluster's."""
    env = without_launch(os.environ)
    for name in list(env):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "PYTEST_", "KUBERNETES_", "JAX_")):
            del env[name]
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), env.get("PYTHONPATH")) if part)
    return {**env, **variables}


@contextmanager
def launcher(*arguments: str | Path, cwd: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start `python -m jax_deepep.launch ARGUMENTS`; at the end it is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_deepep.launch", *map(str, arguments)],
        env=environment(**variables), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()


def launch(*arguments: str | Path, cwd: Path, **variables: str) -> tuple[int, str]:
    """Run the launcher to its end and return its status and everything it printed."""
    with launcher(*arguments, cwd=cwd, **variables) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output


def program(folder: Path, text: str, name: str = "program.py") -> Path:
    """Write a program for the ranks."""
    path = folder / name
    path.write_text(text)
    return path


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until the condition holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def two_hosts() -> list[str]:
    """Return two simulated hosts, loopback addresses unique to this process: equal lines mean one job."""
    high, low = divmod(os.getpid() % 62500, 250)
    return [f"127.{high + 1}.{low + 1}.{host}" for host in (1, 2)]


def pids(folder: Path) -> list[int]:
    """Return the process ids that programs wrote as `folder/*.pid`."""
    return [int(path.read_text() or 0) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    """Return whether the process runs; one that is dead and only not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
