"""The build of the package, which must be the same in all processes of a job."""

import functools
import hashlib
import pathlib
from importlib.metadata import version

from jax_deepep.communicator import native_module


def texts_of_build(implementation: str, platform: str) -> dict[str, str]:
    """Return texts that are equal between processes if their builds are.

    Native sources are included where the requested `implementation` may use them on the `platform` and they
    are built: otherwise no process runs native ops.
    """
    release = version("jax_deepep")
    texts = {"build": f"version {release}, Python sources {_python_sources()}"}
    if implementation != "xla" and (sources := _native_sources(platform)):
        texts["build of native ops"] = f"version {release}, native sources {sources}"
    return texts


@functools.cache
def _python_sources() -> str:
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _native_sources(platform: str) -> str:
    """Return the digest of a native module's sources, or an empty string if it is not built."""
    return (
        "" if native_module.unsupported_reason(platform) else native_module.load(platform).source_digest[:12]
    )
