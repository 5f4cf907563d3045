"""Placements of redundant experts, and how tokens find a copy."""

import functools

import jax
import numpy as np
import pytest

from jax_deepep.balancing import imbalance, plan_experts, to_slots


def zipf(num_experts: int, exponent: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return loads that fall with a power of the rank, in random order."""
    return np.random.default_rng(seed).permutation(1e6 / np.arange(1, num_experts + 1) ** exponent)


def test_a_plan_by_hand() -> None:
    """Copies go where the load per copy is highest: 8, 4 and again 4 of expert 0, 4 of expert 1."""
    load = [8, 4, 1, 1]
    anywhere = plan_experts(load, num_physical=8, num_devices=4, own_first=False)
    np.testing.assert_array_equal(anywhere.reshape(4, 2), [[0, 1], [0, 1], [0, 2], [0, 3]])
    assert imbalance(load, anywhere, 4) == 4 / 3.5
    own_first = plan_experts(load, num_physical=8, num_devices=4)
    np.testing.assert_array_equal(own_first.reshape(4, 2), [[0, 1], [1, 0], [2, 0], [3, 0]])


@pytest.mark.parametrize("own_first", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "num_devices", "slots"),
    [(16, 4, 5), (16, 4, 4), (8, 8, 3), (64, 8, 9), (6, 2, 6), (4, 1, 4)],
)
@pytest.mark.parametrize("exponent", [0, 1, 3])
def test_every_plan_is_a_placement(
    num_experts: int, num_devices: int, slots: int, exponent: int, own_first: bool
) -> None:
    load = zipf(num_experts, exponent)
    sizes = {"num_physical": num_devices * slots, "num_devices": num_devices, "own_first": own_first}
    placement = plan_experts(load, **sizes)
    assert placement.dtype == np.int32
    assert set(placement.tolist()) == set(range(num_experts))
    of_device = placement.reshape(num_devices, slots)
    if own_first:
        own = np.arange(num_experts).reshape(num_devices, -1)
        np.testing.assert_array_equal(of_device[:, : own.shape[1]], own)
    np.testing.assert_array_equal(plan_experts(load, **sizes), placement)


def test_layers_are_planned_one_by_one() -> None:
    load = np.stack([zipf(16, seed=seed) for seed in range(3)])
    sizes = {"num_physical": 24, "num_devices": 4}
    of_layers = plan_experts(load, **sizes)
    np.testing.assert_array_equal(of_layers, [plan_experts(row, **sizes) for row in load])
    assert len({row.tobytes() for row in of_layers}) == 3


@pytest.mark.parametrize(("own_first", "part"), [(True, 0.5), (False, 0.01)])
def test_copies_even_out_a_skewed_load(own_first: bool, part: float) -> None:
    """One more slot on each of 8 devices for 64 experts, over five orders of the loads."""
    for seed in range(5):
        load = zipf(64, seed=seed)
        without = imbalance(load, np.arange(64), 8)
        placement = plan_experts(load, num_physical=72, num_devices=8, own_first=own_first)
        assert without > 1.5
        assert imbalance(load, placement, 8) - 1 < part * (without - 1)


def test_no_load_is_even() -> None:
    assert imbalance(np.zeros(4), np.arange(4), 2) == 1


def test_tokens_take_the_copies_in_turn() -> None:
    rng = np.random.default_rng(0)
    placement = rng.permutation([0, 0, 0, 1, 2, 2, 4, 4, 4, 4])  # expert 3 has no slot
    topk_idx = np.stack([rng.permutation(5)[:3] for _ in range(40)]).astype(np.int32)
    topk_idx[::7, 1], topk_idx[::9, 2] = -1, 5  # no expert, and an invalid one
    program = jax.jit(functools.partial(to_slots, num_experts=5))
    for first_token in (0, 7):
        expected = topk_idx.copy()
        for (token, k), expert in np.ndenumerate(topk_idx):
            if 0 <= expert < 5:
                slots = np.flatnonzero(placement == expert)
                expected[token, k] = slots[(first_token + token) % len(slots)] if len(slots) else -1
        token = np.arange(first_token, first_token + 40, dtype=np.int32)
        result = program(topk_idx, token, placement.astype(np.int32))
        assert result.dtype == np.int32
        np.testing.assert_array_equal(result, expected)


ERRORS = [
    ({"load": [[[1.0]]]}, r"load: got shape \(1, 1, 1\); takes \[num_experts\] or"),
    ({"load": [1, 2, -3, 4]}, "load: got a negative number, or one that is not finite"),
    ({"load": [1, 2, np.nan, 4]}, "load: got a negative number, or one that is not finite"),
    ({"num_devices": 3}, "num_devices: got 3; takes a divisor of the 4 experts"),
    ({"num_devices": 0}, "num_devices: got 0; takes an integer of at least 1"),
    ({"num_physical": 5}, "num_physical: got 5; takes a multiple of num_devices=2, at least 4"),
    ({"num_physical": 2}, "num_physical: got 2; takes a multiple of num_devices=2, at least 4"),
    ({"num_physical": 10}, "num_physical: got 10; takes at most 8: every expert once on every device"),
]


@pytest.mark.parametrize(("wrong", "words"), ERRORS, ids=[case[1][:40] for case in ERRORS])
def test_a_wrong_argument(wrong: dict, words: str) -> None:
    arguments = {"load": [1, 2, 3, 4], "num_physical": 6, "num_devices": 2, **wrong}
    with pytest.raises(ValueError, match=words):
        plan_experts(arguments.pop("load"), **arguments)


def test_a_number_that_is_no_integer() -> None:
    with pytest.raises(TypeError, match=r"num_physical: got 12\.0; takes a Python integer"):
        plan_experts([1, 2, 3, 4], num_physical=12.0, num_devices=2)
