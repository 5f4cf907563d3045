"""Expert-parallel communication for Mixture-of-Experts models in JAX.

The public surface, with `jax_deepep.moe`, `.flax` and `.balancing`; everything else is private.
"""

from importlib.metadata import version as _version

from jax_deepep import gating as gating
from jax_deepep.communicator import Communicator as Communicator
from jax_deepep.communicator import CommunicatorStats as CommunicatorStats
from jax_deepep.cpu_threads import reserve_cpu_threads as _reserve_cpu_threads
from jax_deepep.errors import CommunicatorError as CommunicatorError
from jax_deepep.errors import InvalidRoutingError as InvalidRoutingError
from jax_deepep.errors import PeerTimeoutError as PeerTimeoutError
from jax_deepep.gating import group_limited_topk as group_limited_topk
from jax_deepep.ops.combine import combine as combine
from jax_deepep.ops.dispatch import dispatch as dispatch
from jax_deepep.ops.handle import ExpertMajor as ExpertMajor
from jax_deepep.ops.handle import Handle as Handle
from jax_deepep.ops.handle import TokenMajor as TokenMajor

_reserve_cpu_threads()

__version__ = _version("jax_deepep")
