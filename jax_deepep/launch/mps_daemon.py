"""A private MPS daemon, so that N ranks can compute on one GPU at the same time.

Private, because one client's fault kills every client of a daemon and may leave it unusable: nobody
else's job may depend on this one, nor this one on theirs. `cleanup_guard` stops it.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jax_deepep.launch.cleanup_guard_pipe import CleanupGuard

_CONTROL = "nvidia-cuda-mps-control"


class MpsError(RuntimeError):
    """The MPS daemon is installed, but did not start."""


def start_mps(guard: CleanupGuard, environ: Mapping[str, str]) -> dict[str, str] | None:
    """Start a daemon and return what the ranks' environment needs to use it.

    No rank is limited to a part of the SMs: one that is does not always get all of its part, and the ops of a
    group, whose blocks wait for each other, then wait for good.

    The guard learns of the folder before the daemon exists, so no ending can leave either behind.

    Returns:
        Variables for the ranks, or None where MPS is not installed.
    """
    if shutil.which(_CONTROL, path=environ.get("PATH")) is None:
        return None
    # A short path: the daemon makes Unix sockets in it, whose names end at 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="jax_deepep_mps_"))
    guard.order(f"mps {folder}")
    (folder / "pipe").mkdir()
    (folder / "log").mkdir()
    pipes = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    # The daemon would open every GPU that it sees. It renumbers what it does see, so the ranks must
    # name the GPU by its new number, unless it goes by its UUID.
    gpu = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    # Into a file, not a pipe: the daemon lives on with its output open, and a pipe would never end.
    started = folder / "log" / "start.log"
    with started.open("w") as output:
        status = subprocess.run(
            [_CONTROL, "-d"],
            env={**environ, **pipes, "CUDA_VISIBLE_DEVICES": gpu},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=30, check=False,
            start_new_session=True,
        ).returncode  # fmt: skip
    if status != 0:
        raise MpsError(
            f"--share-gpu: '{_CONTROL} -d' ended with status {status}: "
            f"{started.read_text().strip() or 'no output'}. "
            "Run it by hand to see why, or take its folder off PATH to share the GPU by time slices."
        )
    return {
        **pipes,
        "CUDA_VISIBLE_DEVICES": "0" if gpu.isdigit() else gpu,
    }
