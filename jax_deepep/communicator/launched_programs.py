"""Waiting for the programs that this process has launched, also for those that have not begun."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def wait_for_programs(platform: str) -> None:
    """Wait for the programs of this process that this thread has launched, and for those with a live result.

    A program that failed raises where its results are read, not here.
    """
    for array in jax.live_arrays(platform):
        # A result may be donated meanwhile.
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
            if not array.is_deleted():
                array.block_until_ready()
    # Nobody may hold the results of the others. What one thread launches on the same devices runs in order.
    with contextlib.suppress(jax.errors.JaxRuntimeError), jax.disable_jit(False):
        _program_on_all_devices(platform)().block_until_ready()


@functools.cache
def _program_on_all_devices(platform: str) -> jax.stages.Compiled:
    devices = jax.local_devices(backend=platform)
    mesh = Mesh(np.array(devices), "device")
    on_each = jax.jit(
        lambda: jnp.zeros(len(devices), jnp.int32), out_shardings=NamedSharding(mesh, PartitionSpec("device"))
    )
    return on_each.lower().compile()
