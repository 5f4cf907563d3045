"""Finds the native modules and registers their custom calls with XLA.

A native module is a table of capsules; nothing happens when it is imported but that.
"""

import atexit
import contextlib
import functools
import importlib
import os
import pathlib
import threading
import weakref
from types import ModuleType
from typing import Any

import jax

# JAX records this event as a scalar before it compiles a program or loads it from its cache, and as a
# duration after that, on the same thread, also if it has failed.
COMPILATION = "/jax/core/compile/backend_compile_duration"

# The module of a platform, the name under which XLA knows the platform, and what builds the module.
_PLATFORMS = {
    "cpu": ("jax_deepep._cpu", "cpu", "a C++17 compiler"),
    "cuda": ("jax_deepep._cuda", "CUDA", "a C++17 compiler and a CUDA toolkit of 12.3 or newer"),
}


# Two threads may make the first communicators, and custom calls are registered once.
_finding = threading.Lock()


def _find(platform: str) -> tuple[ModuleType | None, str]:
    with _finding:
        return _find_once(platform)


@functools.cache
def _find_once(platform: str) -> tuple[ModuleType | None, str]:
    """Import and register the native module of a platform; return it, or why there is none."""
    if os.environ.get("JAX_DEEPEP_NATIVE") == "0":
        return None, "JAX_DEEPEP_NATIVE=0 switches native ops off"
    name, xla_platform, needs = _PLATFORMS[platform]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"the native module for {platform} is not built ({error}); {_remedy(needs)}"
    # A state type must be known before the first target whose instantiate stage returns it.
    for type_name, type_info in module.state_types().items():
        jax.ffi.register_ffi_type(type_name, type_info, platform=xla_platform)
    for target, stages in module.targets().items():
        jax.ffi.register_ffi_target(target, stages, platform=xla_platform, api_version=1)
    if platform == "cpu":
        _number_calls_by_program(module)
    return module, ""


def _number_calls_by_program(module: ModuleType) -> None:
    """Number the custom calls of a program alike in all processes of a job: from zero, in its own order.

    Programs that other threads compile at the same time would be counted too: with several processes, one
    compilation waits for the other.
    """
    compiling = threading.RLock()

    def begin(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILATION and jax.distributed.is_initialized():
            compiling.acquire()
            module.begin_program()

    def end(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILATION:
            with contextlib.suppress(RuntimeError):  # of a compilation that began before there was a job
                compiling.release()

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)


def _remedy(needs: str) -> str:
    package = pathlib.Path(__file__).parent
    if (package.parent / "pyproject.toml").exists():
        return (
            f"jax_deepep was imported from the checkout {package.parent}: run pip install -e . there, "
            f"on a machine with {needs}"
        )
    return f"install the package with pip on a machine with {needs}"


def obstacle(platform: str) -> str:
    """Return why there are no native ops for the devices of a platform, or an empty string."""
    if platform not in _PLATFORMS:
        return f"this version has native ops for {' and '.join(_PLATFORMS)} devices only, not for {platform}"
    return _find(platform)[1]


def load(platform: str) -> ModuleType:
    """Return the native module of a platform.

    Raises:
        ImportError: there is none.
    """
    module, why_not = _find(platform)
    if module is None:
        raise ImportError(why_not)
    return module


def close_at_exit(owner: Any, native_communicator: Any) -> None:
    """Close a native communicator when the interpreter ends.

    If its owner goes before that, programs may still use it, and it goes with the last of them.
    """
    close = functools.partial(native_communicator.close)  # an object of its own, to be found again
    atexit.register(close)
    weakref.finalize(owner, atexit.unregister, close).atexit = False
