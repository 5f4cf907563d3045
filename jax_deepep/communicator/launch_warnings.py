"""Warnings of a process that does not run as its launcher, or its environment, said that it would."""

import os
import warnings

import jax

from jax_deepep import launch_variables


def warn_of_launch(*, stacklevel: int) -> None:
    """Warn if JAX knows of no other process of the job, or runs on CPUs where GPUs were asked for."""
    launched = launch_variables.rank_in_job()
    if launched is not None and launched[1] > 1 and jax.process_count() == 1:
        warnings.warn(
            f"This is rank {launched[0]} of {launched[1]} of python -m jax_deepep.launch, and JAX knows "
            "of no other process: call jax.distributed.initialize() first, in every rank, or each one "
            "computes alone.",
            stacklevel=stacklevel,
        )
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms.startswith("cuda,") and jax.default_backend() == "cpu":
        warnings.warn(
            f"JAX_PLATFORMS is {platforms!r}, as python -m jax_deepep.launch --platform cuda sets it, and "
            "JAX runs on CPUs: it found no GPU. Install jax[cuda13], or see what JAX_PLATFORMS=cuda "
            "python -c 'import jax; jax.devices()' says.",
            stacklevel=stacklevel,
        )
