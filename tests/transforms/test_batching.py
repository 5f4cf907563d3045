"""vmap over a leading axis of the operands, and over stages on a separate mesh axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax.sharding import PartitionSpec as P
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh, run_per_device
from moe_layer import LAYER, PARAMETERS, assert_close, communicator, layer_inputs, masked_experts, moe
from problems import Problem

MESH, AXIS = LAYER.mesh, LAYER.axis_name
BATCH = 3

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def test_vmap_inside_shard_map(implementation: str) -> None:
    """Each element of the batch is a separate dispatch, with its own routes; with the gradient."""
    comm, native = communicator(implementation), communicator("native")
    inputs = layer_inputs()
    topk_idx = np.stack([np.roll(inputs.topk_idx, shift, axis=1) for shift in range(BATCH)], axis=1)
    x = np.stack([inputs.x * (1 + shift) for shift in range(BATCH)], axis=1)

    def one_by_one(x, topk_weights, matrices, bias, topk_idx):
        layer = functools.partial(moe, native, experts=masked_experts)
        return jnp.stack([layer(x[i], topk_weights, matrices, bias, topk_idx[i]) for i in range(BATCH)])

    def batched(x, *rest):
        layer = functools.partial(moe, comm, experts=masked_experts)
        return jax.vmap(layer, in_axes=(1, None, None, None, 0))(jnp.moveaxis(x, 0, 1), *rest)

    def results_of(layer):
        def with_gradients(*args):
            *operands, topk_idx, g = args
            out, backward = jax.vjp(lambda *operands: layer(*operands, topk_idx), *operands)
            return out, backward(jnp.stack([g] * BATCH))

        return run_per_device(with_gradients, MESH, AXIS, *arrays)

    arrays = (x, inputs.topk_weights, inputs.matrices, inputs.bias, topk_idx, inputs.g)
    assert_close(results_of(batched), results_of(one_by_one))


def test_vmap_of_a_shard_map(implementation: str) -> None:
    """The batch is outside of shard_map and on no mesh axis."""
    comm = communicator(implementation)
    inputs = layer_inputs()
    layer = jax.vmap(
        per_device(lambda *operands: moe(comm, *operands, masked_experts), MESH, AXIS),
        in_axes=(0, None, None, None, None),
    )
    spec = device_axis(MESH, AXIS)
    x = put_on_mesh(np.stack([inputs.x] * BATCH), MESH, P(None, *spec))
    rest = put_on_mesh(inputs.operands[1:], MESH, spec)
    assert_close(fetch(compiled(layer)(x, *rest)), np.stack([inputs.out] * BATCH))


def test_vmap_over_pipeline_stages(implementation: str) -> None:
    """spmd_axis_name: the batch axis is the mesh axis `stage`, and every stage is a separate group."""
    problem = Problem("layer", mesh_name="stage × expert", num_tokens=5, routing="some_none")
    mesh = problem.mesh
    comm = problem.communicator(implementation)
    inputs = layer_inputs(problem)

    def body(*operands):
        return moe(comm, *(array[0] for array in operands), masked_experts)[None]

    stage = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=True)
    layer = jax.vmap(stage, spmd_axis_name="stage")

    def loss(operands, topk_idx, g):
        out = layer(*operands, topk_idx)
        return jnp.sum(out * g), out

    arrays = (*inputs.operands, inputs.g)
    by_stage = [array.reshape(*mesh.devices.shape, *array.shape[1:]) for array in arrays]
    *operands, topk_idx, g = put_on_mesh(by_stage, mesh, P("stage", "expert"))
    gradients, out = fetch(compiled(jax.grad(loss, has_aux=True))(tuple(operands), topk_idx, g))
    assert_close(out.reshape(inputs.out.shape), inputs.out)
    for name, gradient, expected in zip(PARAMETERS, gradients, inputs.expected, strict=True):
        assert_close({name: gradient.reshape(expected.shape)}, {name: expected})
