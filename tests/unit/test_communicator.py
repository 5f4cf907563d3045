"""The communicator as an object: attributes, identity, description, lifetime."""

import copy
import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from meshes import device_axis, fetch, mesh_named, per_device, put_on_mesh
from moe_layer import LAYER, assert_close, layer_inputs, moe

import jax_deepep as ep

MESH = mesh_named("data × expert")
SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}

by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def make(**options) -> ep.Communicator:
    return ep.Communicator(MESH, "expert", **{**SIZES, **options})


def layer_program(comm: ep.Communicator):
    """Return the layer as a jitted function, and operands on the mesh."""
    program = jax.jit(per_device(lambda *operands: moe(comm, *operands), MESH, "expert"))
    return program, put_on_mesh(layer_inputs().operands, MESH, device_axis(MESH, "expert"))


@by_implementation
def test_arguments_are_attributes(implementation: str) -> None:
    comm = make(implementation=implementation, num_sms=20, timeout_s=7.5)
    assert comm.mesh is MESH
    assert comm.axis_name == "expert"
    for name, value in SIZES.items():
        assert getattr(comm, name) == value
    assert comm.implementation == implementation
    assert comm.mode == "auto"
    assert comm.num_sms == 20
    assert comm.timeout_s == 7.5
    assert comm.size == MESH.shape["expert"]
    assert comm.num_local_experts == 8 // comm.size
    assert comm.buffer_bytes >= 0


def test_a_tuple_of_axes_is_one_group() -> None:
    mesh = mesh_named("node × expert")
    comm = ep.Communicator(mesh, ("node", "expert"), **SIZES)
    assert comm.axis_name == ("node", "expert")
    assert comm.size == mesh.size
    assert comm.num_local_experts == 8 // mesh.size


def test_defaults() -> None:
    comm = ep.Communicator(MESH, **SIZES)
    assert comm.axis_name == "expert"
    assert comm.num_sms is None
    assert comm.timeout_s == 600.0


def test_auto_takes_the_native_ops_and_says_so() -> None:
    comm = make()
    assert comm.implementation == "native"
    assert "native (auto" in comm.describe()


@by_implementation
def test_equality_is_identity(implementation: str) -> None:
    one, other = make(implementation=implementation), make(implementation=implementation)
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2
    assert copy.deepcopy(one) is one
    assert copy.copy(one) is one


def test_a_communicator_is_a_static_argument() -> None:
    comm = make()
    traced = []

    def double(value, comm):
        traced.append(comm)
        return 2 * value

    function = jax.jit(double, static_argnames="comm")
    assert function(jnp.float32(1), comm=comm) == 2
    assert function(jnp.float32(3), comm=comm) == 6
    assert traced == [comm]  # the second call found the first one's program


def test_frozen() -> None:
    comm = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        comm.max_tokens = 7


@by_implementation
def test_describe_is_one_screen(implementation: str) -> None:
    comm = make(implementation=implementation, timeout_s=7.5)
    text = comm.describe()
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 120
    groups, size = MESH.devices.shape
    shape, topology = f"data {groups}, expert {size}", f"{groups} of {size} devices along expert"
    for fact in (shape, topology, implementation, "7.5 s", "ready", comm.topology.platform):
        assert fact in text


def test_describe_says_when_it_is_closed() -> None:
    comm = make()
    comm.close()
    assert "closed" in comm.describe()
    assert "ready" not in comm.describe()


@by_implementation
def test_context_manager_closes(implementation: str) -> None:
    with make(implementation=implementation) as comm:
        program, operands = layer_program(comm)
        assert_close(fetch(program(*operands)), layer_inputs().out)
    with pytest.raises(ep.CommunicatorError, match="closed"):
        jax.eval_shape(per_device(lambda *operands: moe(comm, *operands), MESH, "expert"), *operands)
    comm.close()  # again does nothing


@by_implementation
def test_the_mesh_of_the_program_may_have_other_devices(implementation: str) -> None:
    with jax.set_mesh(mesh_named("one device")), make(implementation=implementation) as comm:
        comm.check()
        if implementation == "native":
            comm.stats()


def test_a_closed_communicator_fails_the_programs_compiled_before() -> None:
    """With a clear error; the process and other communicators keep working.

    XLA may replay a CUDA graph of it without calling the host: then NaN shows the failure.
    """
    comm, other = make(), make()
    program, operands = layer_program(comm)
    for _ in range(3):
        fetch(program(*operands))
    comm.close()
    try:
        out = fetch(program(*operands))
    except jax.errors.JaxRuntimeError as error:
        assert re.search(r"is closed.*make a new Communicator", str(error))  # noqa: PT017
    else:
        assert comm.topology.platform == "cuda"
        assert np.isnan(out).all()

    program, operands = layer_program(other)
    assert_close(fetch(program(*operands)), layer_inputs().out)
    other.check()


def test_a_failed_program_does_not_spoil_check() -> None:
    """A failure with a closed communicator does not affect another one, while its result is alive."""
    comm, other = make(), make()
    program, operands = layer_program(comm)
    compiled = program.lower(*operands).compile()
    comm.close()
    failed = None
    try:
        failed = compiled(*operands)
        jax.block_until_ready(failed)
    except jax.errors.JaxRuntimeError as error:
        assert "is closed" in str(error)  # noqa: PT017
    else:
        pytest.fail("the program ran with a closed communicator")
    try:
        other.check()
        other.close()
    finally:
        del failed


def test_close_waits_for_what_runs() -> None:
    comm = make()
    program, operands = layer_program(comm)
    outs = [program(*operands) for _ in range(5)]
    comm.close()
    for out in outs:
        assert_close(fetch(out), layer_inputs().out)


def test_a_very_long_timeout_does_not_overflow() -> None:
    """More seconds than clocks can represent."""
    comm = make(timeout_s=1e300)
    program, operands = layer_program(comm)
    assert_close(fetch(program(*operands)), layer_inputs().out)
    comm.check()


@by_implementation
def test_an_unused_communicator_is_collected(implementation: str) -> None:
    comm = make(implementation=implementation)
    program, operands = layer_program(comm)
    fetch(program(*operands))
    gone = weakref.ref(comm)
    del comm, program
    jax.clear_caches()
    gc.collect()
    assert gone() is None


def test_a_program_outlives_its_communicator() -> None:
    """Freed while a compiled program still uses it."""
    comm = make()
    program, operands = layer_program(comm)
    compiled = program.lower(*operands).compile()
    del comm, program
    jax.clear_caches()
    gc.collect()
    assert_close(fetch(compiled(*operands)), layer_inputs().out)


def test_stats_of_the_other_implementation() -> None:
    with pytest.raises(ep.CommunicatorError, match='stats: implementation="xla"'):
        make(implementation="xla").stats()


def test_xla_has_nothing_to_check() -> None:
    make(implementation="xla").check()


def test_ranks_follow_the_mesh() -> None:
    """The device order of a group is the mesh's, independent of device ids."""
    devices = np.array(jax.devices())[::-1].reshape(MESH.devices.shape)
    mesh = jax.sharding.Mesh(devices, ("data", "expert"))
    comm = ep.Communicator(mesh, "expert", **SIZES)
    inputs = layer_inputs()
    program = jax.jit(per_device(lambda *operands: moe(comm, *operands), mesh, "expert"))
    out = program(*put_on_mesh(inputs.operands, mesh, device_axis(mesh, "expert")))
    assert_close(fetch(out), inputs.out)
    assert LAYER.max_tokens == SIZES["max_tokens"]


def assert_rejected(devices: np.ndarray) -> None:
    """Check that ops are not compiled for another mesh of `devices`, before any wait."""
    comm = make(implementation="native")
    other = jax.sharding.Mesh(devices, MESH.axis_names)
    program = jax.jit(per_device(lambda *operands: moe(comm, *operands), other, "expert"))
    operands = put_on_mesh(layer_inputs().operands, other, device_axis(other, "expert"))
    with pytest.raises(
        ValueError, match=r"comm: expected the groups .* program's mesh has .*; use shard_map with comm\.mesh"
    ):
        program(*operands)
    comm.check()


def test_a_program_in_which_devices_are_other_ranks_is_an_error() -> None:
    assert_rejected(MESH.devices[:, ::-1])


@pytest.mark.skipif(len(MESH.devices) == 1, reason="needs two groups of two devices")
def test_a_program_in_which_groups_are_of_other_devices_is_an_error() -> None:
    """Every device keeps its rank."""
    devices = MESH.devices.copy()
    devices[:, 1] = devices[::-1, 1]
    assert_rejected(devices)


def test_groups_in_another_order_are_the_same() -> None:
    """The first axis reversed: every group and every rank stay the same."""
    comm = make()
    other = jax.sharding.Mesh(MESH.devices[::-1], MESH.axis_names)
    program = jax.jit(per_device(lambda *operands: moe(comm, *operands), other, "expert"))
    _, operands = layer_program(comm)
    operands = jax.device_put(operands, jax.NamedSharding(other, device_axis(other, "expert")))
    assert_close(fetch(program(*operands)), layer_inputs().out)


def test_a_group_of_one_needs_no_axis_in_the_program() -> None:
    mesh = mesh_named("one device")
    comm = ep.Communicator(mesh, "expert", **SIZES, implementation="native")
    other = jax.sharding.Mesh(mesh.devices, ("data",))
    x = np.ones((1, 4, 8), np.float32)
    topk_idx = np.tile(np.array([0, 5, 7], np.int32), (1, 4, 1))
    topk_weights = np.full((1, 4, 3), 0.5, np.float32)

    def there_and_back(x, topk_idx, topk_weights):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
        return ep.combine(dispatched.tokens, handle, comm=comm)

    program = jax.jit(per_device(there_and_back, other, "data"))
    np.testing.assert_array_equal(fetch(program(x, topk_idx, topk_weights)), 1.5 * x)
