"""Errors of dispatch and combine when tracing: each names the argument, what it got, and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from meshes import fetch, per_device
from op_calls import MESH, SIZE, SIZES, combine, communicator, dispatch, trace

import jax_deepep as ep


@pytest.fixture(params=IMPLEMENTATIONS)
def comm(request: pytest.FixtureRequest) -> ep.Communicator:
    return communicator(request.param)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_low_latency_mode_does_not_send(implementation: str) -> None:
    comm = communicator(implementation, mode="low_latency")
    words = (
        r'%s: expected rows of at most 16 bytes with mode="low_latency" and hidden_size=8, got 8 float32, 32 '
        r'bytes; cast them to bfloat16, or make the communicator with mode="throughput"'
    )
    with pytest.raises(ValueError, match=words % "x"):
        trace(lambda: dispatch(comm))
    narrow = {"x": jnp.zeros((5, 8), jnp.bfloat16), "capacity": 48}
    with pytest.raises(ValueError, match=words % "y"):
        trace(lambda: combine(comm, narrow, y=jnp.zeros((48, 8))))
    trace(lambda: combine(comm, narrow))
    assert comm.mode == "low_latency"
    assert "low_latency (mode='low_latency')" in comm.describe()


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


def test_a_closed_communicator_is_not_traced(comm) -> None:
    closed = ep.Communicator(MESH, "expert", **SIZES, implementation=comm.implementation)
    closed.close()
    with pytest.raises(ep.CommunicatorError, match=r"comm: .*is closed; make a new Communicator"):
        trace(lambda: dispatch(closed))
