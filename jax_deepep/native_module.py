"""Finds the native modules and registers their custom calls with XLA.

A native module is a table of capsules; nothing happens when it is imported but that.
"""

import functools
import importlib
import os
import pathlib
from types import ModuleType
from typing import Any

import jax

# JAX records this event after it has compiled a program or loaded it from its cache.
PROGRAM_COMPILED = "/jax/core/compile/backend_compile_duration"

PLATFORM_MODULES = {"cpu": "jax_deepep._cpu"}


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """Import and register the native module; return it, or why there is none."""
    if os.environ.get("JAX_DEEPEP_NATIVE") == "0":
        return None, "JAX_DEEPEP_NATIVE=0 switches native ops off"
    try:
        module = importlib.import_module(PLATFORM_MODULES["cpu"])
    except ImportError as error:
        return None, f"the native module is not built ({error}); {_remedy()}"
    # A state type must be known before the first target whose instantiate stage returns it.
    for name, type_info in module.state_types().items():
        jax.ffi.register_ffi_type(name, type_info, platform="cpu")
    for name, stages in module.targets().items():
        jax.ffi.register_ffi_target(name, stages, platform="cpu", api_version=1)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: module.finish_program() if event == PROGRAM_COMPILED else None
    )
    return module, ""


def _remedy() -> str:
    package = pathlib.Path(__file__).parent
    if (package.parent / "pyproject.toml").exists():
        return f"jax_deepep was imported from the checkout {package.parent}: run pip install -e . there"
    return "install the package with pip on a machine with a C++17 compiler"


def obstacle() -> str:
    """Return why there are no native ops for CPU devices, or an empty string."""
    return _find()[1]


def load() -> ModuleType:
    """Return the native module.

    Raises:
        ImportError: there is none.
    """
    module, why_not = _find()
    if module is None:
        raise ImportError(why_not)
    return module


def release(native_communicator: Any) -> None:
    """Close a native communicator that Python has let go of."""
    native_communicator.close()
