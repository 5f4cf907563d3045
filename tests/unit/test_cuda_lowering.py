"""Programs for GPUs are lowered on a machine without one: JAX accepts custom calls and Pallas kernels."""

import functools
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from meshes import mesh_named
from own_processes import is_a_command_for_one_process

import jax_deepep as ep
from jax_deepep import jax_compat
from jax_deepep.communicator import native_module
from jax_deepep.moe import build_config, init_parameters, moe

pytestmark = is_a_command_for_one_process

EXPERT = P("expert")
SIZES = {"num_experts": 32, "num_experts_per_tok": 4, "max_tokens": 16, "hidden_size": 128}


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ep.Communicator:
    """A communicator of CPU devices that look like H100s once it is made."""
    # A mesh that no other test has: JAX caches what it derives from meshes.
    mesh = Mesh(mesh_named("expert").devices[::-1], ("expert",))
    comm = ep.Communicator(mesh, **SIZES, implementation="native", mode=getattr(request, "param", "auto"))
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    monkeypatch.setattr(jax_compat, "platform_of", lambda device: "cuda")
    monkeypatch.setitem(vars(mesh), "abstract_mesh", mesh.abstract_mesh.update(abstract_device=gpu))
    yield comm
    comm.close()


def calls_of(function, *operands: jax.ShapeDtypeStruct) -> tuple[Counter, str]:
    """Lower a program for GPUs; return how often it calls each custom call, and its text."""
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r"custom_call @([\w$.]+)", text)), text


def global_array(comm: ep.Communicator, shape: tuple[int, ...], dtype, spec: P = EXPERT):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(comm.mesh, spec))


@pytest.mark.parametrize("comm", ["throughput", "low_latency"], indirect=True)
@pytest.mark.parametrize("layout", ["expert", "token"])
def test_ops_and_their_gradients(comm: ep.Communicator, layout: str) -> None:
    def body(x, topk_idx, topk_weights, bias):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, layout=layout)
        again, _ = ep.dispatch(x, handle=handle)
        return ep.combine(dispatched.tokens + again.tokens, handle, bias=bias)

    def loss(*operands):
        return jnp.sum(jax.shard_map(body, mesh=comm.mesh, in_specs=EXPERT, out_specs=EXPERT)(*operands))

    tokens = comm.mesh.size * 16
    x = global_array(comm, (tokens, 128), jnp.bfloat16)
    topk = [global_array(comm, (tokens, 4), dtype) for dtype in (jnp.int32, jnp.float32)]
    calls, text = calls_of(jax.value_and_grad(loss, argnums=(0, 2, 3)), x, *topk, x)
    # The backward of combine is a cached_dispatch, and those of both dispatches are combines.
    assert calls == {"jax_deepep_dispatch": 1, "jax_deepep_cached_dispatch": 2, "jax_deepep_combine": 3}
    pairs = native_module.numbers().pair_table_shape(
        num_ranks=comm.size, num_experts=32, num_topk=4, num_tokens=16
    )
    result = "x".join(map(str, pairs))
    needed = layout == "expert" or comm.mode_of(16) == "low_latency"  # by ops on GPUs alone
    assert (f"tensor<{result}xi32>" in text) == needed


@pytest.mark.parametrize("comm", ["throughput", "low_latency"], indirect=True)
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_ops_in_two_parts(comm: ep.Communicator, remat: bool) -> None:
    """Every start has its done, with the same number in the program and its results in the same memory."""

    def body(x, topk_idx, topk_weights):
        sent = ep.dispatch_start(x, topk_idx, topk_weights, comm=comm)
        shared = sent.meanwhile(jnp.tanh, x)
        dispatched, handle = ep.dispatch_done(sent)
        returned = ep.combine_start(jnp.tanh(dispatched.tokens), handle, bias=shared)
        beside = returned.meanwhile(jnp.sin, shared)
        return ep.combine_done(returned) + beside

    def loss(*operands):
        layer = jax.checkpoint(body) if remat else body
        out = jax.shard_map(layer, mesh=comm.mesh, in_specs=EXPERT, out_specs=EXPERT)(*operands)
        return jnp.sum(out**2)

    tokens = comm.mesh.size * 16
    x = global_array(comm, (tokens, 128), jnp.bfloat16)
    topk = [global_array(comm, (tokens, 4), dtype) for dtype in (jnp.int32, jnp.float32)]
    calls, text = calls_of(jax.grad(loss, argnums=(0, 2)), x, *topk)
    suffix = "_uncaptured" if comm.mode == "throughput" else ""
    dispatches = 2 if remat else 1
    expected = {"dispatch": dispatches, "cached_dispatch": 1, "combine": 2}  # their gradients as well
    assert calls == {f"jax_deepep_{verb}{suffix}": 2 * count for verb, count in expected.items()}
    sites = []
    for line in text.splitlines():
        if found := re.search(r"custom_call @jax_deepep_(\w+)\(.*site = dense<\[(.*?)\]>", line):
            verb, site = found.groups()
            sites.append((verb, [int(word) for word in site.split(",")], "output_operand_alias<" in line))
    names = {code: name for name, code in native_module.numbers().parts.items()}
    numbers = {
        part: sorted((verb, site[2]) for verb, site, _ in sites if names[site[5]] == part)
        for part in ("start", "done")
    }
    assert numbers["start"] == numbers["done"]
    assert len(numbers["start"]) == sum(expected.values())
    assert all(aliases == (names[site[5]] == "done") for _, site, aliases in sites)


def test_independent_ops_run_in_the_order_in_which_they_are_lowered(comm: ep.Communicator) -> None:
    def body(x, y, topk_idx, topk_weights):
        (a, _), (b, _) = (ep.dispatch(rows, topk_idx, topk_weights, comm=comm) for rows in (x, y))
        return a.tokens, b.tokens

    x = global_array(comm, (comm.mesh.size * 16, 128), jnp.bfloat16)
    topk = [global_array(comm, (x.shape[0], 4), dtype) for dtype in (jnp.int32, jnp.float32)]
    sharded = jax.shard_map(body, mesh=comm.mesh, in_specs=EXPERT, out_specs=EXPERT)
    _, text = calls_of(sharded, x, x, *topk)
    (first, count, first_after), (_, _, second_after) = re.findall(
        r"(%\w+):(\d+) = stablehlo.custom_call @jax_deepep_dispatch\(%\w+, (%[\w#]+),", text
    )
    assert second_after == f"{first}#{int(count) - 1}"  # the last result of the first
    assert first_after != second_after


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # JAX 0.12
@pytest.mark.parametrize("matmul", ["triton", "mosaic", "ragged_dot"])
def test_a_layer_and_its_gradient(comm: ep.Communicator, matmul: str) -> None:
    config = build_config(32, 4, 128, 256, comm=comm, grouped_matmul=matmul, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    parameters = {
        name: global_array(comm, value.shape, value.dtype, config.spec(name))
        for name, value in shapes.items()
    }

    def loss(parameters, x):
        out, aux = moe(config, parameters, x)
        return jnp.sum(out) + aux.balance_loss.astype(out.dtype)

    x = global_array(comm, (comm.mesh.size * 16, 128), jnp.bfloat16)
    calls, text = calls_of(jax.value_and_grad(loss), parameters, x)
    assert calls["jax_deepep_dispatch"] == 1
    assert calls["jax_deepep_cached_dispatch"] == 1
    assert calls["jax_deepep_combine"] == 3  # the gradient of dispatch is in two parts
    assert calls["jax_deepep_expert_choice"] == (0 if native_module.unsupported_reason("cuda") else 1)
    # Three products forward; of each, the gradients of rows and of matrices. With mosaic the first two are
    # one kernel, as are their gradients of rows. With triton gradients have the product too: JAX 0.10 leaves
    # it to XLA to remove those that nothing uses.
    used = {"triton": (9, 9 + 6), "mosaic": (7,)}.get(matmul)
    for name, target in {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}.items():
        assert calls[target] in (used if matmul == name else (0,))
    # The router and the gradient of the gate are float32 products of six bfloat16 ones each.
    assert text.count("num_primitive_operations = 6") == 2


@pytest.mark.parametrize("experts", [256, 2048])
def test_the_choice_of_experts_is_one_kernel(experts: int) -> None:
    """Where the module is built, and for as many experts as it takes."""

    def choice(logits):
        return ep.group_limited_topk(logits, num_experts_per_tok=8, num_groups=8, topk_groups=4)[0]

    calls, text = calls_of(jax.vmap(choice), jax.ShapeDtypeStruct((2, 16, experts), jnp.float32))
    by_kernel = experts <= 1024 and not native_module.unsupported_reason("cuda")
    assert calls == ({"jax_deepep_expert_choice": 1} if by_kernel else {})
    assert text.count("chlo.top_k") == (0 if by_kernel else 3)


def test_a_choice_that_xla_divides_among_devices_is_plain() -> None:
    """It keeps its sharding, where that is part of the type too."""
    mesh = mesh_named("expert", AxisType.Explicit)
    choice = functools.partial(ep.group_limited_topk, num_experts_per_tok=2)
    logits = jax.ShapeDtypeStruct((2 * mesh.size, 8), jnp.float32, sharding=jax.NamedSharding(mesh, EXPERT))
    with jax.set_mesh(mesh):
        calls, text = calls_of(choice, logits)
        topk_idx, topk_weights = jax.eval_shape(choice, logits)
    assert not calls
    assert text.count("chlo.top_k") == 1
    assert topk_idx.sharding.spec == topk_weights.sharding.spec == P("expert", None)


def test_what_is_exported_needs_no_kernel_of_the_router() -> None:
    choice = jax.jit(lambda logits: ep.group_limited_topk(logits, num_experts_per_tok=2))
    logits = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    exported = jax.export.export(choice, platforms=["cpu", "cuda"])(logits)
    assert "custom_call @jax_deepep" not in exported.mlir_module()


ONE_BATCH = [
    "dispatch | 3 shared", "3 experts", "combine",
    "cached_dispatch | 6 shared", "4 experts", "combine | 2 experts",
]  # fmt: skip
TWO_BATCHES = [
    "dispatch | 3 shared", "dispatch | 3 experts", "combine | 3 experts", "combine",
    "cached_dispatch | 6 shared", "cached_dispatch | 3 experts",
    "combine | 5 experts", "combine | 4 experts",
]  # fmt: skip


@pytest.mark.parametrize("comm", ["throughput"], indirect=True)
@pytest.mark.parametrize(("two", "expected"), [(False, ONE_BATCH), (True, TWO_BATCHES)], ids=["one", "two"])
def test_what_a_layer_computes_beside_its_ops(comm: ep.Communicator, two: bool, expected: list[str]) -> None:
    """Ops and matmuls in the order of the program: those from the start of an op to its done beside it."""

    def product(rows, matrices, group_sizes):  # a dot of two dimensions would be one of the shared experts
        return jnp.einsum("ch,lhf->cf", rows, matrices)

    config = build_config(
        32, 4, 128, 256, comm=comm, grouped_matmul=product, shared_intermediate_size=64, two_batch_overlap=two
    )
    x = global_array(comm, (comm.mesh.size * 16, 128), jnp.float32)
    parameters = {
        name: global_array(comm, shape, jnp.float32, config.spec(name))
        for name, (shape, _) in config.parameters.items()
    }
    routing = [global_array(comm, (x.shape[0], 4), dtype) for dtype in (jnp.int32, jnp.float32)]

    def loss(parameters, x, topk_idx, topk_weights):
        out, _ = moe(config, parameters, x, topk_idx=topk_idx, topk_weights=topk_weights)
        return jnp.sum(out**2)

    _, text = calls_of(jax.grad(loss, argnums=(0, 1)), parameters, x, *routing)
    assert "tensor<8x128xf32>" not in text  # of half of the 16 tokens
    writes = re.findall(r"custom_call @jax_deepep_combine.*first_token = (\d+).*with_into = (\w+)", text)
    of_two = [("0", "false"), ("8", "true"), ("8", "false"), ("0", "true")]
    assert [kind for kind, _ in itertools.groupby(writes)] == (of_two if two else [("0", "false")])
    names = {code: name for name, code in native_module.numbers().parts.items()}
    steps: list[tuple[str, Counter]] = [("", Counter())]
    for line in text.splitlines():
        if found := re.search(
            r"custom_call @jax_deepep_([a-z_]*?)(?:_uncaptured)?\(.*site = dense<\[(.*?)\]>", line
        ):
            part = names[int(found[2].split(",")[5])]
            steps.append(("" if part == "done" else found[1], Counter()))
            if part == "whole":
                steps.append(("", Counter()))
        elif "stablehlo.dot_general" in line:
            steps[-1][1]["shared" if "x64x" in line or "x64>" in line or "<64x" in line else "experts"] += 1
    described = [
        " | ".join(filter(None, [op, *(f"{count} {kind}" for kind, count in computed.items())]))
        for op, computed in steps
    ]
    assert [step for step in described if step] == expected


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # JAX 0.12
@pytest.mark.parametrize("matmul", ["triton", "mosaic", "ragged_dot"])
def test_a_layer_under_x64_and_strict_promotion(comm: ep.Communicator, matmul: str) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        test_a_layer_and_its_gradient(comm, matmul)
