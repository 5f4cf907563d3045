"""`python -m jax_deepep.launch -n N [options] -- COMMAND …` (`--help` says the rest)."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jax_deepep.launch.cleanup_guard_pipe import CleanupGuard
from jax_deepep.launch.cluster_environment import (
    LauncherPlace,
    PlaceError,
    place_from_arguments,
    place_from_cluster,
)
from jax_deepep.launch.command_line import parse
from jax_deepep.launch.failure_report import report, say
from jax_deepep.launch.host_rendezvous import HostLink, meet
from jax_deepep.launch.job_watch import JobWatch
from jax_deepep.launch.kubernetes_job import KubernetesError
from jax_deepep.launch.local_processes import RankProcess, adopt_orphans, kill_adopted
from jax_deepep.launch.mps_daemon import MpsError, start_mps
from jax_deepep.launch.python_command import through_python_program
from jax_deepep.launch.rank_environment import (
    LaunchedRank,
    RankSettings,
    launched_rank,
    rank_environ,
    without_launch,
)
from jax_deepep.launch.rank_logs import RankLog
from jax_deepep.launch.rank_names import rank_names


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return its status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    base = without_launch(os.environ)
    if shutil.which(options.command[0]) is None:
        say(
            f"COMMAND: got {options.command[0]!r}, which is not a program here; "
            "check its name, its mode and PATH"
        )
        return 127
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    try:
        place = find_place(options, base)
        link = meet(place, options.n, options.start_timeout, cancelled=lambda: bool(received))
    except (PlaceError, KubernetesError) as error:
        say(str(error))
        return 2
    except InterruptedError:
        return 128 + received[0]
    adopt_orphans()
    guard = CleanupGuard()
    try:
        with guard:
            return run_job(options, base, link, guard, received)
    except MpsError as error:
        say(str(error))
        return 1
    finally:
        kill_adopted(spare={guard.pid})
        link.close()


def find_place(options: argparse.Namespace, environ: dict[str, str]) -> LauncherPlace:
    """Return this launcher's place: as told, else as the cluster has it, else alone on this host."""
    if options.hosts is None and options.node_rank is None:
        found = place_from_cluster(environ, options.coordinator)
        if found is not None:
            say(f"launcher {found.index} of {found.count}, as {found.found_in} says")
            return found
    return place_from_arguments(options.hosts, options.coordinator, options.node_rank, environ)


def run_job(
    options: argparse.Namespace,
    base: dict[str, str],
    link: HostLink,
    guard: CleanupGuard,
    received: list[int],
) -> int:
    """Start this host's ranks, watch them, report."""
    log_dir = prepare_log_dir(options.log_dir, link)
    settings = RankSettings(
        options.platform,
        options.devices_per_process,
        options.share_gpu,
        options.memory_fraction or RankSettings.memory_fraction,
    )
    job = link.job
    say(f"{rank_names(job.ranks)} of {job.num_ranks} on this host; logs in {log_dir}")
    mps: dict[str, str] = {}
    if options.share_gpu:
        mps = start_mps(guard, base) or {}
        if not mps:
            say(
                "--share-gpu: nvidia-cuda-mps-control is not on PATH, so the ranks take turns on the GPU. "
                "Results are right, but times mean nothing"
            )
    command = through_python_program(options.command)
    ranks: list[RankProcess] = []
    try:
        for local_rank in range(options.n):
            env = {**rank_environ(base, job, local_rank, settings, log_dir), **mps}
            rank_place = launched_rank(env)
            assert rank_place is not None
            log = RankLog(
                rank_place.rank, log_dir / f"rank{rank_place.rank}.log", console(options.console, rank_place)
            )
            ranks.append(RankProcess(command, env, log, guard))
        outcome = JobWatch(ranks, link, options.grace, received).run()
    finally:
        for rank in ranks:
            rank.kill_group()
            rank.log.close()
        guard.order("forget")
    report(outcome, ranks, log_dir)
    return outcome.status


def prepare_log_dir(wanted: Path | None, link: HostLink) -> Path:
    """Return the folder of the logs, without what an earlier job left there about these ranks."""
    log_dir = (wanted or Path(tempfile.mkdtemp(prefix="jax_deepep_launch_"))).absolute()
    (log_dir / ".launch").mkdir(parents=True, exist_ok=True)
    for rank in link.job.ranks:
        ours = [log_dir / f"rank{rank}.log", log_dir / f"rank{rank}.stacks"]  # the folder may hold others
        for stale in [*ours, *(log_dir / ".launch").glob(f"rank{rank}.*")]:
            stale.unlink(missing_ok=True)
    return log_dir


def console(wanted: str, place: LaunchedRank) -> Callable[[], bool]:
    """Return whether this rank's lines are shown, asked anew for every piece of output."""
    if wanted == "all" or place.local_rank == 0:
        return lambda: True
    if wanted == "first":
        return lambda: False
    # The plugin's file exists before pytest prints anything, however pytest was started.
    ran_pytest = place.state_file("pytest")
    return lambda: not ran_pytest.exists()


if __name__ == "__main__":
    sys.exit(main())
