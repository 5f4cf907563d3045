"""Expert-parallel communication for Mixture-of-Experts models in JAX.

The public API, with `python -m jax_deepep.launch` and `.bench`; everything else is private. Names are loaded
on first use: the launcher starts without JAX, and only `jax_deepep.flax` needs Flax.
"""

from typing import TYPE_CHECKING

from jax_deepep.cpu_threads import reserve_cpu_threads as _reserve_cpu_threads

if TYPE_CHECKING:
    from jax_deepep import balancing as balancing
    from jax_deepep import flax as flax
    from jax_deepep import gating as gating
    from jax_deepep import moe as moe
    from jax_deepep.communicator import Communicator as Communicator
    from jax_deepep.communicator import CommunicatorStats as CommunicatorStats
    from jax_deepep.errors import CommunicatorError as CommunicatorError
    from jax_deepep.errors import InvalidRoutingError as InvalidRoutingError
    from jax_deepep.errors import PeerTimeoutError as PeerTimeoutError
    from jax_deepep.gating import group_limited_topk as group_limited_topk
    from jax_deepep.ops.combine import combine as combine
    from jax_deepep.ops.dispatch import dispatch as dispatch
    from jax_deepep.ops.handle import ExpertMajor as ExpertMajor
    from jax_deepep.ops.handle import Handle as Handle
    from jax_deepep.ops.handle import TokenMajor as TokenMajor
    from jax_deepep.ops.overlap import InFlight as InFlight
    from jax_deepep.ops.overlap import combine_done as combine_done
    from jax_deepep.ops.overlap import combine_start as combine_start
    from jax_deepep.ops.overlap import dispatch_done as dispatch_done
    from jax_deepep.ops.overlap import dispatch_start as dispatch_start
    from jax_deepep.ops.wire import Wire as Wire
    from jax_deepep.quantization.block_scaled import BlockScaled as BlockScaled
    from jax_deepep.quantization.block_scaled import quantize as quantize
    from jax_deepep.quantization.block_scaled import quantize_dequantize as quantize_dequantize

    __version__: str
else:  # with this function, type checkers would accept any name

    def __getattr__(name: str) -> object:
        import importlib
        from importlib.metadata import version

        if name == "__version__":
            value = version("jax_deepep")
        elif name in _SUBMODULES:
            value = importlib.import_module(f"jax_deepep.{name}")
        elif name in _MODULE_OF:
            value = getattr(importlib.import_module(f"jax_deepep.{_MODULE_OF[name]}"), name)
        else:
            raise AttributeError(f"module 'jax_deepep' has no attribute {name!r}")
        globals()[name] = value
        return value


_SUBMODULES = ("balancing", "flax", "gating", "moe")
_MODULE_OF = {
    "BlockScaled": "quantization.block_scaled",
    "Communicator": "communicator",
    "CommunicatorError": "errors",
    "CommunicatorStats": "communicator",
    "ExpertMajor": "ops.handle",
    "Handle": "ops.handle",
    "InFlight": "ops.overlap",
    "InvalidRoutingError": "errors",
    "PeerTimeoutError": "errors",
    "TokenMajor": "ops.handle",
    "Wire": "ops.wire",
    "combine": "ops.combine",
    "combine_done": "ops.overlap",
    "combine_start": "ops.overlap",
    "dispatch": "ops.dispatch",
    "dispatch_done": "ops.overlap",
    "dispatch_start": "ops.overlap",
    "group_limited_topk": "gating",
    "quantize": "quantization.block_scaled",
    "quantize_dequantize": "quantization.block_scaled",
}

# Without flax, which `from jax_deepep import *` would load.
__all__ = [
    "BlockScaled",
    "Communicator",
    "CommunicatorError",
    "CommunicatorStats",
    "ExpertMajor",
    "Handle",
    "InFlight",
    "InvalidRoutingError",
    "PeerTimeoutError",
    "TokenMajor",
    "Wire",
    "balancing",
    "combine",
    "combine_done",
    "combine_start",
    "dispatch",
    "dispatch_done",
    "dispatch_start",
    "gating",
    "group_limited_topk",
    "moe",
    "quantize",
    "quantize_dequantize",
]


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "flax"})


_reserve_cpu_threads()
