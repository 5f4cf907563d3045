"""What tests of processes that fail, and their ranks, agree on."""

import os
from collections.abc import Mapping

# How long ops wait for each other. Making a communicator takes as long too: more where a network starts
# slowly.
TIMEOUT_S = int(os.environ.get("TIMEOUT_S", "4"))


def is_over_network(environment: Mapping[str, str]) -> bool:
    """Return whether NVSHMEM reaches peers over a network there, and not over memory."""
    return environment.get("NVSHMEM_REMOTE_TRANSPORT", "none") != "none"
