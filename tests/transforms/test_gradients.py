"""Gradients against the closed form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, assert_same_bits, cases
from meshes import captured, compiled, device_axis, fetch, per_device, put_on_mesh, run_per_device
from moe_layer import LAYER, LAYERS, assert_close, communicator, layer_inputs, moe, training_step
from problems import Problem, inputs_of

import jax_deepep as ep

by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
by_layer = cases("problem", LAYERS, in_xla=lambda problem: problem is LAYER)


@cases("problem check_vma", LAYERS, [True, False], in_xla=lambda problem, vma: vma or problem is LAYER)
def test_gradient_of_the_layer(problem: Problem, check_vma: bool, implementation: str) -> None:
    """jax.grad through shard_map, for every differentiable operand."""
    comm = communicator(implementation, problem)
    inputs = layer_inputs(problem)
    layer = per_device(
        lambda *operands: moe(comm, *operands, **problem.dispatch_options),
        problem.mesh, problem.axis_name, check_vma=check_vma,
    )  # fmt: skip

    def loss(operands, topk_idx, g):
        out = layer(*operands, topk_idx)
        return jnp.sum(out * g), out

    sharding = device_axis(problem.mesh, problem.axis_name)
    *operands, topk_idx, g = put_on_mesh((*inputs.operands, inputs.g), problem.mesh, sharding)
    # Not the loss itself: its sum over the devices would be a collective of XLA.
    gradients, out = fetch(compiled(jax.grad(loss, has_aux=True))(tuple(operands), topk_idx, g))
    assert_close(out, inputs.out)
    assert_close(gradients, inputs.expected)


@by_layer
def test_vjp_inside_shard_map(problem: Problem, implementation: str) -> None:
    """jax.vjp of per-device values, where a device's cotangent reaches the operands of its peers."""
    inputs = layer_inputs(problem)
    _, step, arrays = training_step(implementation, problem)
    out, gradients = fetch(captured(step)(*arrays))
    assert_close(out, inputs.out)
    assert_close(gradients, inputs.expected)


@by_layer
def test_gradient_for_y_is_zero_in_rows_without_a_token(problem: Problem, implementation: str) -> None:
    comm = communicator(implementation, problem)
    inputs, rows = layer_inputs(problem), inputs_of(problem)

    def program(x, topk_idx, topk_weights, y, g):
        _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
        _, backward = jax.vjp(lambda y: ep.combine(y, handle, comm=comm), y)
        return backward(g)[0]

    y = np.where(np.isnan(rows.y), np.inf, rows.y)
    arrays = (rows.x, rows.topk_idx, rows.topk_weights, y, inputs.g)
    gradient = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    assert_close(gradient, inputs.y_gradient)
    np.testing.assert_array_equal(gradient[~inputs.mask], 0)


@by_implementation
@pytest.mark.parametrize("limit", [{}, {"capacity": 6}], ids=["everything arrives", "capacity"])
def test_gradient_of_token_major_rows(implementation: str, limit: dict) -> None:
    """Experts that weight and sum by themselves: the weights' gradient returns through the rows."""
    problem = Problem("token-major layer", layout="token", routing="invalid", **limit)
    comm = communicator(implementation, problem)
    rows = inputs_of(problem)
    scales = np.linspace(0.5, 2.0, problem.num_experts, dtype=np.float32)  # expert e multiplies by scales[e]
    local_scales = np.tile(scales.reshape(comm.size, -1), (len(rows.routes), 1))
    g = layer_inputs().g[:, :1].repeat(problem.num_tokens, axis=1)

    def program(x, topk_weights, topk_idx, local_scales, g):
        def layer(x, topk_weights):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            factors = dispatched.topk_weights * jnp.where(
                dispatched.topk_idx >= 0, local_scales[dispatched.topk_idx], 0
            )
            return ep.combine(dispatched.tokens * factors.sum(axis=1, keepdims=True), handle, comm=comm)

        out, backward = jax.vjp(layer, x, topk_weights)
        return out, backward(g)

    arrays = (rows.x, rows.topk_weights, rows.topk_idx, local_scales, g)
    out, (x_gradient, weight_gradient) = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    reached = np.concatenate([routes.row_of >= 0 for routes in rows.routes])
    factor = np.where(reached, scales[np.clip(rows.topk_idx, 0, len(scales) - 1)].astype(np.float64), 0)
    gate = np.sum(factor * rows.topk_weights, axis=-1, keepdims=True)
    assert_close(out, rows.x * gate)
    assert_close(x_gradient, g * gate)
    assert_close(weight_gradient, factor * np.sum(rows.x * g, axis=-1, keepdims=True))


@by_implementation
def test_gradient_of_a_dispatch_along_a_handle(implementation: str) -> None:
    comm = communicator(implementation)
    inputs, rows = layer_inputs(), inputs_of(LAYER)

    def program(x, topk_idx, topk_weights, x2, y):
        _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        _, backward = jax.vjp(lambda x2: ep.dispatch(x2, handle=handle, comm=comm)[0].tokens, x2)
        return backward(y)[0], ep.combine(y, handle, comm=comm, weighted=False)

    arrays = (rows.x, rows.topk_idx, rows.topk_weights, inputs.x, rows.y)
    gradient, combined = run_per_device(program, LAYER.mesh, LAYER.axis_name, *arrays)
    assert_same_bits(gradient, combined)


WITHOUT_ROWS = [
    Problem(f"{name}, {layout}", layout=layout, **sizes)
    for name, sizes in {
        "no tokens": {"num_tokens": 0},
        "no tokens, rows of padding": {"num_tokens": 0, "capacity": 4},
        "no capacity": {"capacity": 0},
    }.items()
    for layout in ("expert", "token")
]


@cases(
    "problem check_vma", WITHOUT_ROWS, [True, False],
    in_xla=lambda problem, check_vma: check_vma or problem.layout == "expert",
)  # fmt: skip
def test_gradients_where_no_row_is_sent(problem: Problem, check_vma: bool, implementation: str) -> None:
    """Only the bias reaches the result and has a gradient; other arrays have no elements."""
    comm = communicator(implementation, problem)
    rows = inputs_of(problem)

    def per_rank(x, x2, topk_weights, bias, topk_idx):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
        again, _ = ep.dispatch(x2, handle=handle, comm=comm)
        mask = dispatched.mask[:, None]
        y = jnp.where(mask, jnp.sin(dispatched.tokens) * again.tokens, 0)
        return ep.combine(y, handle, comm=comm, bias=bias)

    layer = per_device(per_rank, problem.mesh, problem.axis_name, check_vma=check_vma)

    def loss(operands, topk_idx, g):
        out = layer(*operands, topk_idx)
        return jnp.sum(out * g), out

    arrays = (rows.x, rows.x2, rows.topk_weights, rows.bias, rows.topk_idx, rows.x)
    *operands, topk_idx, g = put_on_mesh(arrays, problem.mesh, device_axis(problem.mesh, problem.axis_name))
    gradients, out = fetch(compiled(jax.grad(loss, has_aux=True))(tuple(operands), topk_idx, g))
    assert_same_bits(out, rows.bias)
    assert_same_bits(gradients[3], rows.x)
    for gradient, operand in zip(gradients[:3], operands[:3], strict=True):
        assert_same_bits(gradient, np.zeros(operand.shape, operand.dtype))
