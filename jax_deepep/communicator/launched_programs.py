"""Waiting for the programs that this process has launched, also for those that have not begun."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class LaunchedPrograms:
    """The programs on some devices of this process."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = devices
        self._last: jax.stages.Compiled | None = None

    def wait(self) -> None:
        """Wait for the programs that this thread has launched, and for those with a live result.

        A program that failed raises where its results are read, not here.
        """
        for array in self._devices[0].client.live_arrays():
            # A result may be donated meanwhile.
            with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
                if not array.is_deleted():
                    array.block_until_ready()
        # Nobody may hold the results of the others. What one thread launches on the same devices runs in
        # order, so one more program on all of them ends after the others.
        with contextlib.suppress(jax.errors.JaxRuntimeError), jax.disable_jit(False):
            if self._last is None:
                self._last = self._compile_last()
            self._last().block_until_ready()

    def _compile_last(self) -> jax.stages.Compiled:
        count = len(self._devices)
        mesh = Mesh(np.array(self._devices), "device")
        sharding = NamedSharding(mesh, PartitionSpec("device"))
        with jax.set_mesh(mesh):  # that of the program may have other devices
            return jax.jit(lambda: jnp.zeros(count, jnp.int32), out_shardings=sharding).lower().compile()
