"""The experts' networks by every grouped matmul, where rows without an expert hold NaN."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import numbers
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from moe_layer import assert_close

from jax_deepep import jax_compat
from jax_deepep.moe.experts import routed_experts
from jax_deepep.moe.grouped_matmul import alignment_for, chosen
from jax_deepep.moe.routing import router_logits

BLOCK, L, H, F = 16, 5, 32, 48
ROWS = np.array([7, 0, 33, 16, 1])  # of each expert
GROUP_SIZES = -(-ROWS // BLOCK) * BLOCK
CAPACITY = int(GROUP_SIZES.sum()) + 3 * BLOCK
EXPERT = np.repeat(np.arange(L), GROUP_SIZES)  # of each row in a group
INDEX = np.concatenate([np.arange(size) for size in GROUP_SIZES])  # of each row in its group
LIVE = np.append(ROWS[EXPERT] > INDEX, np.zeros(3 * BLOCK, bool))  # rows of tokens


def loop_over_rows(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """A user's grouped matmul."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows)), side="right")
    live = (expert < L)[
        :, None
    ]  # cleared before and after, so that neither rows nor gradients reach the matrices
    products = jax.lax.map(
        lambda pair: pair[0] @ matrices[jnp.minimum(pair[1], L - 1)], (jnp.where(live, rows, 0), expert)
    )
    return jnp.where(live, products, 0)


def weights_of(gated: bool, dtype: jnp.dtype) -> dict[str, jax.Array]:
    shapes = {"wi_0": (L, H, F), "wi_1": (L, H, F), "wo": (L, F, H)}
    names = ("wi_0", "wi_1", "wo") if gated else ("wi_0", "wo")
    return {name: jnp.asarray(numbers(*shapes[name], seed=n) / 6, dtype) for n, name in enumerate(names)}


def expected(rows, row_weights, weights):
    """Return the result on the rows in groups."""
    own = {name: value[EXPERT] for name, value in weights.items()}
    hidden = jax.nn.silu(jnp.einsum("ch,chf->cf", rows, own["wi_0"]))
    if "wi_1" in own:
        hidden *= jnp.einsum("ch,chf->cf", rows, own["wi_1"])
    return row_weights[:, None] * jnp.einsum("cf,cfh->ch", hidden, own["wo"])


@jax.jit
def expected_with_gradients(rows, row_weights, weights, gradient):
    """Return the result, and the gradients of rows, their weights and the experts' weights."""
    out, pull_back = jax.vjp(expected, rows, row_weights, weights)
    return out, *pull_back(gradient)


@pytest.mark.parametrize(
    ("choice", "gated"),
    [
        ("blocks", True),
        ("blocks", False),
        ("ragged_dot", True),
        ("ragged_dot", False),
        ("triton", True),
        (loop_over_rows, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_without_an_expert_affect_nothing(choice, gated: bool) -> None:
    """As dispatch returns them: zero in padding rows, NaN after the last group; gradients likewise."""
    in_groups = len(EXPERT)
    rows = np.where(LIVE[:, None], numbers(CAPACITY, H), 0)
    gradient = np.where(LIVE[:, None], numbers(CAPACITY, H, seed=1), 0)
    rows[in_groups:] = gradient[in_groups:] = np.nan
    row_weights = np.where(LIVE, np.abs(numbers(CAPACITY, seed=2)), 0)
    weights = weights_of(gated, jnp.float32)
    apply = partial(routed_experts, activation=jax.nn.silu, choice=choice, alignment=BLOCK)

    @jax.jit
    def run(rows, row_weights, weights, gradient):
        def experts(rows, row_weights, weights):
            return apply(rows, row_weights, jnp.asarray(GROUP_SIZES, jnp.int32), weights)

        out, pull_back = jax.vjp(experts, rows, row_weights, weights)
        return out, *pull_back(gradient)

    *of_all_rows, of_weights = jax.tree.map(np.asarray, run(rows, row_weights, weights, gradient))
    in_group = (value[:in_groups] for value in (rows, row_weights))
    exact = expected_with_gradients(*in_group, weights, gradient[:in_groups])
    assert_close((*(value[:in_groups] for value in of_all_rows), of_weights), jax.tree.map(np.asarray, exact))


def test_blocks_are_not_computed_after_the_last_group() -> None:
    """They are not even read."""
    counts = []

    def count(rows):
        counts.append(None)
        return rows

    def activation(hidden):
        return jax.pure_callback(count, jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), hidden)

    rows = jnp.asarray(numbers(CAPACITY, H))
    jax.block_until_ready(
        jax.jit(partial(routed_experts, activation=activation, choice="blocks", alignment=BLOCK))(
            rows, jnp.ones(CAPACITY), jnp.asarray(GROUP_SIZES, jnp.int32), weights_of(True, jnp.float32)
        )
    )
    assert len(counts) == GROUP_SIZES.sum() // BLOCK


@pytest.mark.parametrize("choice", ["blocks", "triton"])
def test_gradients_of_weights_are_summed_in_float32(choice: str) -> None:
    """640 blocks of an expert, each adding 1: in bfloat16 the sum would stop at 256."""
    rows = jnp.ones((640 * BLOCK, H), jnp.bfloat16)
    weights = {"wi_0": jnp.ones((1, H, F), jnp.bfloat16), "wo": jnp.zeros((1, F, H), jnp.bfloat16)}
    group_sizes = jnp.array([len(rows)], jnp.int32)

    def run(weights):
        apply = partial(routed_experts, activation=jnp.ones_like, choice=choice, alignment=BLOCK)
        return apply(rows, jnp.ones(len(rows)), group_sizes, weights)[::BLOCK].astype(jnp.float32).sum()

    of_weights = jax.jit(jax.grad(run))(weights)
    np.testing.assert_array_equal(np.asarray(of_weights["wo"], np.float32), 640)


@pytest.mark.parametrize("choice", ["blocks", "ragged_dot"])
def test_an_activation_may_compute_in_float32(choice: str) -> None:
    def activation(x):
        return jax.nn.silu(x.astype(jnp.float32))

    def of_weights(weights):
        apply = partial(routed_experts, activation=activation, choice=choice, alignment=BLOCK)
        rows = jnp.asarray(numbers(len(EXPERT), H), jnp.bfloat16)
        out = apply(rows, jnp.ones(len(rows)), jnp.asarray(GROUP_SIZES, jnp.int32), weights)
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(of_weights, has_aux=True))(
        weights_of(True, jnp.bfloat16)
    )
    rows = numbers(len(EXPERT), H).astype(jnp.bfloat16).astype(np.float32)
    weights = jax.tree.map(lambda value: value.astype(jnp.float32), weights_of(True, jnp.bfloat16))
    assert_close(
        np.asarray(out, np.float32),
        np.asarray(jax.jit(expected)(rows, np.ones(len(rows)), weights)),
        tolerance=2e-2,
    )
    assert jax.tree.all(jax.tree.map(lambda value: value.dtype == jnp.bfloat16, gradients))


def test_blocks_follow_the_rows_of_an_expert() -> None:
    sizes = [1, 8, 15, 16, 100, 10_000]
    assert [alignment_for("blocks", rows) for rows in sizes] == [8, 8, 8, 16, 64, 128]
    assert [alignment_for("triton", rows) for rows in sizes] == [16, 16, 16, 16, 64, 128]
    assert alignment_for("ragged_dot", 100) == alignment_for(loop_over_rows, 100) == 1
    assert chosen("auto", "cpu") == "blocks"
    assert chosen(loop_over_rows, "cpu") is loop_over_rows
    assert chosen("triton", "cuda") == "triton"
    fitting = {"hidden_size": 64, "intermediate_size": 128}
    assert chosen("auto", "cuda", **fitting) == chosen("auto", "cuda", **fitting, alignment=32) == "triton"
    assert chosen("auto", "cuda", hidden_size=64, intermediate_size=100) == "ragged_dot"
    assert chosen("auto", "cuda", **fitting, alignment=48) == "ragged_dot"
    with pytest.raises(
        ValueError, match="grouped_matmul: expected 'triton' on NVIDIA GPUs only, got it on cpu"
    ):
        chosen("triton", "cpu")


def test_a_jax_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX 0.12 deprecates it: "auto" avoids it, and says why."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)  # its import is an error
    monkeypatch.delattr(pallas, "triton", raising=False)
    assert jax_compat.pallas_triton() is None
    with pytest.warns(UserWarning, match=r'got JAX 0\.\S+ without it; use .*"ragged_dot", as "auto" does'):
        assert chosen("auto", "cuda", hidden_size=64, intermediate_size=128) == "ragged_dot"
    with pytest.raises(ValueError, match="grouped_matmul: expected a JAX with the Triton backend of Pallas"):
        chosen("triton", "cuda")
    assert chosen("auto", "cpu") == "blocks"


def test_unsupported_sizes() -> None:
    weights = {"wi_0": jnp.ones((1, 20, F)), "wo": jnp.ones((1, F, 20))}
    rows, sizes = jnp.ones((BLOCK, 20)), jnp.array([BLOCK])
    for choice, alignment, words in (
        ("triton", BLOCK, 'hidden_size: expected a multiple of 16 with grouped_matmul="triton", got 20'),
        ("triton", 8, "alignment: expected a power of two from 16 .*, got 8"),
        ("blocks", 3, "rows: expected a multiple of block=3, got 16"),
    ):
        own = weights if alignment == BLOCK else weights_of(True, jnp.float32)
        with pytest.raises(ValueError, match=words):
            routed_experts(
                rows if alignment == BLOCK else jnp.ones((BLOCK, H)), jnp.ones(BLOCK), sizes, own,
                activation=jax.nn.silu, choice=choice, alignment=alignment,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "num_experts"),
    [(64, 2048, 64), (64, 2048, 256), (64, 2047, 64), (2, 2048, 64), (1, 2048, 64), (64, 2048, 1)],
)
def test_the_router_is_as_exact_as_float32_can_be(
    num_tokens: int, hidden_size: int, num_experts: int
) -> None:
    """On NVIDIA GPUs by a dot algorithm of bfloat16 parts, or by HIGHEST; on each of several devices."""
    mesh, split = mesh_named("expert"), P("expert")
    x, gate = (
        numbers(mesh.size * num_tokens, hidden_size),
        numbers(hidden_size, num_experts) / np.float32(hidden_size**0.5),
    )
    product = partial(router_logits, jax_compat.platform_of(mesh.devices.flat[0]))
    per_device = jax.shard_map(product, mesh=mesh, in_specs=(split, P()), out_specs=split)
    logits = fetch(jax.jit(per_device)(put_on_mesh(x, mesh, split), put_on_mesh(gate, mesh, P())))
    exact = np.asarray(x, np.float64) @ np.asarray(gate, np.float64)
    assert np.abs(np.asarray(logits, np.float64) - exact).max() < 3e-6 * np.abs(exact).max()
