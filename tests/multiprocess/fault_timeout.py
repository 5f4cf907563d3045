"""How long ops wait for each other where a process fails, for tests and for ranks."""

import os

# Making a communicator takes as long too: more where a network starts slowly.
TIMEOUT_S = int(os.environ.get("TIMEOUT_S", "4"))
