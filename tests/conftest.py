"""Sets the process up before JAX is imported: eight CPU devices, unless configured otherwise."""

import faulthandler
import os
import re
import sys

from quick_compilation import QUICK_COMPILATION

# The launcher and the user take precedence: only unset variables are set. The launcher's variable is read
# here by its name, because importing `jax_deepep` reserves threads for the devices configured so far.
if "JAX_DEEPEP_LAUNCH_RANK" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILATION} {os.environ.get('XLA_FLAGS', '')}"  # the last flag counts

import jax
import pytest
from cpu_budgets import CpuBudgets

from jax_deepep.launch import launched_rank

# The job of `.ci/run`, which sets this, that runs the tests marked `any_python` instead of the present one.
ANY_PYTHON = os.environ.get("JAX_DEEPEP_ANY_PYTHON")
DEADLINE_S = 300.0  # of a test with its fixtures; a hang becomes a traceback of every thread

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # on GPUs, float32 is not multiplied as TF32

_stderr = None


def pytest_configure(config: pytest.Config) -> None:
    global _stderr
    _stderr = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")  # pytest's capture must not swallow it
    if launched_rank() is None:  # ranks share the work of a test
        config.pluginmanager.register(CpuBudgets())


def pytest_unconfigure(config: pytest.Config) -> None:
    _cancel_alarm()


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"jax {jax.__version__}: {jax.device_count()} {jax.default_backend()} devices "
        f"in {jax.process_count()} process(es), NPROC={os.environ.get('NPROC')}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    _set_alarm()
    try:
        return (yield)
    finally:
        _cancel_alarm()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact() -> None:
    _set_alarm()  # pytest's own faulthandler plugin has cancelled it; a fixture's teardown may hang, too


def _set_alarm() -> None:
    if launched_rank() is None:  # the launcher has its own deadline, for all ranks together
        faulthandler.dump_traceback_later(DEADLINE_S, exit=True, file=_stderr)


def _cancel_alarm() -> None:
    if launched_rank() is None:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if item not in nightly]
        config.hook.pytest_deselected(items=nightly)
    if unsupported_reason := _why_no_gpu():
        _skip(items, "gpu", unsupported_reason)
    if ANY_PYTHON:
        _skip(items, "any_python", f"depends on neither Python nor JAX: runs in the job {ANY_PYTHON!r}")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    """Return why tests that need a GPU cannot run here, or an empty string."""
    if any(device.platform == "gpu" for device in jax.devices()):
        return ""
    if not any(re.fullmatch(r"nvidia\d+", name) for name in os.listdir("/dev")):
        return "needs an NVIDIA GPU; there is none here"
    return (
        f"needs an NVIDIA GPU; there is one here, but JAX runs on {jax.default_backend()}: "
        "set JAX_PLATFORMS=cuda, with JAX for GPUs installed"
    )
