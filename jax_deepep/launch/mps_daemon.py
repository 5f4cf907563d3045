"""A private MPS daemon, so that N ranks can compute on one GPU at the same time.

Private, because one client's fault kills every client of a daemon and may leave it unusable: jobs must not
depend on each other.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jax_deepep.launch.rank_logs import say

_CONTROL = "nvidia-cuda-mps-control"


class MpsError(RuntimeError):
    """The MPS daemon is installed, but did not start."""


class MpsDaemon:
    """The daemon, and the folder of its sockets and logs.

    Made before the launcher forks: the worker starts it, the guard stops it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        # A short path: the daemon makes Unix sockets in it, whose names end at 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="jax_deepep_mps_"))
        self._pipe, self._log = self._folder / "pipe", self._folder / "log"
        self._variables = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self._pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self._log),
        }

    @staticmethod
    def is_installed(environ: Mapping[str, str]) -> bool:
        """Return whether there is MPS on PATH."""
        return shutil.which(_CONTROL, path=environ.get("PATH")) is not None

    def start(self) -> dict[str, str]:
        """Start the daemon and return what the ranks' environment needs to use it.

        No rank is limited to a fraction of the SMs: it would not always get all of that fraction, and the ops
        of a group, whose blocks wait for each other, would hang.
        """
        self._pipe.mkdir()
        self._log.mkdir()
        # The daemon would open every visible GPU. It renumbers those, so the ranks must name the GPU by its
        # new ordinal, unless by its UUID.
        gpu = self._environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        # To a file, not a pipe: the daemon keeps its output open, and reading a pipe would never end.
        started = self._log / "start.log"
        with started.open("w") as output:
            status = subprocess.run(
                [_CONTROL, "-d"],
                env={**self._environ, **self._variables, "CUDA_VISIBLE_DEVICES": gpu},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=30, check=False,
                start_new_session=True,
            ).returncode  # fmt: skip
        if status != 0:
            raise MpsError(
                f"--share-gpu: '{_CONTROL} -d' ended with status {status}: "
                f"{started.read_text().strip() or 'no output'}. "
                "Run it by hand to see why, or remove its folder from PATH to share the GPU by time slices."
            )
        return {**self._variables, "CUDA_VISIBLE_DEVICES": "0" if gpu.isdigit() else gpu}

    def pid(self) -> int | None:
        """Return the daemon's process id, if it runs."""
        try:
            return int((self._pipe / f"{_CONTROL}.pid").read_text())
        except (OSError, ValueError):
            return None

    def quit(self) -> None:
        """Ask the daemon to end, if it runs. The caller waits, and kills one that does not respond."""
        if self.pid() is not None:
            try:
                subprocess.run(
                    [_CONTROL], input="quit -t 5\n", text=True, env={**self._environ, **self._variables},
                    timeout=15, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                say(f"the MPS daemon did not accept 'quit': {error}")

    def remove_folder(self) -> None:
        """Remove what the daemon has left."""
        shutil.rmtree(self._folder, ignore_errors=True)
