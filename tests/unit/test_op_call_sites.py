"""Where dispatch and combine can be called, which transformations they support, and errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from meshes import device_axis, fetch, per_device, put_on_mesh
from op_calls import MESH, SIZE, SIZES, communicator, dispatch, trace

import jax_deepep as ep


@pytest.fixture(params=IMPLEMENTATIONS)
def comm(request: pytest.FixtureRequest) -> ep.Communicator:
    return communicator(request.param)


def test_a_handle_that_kept_its_device_axis(comm) -> None:
    def with_device_axis():
        dispatched, handle = dispatch(comm)
        handle = jax.tree.map(lambda leaf: leaf[None], handle)
        return ep.combine(dispatched.tokens, handle, comm=comm)

    words = r"handle: expected .* \[capacity\] = \[\d+\], got \[1, \d+\]; remove .* jax\.tree\.map\("
    with pytest.raises(ValueError, match=words):
        trace(with_device_axis)


def test_outside_of_shard_map(comm) -> None:
    words = (
        r"dispatch: expected values of one device, got a call where the mesh axis 'stage' of size 2 is not "
        r"manual \(manual: none\); call it in jax\.shard_map"
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: dispatch(comm))


def test_a_mesh_axis_that_is_not_manual(comm) -> None:
    """All axes larger than 1 must be manual, not the expert-parallel ones alone."""
    mapped = jax.shard_map(
        lambda _: dispatch(comm)[0].mask,
        mesh=MESH, in_specs=P(), out_specs=P(), axis_names={"expert"}, check_vma=False,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"dispatch: expected .* the mesh axis 'stage' of size 2 is not manual"
    ):
        jax.eval_shape(jax.jit(mapped), jax.ShapeDtypeStruct((), jnp.float32))


def test_combine_outside_of_shard_map(comm) -> None:
    kept = []

    def keep():
        dispatched, handle = dispatch(comm)
        kept.append(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), handle))
        return dispatched.mask

    trace(keep)
    y = jnp.zeros((*kept[0].source.shape, 8))
    with pytest.raises(
        ValueError, match=r"combine: expected .* the mesh axis 'stage' of size 2 is not manual"
    ):
        ep.combine(y, kept[0], comm=comm)


def other_mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
    "mesh",
    [
        other_mesh(stage=4, expert=SIZE),
        other_mesh(expert=8),
        other_mesh(data=2, expert=SIZE),
        other_mesh(stage=2, data=2, expert=SIZE),
    ],
    ids=["another size", "an axis less", "another axis", "an axis more"],
)
def test_another_mesh_than_the_communicators(comm, mesh: AbstractMesh) -> None:
    here, own = ({axis: size for axis, size in of.shape.items() if size > 1} for of in (mesh, MESH))
    words = (
        f"comm: expected a communicator of the mesh in use here, {here}, got one of {own}; call dispatch in"
    )
    mapped = per_device(lambda _: dispatch(comm)[0].mask, mesh, "expert")
    with pytest.raises(ValueError, match=re.escape(words)):
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((mesh.size,), jnp.float32))


def differentiable(comm):
    """Return a function of x [devices, T, H], whose rows go through both ops."""

    def layer(x):
        dispatched, handle = dispatch(comm, x=x)
        return ep.combine(dispatched.tokens + ep.dispatch(x, handle=handle)[0].tokens, handle, weighted=False)

    return per_device(layer, MESH, "expert")


def test_forward_mode(comm) -> None:
    layer, x = differentiable(comm), jnp.ones((MESH.size, 5, 8))
    words = r"dispatch: expected .* reverse mode, got forward mode \(jvp, jacfwd, linearize\); use jax\.grad"
    for function in (layer, jax.jit(layer)):
        with pytest.raises(TypeError, match=words):
            jax.jit(lambda x, function=function: jax.jvp(function, (x,), (x,))).lower(x)


def test_gradients_of_gradients(comm) -> None:
    """Native ops have none; those of xla are right."""
    layer, x = differentiable(comm), jnp.ones((MESH.size, 5, 8))

    def gradient(x):
        out, backward = jax.vjp(layer, x)  # of ½ |layer(x)|², with a linear layer
        return backward(out)[0]

    def second(x):
        return jax.vjp(gradient, x)[1](x)[0]

    if comm.implementation == "xla":
        value, of_gradient = fetch(jax.jit(lambda x: (gradient(x), second(x)))(x))
        np.testing.assert_allclose(of_gradient, value, rtol=1e-6)
        assert np.abs(value).max() > 0
    else:
        with pytest.raises(
            TypeError, match=r"gradient: expected .* first order, got .* implementation=\"xla\""
        ):
            jax.jit(second).lower(x)


def test_lowering_for_another_platform(comm) -> None:
    program = jax.jit(differentiable(comm)).trace(jax.ShapeDtypeStruct((MESH.size, 5, 8), jnp.float32))
    if comm.implementation == "xla":
        assert ("all_gather" in program.lower(lowering_platforms=("tpu",)).as_text()) == (SIZE > 1)
        return
    for platform in {"cpu", "cuda", "rocm", "tpu"} - {comm.platform}:
        words = rf"comm: expected .* of {platform} devices, .* on {comm.platform}; .*implementation=\"xla\""
        with pytest.raises(ValueError, match=words):
            program.lower(lowering_platforms=(platform,))


def test_a_communicator_made_while_tracing() -> None:
    words = r"Communicator: expected to be made outside of jit .*, got a call while tracing; make it before"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: ep.Communicator(MESH, "expert", **SIZES) and jnp.zeros(()))


def test_a_handle_leaves_a_shard_map_and_enters_another(comm) -> None:
    """As documented: with a leading device axis."""
    x, idx = jnp.arange(MESH.size * 40.0).reshape(-1, 5, 8), jnp.arange(15, dtype=jnp.int32).reshape(5, 3) % 8
    axes = device_axis(MESH, "expert")
    options = {"topk_idx": idx, "topk_weights": jnp.full((5, 3), 0.5)}

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=axes, out_specs=axes)
    def first(x):
        results = dispatch(comm, x=x[0], **options)
        return jax.tree.map(lambda leaf: leaf[None], results)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=axes, out_specs=axes)
    def second(dispatched, handle):
        dispatched, handle = jax.tree.map(lambda leaf: leaf[0], (dispatched, handle))
        return ep.combine(dispatched.tokens, handle)[None]

    [x_on_mesh] = put_on_mesh([np.asarray(x)], MESH, axes)
    dispatched, handle = first(x_on_mesh)
    assert isinstance(handle, ep.Handle)
    assert handle.comm is comm
    assert (handle.layout, handle.capacity, handle.mode) == ("expert", handle.source.shape[1], "low_latency")
    assert handle.num_dropped.shape == (MESH.size,)
    np.testing.assert_array_equal(fetch(second(dispatched, handle)), 1.5 * x)
