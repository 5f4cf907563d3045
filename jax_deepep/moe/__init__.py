"""MoE layers on expert-parallel meshes, in plain JAX; `jax_deepep.flax` wraps them as modules."""

from jax_deepep.moe.aux import MoEAux as MoEAux
from jax_deepep.moe.build import build_config as build_config
from jax_deepep.moe.config import MoEConfig as MoEConfig
from jax_deepep.moe.copies import physical_parameters as physical_parameters
from jax_deepep.moe.layer import moe as moe
from jax_deepep.moe.parameters import init_parameters as init_parameters

__all__ = ["MoEAux", "MoEConfig", "build_config", "init_parameters", "moe", "physical_parameters"]
