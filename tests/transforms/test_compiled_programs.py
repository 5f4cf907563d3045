"""Properties of compiled programs: export, the same bits on every run, and no hidden communication."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, assert_same_bits
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh
from moe_layer import LAYER, assert_close, communicator, layer_inputs, moe, training_step

MESH, AXIS = LAYER.mesh, LAYER.axis_name
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
CUSTOM_CALLS = ("jax_deepep_dispatch", "jax_deepep_cached_dispatch", "jax_deepep_combine")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export_round_trip(implementation: str) -> None:
    step, _, arrays = training_step(implementation)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    exported = jax.export.export(step, disabled_checks=checks)(*arrays)
    again = jax.export.deserialize(exported.serialize())
    out, gradients = fetch(compiled(again.call)(*arrays))
    inputs = layer_inputs()
    assert_close(out, inputs.out)
    assert_close(gradients, inputs.expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_run_gives_the_same_bits(implementation: str) -> None:
    _, step, arrays = training_step(implementation)
    first = fetch(step(*arrays))
    for _ in range(20):
        jax.tree.map(assert_same_bits, fetch(step(*arrays)), first)


@pytest.mark.parametrize("implementation", ["native"])
def test_what_follows_an_op_treats_subnormals_as_xla_does(implementation: str) -> None:
    """On a CPU, XLA flushes them to zero; an op that ends on a library thread does not change that."""
    comm = communicator(implementation)
    inputs = layer_inputs()

    def tiny(out):
        sign = jnp.where(out > 0, 1.0, -1.0)  # which rounding does not change
        return [sign * jnp.float32(1e-38) * jnp.float32(factor) for factor in (0.5, 0.01, 2.0)]

    def results_of(function, *arrays):
        program = jax.jit(per_device(function, MESH, AXIS))
        arrays = put_on_mesh(arrays, MESH, device_axis(MESH, AXIS))
        return [fetch(program(*arrays)) for _ in range(10)]

    expected = results_of(tiny, inputs.out.astype(np.float32))[0]
    for got in results_of(lambda *operands: tiny(moe(comm, *operands)), *inputs.operands):
        jax.tree.map(assert_same_bits, got, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_native_programs_hold_no_collective(check_vma: bool) -> None:
    """Forward and backward, the ops are the only communication."""
    _, step, _ = training_step("native", check_vma=check_vma)
    text = step.as_text()
    assert set(re.findall(r'custom_call_target="(jax_deepep_\w+)"', text)) == set(CUSTOM_CALLS)
    for collective in COLLECTIVES:
        assert not re.search(rf"= .*\b{collective}(-start)?\(", text), collective


@pytest.mark.collectives
def test_the_search_for_collectives_finds_those_of_xla() -> None:
    """The same search on the implementation that is made of them."""
    _, step, _ = training_step("xla")
    text = step.as_text()
    found = {name for name in COLLECTIVES if re.search(rf"= .*\b{name}(-start)?\(", text)}
    assert {"all-gather", "all-to-all"} <= found
