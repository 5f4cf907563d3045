"""Errors of dispatch and combine when tracing: each names the argument, what it got, and what it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from meshes import device_axis, fetch, mesh_named, per_device, put_on_mesh

import jax_deepep as ep

MESH = mesh_named("stage × expert")  # of which the outer axis is larger than 1 with any number of devices
SIZE = MESH.shape["expert"]
SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}


@functools.cache
def communicator(implementation: str = "native") -> ep.Communicator:
    return ep.Communicator(MESH, "expert", **SIZES, implementation=implementation)


@pytest.fixture(params=IMPLEMENTATIONS)
def comm(request: pytest.FixtureRequest) -> ep.Communicator:
    return communicator(request.param)


def trace(function) -> None:
    """Trace a function of no operands inside shard_map over the whole mesh."""
    mapped = per_device(lambda _: function(), MESH, "expert")
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((MESH.size,), jnp.float32))


def dispatch(right_comm, **wrong):
    operands = {
        "x": jnp.zeros((5, 8)),
        "topk_idx": jnp.zeros((5, 3), jnp.int32),
        "topk_weights": jnp.zeros((5, 3)),
        "comm": right_comm,
    }
    return ep.dispatch(**{**operands, **wrong})


def combine(right_comm, dispatch_options: dict | None = None, **wrong):
    dispatched, handle = dispatch(right_comm, **(dispatch_options or {}))
    return ep.combine(**{"y": dispatched.tokens, "handle": handle, "comm": right_comm, **wrong})


DISPATCH = [
    ({"x": jnp.zeros((5, 7))}, ValueError, r"x: got shape \(5, 7\); takes \[T, hidden_size\] = \[any, 8\]"),
    ({"x": jnp.zeros((5, 1, 8))}, ValueError, r"x: got shape \(5, 1, 8\); takes \[T, hidden_size\]"),
    ({"x": jnp.zeros((7, 8))}, ValueError, r"x: got 7 tokens; .* takes at most max_tokens=6"),
    ({"x": jnp.zeros((5, 8), bool)}, TypeError, r"x: got dtype bool; takes bfloat16, .*, uint32\. Cast it"),
    ({"x": jnp.zeros((5, 8), jnp.int4)}, TypeError, r"x: got dtype int4; takes bfloat16, "),
    ({"x": jnp.zeros((5, 8), jnp.float8_e4m3fn)}, TypeError,
     r"x: got dtype float8_e4m3fn; .*send its bits as integers: jax\.lax\.bitcast_convert_type\(x"),
    ({"x": jnp.zeros((5, 33), jnp.uint8)}, ValueError,
     r"x: got 33 uint8 in a row; takes 1 to 32, the bytes of hidden_size=8 float32.*larger hidden_size"),
    ({"x": jnp.zeros((5, 17), jnp.int16)}, ValueError, r"x: got 17 int16 in a row; takes 1 to 16"),
    ({"x": jnp.zeros((5, 0), jnp.int32)}, ValueError, r"x: got 0 int32 in a row; takes 1 to 8"),
    ({"x": jnp.zeros((5, 1, 8), jnp.int8)}, ValueError, r"x: got shape \(5, 1, 8\); takes \[T, W\] = \[any"),
    ({"x": jnp.zeros((7, 3), jnp.int8)}, ValueError, r"x: got 7 tokens; .* takes at most max_tokens=6"),
    ({"x": [[0.0] * 8]}, TypeError, r"x: got list; takes an array"),
    ({"topk_idx": jnp.zeros((5, 3), jnp.int16)}, TypeError, r"topk_idx: got dtype int16; takes int32"),
    ({"topk_idx": jnp.zeros((5, 4), jnp.int32)}, ValueError,
     r"topk_idx: got shape \(5, 4\); takes \[T, num_experts_per_tok\] = \[5, 3\]"),
    ({"topk_idx": None}, TypeError, r"topk_idx, topk_weights: got None; dispatch takes both, or handle="),
    ({"topk_weights": jnp.zeros((4, 3))}, ValueError, r"topk_weights: got shape \(4, 3\); .* \[5, 3\]"),
    ({"topk_weights": jnp.zeros((5, 3), jnp.bfloat16)}, TypeError,
     r"topk_weights: got dtype bfloat16; takes float32.*Cast it"),
    ({"comm": "expert"}, TypeError, r"comm: expected a jax_deepep\.Communicator, got str; make one outside"),
    ({"comm": None}, TypeError, r"comm: expected a jax_deepep\.Communicator, got NoneType; .* to dispatch"),
    ({"layout": "rows"}, ValueError, r"layout: got 'rows'; takes \"expert\" or \"token\""),
    ({"alignment": 0}, ValueError, r"alignment: got 0; takes an integer of at least 1"),
    ({"alignment": 2.0}, TypeError, r"alignment: got 2\.0; takes a Python integer"),
    ({"alignment": 2**32, "capacity": 0}, ValueError, r"alignment: got 4294967296; takes at most 2147483647"),
    ({"expert_capacity": 2**70}, ValueError, rf"expert_capacity: got {2**70}; takes at most 2147483647"),
    ({"capacity": -8}, ValueError, r"capacity: got -8; takes an integer of at least 0"),
    ({"capacity": 12, "alignment": 8}, ValueError,
     r"capacity: got 12 with alignment=8; takes a multiple of alignment, for example 16"),
    ({"capacity": 2**31 // SIZE}, ValueError,
     rf"capacity: got {2**31 // SIZE} rows on each of {SIZE} devices; takes at most"),
    ({"capacity": "many"}, TypeError, r"capacity: got 'many'; takes a Python integer"),
    ({"expert_capacity": -1}, ValueError, r"expert_capacity: got -1; takes an integer of at least 0"),
    ({"expert_capacity": 4, "layout": "token"}, ValueError,
     r"expert_capacity: got 4 with layout='token'.*takes None"),
    ({"wire": "fp8"}, ValueError, r"wire: expected None, got 'fp8'; .*of a later version"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "words"), DISPATCH, ids=[case[2][:40] for case in DISPATCH])
def test_a_wrong_argument_of_dispatch(comm, wrong: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        trace(lambda: dispatch(comm, **wrong))


def test_integers_of_numpy(comm) -> None:
    options = {"capacity": 16, "alignment": 4, "expert_capacity": 2}
    of_numpy = {name: np.int16(value) for name, value in options.items()}

    def destinations(options: dict) -> np.ndarray:
        mapped = per_device(lambda _: dispatch(comm, **options)[1].destination, MESH, "expert")
        return fetch(jax.jit(mapped)(jnp.zeros(MESH.size)))

    np.testing.assert_array_equal(destinations(of_numpy), destinations(options))


def test_a_capacity_that_is_traced(comm) -> None:
    with pytest.raises(TypeError, match=r"capacity: got .*; takes a Python integer \(a static value"):
        trace(lambda: jax.jit(lambda capacity: dispatch(comm, capacity=capacity))(8))


ALONG_A_HANDLE = [
    ({"topk_idx": jnp.zeros((5, 3), jnp.int32)}, r"topk_idx: got an array together with handle=; takes None"),
    ({"topk_weights": jnp.zeros((5, 3))}, r"topk_weights: got an array together with handle=; takes None"),
    ({"capacity": 8}, r"capacity: got 8; takes None or the handle's own, 48"),
    ({"x": jnp.zeros((4, 8))}, r"x: got 4 tokens; takes as many as the dispatch that made the handle, 5"),
    ({"layout": "token"}, r"layout: got 'token'"),
    ({"alignment": 8}, r"alignment: got 8"),
    ({"expert_capacity": 2}, r"expert_capacity: got 2"),
]


@pytest.mark.parametrize(("wrong", "words"), ALONG_A_HANDLE, ids=[case[1][:30] for case in ALONG_A_HANDLE])
def test_a_wrong_argument_along_a_handle(comm, wrong: dict, words: str) -> None:
    def along():
        _, handle = dispatch(comm, capacity=48)
        return ep.dispatch(**{"x": jnp.zeros((5, 8)), "handle": handle, "comm": comm, **wrong})

    with pytest.raises(ValueError, match=words):
        trace(along)


COMBINE = [
    ({"y": jnp.zeros((40, 8))}, {}, ValueError, r"y: got shape \(40, 8\); takes \[capacity, .* \[16, 8\]"),
    ({"y": jnp.zeros((16, 8), jnp.int8)}, {}, TypeError, r"y: got dtype int8; takes bfloat16, float16"),
    ({"handle": (1, 2)}, {}, TypeError, r"handle: expected a jax_deepep\.Handle, got tuple; pass the second"),
    ({"handle": None}, {}, TypeError, r"handle: expected a jax_deepep\.Handle, got NoneType"),
    ({"comm": "expert"}, {}, TypeError, r"comm: expected a jax_deepep\.Communicator, got str; .* to combine"),
    ({"weighted": 1}, {}, TypeError, r"weighted: got 1; takes True, False or None"),
    ({"weighted": True}, {"layout": "token"}, ValueError, r"weighted: got True for token-major rows; takes"),
    ({"bias": jnp.zeros((4, 8))}, {}, ValueError, r"bias: got shape \(4, 8\); takes \[T, .* = \[5, 8\]"),
    ({"bias": jnp.zeros((5, 8), jnp.bfloat16)}, {}, TypeError, r"bias: got dtype bfloat16; takes float32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "options", "error", "words"), COMBINE, ids=[case[3][:40] for case in COMBINE]
)
def test_a_wrong_argument_of_combine(
    comm, wrong: dict, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trace(lambda: combine(comm, {"capacity": 16, **options}, **wrong))


def test_a_handle_of_another_communicator(comm) -> None:
    other = ep.Communicator(MESH, "expert", **SIZES, implementation=comm.implementation)
    words = (
        rf"comm: expected Communicator #{comm.id}\(.*, which made the handle, "
        rf"got Communicator #{other.id}\(.*; leave comm out"
    )
    with pytest.raises(ValueError, match=words):
        trace(lambda: combine(comm, comm=other))
    with pytest.raises(ValueError, match=words):
        trace(lambda: ep.dispatch(jnp.zeros((5, 8)), handle=dispatch(comm)[1], comm=other))
    other.close()


def test_a_handle_that_kept_its_device_axis(comm) -> None:
    def with_device_axis():
        dispatched, handle = dispatch(comm)
        handle = jax.tree.map(lambda leaf: leaf[None], handle)
        return ep.combine(dispatched.tokens, handle, comm=comm)

    words = r"handle: expected .* \[capacity\] = \[\d+\], got \[1, \d+\]; .* loses it by jax\.tree\.map\("
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
        out, backward = jax.vjp(layer, x)  # of ½ |layer(x)|², in which all is linear
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
        assert "all_gather" in program.lower(lowering_platforms=("tpu",)).as_text()
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
    """As its docstring says: with an axis of devices."""
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
    assert handle.num_dropped.shape == (MESH.size,)
    np.testing.assert_array_equal(fetch(second(dispatched, handle)), 1.5 * x)


def test_a_closed_communicator_is_not_traced(comm) -> None:
    closed = ep.Communicator(MESH, "expert", **SIZES, implementation=comm.implementation)
    closed.close()
    with pytest.raises(ep.CommunicatorError, match=r"comm: .*is closed; make a new Communicator"):
        trace(lambda: dispatch(closed))
