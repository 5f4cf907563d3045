"""MoE layers as Flax modules: NNX here, Linen in `jax_deepep.flax.linen`. Needs Flax."""

from jax_deepep.flax.hugging_face import from_hugging_face as from_hugging_face
from jax_deepep.flax.nnx import GateBias as GateBias
from jax_deepep.flax.nnx import MoE as MoE

__all__ = ["GateBias", "MoE", "from_hugging_face"]
