"""What the launcher prints when a job has failed; the first failing rank comes last, with its traceback."""

import signal
from collections.abc import Sequence
from pathlib import Path

from jax_deepep.launch.job_watch import JobOutcome
from jax_deepep.launch.pytest_report import pytest_summary
from jax_deepep.launch.rank_ends import Blame
from jax_deepep.launch.rank_logs import log_tail, rank_names, say, show_last
from jax_deepep.launch.rank_process import RankProcess


def report(outcome: JobOutcome, ranks: Sequence[RankProcess], log_dir: Path) -> None:
    """Print what happened on this host."""
    if outcome.signal is not None:
        say(f"got {signal.Signals(outcome.signal).name}; all ranks were ended. Logs: {log_dir}")
        return
    for line in pytest_summary([rank.identity for rank in ranks], shown=ranks[0].rank):
        say(line)
    if outcome.done:
        say(
            f"{rank_names(outcome.done)} had already ended with status 0: "
            "ranks that wait for one of them fail"
        )
    if outcome.elsewhere is not None:
        say(f"the job failed on another host ({outcome.elsewhere}); the ranks here were ended")
        return
    if outcome.first is None or outcome.first.end is None:
        return
    first, end = outcome.first, outcome.first.end
    for rank in ranks:
        if (
            rank is not first
            and rank.end is not None
            and rank.end.status != 0
            and rank.rank not in outcome.ended
        ):
            say(f"rank {rank.rank} failed later: {rank.end.how}")
    if outcome.ended:
        say(f"{rank_names(outcome.ended)} ended by the launcher, because rank {first.rank} had failed")
    if first.rank == 0:
        aborted = [
            rank.rank
            for rank in ranks
            if rank is not first
            and rank.rank not in outcome.ended
            and rank.end is not None
            and rank.end.blame is Blame.CONSEQUENCE
        ]
        if aborted:
            say(
                "rank 0 hosts JAX's coordinator: it died, and JAX then aborts the others. "
                f"The end of {rank_names(aborted)} is a consequence, not a cause"
            )
        else:
            say("rank 0 hosts JAX's coordinator: the job cannot continue without it")
    _show_stacks(outcome, ranks)
    say(f"rank {first.rank} failed first: {end.how}. The end of its log ({first.log.path}):")
    lines = log_tail(first.log.path, outcome.first_log_bytes)
    show_last(first.rank, lines or ["(it printed nothing)"])


def _show_stacks(outcome: JobOutcome, ranks: Sequence[RankProcess]) -> None:
    """After a hang, show the stacks of every rank; after a plain failure, say which files hold them."""
    written = [rank for rank in ranks if _has_content(rank.identity.stacks_file)]
    if not any(rank.end is not None and rank.end.hung for rank in ranks):
        dumped = [rank.rank for rank in written if rank.rank in outcome.ended]
        if dumped:
            say(f"stacks of {rank_names(dumped)} at that moment: {ranks[0].identity.log_dir}/rank*.stacks")
        return
    for rank in sorted(written, key=lambda rank: rank is outcome.first):
        say(f"stacks of rank {rank.rank}:")
        show_last(rank.rank, rank.identity.stacks_file.read_text(errors="replace").splitlines())


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
