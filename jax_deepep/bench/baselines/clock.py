"""The clock of a GPU, in a program."""

import jax
import jax.numpy as jnp
import numpy as np


def now(after: jax.Array) -> jax.Array:
    """Return when `after` had been computed: nanoseconds as uint32 [2], the lower word first.

    A GPU's clocks differ from those of others. `cuda_module.load` registers the call.
    """
    return jax.ffi.ffi_call("jax_deepep_clock", jax.ShapeDtypeStruct((2,), jnp.uint32))(after)


def nanoseconds(begin: np.ndarray, end: np.ndarray) -> int:
    """Return the time between two results of `now`."""
    [first, last] = (int(words[0]) | int(words[1]) << 32 for words in (begin, end))
    return last - first
