"""Ops of slices, and in loops that save their results: each runs once, also in two parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, LOW_LATENCY, assert_same_bits
from jax import lax
from meshes import device_axis, per_device, put_on_mesh, run_per_device
from moe_layer import LAYER, communicator
from test_start_and_done import doubled, experts, in_parts, native, operands_of, whole

import jax_deepep as ep


def of_slices(comm, pair, topk_weights, topk_idx):
    """Start ops of slices of an array."""
    sent = ep.dispatch_start(pair[0], topk_idx, topk_weights, comm=comm)
    beside = sent.meanwhile(doubled, pair[1])
    dispatched, handle = ep.dispatch_done(sent)
    sent = ep.dispatch_start(pair[1], handle=handle)
    rows = sent.meanwhile(experts, dispatched)
    again, _ = ep.dispatch_done(sent)
    rows = rows + jnp.where(dispatched.mask[:, None], again.tokens, 0)
    returned = ep.combine_start(rows, handle, bias=pair[0])
    beside = returned.meanwhile(jnp.abs, beside)
    return ep.combine_done(returned), beside


def operands_of_slices(implementation: str) -> tuple[np.ndarray, ...]:
    x, topk_weights, _, topk_idx, _ = operands_of(implementation)
    return np.stack([x, -2 * x], axis=1), topk_weights, topk_idx


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operands_that_are_slices(implementation: str) -> None:
    comm = communicator(implementation)

    def plain(pair, topk_weights, topk_idx):
        dispatched, handle = ep.dispatch(pair[0], topk_idx, topk_weights, comm=comm)
        again, _ = ep.dispatch(pair[1], handle=handle)
        rows = experts(dispatched) + jnp.where(dispatched.mask[:, None], again.tokens, 0)
        return ep.combine(rows, handle, bias=pair[0]), jnp.abs(doubled(pair[1]))

    program = functools.partial(of_slices, comm)
    results = [
        run_per_device(run, LAYER.mesh, LAYER.axis_name, *operands_of_slices(implementation))
        for run in (program, plain)
    ]
    jax.tree.map(assert_same_bits, *results)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [native, LOW_LATENCY])
def test_xla_runs_every_part_once(implementation: str) -> None:
    """XLA for GPUs would make a fusion of a call and slices that it reads or writes, beside the call."""
    comm = communicator(implementation)

    def layers(pair, topk_weights, topk_idx):
        def step(carry, x):
            out, beside = of_slices(comm, jnp.stack([carry, x]), topk_weights, topk_idx)
            return out + beside, out

        _, outs = lax.scan(step, pair[0], pair)
        return outs

    for program in (functools.partial(of_slices, comm), layers):
        mapped = per_device(program, LAYER.mesh, LAYER.axis_name)
        spec = device_axis(LAYER.mesh, LAYER.axis_name)
        lowered = jax.jit(mapped).lower(*put_on_mesh(operands_of_slices(implementation), LAYER.mesh, spec))
        num_parts = lowered.as_text().count("has_side_effect = true")
        assert num_parts == 6
        assert lowered.compile().as_text().count("custom_call_has_side_effect=true") == num_parts


def scan_of_layers(layer, comm, *args):
    """Forward and backward."""
    *operands, topk_idx, g = args

    def layers(x, topk_weights, bias):
        def body(x, _):
            return layer(comm, LAYER, x, topk_weights, bias, topk_idx)

        return lax.scan(body, x, None, length=3)

    out, backward = jax.vjp(layers, *operands)
    return out, backward((g, jnp.stack([g, g, g])))


@pytest.mark.parametrize("implementation", [native, LOW_LATENCY])
def test_scan_of_layers(implementation: str) -> None:
    """Each layer with its pairs."""
    comm = communicator(implementation)
    results = [
        run_per_device(
            functools.partial(scan_of_layers, layer, comm),
            LAYER.mesh,
            LAYER.axis_name,
            *operands_of(implementation),
        )
        for layer in (whole, in_parts)
    ]
    jax.tree.map(assert_same_bits, *results)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [whole, in_parts])
@pytest.mark.parametrize("implementation", [native, LOW_LATENCY])
def test_xla_runs_every_op_of_a_loop_once(implementation: str, layer) -> None:
    """It saves results for gradients: XLA for GPUs would make a fusion of op and saving, beside the op."""
    program = functools.partial(scan_of_layers, layer, communicator(implementation))
    mapped = per_device(program, LAYER.mesh, LAYER.axis_name)
    spec = device_axis(LAYER.mesh, LAYER.axis_name)
    lowered = jax.jit(mapped).lower(*put_on_mesh(operands_of(implementation), LAYER.mesh, spec))
    num_calls = lowered.as_text().count("@jax_deepep_")
    assert num_calls >= 6
    assert lowered.compile().as_text().count('custom_call_target="jax_deepep_') == num_calls
