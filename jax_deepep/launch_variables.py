"""The environment variables with the rank of a process in a job of `python -m jax_deepep.launch`."""

import os
from collections.abc import Mapping

PREFIX = "JAX_DEEPEP_LAUNCH_"


def rank_in_job(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return the rank of this process and the number of ranks, or None if no launcher started it."""
    if PREFIX + "RANK" not in environ:
        return None
    return int(environ[PREFIX + "RANK"]), int(environ[PREFIX + "NUM_RANKS"])
