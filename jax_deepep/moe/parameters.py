"""Initial values of a MoE layer's parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.layer import with_sharding

Initializer = Callable[..., jax.Array]  # of (key, shape, dtype)

of_experts = jax.nn.initializers.lecun_normal(batch_axis=0)  # each expert's matrix separately
of_matrix = jax.nn.initializers.lecun_normal()


def initializer_of(
    name: str, gate_init: Initializer | None = None, kernel_init: Initializer | None = None
) -> Initializer:
    """Return the initializer of the parameter `name`; None stands for LeCun's normal initializer."""
    if name == "gate_bias":
        return jax.nn.initializers.zeros
    if name == "gate":
        return gate_init or of_matrix
    return kernel_init or (of_matrix if name.startswith("shared") else of_experts)


def init_parameters(
    config: MoEConfig, key: jax.Array, param_dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """Return initial parameters of `moe`, sharded as `config.spec` says. `gate_bias` is float32.

    Args:
        config: the layer.
        key: a key of `jax.random`.
        param_dtype: of all other parameters.
    """
    shapes = {name: shape for name, (shape, _) in config.parameters.items()}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return {name: first(name, key) for key, name in zip(keys, shapes, strict=True)}

    def first(name: str, key: jax.Array) -> jax.Array:
        dtype = jnp.float32 if name == "gate_bias" else param_dtype
        value = functools.partial(initializer_of(name), shape=shapes[name], dtype=dtype)
        # Typed as replicated on a mesh of Explicit axes, it would be made in full on every device.
        return with_sharding(config, key, config.spec(name), value)

    shardings = {name: NamedSharding(config.mesh, config.spec(name)) for name in shapes}
    return jax.jit(init, out_shardings=shardings)(key)
