"""Marks of tests that do not run under the launcher."""

import pytest

from jax_deepep.launch import launched_rank

# A suite under the launcher is itself one of several processes, all of which would start the same ones.
starts_its_own_processes = pytest.mark.skipif(launched_rank() is not None, reason="starts its own processes")
# There, the suite has joined the processes of the job, as these commands would.
is_a_command_for_one_process = pytest.mark.skipif(
    launched_rank() is not None, reason="a command for one process"
)
