"""Finds what a run may leave behind: processes, shared memory, sockets."""

import os
import time
from pathlib import Path

RUN = "JAX_DEEPEP_TEST_RUN"  # in the environment of every process of a run, children included


def processes_of_run(run_id: str) -> list[int]:
    """Return the live processes that have the mark of a run in their environment."""
    mark = f"{RUN}={run_id}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # ended meanwhile, or of another user
            continue
    return found


def shared_segments(process: Path | str = "/proc/self") -> set[int]:
    """Return the inodes of the library's shared memory that a process holds open."""
    inodes = set()
    for descriptor in (Path(process) / "fd").glob("*"):
        try:
            if os.readlink(descriptor).startswith("/memfd:jax_deepep"):
                inodes.add(descriptor.stat().st_ino)
        except OSError:  # closed meanwhile
            continue
    return inodes


def shared_segments_of_all_processes() -> set[int]:
    """Return the same for every live process that is readable."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inodes |= shared_segments(process)
        except OSError:
            continue
    return inodes


def named_shared_memory() -> set[str]:
    """Return files in /dev/shm and abstract Unix sockets with the library's name."""
    files = {str(path) for path in Path("/dev/shm").glob("*jax_deepep*")}
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return files | {name for name in sockets if name.startswith("@jax_deepep-")}


def named_shared_memory_since(before: set[str], patience_s: float = 10.0) -> set[str]:
    """Return those that persist; those of other tests at the same time are transient."""
    deadline = time.monotonic() + patience_s
    left = named_shared_memory() - before
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= named_shared_memory()
    return left
