"""The mark of tests that start processes of their own."""

import pytest

from jax_deepep.launch import launched_rank

# A suite under the launcher is itself one of several processes, all of which would start the same ones.
starts_its_own_processes = pytest.mark.skipif(launched_rank() is not None, reason="starts its own processes")
