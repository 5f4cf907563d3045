"""`python -m jax_deepep.launch -n N [options] -- COMMAND …` (see `--help`)."""

import argparse
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jax_deepep.launch.command_line import parse
from jax_deepep.launch.failure_report import report
from jax_deepep.launch.hosts.cluster_environment import (
    LauncherPosition,
    PositionError,
    position_from_arguments,
    position_from_cluster,
)
from jax_deepep.launch.hosts.kubernetes_job import KubernetesError
from jax_deepep.launch.hosts.rendezvous import HostLink, rendezvous
from jax_deepep.launch.job_processes import StopRequests, run_guarded
from jax_deepep.launch.job_watch import JobWatch
from jax_deepep.launch.mps_daemon import MpsDaemon, MpsError
from jax_deepep.launch.python_command import through_python_program
from jax_deepep.launch.rank_environment import RankSettings, rank_environ, without_launch
from jax_deepep.launch.rank_identity import LaunchedRank, launched_rank
from jax_deepep.launch.rank_logs import OUTPUTS, RankLog, rank_names, say
from jax_deepep.launch.rank_process import RankProcess


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return its status."""
    _open_standard_files()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    base = without_launch(os.environ)
    if shutil.which(options.command[0]) is None:
        say(
            f"COMMAND: expected a program on this host, got {options.command[0]!r}; check its name, its mode "
            "and PATH"
        )
        return 127
    mps = MpsDaemon(base) if options.share_gpu and MpsDaemon.is_installed(base) else None
    return run_guarded(lambda requests: rendezvous_and_run(options, base, mps, requests), mps)


def _open_standard_files() -> None:
    """Open /dev/null as those that are closed: pipes of ours would take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def rendezvous_and_run(
    options: argparse.Namespace, base: dict[str, str], mps: MpsDaemon | None, requests: StopRequests
) -> int:
    """Find the launchers of other hosts, then run the job with them."""
    OUTPUTS.is_ending = lambda: bool(requests.read())
    try:
        position = find_position(options, base)
        link = rendezvous(position, options.n, options.start_timeout, cancelled=lambda: bool(requests.read()))
        return run_job(options, base, link, mps, requests)
    except (PositionError, KubernetesError) as error:
        say(str(error))
        return 2
    except MpsError as error:
        say(str(error))
        return 1
    except InterruptedError:
        return 128 + requests.read()[0]


def find_position(options: argparse.Namespace, environ: dict[str, str]) -> LauncherPosition:
    """Return this launcher's position: from the options, else from the cluster, else alone on this host."""
    if options.hosts is None and options.node_rank is None:
        found = position_from_cluster(environ, options.coordinator)
        if found is not None:
            say(f"launcher {found.index} of {found.count}, as {found.found_in} says")
            return found
    return position_from_arguments(options.hosts, options.coordinator, options.node_rank, environ)


def run_job(
    options: argparse.Namespace,
    base: dict[str, str],
    link: HostLink,
    mps: MpsDaemon | None,
    requests: StopRequests,
) -> int:
    """Start this host's ranks, watch them, report."""
    try:
        log_dir = prepare_log_dir(options.log_dir, link)
    except OSError as error:
        say(
            f"--log-dir: expected a folder that can be written, got {error.filename} ({error.strerror}); "
            "name another one"
        )
        return 2
    settings = RankSettings(
        options.platform,
        options.devices_per_process,
        options.share_gpu,
        options.memory_fraction or RankSettings.memory_fraction,
    )
    job = link.job
    say(f"{rank_names(job.ranks)} of {job.num_ranks} on this host; logs in {log_dir}")
    mps_variables = mps.start() if mps is not None else {}
    if options.share_gpu and mps is None:
        say(
            "--share-gpu: nvidia-cuda-mps-control is not on PATH, so the ranks take turns on the GPU. "
            "Results are right, but times are not meaningful"
        )
    command = through_python_program(options.command)
    ranks: list[RankProcess] = []
    for local_rank in range(options.n):
        env = {**rank_environ(base, job, local_rank, settings, log_dir), **mps_variables}
        identity = launched_rank(env)
        assert identity is not None
        path = log_dir / f"rank{identity.rank}.log"
        try:
            log = RankLog(identity.rank, path, console(options.console, identity))
            ranks.append(RankProcess(command, env, identity, log))
        except OSError as error:
            if error.filename == str(path):
                say(f"--log-dir: expected a folder that can be written, got {path} ({error.strerror})")
                return 2
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
                remedy = "raise ulimit -n, ulimit -u, or the limits of the container"
                say(f"{rank_names([identity.rank])} cannot be started ({error.strerror}); {remedy}")
                return 126
            say(
                f"COMMAND: expected a program that can be run, got {command[0]!r} ({error.strerror}); "
                "check the file and its first line"
            )
            return 127 if isinstance(error, FileNotFoundError) else 126
    outcome = JobWatch(ranks, link, options.grace, requests).run()
    for rank in ranks:
        rank.log.close()
    report(outcome, ranks, log_dir)
    return outcome.status


def prepare_log_dir(wanted: Path | None, link: HostLink) -> Path:
    """Return the folder of the logs, after removing what an earlier job left there for these ranks."""
    log_dir = (wanted or Path(tempfile.mkdtemp(prefix="jax_deepep_launch_"))).absolute()
    (log_dir / ".launch").mkdir(parents=True, exist_ok=True)
    for rank in link.job.ranks:
        ours = [log_dir / f"rank{rank}.log", log_dir / f"rank{rank}.stacks"]  # the folder may hold others
        for stale in [*ours, *(log_dir / ".launch").glob(f"rank{rank}.*")]:
            stale.unlink(missing_ok=True)
    return log_dir


def console(wanted: str, identity: LaunchedRank) -> Callable[[], bool]:
    """Return a function that says whether to show this rank's lines, called for every piece of output."""
    if wanted == "all" or identity.local_rank == 0:
        return lambda: True
    if wanted == "first":
        return lambda: False
    # The plugin's file exists before pytest prints anything, however pytest was started.
    ran_pytest = identity.state_file("pytest")
    return lambda: not ran_pytest.exists()


if __name__ == "__main__":
    sys.exit(main())
