"""Which rows a layer drops under a capacity."""

from functools import partial

import jax
import numpy as np
import pytest
from dense_moe import E, F, H, K, config_of, dense_moe, loss_of, numbers, on_mesh, parameters_of
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from moe_layer import assert_close

from jax_deepep.moe import build_config, moe
from jax_deepep.moe.fair_drops import keep_shares, omit_excess


@pytest.mark.parametrize(
    ("mesh_name", "bound"),
    [
        ("expert", "capacity_factor"),
        ("expert", "expert_capacity"),
        ("fsdp × expert × tensor", "capacity_factor"),
    ],
)
def test_rows_beyond_the_capacity_are_dropped(mesh_name: str, bound: str) -> None:
    """All tokens go to expert 0, which takes half of each sender's, those of the higher weights."""
    plain = config_of(mesh_name, num_experts_per_tok=1, normalize=False)
    shards, size, per_device = plain.num_token_shards, plain.comm.size, 16
    capacity = {"capacity_factor": size / 2, "expert_capacity": size * per_device // 2}[bound]
    config = config_of(mesh_name, num_experts_per_tok=1, alignment=1, normalize=False, **{bound: capacity})
    parameters, x = parameters_of(config), np.abs(numbers(shards, per_device, H))
    parameters["gate"] = np.zeros_like(parameters["gate"])
    parameters["gate"][:, 0] = 1

    def loss(parameters, x):
        out, aux = moe(config, parameters, x)
        return loss_of(out), (out, aux)

    step = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    operands = on_mesh(config, parameters), put_on_mesh(x, config.mesh, P(config.token_axes))
    gradient, (out, aux) = fetch(step(*operands))

    assert aux.num_dropped == aux.expert_drops[0] == shards * per_device // 2
    assert aux.expert_load[0] == shards * per_device
    gradient = gradient.reshape(-1, H)
    kept = gradient.all(axis=1)
    assert not gradient[~kept].any()
    expected, *_ = jax.jit(lambda parameters, x: dense_moe(plain, parameters, x))(parameters, x)
    assert_close(out.reshape(-1, H), np.where(kept[:, None], np.asarray(expected).reshape(-1, H), 0))
    logits = x.reshape(-1, H).sum(axis=1).reshape(-1, per_device)  # those of the other experts are 0
    for of_sender, stays in zip(logits, kept.reshape(-1, per_device), strict=True):
        weight = 1 / (1 + (E - 1) * np.exp(-of_sender))
        assert stays.sum() == per_device // 2
        assert weight[stays].min() >= weight[~stays].max() * (1 - 2**-7)  # compared to 16 bits


def test_drops_are_spread_over_experts_and_senders() -> None:
    """Dispatch alone would drop the last expert of a device and the last sender, and never the first ones."""
    mesh = mesh_named("expert")
    experts = 4 * mesh.size
    config = build_config(
        experts, K, H, F, mesh=mesh, max_tokens=32, capacity_factor=0.8, alignment=1, normalize=False
    )
    parameters = on_mesh(config, parameters_of(config))
    call = jax.jit(lambda parameters, x: moe(config, parameters, x, aux="local")[1])
    drops = load = 0
    for seed in range(8):
        aux = fetch(call(parameters, put_on_mesh(numbers(mesh.size * 32, H, seed=seed), mesh, P("expert"))))
        drops, load = drops + aux.expert_drops, load + aux.expert_load
    share = drops.sum() / load.sum()
    assert share > 0.1
    by_local_expert = lambda values: values.reshape(mesh.size, mesh.size, 4).sum(axis=(0, 1))  # noqa: E731
    for rates in (by_local_expert(drops) / by_local_expert(load), drops.sum(axis=1) / load.sum(axis=1)):
        assert share / 2 < rates.min() <= rates.max() < share * 2


def test_small_shares_are_left_to_dispatch() -> None:
    """A sender with a share of 7 rows omits none; one with a share of 8 omits the others."""
    topk_idx, weights = np.zeros((16, 1), np.int32), np.linspace(1, 2, 16, dtype=np.float32)[:, None]
    for capacity, kept in ((7, 16), (8, 8)):
        config = config_of("one device", num_experts_per_tok=1, expert_capacity=capacity)
        sent = jax.jit(lambda *of, config=config: omit_excess(config, *of, None, 1))(topk_idx, weights)
        np.testing.assert_array_equal(np.asarray(sent)[:, 0], np.where(np.arange(16) >= 16 - kept, 0, -1))


@pytest.mark.parametrize("num_tokens", [1, 37, 4100])
@pytest.mark.parametrize("levels", [0, 3], ids=["", "ties"])
@pytest.mark.parametrize(("num_groups", "experts_per_group"), [(2, 4), (8, 1)])
def test_the_highest_weights_of_each_group_stay(
    num_tokens: int, levels: int, num_groups: int, experts_per_group: int
) -> None:
    """Against a loop: the first of equal weights, whatever their sign; who has no group stays."""
    random = np.random.default_rng(num_tokens)
    num_experts, shape, rank, num_ranks, rest = num_groups * experts_per_group, (num_tokens, 3), 1, 3, 2
    topk_idx = random.integers(-1, num_experts + 2, shape, np.int32)
    weights = random.uniform(-1, 1, shape).astype(np.float32)
    if levels:
        weights = np.round(weights * levels)
    for share in (1, max(1, topk_idx.size // num_groups // 2), topk_idx.size):
        expected = topk_idx.flatten()
        for group in range(num_groups):
            entries = np.flatnonzero((expected >= 0) & (expected // experts_per_group == group))
            bits = np.abs(weights).view(np.uint32).flatten()[entries] >> 16
            order = entries[np.argsort(-bits.astype(np.int64), kind="stable")]
            expected[order[share + ((group + rank) % num_ranks < rest) :]] = -1
        integers = {"num_groups": num_groups, "experts_per_group": experts_per_group, "share": share}
        kept = jax.jit(partial(keep_shares, **integers, rest=rest, num_ranks=num_ranks))
        got = kept(topk_idx, weights, np.int32(rank))
        np.testing.assert_array_equal(np.asarray(got).flatten(), expected)


def test_shares_of_a_slice() -> None:
    """XLA for GPUs makes fusions of custom calls and slices, which give results other memory."""
    random = np.random.default_rng(0)
    topk_idx = random.integers(-1, 8, (64, 3), np.int32)
    weights = random.uniform(-1, 1, (64, 3)).astype(np.float32)
    keep = partial(
        keep_shares, num_groups=2, experts_per_group=4, share=7, rest=0, num_ranks=1, rank=np.int32(0)
    )
    of_slices = jax.jit(lambda topk_idx, weights: keep(topk_idx[32:], weights[32:]))(topk_idx, weights)
    np.testing.assert_array_equal(of_slices, jax.jit(keep)(topk_idx[32:], weights[32:]))
