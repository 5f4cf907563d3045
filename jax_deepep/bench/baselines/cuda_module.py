"""Loads jax_deepep._cuda_bench, the baseline kernels, and registers its custom calls."""

import functools
import importlib
from types import ModuleType

import jax

from jax_deepep.communicator import native_module


@functools.cache
def load() -> ModuleType:
    """Return the module, after registering its custom calls.

    Raises:
        ImportError: it was not built, or not together with the module of the ops.
    """
    ops = native_module.load("cuda")
    remedy = "reinstall jax_deepep on a machine with a CUDA toolkit of 12.3 or newer"
    try:
        module = importlib.import_module("jax_deepep._cuda_bench")
    except ImportError as error:
        raise ImportError(f"the kernels of the bench are not built ({error}); {remedy}") from error
    if module.source_digest != ops.source_digest:
        raise ImportError(
            f"jax_deepep._cuda_bench: expected the build of jax_deepep._cuda ({ops.source_digest[:12]}), got "
            f"{module.source_digest[:12]}; {remedy}"
        )
    [call_site] = ops.state_types().values()
    module.connect(call_site["type_id"], ops.launch_op)
    instantiate = ops.targets()["jax_deepep_dispatch"]["instantiate"]
    for target, execute in module.handlers().items():
        stages = {"instantiate": instantiate, "execute": execute}
        jax.ffi.register_ffi_target(target, stages, platform="CUDA", api_version=1)
    jax.ffi.register_ffi_target("jax_deepep_clock", module.clock(), platform="CUDA", api_version=1)
    return module
