"""Operands that are the same on every device, under check_vma=True.

The gradient of such an operand is summed over the devices, by a collective of XLA with every implementation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax.sharding import PartitionSpec as P
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh
from moe_layer import LAYER, assert_close, communicator, layer_inputs, moe

import jax_deepep as ep

MESH, AXIS = LAYER.mesh, LAYER.axis_name

pytestmark = pytest.mark.collectives


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_replicated_operands_and_the_sum_of_their_gradients(implementation: str) -> None:
    """Every device has the same tokens: the gradient of a replicated operand is the sum over devices."""
    comm = communicator(implementation)
    inputs = layer_inputs()
    x, topk_weights, _, bias, topk_idx = (array[0] for array in inputs.operands)
    scales = np.linspace(0.5, 2.0, LAYER.num_experts, dtype=np.float32)

    def per_device_layer(x, topk_weights, bias, topk_idx, scales):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        first = jax.lax.axis_index(AXIS) * comm.num_local_experts
        local = jax.lax.dynamic_slice(scales, (first,), (comm.num_local_experts,))
        of_row = jnp.repeat(local, dispatched.group_sizes, total_repeat_length=dispatched.mask.size)
        out = ep.combine(dispatched.tokens * of_row[:, None], handle, comm=comm, bias=bias)
        return out[None]

    layer = jax.shard_map(
        per_device_layer, mesh=MESH, in_specs=P(), out_specs=device_axis(MESH, AXIS), check_vma=True
    )

    def loss(x, topk_weights, bias, topk_idx, scales):
        out = layer(x, topk_weights, bias, topk_idx, scales)
        return jnp.sum(out**2), out

    operands = put_on_mesh((x, topk_weights, bias, topk_idx, scales), MESH, P())
    gradients, out = fetch(compiled(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands))

    live = topk_idx >= 0
    factor = np.where(live, scales[topk_idx].astype(np.float64), 0)
    gate = np.sum(factor * topk_weights, axis=-1, keepdims=True)
    expected = bias + x * gate
    assert_close(out, np.broadcast_to(expected, out.shape))
    g = 2 * expected * MESH.size
    assert_close(gradients, (g * gate, factor * np.sum(g * x, axis=-1, keepdims=True), g))


def weighted_sum(layer):
    return lambda operands, topk_idx, g: jnp.sum(layer(*operands, topk_idx) * g)


@functools.cache
def gradients_of_varying_operands():
    layer = per_device(lambda *operands: moe(communicator("native"), *operands), MESH, AXIS)
    return compiled(jax.grad(weighted_sum(layer)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("replicated", ["x", "topk_weights", "matrices", "bias"])
def test_one_replicated_operand_among_varying_ones(implementation: str, replicated: str) -> None:
    comm = communicator(implementation)
    inputs = layer_inputs()
    names = ("x", "topk_weights", "matrices", "bias", "topk_idx")
    varying = device_axis(MESH, AXIS)
    specs = tuple(P() if name == replicated else varying for name in names)

    def body(*operands):
        per_device = [a if name == replicated else a[0] for name, a in zip(names, operands, strict=True)]
        return moe(comm, *per_device)[None]

    layer = jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=varying, check_vma=True)
    arrays = [a[0] if name == replicated else a for name, a in zip(names, inputs.operands, strict=True)]
    operands = [put_on_mesh(a, MESH, spec) for a, spec in zip(arrays, specs, strict=True)]
    g = put_on_mesh(inputs.g, MESH, varying)

    gradients = compiled(jax.grad(weighted_sum(layer)))(tuple(operands[:4]), operands[4], g)

    # The same with a copy of the operand on every device, whose gradients are summed outside.
    copies = [
        np.broadcast_to(a[0], a.shape) if name == replicated else a
        for name, a in zip(names, inputs.operands, strict=True)
    ]
    *copies, topk_idx = put_on_mesh(copies, MESH, varying)
    expected = gradients_of_varying_operands()(tuple(copies), topk_idx, g)
    expected = [
        value.sum(axis=0) if name == replicated else value
        for name, value in zip(names[:4], fetch(expected), strict=True)
    ]
    assert_close(list(fetch(gradients)), expected)
