"""Which build of the package this is: what two processes of a job must have in common."""

import functools
import hashlib
import pathlib
from importlib.metadata import version

from jax_deepep.communicator import native_module


def texts_of_build(implementation: str, platform: str) -> dict[str, str]:
    """Return the build as texts that are equal between processes when it is.

    Native sources count where the `implementation` asked for may use them on the `platform` and they are
    built: where they are not, nothing native runs on any process.
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
    """Return the digest of what a native module was compiled from, or nothing where there is none."""
    return (
        "" if native_module.unsupported_reason(platform) else native_module.load(platform).source_digest[:12]
    )
