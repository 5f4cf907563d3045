"""Finds the native modules and registers their custom calls with XLA.

A native module is a table of capsules; importing it has no other effect.
"""

import atexit
import contextlib
import functools
import importlib
import os
import pathlib
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, cast, overload

import jax

from jax_deepep import jax_compat
from jax_deepep.communicator.launched_programs import LaunchedPrograms
from jax_deepep.communicator.native_types import CpuModule, CudaModule, NativeCommunicator, NativeModule

# JAX records this event as a scalar before it compiles a program or loads it from its cache, and as a
# duration afterwards, on the same thread, also after a failure.
COMPILATION = "/jax/core/compile/backend_compile_duration"

_POLL_S = 0.1  # while another thread compiles: the event of its end may be lost

# The module of a platform, the name under which XLA knows the platform, and what builds the module.
_PLATFORMS = {
    "cpu": ("jax_deepep._cpu", "cpu", "a C++17 compiler"),
    "cuda": ("jax_deepep._cuda", "CUDA", "a C++17 compiler and a CUDA toolkit of 12.3 or newer"),
}


# Two threads may make the first communicators; custom calls are registered once.
_finding = threading.Lock()


def _find(platform: str) -> tuple[Any, str]:
    with _finding:
        return _find_once(platform)


@functools.cache
def _find_once(platform: str) -> tuple[Any, str]:
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
        global _compilations
        _compilations = _Compilations(module.begin_program)
        watch_compilations()
    return module, ""


class _OfThread(threading.local):
    """The settings of the compilations of a thread that have not ended, the innermost one last."""

    def __init__(self) -> None:
        self.settings: list[contextlib.AbstractContextManager[None]] = []


class _Compilations:
    """Numbers the custom calls of a program from zero, in its order, the same in all processes of a job.

    Calls of programs that other threads compile at the same time would be counted too: with several
    processes, one compilation waits for the other. If JAX's listeners are cleared in between, the event of
    its end is lost: so a thread counts as compiling only while the compiling frame is on its stack.

    Every process compiles: XLA:CPU identifies the runs of a program that was loaded by other numbers, and of
    JAX's persistent cache, which process 0 alone writes, no other process would load it.
    """

    def __init__(self, begin_program: Callable[[bool], None]) -> None:
        self._begin_program = begin_program
        self._changed = threading.Condition()
        self._compiling: tuple[int, FrameType] | None = None  # a thread, and the frame that compiles
        self._of_thread = _OfThread()

    def watch(self) -> None:
        """Register the listeners to JAX's compilations, again if they were cleared."""
        with self._changed:
            jax_compat.keep_listeners(self._begin, self._end)

    def _begin(self, event: str, *_: Any, **__: Any) -> None:
        if event != COMPILATION or not jax.distributed.is_initialized():
            return
        with self._changed:
            while self._another_compiles():
                self._changed.wait(_POLL_S)
            self._compiling = threading.get_ident(), _frame_that_compiles()
            if jax.process_count() > 1:
                setting = jax_compat.without_cached_programs()
                setting.__enter__()
                self._of_thread.settings.append(setting)
            self._begin_program(threading.current_thread() is threading.main_thread())

    def _another_compiles(self) -> bool:
        if self._compiling is None or self._compiling[0] == threading.get_ident():
            return False
        thread, compiles = self._compiling
        frame = sys._current_frames().get(thread)
        while frame is not None and frame is not compiles:
            frame = frame.f_back
        return frame is not None

    def _end(self, event: str, *_: Any, **__: Any) -> None:
        if event != COMPILATION:
            return
        if self._of_thread.settings:
            self._of_thread.settings.pop().__exit__(None, None, None)
        with self._changed:
            if self._compiling is not None and self._compiling[0] == threading.get_ident():
                self._compiling = None
                self._changed.notify_all()


def _frame_that_compiles() -> FrameType:
    """Return the frame in which JAX times a compilation, which is on the stack until its end."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("record_scalar", "__enter__"):
        frame = frame.f_back
    assert frame is not None
    return frame


_compilations: _Compilations | None = None  # with the native module for CPUs


def watch_compilations() -> None:
    """Make sure that the calls of a program that is about to be compiled are numbered."""
    if _compilations is not None:
        _compilations.watch()


def _remedy(needs: str) -> str:
    package = pathlib.Path(__file__).parents[1]
    if (package.parent / "pyproject.toml").exists():
        return (
            f"jax_deepep was imported from the checkout {package.parent}: run pip install -e . there, "
            f"on a machine with {needs}"
        )
    return f"install the package with pip on a machine with {needs}"


def unsupported_reason(platform: str) -> str:
    """Return why there are no native ops for the devices of a platform, or an empty string."""
    if platform not in _PLATFORMS:
        return f"this version has native ops for {' and '.join(_PLATFORMS)} devices only, not for {platform}"
    return _find(platform)[1]


@overload
def load(platform: Literal["cpu"]) -> CpuModule: ...


@overload
def load(platform: Literal["cuda"]) -> CudaModule: ...


@overload
def load(platform: str) -> NativeModule: ...


def load(platform: str) -> Any:
    """Return the native module of a platform.

    Raises:
        ImportError: there is none.
    """
    module, unsupported_reason = _find(platform)
    if module is None:
        raise ImportError(unsupported_reason)
    return module


@functools.cache
def numbers() -> NativeModule:
    """Return a native module, for the numbers and sizes that are the same on all platforms.

    It is only imported: a program may be traced for a platform whose module is not built here.
    """
    errors = []
    for name, _, _ in _PLATFORMS.values():
        try:
            return cast(NativeModule, importlib.import_module(name))
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


def close_at_exit(owner: Any, native_communicator: NativeCommunicator, launched: LaunchedPrograms) -> None:
    """Close a native communicator when the interpreter ends, after the programs launched until then.

    If its owner is freed before, programs may still use it, and it is freed with the last of them.
    """
    # A unique object, to unregister it.
    close = functools.partial(_leave, os.getpid(), native_communicator, launched)
    atexit.register(close)
    weakref.finalize(owner, atexit.unregister, close).atexit = False


def _leave(creator_pid: int, native_communicator: NativeCommunicator, launched: LaunchedPrograms) -> None:
    if os.getpid() != creator_pid:
        return  # a fork has the memory of the communicator, but none of its threads, nor XLA's
    error = getattr(sys, "last_value", None)  # an uncaught exception
    try:
        if error is not None and jax.process_count() > 1:
            # Its ops may wait for peers that wait for ops this program will not launch any more.
            native_communicator.leave(f"{type(error).__name__}: {error}")
        else:
            # An op that began after the end would fail, and leave other devices waiting in XLA's collectives.
            launched.wait()
    finally:
        native_communicator.close()
