"""The identity of a rank of `python -m jax_deepep.launch`, from its variables alone, without JAX."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jax_deepep.launch_variables import PREFIX, rank_in_job


@dataclass(frozen=True)
class LaunchedRank:
    """The identity of a process in its job, and the files through which it reports to its launcher."""

    rank: int
    num_ranks: int
    local_rank: int
    log_dir: Path

    @property
    def state(self) -> Path:
        """Path of the files for the launcher, without their suffix."""
        return self.log_dir / ".launch" / f"rank{self.rank}"

    def state_file(self, kind: str) -> Path:
        """The file of one kind of report: dumps, failed, pytest."""
        return self.state.with_suffix(f".{kind}")

    @property
    def stacks_file(self) -> Path:
        """Where the rank dumps its stacks when it hangs, or when another rank failed."""
        return self.log_dir / f"rank{self.rank}.stacks"


def launched_rank(environ: Mapping[str, str] = os.environ) -> LaunchedRank | None:
    """Return the identity of this process in its job, or None if no launcher started it."""
    found = rank_in_job(environ)
    if found is None:
        return None
    rank, num_ranks = found
    return LaunchedRank(
        rank,
        num_ranks,
        local_rank=int(environ[PREFIX + "LOCAL_RANK"]),
        log_dir=Path(environ[PREFIX + "LOG_DIR"]),
    )
