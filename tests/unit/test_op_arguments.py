"""Errors of dispatch and combine when tracing: name of the argument, expected and given value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from meshes import fetch, mesh_named, per_device
from op_calls import MESH, SIZE, SIZES, combine, dispatch, trace
from op_calls import communicator as communicator_of

import jax_deepep as ep
from jax_deepep import jax_compat
from jax_deepep.communicator import communicator
from jax_deepep.communicator.backend import Agreement


@pytest.fixture(params=IMPLEMENTATIONS)
def comm(request: pytest.FixtureRequest) -> ep.Communicator:
    return communicator_of(request.param)


DISPATCH = [
    ({"x": jnp.zeros((5, 7))}, ValueError, r"x: expected shape \[T, hidden_size\] = \[any, 8\], got \[5, 7"),
    ({"x": jnp.zeros((5, 1, 8))}, ValueError, r"x: expected shape \[T, hidden_size\].*, got \[5, 1, 8"),
    ({"x": jnp.zeros((7, 8))}, ValueError, r"x: expected at most max_tokens=6 tokens, got 7; make"),
    ({"x": jnp.zeros((5, 8), bool)}, TypeError, r"x: expected dtype bfloat16, .*, uint32, got bool; cast it"),
    ({"x": jnp.zeros((5, 8), jnp.int4)}, TypeError, r"x: expected dtype bfloat16, .*, got int4"),
    ({"x": jnp.zeros((5, 8), jnp.float8_e4m3fn)}, TypeError,
     r"x: expected dtype .*, got float8_e4m3fn; .*send its bits as integers: jax\.lax\.bitcast_convert_type"),
    ({"x": jnp.zeros((5, 33), jnp.uint8)}, ValueError,
     r"x: expected rows of 1 to 32 uint8, the bytes of hidden_size=8 float32, got 33; .*larger hidden_size"),
    ({"x": jnp.zeros((5, 17), jnp.int16)}, ValueError, r"x: expected rows of 1 to 16 int16, .*, got 17"),
    ({"x": jnp.zeros((5, 0), jnp.int32)}, ValueError, r"x: expected rows of 1 to 8 int32, .*, got 0"),
    ({"x": jnp.zeros((5, 1, 8), jnp.int8)}, ValueError, r"x: expected shape \[T, W\] = .*, got \[5, 1, 8\]"),
    ({"x": jnp.zeros((7, 3), jnp.int8)}, ValueError, r"x: expected at most max_tokens=6 tokens, got 7; make"),
    ({"x": [[0.0] * 8]}, TypeError, r"x: expected an array, got list"),
    ({"topk_idx": jnp.zeros((5, 3), jnp.int16)}, TypeError, r"topk_idx: expected dtype int32, got int16"),
    ({"topk_idx": jnp.zeros((5, 4), jnp.int32)}, ValueError,
     r"topk_idx: expected shape \[T, num_experts_per_tok\] = \[5, 3\], got \[5, 4\]"),
    ({"topk_idx": None}, TypeError, r"topk_idx, topk_weights: expected arrays, got None; pass both"),
    ({"topk_weights": jnp.zeros((4, 3))}, ValueError, r"topk_weights: expected .* \[5, 3\], got \[4, 3\]"),
    ({"topk_weights": jnp.zeros((5, 3), jnp.bfloat16)}, TypeError,
     r"topk_weights: expected dtype float32, got bfloat16; cast it"),
    ({"comm": "expert"}, TypeError, r"comm: expected a jax_deepep\.Communicator, got str; make one outside"),
    ({"comm": None}, TypeError, r"comm: expected a jax_deepep\.Communicator, got NoneType; .* to dispatch"),
    ({"layout": "rows"}, ValueError, r"layout: expected \"expert\" or \"token\", got 'rows'"),
    ({"alignment": 0}, ValueError, r"alignment: expected an integer of at least 1, got 0"),
    ({"alignment": 2.0}, TypeError, r"alignment: expected a Python integer.*, got 2\.0"),
    ({"alignment": 2**32, "capacity": 0}, ValueError, r"alignment: expected at most 2147483647 .* 42949.*"),
    ({"expert_capacity": 2**70}, ValueError, rf"expert_capacity: expected at most 2147483647 .* {2**70}"),
    ({"capacity": -8}, ValueError, r"capacity: expected an integer of at least 0, got -8"),
    ({"capacity": 12, "alignment": 8}, ValueError,
     r"capacity: expected a multiple of alignment=8, got 12; pass 16"),
    ({"capacity": 2**31 // SIZE}, ValueError,
     rf"capacity: expected at most .* rows on each of {SIZE} devices .*, got {2**31 // SIZE}; pass"
     if SIZE > 1 else r"capacity: expected at most 2147483647 \(an int32\), got 2147483648"),
    ({"capacity": "many"}, TypeError, r"capacity: expected a Python integer.*, got 'many'"),
    ({"expert_capacity": -1}, ValueError, r"expert_capacity: expected an integer of at least 0, got -1"),
    ({"expert_capacity": 4, "layout": "token"}, ValueError,
     r"expert_capacity: expected None with layout='token', .*, got 4; use"),
    ({"wire": "fp16"}, ValueError,
     r'wire: expected None or one of "fp8", "fp8_ue8m0", "mxfp8", "nvfp4" for dispatch, got \'fp16\''),
    ({"wire": ep.Wire("fp8", backward="nvfp4")}, ValueError,
     r'wire\.backward: expected None or one of "fp8", .*"mxfp8" for the gradient of dispatch, got \'nvfp4\''),
    ({"wire": ep.Wire(None, keep_quantized=True)}, ValueError,
     r"wire\.keep_quantized: expected False with dispatch\(wire=None\), got True"),
    ({"wire": ep.Wire("fp8", keep_quantized=1)}, TypeError, r"wire\.keep_quantized: expected True or False"),
    ({"wire": "fp8", "x": jnp.zeros((5, 3), jnp.int8)}, TypeError,
     r"x: expected dtype .*float32 with wire='fp8', got int8; integers are not quantised: leave wire out"),
    ({"wire": "fp8", "x": ep.quantize(jnp.zeros((5, 8)), "fp8")}, ValueError,
     r"wire: expected None with a BlockScaled x, .* got 'fp8'; leave it out"),
    ({"x": ep.quantize(jnp.zeros((5, 16)), "fp8")}, ValueError,
     r"x: expected shape \[T, hidden_size\] = \[any, 8\], got \[5, 16\]"),
    ({"x": ep.BlockScaled(jnp.zeros((5, 8), jnp.uint8), jnp.zeros((5, 1)), format="mxfp8")}, TypeError,
     r"x\.scales: expected uint8 \[5, 1\] for mxfp8 rows of 8 elements, got float32 \[5, 1\]; make x with"),
    ({"x": ep.BlockScaled(jnp.zeros((5, 8), jnp.uint8), jnp.zeros((5, 2)), format="fp8")}, ValueError,
     r"x\.scales: expected float32 \[5, 1\] for fp8 rows of 8 elements, got float32 \[5, 2\]"),
    ({"x": ep.BlockScaled(jnp.zeros((5, 4), jnp.uint8), jnp.zeros((5, 1), jnp.uint8), format="nvfp4")},
     TypeError, r"x\.row_scale: expected float32 \[5\] for nvfp4 rows of 8 elements, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "words"), DISPATCH, ids=[case[2][:40] for case in DISPATCH])
def test_a_wrong_argument_of_dispatch(comm, wrong: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        trace(lambda: dispatch(comm, **wrong))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_low_latency_mode_does_not_send(implementation: str) -> None:
    comm = communicator_of(implementation, mode="low_latency")
    words = (
        r'%s: expected rows of at most 16 bytes with mode="low_latency" and hidden_size=8, whatever crosses '
        r"the link, got 8 float32, 32 bytes; cast them to bfloat16, or make the communicator with "
        r'mode="throughput"'
    )
    with pytest.raises(ValueError, match=words % "x"):
        trace(lambda: dispatch(comm))
    narrow = {"x": jnp.zeros((5, 8), jnp.bfloat16), "capacity": 48}
    with pytest.raises(ValueError, match=words % "y"):
        trace(lambda: combine(comm, narrow, y=jnp.zeros((48, 8))))
    trace(lambda: combine(comm, narrow))
    assert comm.mode == "low_latency"
    assert "low_latency, as asked" in comm.describe()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_auto_takes_low_latency_mode_for_few_tokens(implementation: str) -> None:
    comm = ep.Communicator(MESH, **{**SIZES, "max_tokens": 4096}, implementation=implementation)
    most = 1024 // max(comm.size, 2)
    assert f"auto: low_latency for dispatches of up to {most} tokens per device" in comm.describe()
    assert comm.mode == "auto"
    for num_tokens, mode in ((most, "low_latency"), (most + 1, "throughput")):

        def run(num_tokens: int = num_tokens, mode: str = mode) -> jax.Array:
            x = jnp.zeros((num_tokens, 8), jnp.bfloat16)
            idx = jnp.zeros((num_tokens, comm.num_experts_per_tok), jnp.int32)
            weights = jnp.zeros(idx.shape)
            received, handle = ep.dispatch(x, idx, weights, comm=comm)
            assert handle.mode == mode
            # Wider than what was sent, which low_latency alone would reject.
            return ep.combine(received.tokens.astype(jnp.float32), handle)

        trace(run)


@pytest.mark.parametrize("declared", [1, None])
def test_auto_is_throughput_mode_between_nodes_of_gpus(
    declared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that were declared, or found: kernels of the other mode would lack the scratch that they need."""
    monkeypatch.setattr(jax_compat, "platform_of", lambda device: "cuda")
    monkeypatch.setattr(communicator, "agree", lambda *_: Agreement("", ranks_per_node=1))
    mesh = mesh_named("expert")
    for mode, taken in (("auto", "throughput"), ("low_latency", "low_latency")):
        comm = ep.Communicator(mesh, **SIZES, implementation="xla", ranks_per_node=declared, mode=mode)
        assert (comm.topology.num_nodes, comm.mode_of(1)) == (mesh.size, taken)
        assert comm.config.ranks_per_node == declared
        expected = f"{taken}, as asked" if mode == taken else "between nodes has not been measured"
        assert expected in comm.describe()


@pytest.mark.parametrize(("num_experts", "most"), [(512, 512), (8192, 32), (2**19, 0)])
def test_auto_keeps_low_latency_mode_within_shared_memory(num_experts: int, most: int) -> None:
    mesh = jax.make_mesh((1,), ("expert",), devices=jax.local_devices()[:1])
    sizes = {"num_experts": num_experts, "num_experts_per_tok": 1, "max_tokens": 4096, "hidden_size": 8}
    comm = ep.Communicator(mesh, "expert", **sizes, implementation="xla")
    assert comm.config.most_low_latency_tokens == most
    assert comm.mode_of(most + 1) == "throughput"
    assert comm.mode_of(0) == ("low_latency" if most else "throughput")
    assert ("are too many for low_latency" in comm.describe()) == (most == 0)


def test_integers_of_numpy(comm) -> None:
    options = {"capacity": 16, "alignment": 4, "expert_capacity": 2}
    of_numpy = {name: np.int16(value) for name, value in options.items()}

    def destinations(options: dict) -> np.ndarray:
        mapped = per_device(lambda _: dispatch(comm, **options)[1].destination, MESH, "expert")
        return fetch(jax.jit(mapped)(jnp.zeros(MESH.size)))

    np.testing.assert_array_equal(destinations(of_numpy), destinations(options))


def test_a_capacity_that_is_traced(comm) -> None:
    with pytest.raises(
        TypeError, match=r"capacity: expected a Python integer \(static, .*, got .*; pass an int"
    ):
        trace(lambda: jax.jit(lambda capacity: dispatch(comm, capacity=capacity))(8))


ALONG_A_HANDLE = [
    (
        {"topk_idx": jnp.zeros((5, 3), jnp.int32)},
        r"topk_idx: expected None together with handle=, .*, got an array",
    ),
    (
        {"topk_weights": jnp.zeros((5, 3))},
        r"topk_weights: expected None together with handle=, .*, got an array",
    ),
    ({"capacity": 8}, r"capacity: expected None or the handle's, 48, got 8"),
    (
        {"x": jnp.zeros((4, 8))},
        r"x: expected as many tokens as in the dispatch that made the handle, 5, got 4",
    ),
    ({"layout": "token"}, r"layout: expected 'expert' or .*, got 'token'"),
    ({"alignment": 8}, r"alignment: expected 1 or .*, got 8"),
    ({"expert_capacity": 2}, r"expert_capacity: expected None or .*, got 2"),
]


@pytest.mark.parametrize(("wrong", "words"), ALONG_A_HANDLE, ids=[case[1][:30] for case in ALONG_A_HANDLE])
def test_a_wrong_argument_along_a_handle(comm, wrong: dict, words: str) -> None:
    def along():
        _, handle = dispatch(comm, capacity=48)
        return ep.dispatch(**{"x": jnp.zeros((5, 8)), "handle": handle, "comm": comm, **wrong})

    with pytest.raises(ValueError, match=words):
        trace(along)


COMBINE = [
    ({"y": jnp.zeros((40, 8))}, {}, ValueError, r"y: expected shape \[capacity, .* \[16, 8\], got \[40, 8\]"),
    ({"y": jnp.zeros((16, 8), jnp.int8)}, {}, TypeError, r"y: expected dtype bfloat16, float16.*, got int8"),
    ({"y": ep.quantize(jnp.zeros((16, 8)), "fp8")}, {}, TypeError,
     r"y: expected an array, got BlockScaled; pass y\.dequantize\(dtype\)"),
    ({"wire": "nvfp4"}, {}, ValueError,
     r'wire: expected None or one of "fp8", "fp8_ue8m0", "mxfp8" for combine, got \'nvfp4\''),
    ({"wire": ep.Wire("fp8", backward="int4")}, {}, ValueError,
     r"wire\.backward: expected None or one of .*\"nvfp4\" for the gradient of combine, got 'int4'"),
    ({"wire": ep.Wire("fp8", keep_quantized=True)}, {}, ValueError,
     r"wire\.keep_quantized: expected False with combine\(wire='fp8'\), got True; sums are not quantised"),
    ({"handle": (1, 2)}, {}, TypeError, r"handle: expected a jax_deepep\.Handle, got tuple; pass the second"),
    ({"handle": None}, {}, TypeError, r"handle: expected a jax_deepep\.Handle, got NoneType"),
    ({"comm": "expert"}, {}, TypeError, r"comm: expected a jax_deepep\.Communicator, got str; .* to combine"),
    ({"weighted": 1}, {}, TypeError, r"weighted: expected True, False or None.*, got 1"),
    ({"weighted": True}, {"layout": "token"}, ValueError, r"weighted: expected .* token-major .*, got True"),
    ({"bias": jnp.zeros((4, 8))}, {}, ValueError, r"bias: expected shape \[T, .* = \[5, 8\], got \[4, 8\]"),
    ({"bias": jnp.zeros((5, 8), jnp.bfloat16)}, {}, TypeError, r"bias: expected dtype float32, got bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "options", "error", "words"), COMBINE, ids=[case[3][:40] for case in COMBINE]
)
def test_a_wrong_argument_of_combine(
    comm, wrong: dict, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trace(lambda: combine(comm, {"capacity": 16, **options}, **wrong))


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_combine_of_what_dispatch_returned(comm, layout: str) -> None:
    """Instead of what experts made of it."""
    words = r"y: expected an array \[capacity, hidden_size\], got dispatch's .*Major; .* for its `tokens`"
    with pytest.raises(TypeError, match=words):
        trace(lambda: ep.combine(*dispatch(comm, layout=layout)))


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
