"""The ops inside jax.checkpoint, scan, cond and while, donated operands, and handles that are passed on.

Results of loops are compared with unrolled native ops, for every implementation: they compile faster.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import XLA_NIGHTLY, assert_same_bits, assert_same_sums
from meshes import captured, compiled, device_axis, fetch, per_device, put_on_mesh, run_per_device
from moe_layer import LAYER, assert_close, communicator, layer_inputs, moe, training_step
from problems import inputs_of

import jax_deepep as ep

MESH, AXIS = LAYER.mesh, LAYER.axis_name
NUM_LAYERS = 3

pytestmark = pytest.mark.parametrize("implementation", XLA_NIGHTLY)


@pytest.fixture(autouse=True)
def _communicators(implementation: str) -> None:
    """Made before anything is traced: tests compare with native ops."""
    communicator(implementation)
    communicator("native")


def layer_gradients(layer, *operands_and_g):
    *operands, topk_idx, g = operands_and_g
    out, backward = jax.vjp(lambda *operands: layer(*operands, topk_idx), *operands)
    return out, backward(g)


def test_checkpoint_changes_no_bit(implementation: str) -> None:
    """The backward pass dispatches again."""
    comm = communicator(implementation)
    inputs = layer_inputs()

    def layer(*operands):
        return moe(comm, *operands)

    arrays = (*inputs.operands, inputs.g)
    _, step, on_mesh = training_step(implementation)
    plain = fetch(captured(step)(*on_mesh))
    again = run_per_device(lambda *args: layer_gradients(jax.checkpoint(layer), *args), MESH, AXIS, *arrays)
    assert_close(again[1], inputs.expected)
    jax.tree.map(assert_same_bits, again, plain)


def test_scan_over_layers(implementation: str) -> None:
    """Stacked matrices and routings, rematerialised, with the gradient of everything."""
    comm = communicator(implementation)
    inputs = layer_inputs()
    rng = np.random.default_rng(1)
    scales = rng.uniform(0.2, 0.5, (MESH.size, NUM_LAYERS, 1, 1, 1)).astype(np.float32)
    matrices = inputs.matrices[:, None] * scales
    topk_idx = np.stack([np.roll(inputs.topk_idx, shift, axis=1) for shift in range(NUM_LAYERS)], axis=1)

    def unrolled(x, topk_weights, matrices, bias, topk_idx):
        for i in range(NUM_LAYERS):
            x = moe(communicator("native"), x, topk_weights, matrices[i], bias, topk_idx[i])
        return x

    def scanned(x, topk_weights, matrices, bias, topk_idx):
        @jax.checkpoint
        def step(x, of_layer):
            return moe(comm, x, topk_weights, of_layer[0], bias, of_layer[1]), None

        return jax.lax.scan(step, x, (matrices, topk_idx))[0]

    arrays = (inputs.x, inputs.topk_weights, matrices, inputs.bias, topk_idx, inputs.g)
    got = run_per_device(lambda *args: layer_gradients(scanned, *args), MESH, AXIS, *arrays)
    expected = run_per_device(lambda *args: layer_gradients(unrolled, *args), MESH, AXIS, *arrays)
    assert_close(got, expected)


def test_while_loop(implementation: str) -> None:
    """Three iterations of the same op, compared with the same ops unrolled."""
    comm = communicator(implementation)
    inputs = layer_inputs()

    def looped(x, *rest):
        return jax.lax.fori_loop(0, NUM_LAYERS, lambda _, x: jnp.tanh(moe(comm, x, *rest)), x)

    def in_a_row(x, *rest):
        for _ in range(NUM_LAYERS):
            x = jnp.tanh(moe(communicator("native"), x, *rest))
        return x

    got = run_per_device(looped, MESH, AXIS, *inputs.operands)
    assert_close(got, run_per_device(in_a_row, MESH, AXIS, *inputs.operands))


def test_cond_whose_predicate_the_group_shares(implementation: str) -> None:
    """Only the first group takes the branch with the ops, or only the second."""
    comm = communicator(implementation)
    inputs = layer_inputs()

    def program(here, *operands):
        return jax.lax.cond(here, lambda: moe(comm, *operands), lambda: jnp.zeros_like(operands[0]))

    run = compiled(per_device(program, MESH, AXIS))
    for taken in (True, False):
        in_group = (np.arange(MESH.size) < comm.size) == taken
        out = fetch(run(*put_on_mesh((in_group, *inputs.operands), MESH, device_axis(MESH, AXIS))))
        assert_close(out, np.where(in_group[:, None, None], inputs.out, 0))


def test_donated_operands(implementation: str) -> None:
    """The program may write its results over x and bias."""
    comm = communicator(implementation)
    inputs = layer_inputs()
    program = jax.jit(per_device(lambda *args: moe(comm, *args), MESH, AXIS), donate_argnums=(0, 3))
    for _ in range(3):
        operands = put_on_mesh(inputs.operands, MESH, device_axis(MESH, AXIS))
        out = fetch(program(*operands))
        assert operands[0].is_deleted() or operands[3].is_deleted()
        assert_close(out, inputs.out)


@functools.cache
def routes_of_tokens(implementation: str):
    """Return a compiled dispatch of arrays on the mesh."""
    comm = communicator(implementation)
    return compiled(per_device(lambda x, idx, w: ep.dispatch(x, idx, w, comm=comm), MESH, AXIS))


def test_donated_handle(implementation: str) -> None:
    comm = communicator(implementation)
    rows = inputs_of(LAYER)
    total = jax.jit(
        per_device(lambda y, handle: (ep.combine(y, handle, comm=comm), handle), MESH, AXIS), donate_argnums=1
    )
    x, topk_idx, topk_weights, y = put_on_mesh(
        (rows.x, rows.topk_idx, rows.topk_weights, rows.y), MESH, device_axis(MESH, AXIS)
    )
    _, handle = routes_of_tokens(implementation)(x, topk_idx, topk_weights)
    first, donated = total(y, handle)
    assert handle.source.is_deleted()
    second, _ = total(y, donated)
    assert_same_bits(fetch(first), fetch(second))


def test_handle_through_scan(implementation: str) -> None:
    """Routes computed once and carried through every step."""
    comm = communicator(implementation)
    rows = inputs_of(LAYER)

    def scanned(x, topk_idx, topk_weights):
        _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)

        def step(carry, _):
            x, handle = carry
            dispatched, handle = ep.dispatch(x, handle=handle, comm=comm)
            return (ep.combine(jnp.sin(dispatched.tokens), handle, comm=comm), handle), None

        return jax.lax.scan(step, (x, handle), length=NUM_LAYERS)[0][0]

    def in_a_row(x, topk_idx, topk_weights):
        native = communicator("native")
        for _ in range(NUM_LAYERS):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=native)
            x = ep.combine(jnp.sin(dispatched.tokens), handle, comm=native)
        return x

    arrays = (rows.x, rows.topk_idx, rows.topk_weights)
    got = run_per_device(scanned, MESH, AXIS, *arrays)
    assert_close(got, run_per_device(in_a_row, MESH, AXIS, *arrays))


def test_handle_out_of_jit_and_back(implementation: str) -> None:
    """A handle is a pytree: it leaves with a leading device axis, which is removed on the way in."""
    comm = communicator(implementation)
    rows = inputs_of(LAYER)
    arrays = (rows.x, rows.topk_idx, rows.topk_weights, rows.y, rows.bias)
    x, topk_idx, topk_weights, y, bias = put_on_mesh(arrays, MESH, device_axis(MESH, AXIS))
    dispatched, handle = routes_of_tokens(implementation)(x, topk_idx, topk_weights)
    assert isinstance(handle, ep.Handle)
    assert handle.source.shape == dispatched.mask.shape
    out = compiled(
        per_device(lambda y, handle, bias: ep.combine(y, handle, comm=comm, bias=bias), MESH, AXIS)
    )(y, handle, bias)

    y, bias = rows.by_group(rows.y), rows.by_group(rows.bias)
    expected = rows.from_oracle(
        lambda routes, group: oracle.combine(routes, y[group], weighted=True, bias=bias[group])
    )
    assert_same_sums(fetch(out), expected, implementation)
    np.testing.assert_array_equal(fetch(dispatched.mask), layer_inputs().mask)
