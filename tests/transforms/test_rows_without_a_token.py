"""Rows without a token reach no result and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from implementations import cases
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh, run_per_device
from moe_layer import LAYERS, assert_close, communicator, layer_inputs
from problems import Problem

import jax_deepep as ep


@cases("problem", LAYERS, in_xla=lambda problem: True)
def test_garbage_reaches_nothing(problem: Problem, implementation: str) -> None:
    """Planted before the experts and after them, and in the cotangent of the tokens."""
    comm = communicator(implementation, problem)
    inputs = layer_inputs(problem)

    @jax.custom_vjp
    def plant(garbage, rows, mask):
        return jnp.where(mask[:, None], rows, garbage)

    def plant_forward(garbage, rows, mask):
        return plant(garbage, rows, mask), (garbage, mask)

    def plant_backward(residuals, cotangent):
        garbage, mask = residuals
        return None, jnp.where(mask[:, None], cotangent, garbage), None

    plant.defvjp(plant_forward, plant_backward)

    def program(garbage, x, topk_weights, matrices, bias, topk_idx, g):
        def layer(x, topk_weights, matrices, bias):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            tokens = plant(garbage, dispatched.tokens, dispatched.mask)
            # The experts themselves honour the mask; the rest is the ops' task.
            live = jnp.where(dispatched.mask[:, None], tokens, 0)
            y = jax.lax.ragged_dot(live, matrices, dispatched.group_sizes)
            return ep.combine(plant(garbage, y, dispatched.mask), handle, comm=comm, bias=bias)

        out, backward = jax.vjp(layer, x, topk_weights, matrices, bias)
        x_bar, weights_bar, _, bias_bar = backward(g)
        return out, x_bar, weights_bar, bias_bar

    mesh, axis = problem.mesh, problem.axis_name
    arrays = put_on_mesh((*inputs.operands, inputs.g), mesh, device_axis(mesh, axis))
    run = compiled(per_device(program, mesh, axis))
    expected = (inputs.out, *(inputs.gradients[name] for name in ("x", "topk_weights", "bias")))
    for garbage in (np.nan, np.inf):
        everywhere = put_on_mesh(np.full(mesh.size, garbage, np.float32), mesh, device_axis(mesh, axis))
        assert_close(fetch(run(everywhere, *arrays)), expected)


@cases("problem", LAYERS, in_xla=lambda problem: problem.alignment > 1)
def test_a_grouped_matmul_needs_no_mask(problem: Problem, implementation: str) -> None:
    """ragged_dot honours group_sizes: garbage after the last group has no effect, forward and backward."""
    comm = communicator(implementation, problem)
    inputs = layer_inputs(problem)

    def program(x, topk_weights, matrices, bias, topk_idx, g):
        def layer(x, topk_weights, matrices, bias):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            after = jnp.arange(len(dispatched.mask)) >= jnp.sum(dispatched.group_sizes)
            tokens = jnp.where(after[:, None], jnp.nan, dispatched.tokens)
            y = jax.lax.ragged_dot(tokens, matrices, dispatched.group_sizes)
            return ep.combine(y, handle, comm=comm, bias=bias)

        out, backward = jax.vjp(layer, x, topk_weights, matrices, bias)
        return out, backward(g)

    arrays = (*inputs.operands, inputs.g)
    out, gradients = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    assert_close(out, inputs.out)
    assert_close(gradients, inputs.expected)


def test_debug_nans_blames_no_op_for_rows_that_are_not_written() -> None:
    """Where JAX runs op by op: there it looks at the results of each."""
    problem = LAYERS[0]
    comm = communicator("native", problem)
    inputs = layer_inputs(problem)

    def program(x, topk_idx, topk_weights):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
        return ep.combine(jnp.where(dispatched.mask[:, None], dispatched.tokens, 0), handle)

    mesh, axis = problem.mesh, problem.axis_name
    arrays = put_on_mesh((inputs.x, inputs.topk_idx, inputs.topk_weights), mesh, device_axis(mesh, axis))
    # Of their memory, some holds the results of the ops.
    nan = [jnp.full((rows, problem.hidden_size), jnp.nan) for rows in range(1, 129) for _ in range(8)]
    jax.block_until_ready(nan)
    del nan
    with jax.debug_nans(True):
        out = per_device(program, mesh, axis)(*arrays)
    factors = np.where(inputs.topk_idx >= 0, inputs.topk_weights, 0).sum(axis=-1, keepdims=True)
    assert_close(fetch(out), inputs.x * factors)
