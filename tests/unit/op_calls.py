"""Calls of dispatch and combine on a small mesh, correct except for what a test changes."""

import functools

import jax
import jax.numpy as jnp
from meshes import mesh_named, per_device

import jax_deepep as ep

MESH = mesh_named("stage × expert")  # its outer axis is larger than 1 with any number of devices
SIZE = MESH.shape["expert"]
SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}


@functools.cache
def communicator(implementation: str = "native", mode: str = "auto") -> ep.Communicator:
    return ep.Communicator(MESH, "expert", **SIZES, implementation=implementation, mode=mode)


def trace(function) -> None:
    """Trace a function of no operands inside shard_map over the whole mesh."""
    mapped = per_device(lambda _: function(), MESH, "expert")
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((MESH.size,), jnp.float32))


def dispatch(right_comm, **wrong):
    operands = {
        "x": jnp.zeros((5, 8)),
        "topk_idx": jnp.zeros((5, 3), jnp.int32),
        "topk_weights": jnp.zeros((5, 3)),
        "comm": right_comm,
    }
    return ep.dispatch(**{**operands, **wrong})


def combine(right_comm, dispatch_options: dict | None = None, **wrong):
    dispatched, handle = dispatch(right_comm, **(dispatch_options or {}))
    return ep.combine(**{"y": dispatched.tokens, "handle": handle, "comm": right_comm, **wrong})
