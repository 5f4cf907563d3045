"""Gradients of a function that dispatches integers on the way, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import XLA_NIGHTLY, cases
from jax.sharding import PartitionSpec as P
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh
from moe_layer import LAYER, assert_close
from problems import Problem, inputs_of

import jax_deepep as ep

STEPS_PER_ONE = 16.0


def quantised_layer(comm: ep.Communicator, x, topk_weights, topk_idx):
    """Multiply tokens with themselves, quantised: sent as integers and as floats along the same routes."""
    integers = jnp.round(x * STEPS_PER_ONE).astype(jnp.int8)
    dispatched, handle = ep.dispatch(integers, topk_idx, topk_weights, comm=comm)
    floats, handle = ep.dispatch(x, handle=handle, comm=comm)
    y = floats.tokens * (dispatched.tokens / STEPS_PER_ONE)
    # A device receives as many rows as it sends, and sends them on: an op accepts the result of another.
    some, _ = ep.dispatch(integers, topk_idx, topk_weights, comm=comm, capacity=x.shape[0])
    further, _ = ep.dispatch(some.tokens, topk_idx, topk_weights, comm=comm)
    y = y + 0.0 * jnp.sum(further.weights)  # which changes nothing
    return ep.combine(jnp.where(dispatched.mask[:, None], y, 0), handle, comm=comm)


@functools.cache
def expected_of(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return a cotangent of the result; the result, and the gradients of x and topk_weights, in float64."""
    inputs = inputs_of(problem)
    g = np.random.default_rng(0).normal(size=inputs.x.shape).astype(np.float32)
    x, quantised = inputs.x.astype(np.float64), np.round(inputs.x * STEPS_PER_ONE) / STEPS_PER_ONE
    live = np.concatenate([routes.row_of >= 0 for routes in inputs.routes])
    gate = np.sum(np.where(live, inputs.topk_weights, 0), axis=-1, keepdims=True)
    of_weights = np.where(live, np.sum(g * x * quantised, axis=-1, keepdims=True), 0)
    return g, gate * x * quantised, g * gate * quantised, of_weights


def scanned(layer):
    def twice(*operands):
        _, outs = jax.lax.scan(lambda nothing, _: (nothing, layer(*operands)), None, length=2)
        return jnp.mean(outs, axis=0)

    return twice


def batched(layer):
    def twice(x, *operands):
        outs = jax.vmap(layer, in_axes=(0, None, None))(jnp.stack([x, x]), *operands)
        return jnp.mean(outs, axis=0)

    return twice


TRANSFORMATIONS = {
    "grad": lambda layer: layer,
    "checkpoint": jax.checkpoint,
    "scan": scanned,
    "vmap": batched,
}


@cases(
    "transformation check_vma", TRANSFORMATIONS, [True, False],
    in_xla=lambda transformation, check_vma: check_vma or transformation == "grad",
    nightly=lambda implementation, transformation, check_vma: (
        implementation == "xla" and not (check_vma and transformation in ("grad", "checkpoint"))
    ),
)  # fmt: skip
def test_gradients(transformation: str, check_vma: bool, implementation: str) -> None:
    inputs = inputs_of(LAYER)
    g, *expected = expected_of(LAYER)
    layer = functools.partial(quantised_layer, LAYER.communicator(implementation))
    layer = TRANSFORMATIONS[transformation](layer)
    mapped = per_device(layer, LAYER.mesh, LAYER.axis_name, check_vma=check_vma)

    def loss(x, topk_weights, topk_idx, g):
        out = mapped(x, topk_weights, topk_idx)
        return jnp.sum(out * g), out

    arrays = (inputs.x, inputs.topk_weights, inputs.topk_idx, g)
    operands = put_on_mesh(arrays, LAYER.mesh, device_axis(LAYER.mesh, LAYER.axis_name))
    gradients, out = fetch(compiled(jax.grad(loss, argnums=(0, 1), has_aux=True))(*operands))
    assert_close([out, *gradients], expected)


@pytest.mark.parametrize("implementation", XLA_NIGHTLY)
def test_vmap_over_pipeline_stages(implementation: str) -> None:
    """spmd_axis_name with check_vma=True, where JAX mishandles integer tangents."""
    problem = Problem("layer", mesh_name="stage × expert", num_tokens=5, routing="some_none")
    mesh, inputs = problem.mesh, inputs_of(problem)
    g, *expected = expected_of(problem)
    comm = problem.communicator(implementation)

    def body(*operands):
        return quantised_layer(comm, *(array[0] for array in operands))[None]

    stage = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=True)
    layer = jax.vmap(stage, spmd_axis_name="stage")

    def loss(x, topk_weights, topk_idx, g):
        out = layer(x, topk_weights, topk_idx)
        return jnp.sum(out * g), out

    arrays = (inputs.x, inputs.topk_weights, inputs.topk_idx, g)
    by_stage = [array.reshape(*mesh.devices.shape, *array.shape[1:]) for array in arrays]
    operands = put_on_mesh(by_stage, mesh, P("stage", "expert"))
    gradients, out = fetch(compiled(jax.grad(loss, argnums=(0, 1), has_aux=True))(*operands))
    got = [array.reshape(like.shape) for array, like in zip([out, *gradients], expected, strict=True)]
    assert_close(got, expected)
