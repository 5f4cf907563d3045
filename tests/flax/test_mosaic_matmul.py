"""The grouped matmul for Hopper GPUs: simulated where there is no GPU, and lowered for one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.bench.matmuls import SHAPES, TILES
from jax_deepep.moe.grouped_matmul import alignment_for, chosen, fused, mosaic_products
from jax_deepep.moe.grouped_matmul.fused import can_fuse
from jax_deepep.moe.grouped_matmul.mosaic import Tiles, missing_reason, mosaic_matmul
from jax_deepep.moe.grouped_matmul.mosaic_kernel import in_panels, own_tiles
from jax_deepep.moe.grouped_matmul.mosaic_products import Term, outer
from jax_deepep.moe.halves import FusedHalves, MosaicHalves, halves_of

DEVICE = jax.devices()[0]
SIMULATED = DEVICE.platform == "cpu"
SMALL = Tiles(columns=64, stages=2, panel=2, phases=2, deferred=False)

runs_here = pytest.mark.skipif(
    not SIMULATED and missing_reason(DEVICE) is not None, reason="needs a Hopper GPU, or none"
)
can_simulate = pytest.mark.skipif(
    SIMULATED and jax.__version_info__ < (0, 11),
    reason="JAX's simulator can neither transpose nor load values of rows before 0.11",
)
blocks = pytest.mark.parametrize(("block", "tiles"), [(128, None), (64, SMALL)], ids=["128", "64"])


def problem(block: int, dtype: Any, hidden: int = 192, intermediate: int = 128) -> tuple[jax.Array, ...]:
    """Return rows, matrices, group sizes and a gradient: small integers, whose sums are exact.

    Two groups are empty; rows after the last one hold NaN.
    """
    sizes = block * np.array([1, 0, 3, 0])
    random = np.random.default_rng(0)
    rows, gradient = (
        random.integers(-3, 4, (sizes.sum() + block, width)).astype(np.float32)
        for width in (hidden, intermediate)
    )
    rows[sizes.sum() :] = gradient[sizes.sum() :] = np.nan
    matrices = random.integers(-3, 4, (len(sizes), hidden, intermediate))
    rows, matrices, gradient = (jnp.asarray(value, dtype) for value in (rows, matrices, gradient))
    return rows, matrices, jnp.asarray(sizes, jnp.int32), gradient


def expected(rows, matrices, group_sizes, gradient) -> tuple[np.ndarray, ...]:
    """Return the result and the gradients of rows and matrices in float64, without rows after the groups."""
    rows, matrices, gradient = (np.asarray(value, np.float64) for value in (rows, matrices, gradient))
    expert = np.repeat(np.arange(len(matrices)), group_sizes)
    rows, gradient = rows[: len(expert)], gradient[: len(expert)]
    groups = [expert == e for e in range(len(matrices))]
    return (
        np.concatenate([rows[group] @ matrices[e] for e, group in enumerate(groups)]),
        np.concatenate([gradient[group] @ matrices[e].T for e, group in enumerate(groups)]),
        np.stack([rows[group].T @ gradient[group] for group in groups]),
    )


def with_gradients(tiles: Tiles | None, block: int = 128) -> Any:
    """Return a jitted function of what `problem` returns, with the results of `expected`."""

    def run(rows, matrices, group_sizes, gradient):
        def matmul(rows, matrices):
            return mosaic_matmul(rows, matrices, group_sizes, block=block, tiles=tiles)

        out, pull_back = jax.vjp(matmul, rows, matrices)
        return out, *pull_back(gradient)

    return jax.jit(run)


def assert_rounded(got: jax.Array, exact: np.ndarray) -> None:
    """Compare with the float64 result, rounded once."""
    rounded = jnp.asarray(exact.astype(np.float32), got.dtype)
    np.testing.assert_array_equal(np.asarray(got[: len(exact)], np.float32), np.asarray(rounded, np.float32))


@runs_here
@blocks
def test_a_product(block: int, tiles: Tiles | None) -> None:
    """On a CPU, data races are errors of the simulator."""
    operands = problem(block, jnp.bfloat16)
    out = jax.jit(lambda *operands: mosaic_matmul(*operands, block=block, tiles=tiles))(*operands[:3])
    assert_rounded(out, expected(*operands)[0])


@runs_here
@can_simulate
@blocks
def test_gradients(block: int, tiles: Tiles | None) -> None:
    """That of the matrices of empty groups is zero."""
    operands = problem(block, jnp.float16)
    results = with_gradients(tiles, block)(*operands)
    for got, of_float64 in zip(results, expected(*operands), strict=True):
        assert_rounded(got, of_float64)
    assert not np.asarray(results[2][1]).any()


@runs_here
@can_simulate
@blocks
def test_a_gradient_of_matrices_with_terms_of_two_batches(block: int, tiles: Tiles | None) -> None:
    """Of groups that have rows in both batches, in one of them, or in none."""
    rows, matrices, sizes, gradient = problem(block, jnp.bfloat16)
    other_sizes = jnp.flip(sizes).at[2].set(block)  # 0, 3, 1, 1 blocks
    others = [jnp.tile(value, (2, 1))[: other_sizes.sum()] for value in (gradient, rows)]
    terms = [Term(rows, gradient, sizes), Term(others[1], others[0], other_sizes)]
    got = jax.jit(partial(outer, tiles=tiles))(terms).value
    exact = sum(expected(term.rows, matrices, term.group_sizes, term.gradient)[2] for term in terms)
    assert_rounded(got, exact)


def network_problem(block: int, dtype: Any, gated: bool, hidden: int, intermediate: int) -> tuple[Any, ...]:
    """Return rows, their weights, wi, wo, group sizes and a gradient, with NaN after the groups."""
    rows, matrices, sizes, _ = problem(block, dtype, hidden, intermediate)
    random = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    shape = matrices.shape
    wi = tuple(normal(*shape) / hidden**0.5 for _ in range(1 + gated))
    wo = normal(shape[0], shape[2], shape[1]) / intermediate**0.5
    live = jnp.arange(len(rows)) < sizes.sum()
    row_weights = jnp.where(live, jnp.asarray(random.uniform(size=len(rows)), jnp.float32), 0)
    return rows, row_weights, wi, wo, sizes, jnp.where(live[:, None], normal(*rows.shape), jnp.nan)


def expected_network(rows, row_weights, wi, wo, sizes, gradient) -> tuple[Any, ...]:
    """Return the result and the gradients, rounded where `fused` says, in exact products otherwise."""
    dtype, live = rows.dtype, int(sizes.sum())
    rows, row_weights, gradient = rows[:live], row_weights[:live], gradient[:live]
    expert = np.repeat(np.arange(len(wo)), sizes)

    def wide(value: jax.Array) -> np.ndarray:
        return np.asarray(value, np.float64)

    def rounded(value: Any) -> jax.Array:
        return jnp.asarray(np.asarray(value, np.float32), dtype)

    def times(rows: Any, matrices: Any) -> np.ndarray:
        rows, matrices = wide(rows), wide(matrices)
        return np.concatenate([rows[expert == e] @ matrices[e] for e in range(len(matrices))])

    def outer(rows: Any, others: Any) -> jax.Array:
        groups = (expert == e for e in range(len(wo)))
        return rounded(np.stack([wide(rows)[group].T @ wide(others)[group] for group in groups]))

    def activated(row_weights: jax.Array, *products: jax.Array) -> jax.Array:
        first, *others = products
        return row_weights[:, None] * jax.nn.silu(first) * (others[0] if others else 1)

    products = [rounded(times(rows, matrix)).astype(jnp.float32) for matrix in wi]
    hidden, pull_back = jax.vjp(activated, row_weights, *products)
    of_hidden = rounded(times(gradient, wo.swapaxes(1, 2))).astype(jnp.float32)
    of_row_weights, *of_all = pull_back(of_hidden)
    of_products = [rounded(of) for of in of_all]
    of_rows = sum(times(of, matrix.swapaxes(1, 2)) for of, matrix in zip(of_products, wi, strict=True))
    return (
        rounded(times(rounded(hidden), wo)), rounded(of_rows), of_row_weights,
        tuple(outer(rows, of) for of in of_products), outer(rounded(hidden), gradient),
    )  # fmt: skip


def run_network(with_gradients: bool, block: int) -> Any:
    def run(rows, row_weights, wi, wo, sizes, gradient):
        def network(rows, row_weights, wi, wo):
            halves = halves_of("mosaic", block, jax.nn.silu, rows.dtype)
            assert isinstance(halves, FusedHalves)
            return halves.whole(rows, row_weights, wi, wo, sizes)

        if not with_gradients:
            return (network(rows, row_weights, wi, wo),)
        out, pull_back = jax.vjp(network, rows, row_weights, wi, wo)
        return out, *pull_back(gradient)

    return jax.jit(run)


def assert_nearly_all_equal(results: Any, exact: Any, least: float = 0.99) -> None:
    """Compare: float32 sums may round a value differently than exact ones, by a unit of the last place."""
    for got, value in zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True):
        is_rounded = got.dtype != jnp.float32
        got, value = (np.asarray(array[: len(value)], np.float32) for array in (got, value))
        assert not is_rounded or (got == value).mean() > least
        np.testing.assert_allclose(got, value, rtol=2**-7, atol=2**-7 * np.abs(value).max())


@runs_here
@can_simulate
def test_a_network() -> None:
    """Without a gradient, its products are not stored."""
    operands = network_problem(64, jnp.bfloat16, True, 64, 192)
    assert_nearly_all_equal(run_network(False, 64)(*operands), expected_network(*operands)[:1])


@runs_here
@can_simulate
@pytest.mark.parametrize(("block", "gated"), [(128, True), (64, False)], ids=["gated", "plain"])
def test_gradients_of_a_network(block: int, gated: bool) -> None:
    operands = network_problem(block, jnp.bfloat16, gated, 64, 64)
    assert_nearly_all_equal(run_network(True, block)(*operands), expected_network(*operands))


@pytest.mark.gpu
@runs_here
def test_a_network_on_a_gpu() -> None:
    operands = network_problem(1024, jnp.bfloat16, True, 2048, 768)
    run, exact = run_network(True, 128), expected_network(*operands)
    results = [run(*operands) for _ in range(3)]
    # Of sums of 2048 products 1.4 % round differently; of a step that is not rounded more than a third would.
    assert_nearly_all_equal(results[0], exact, least=0.97)
    live = int(operands[4].sum())
    for again in results[1:]:
        for first, other in zip(jax.tree.leaves(results[0]), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(*(np.asarray(value[:live], np.float32) for value in (first, other)))


def test_which_activations_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Pallas lowers for GPUs; others take the plain networks."""
    monkeypatch.setattr(jax_compat, "platform_of", lambda device: "cuda")
    assert can_fuse(jax.nn.silu, jnp.bfloat16)
    assert can_fuse(jax.nn.gelu, jnp.float16)
    for activation in (partial(jax.nn.gelu, approximate=False), lambda x: x * jnp.arange(3.0)[1]):
        halves = halves_of("mosaic", 128, activation, jnp.bfloat16)
        assert type(halves) is MosaicHalves
    monkeypatch.setattr(fused, "products_and_hidden", None)
    fused._lowers.cache_clear()
    with pytest.raises(TypeError):  # a fault of the kernels is no reason for slower ones
        can_fuse(jax.nn.silu, jnp.bfloat16)


@pytest.mark.gpu
@runs_here
@pytest.mark.parametrize("name", TILES)
def test_on_a_gpu(name: str) -> None:
    """Several times, with the same bits; as many tiles as several rounds of all SMs have."""
    operands = problem(1024, jnp.bfloat16, 2048 + 64, 768)
    run, exact = with_gradients(TILES[name]), expected(*operands)
    for _ in range(5):
        for got, of_float64 in zip(run(*operands), exact, strict=True):
            assert_rounded(got, of_float64)


@pytest.mark.parametrize(("name", "tiles"), [("ds", "default"), ("qwen", "stored at once")])
def test_lowering(name: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of large shapes, for GPUs on a machine without one."""
    monkeypatch.setattr(jax_compat, "platform_of", lambda device: "cuda")
    shape = SHAPES[name]
    num_experts = shape.num_local_experts
    rows, gradient = (
        jax.ShapeDtypeStruct((4096, width), jnp.bfloat16) for width in (shape.hidden, shape.intermediate)
    )
    matrices = jax.ShapeDtypeStruct((num_experts, shape.hidden, shape.intermediate), jnp.bfloat16)
    group_sizes = jax.ShapeDtypeStruct((num_experts,), jnp.int32)

    traced = with_gradients(TILES[tiles]).trace(rows, matrices, group_sizes, gradient)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    assert text.count("stablehlo.optimization_barrier") == 2  # not of the gradient of matrices


def gradients_of_loop(rows, matrices, group_sizes):
    """Return the gradients of layers [N, L, H, H] after each other, whose products are saved."""

    def layer(rows, matrices):
        return jax.nn.silu(mosaic_matmul(rows, matrices, group_sizes, block=128)), None

    def loss(rows, matrices):
        return lax.scan(layer, rows, matrices)[0].astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))(rows, matrices)


@pytest.mark.gpu
@runs_here
def test_xla_runs_every_kernel_of_a_loop_once() -> None:
    """XLA for GPUs would make a fusion of the kernel and saving its result, beside the kernel."""
    rows, matrices, group_sizes, _ = problem(128, jnp.bfloat16, 128, 128)
    lowered = jax.jit(gradients_of_loop).lower(rows, jnp.stack([matrices, matrices]), group_sizes)
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 3
    assert lowered.compile().as_text().count('custom_call_target="mosaic_gpu') == 3


@pytest.mark.parametrize(("down", "across", "panel"), [(5, 3, 2), (4, 1, 8), (1, 7, 4)])
def test_panels_hold_every_tile_once(down: int, across: int, panel: int) -> None:
    index = jnp.arange(down * across, dtype=jnp.int32)
    tiles = jax.vmap(lambda index: in_panels(index, jnp.int32(down), across, panel))(index)
    assert sorted(zip(*map(np.ndarray.tolist, map(np.asarray, tiles)), strict=True)) == [
        (below, beside) for below in range(down) for beside in range(across)
    ]


@pytest.mark.parametrize("num_tiles", [0, 1, 5, 37])
@pytest.mark.parametrize("phases", [1, 3])
def test_blocks_have_every_tile_once(num_tiles: int, phases: int) -> None:
    sms, found = 4, []
    for block in range(sms * phases):
        count, index_of = own_tiles(jnp.int32(block), sms * phases, jnp.int32(num_tiles), phases)
        found += [int(index_of(jnp.int32(number))) for number in range(int(count))]
    assert sorted(found) == list(range(num_tiles))


@pytest.mark.parametrize("beside_ops", [False, True])
def test_blocks_for_sms_that_begin_late(beside_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ops all products have them; alone, the gradients of matrices."""
    phases: dict[str, int] = {}

    def record(product, operands, types, tiles):
        phases[product.name] = tiles.phases
        return [jnp.zeros(of.shape, of.dtype) for of in types]

    monkeypatch.setattr(mosaic_products, "multiply", record)
    rows, row_weights, wi, wo, sizes, gradient = network_problem(64, jnp.bfloat16, True, 64, 192)
    halves = halves_of("mosaic", 64, jax.nn.silu, rows.dtype, beside_ops=beside_ops)
    _, pull_back = jax.vjp(lambda *operands: halves.whole(*operands, sizes), rows, row_weights, wi, wo)
    pull_back(gradient)
    few = 4 if beside_ops else 1
    assert phases == {
        "grouped_hidden": few, "grouped_matmul": few,
        "grouped_hidden_gradient": few, "grouped_matmul_transposed": few, "grouped_outer": 4,
    }  # fmt: skip


def test_where_it_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [alignment_for("mosaic", rows) for rows in (1, 100, 128, 10_000)] == [64, 64, 128, 128]
    fitting = {"dtype": jnp.bfloat16, "mean_rows": 64, "hidden_size": 64, "intermediate_size": 128}
    assert chosen("auto", "cuda", **fitting) == "mosaic"
    assert chosen("auto", "cuda", **fitting | {"mean_rows": 1}, alignment=64) == "mosaic"
    for unfit in (
        {"mean_rows": 63}, {"dtype": jnp.float32}, {"alignment": 32}, {"intermediate_size": 96}
    ):  # fmt: skip
        assert chosen("auto", "cuda", **fitting | unfit) == "triton"
    with pytest.raises(
        ValueError, match="grouped_matmul: expected 'mosaic' on NVIDIA GPUs only, got it on cpu; use"
    ):
        chosen("mosaic", "cpu")

    class Blackwell:
        device_kind, compute_capability = "NVIDIA B200", "10.0"

    monkeypatch.setattr(jax, "devices", lambda: [Blackwell()])
    assert chosen("auto", "cuda", **fitting) == "triton"
    with pytest.raises(ValueError, match=r"compute capability 9\.0 only .*, got it on NVIDIA B200 of 10\.0;"):
        chosen("mosaic", "cuda")
    monkeypatch.undo()
    monkeypatch.setattr(jax_compat, "pallas_mosaic_gpu", lambda: None)
    assert chosen("auto", "cuda", **fitting) == "triton"
    with pytest.raises(ValueError, match=r"expected a JAX with the Mosaic GPU backend .* 0\.\S+ without it;"):
        chosen("mosaic", "cuda")


def test_unsupported_operands() -> None:
    rows, matrices = jnp.ones((128, 64), jnp.bfloat16), jnp.ones((1, 64, 96), jnp.bfloat16)
    sizes = jnp.array([128])
    fitting = matrices[..., :64]
    for operands, block, error, words in (
        ((rows, matrices), 64, ValueError, "intermediate_size: expected a multiple of 64 .*, got 96; use"),
        ((rows, fitting), 32, ValueError, "alignment: expected a multiple of 64 .*, got 32; use"),
        ((rows.astype("float32"), fitting), 64, ValueError, "rows: expected bfloat16 or float16 .*float32"),
        ((rows, fitting.astype("float16")), 64, TypeError, "matrices: expected the dtype of rows, bfloat16"),
    ):
        with pytest.raises(error, match=words):
            mosaic_matmul(*operands, sizes, block=block)
    with pytest.raises(ValueError, match=r"tiles: expected two stages in shared memory, got 1; divide"):
        mosaic_matmul(rows, fitting, sizes, block=64, tiles=Tiles(stages=1))
