"""Expert maps with replicas, and which replica a token takes."""

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jax_deepep.balancing import imbalance, plan_experts, to_physical_experts, to_slots


def zipf(num_experts: int, exponent: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return loads that fall with a power of the rank, in random order."""
    return np.random.default_rng(seed).permutation(1e6 / np.arange(1, num_experts + 1) ** exponent)


def expert_maps(num_experts: int, num_devices: int, slots: int, keep_home: bool) -> Iterator[np.ndarray]:
    """Yield every expert map without an expert twice on one device, up to the order on a device."""
    home = np.arange(num_experts).reshape(num_devices, -1)
    choices = [
        [held for held in itertools.combinations(range(num_experts), slots)
         if not keep_home or set(home[device]) <= set(held)]
        for device in range(num_devices)
    ]  # fmt: skip
    for held in itertools.product(*choices):
        expert_map = np.array(held).ravel()
        if len(set(expert_map.tolist())) == num_experts:
            yield expert_map


@pytest.mark.parametrize(
    ("load", "num_devices", "slots", "keep_home"),
    [
        ([8, 4, 1, 1], 4, 2, True),
        ([8, 4, 1, 1], 4, 2, False),
        ([9, 1, 6, 0, 1, 1, 3, 3], 4, 3, True),
        ([5, 1, 1, 9, 2, 1], 2, 4, True),
        ([5, 1, 1, 9, 2, 1], 2, 4, False),
        ([7, 3, 2], 3, 2, False),
        ([40, 1, 1, 1, 1, 1, 1, 1], 4, 3, True),
    ],
    ids=str,
)
def test_small_plans_are_optimal(load: list[int], num_devices: int, slots: int, keep_home: bool) -> None:
    sizes = {"num_physical": num_devices * slots, "num_devices": num_devices, "keep_home": keep_home}
    optimum = min(
        imbalance(load, expert_map, num_devices)
        for expert_map in expert_maps(len(load), num_devices, slots, keep_home)
    )
    assert imbalance(load, plan_experts(load, **sizes), num_devices) == pytest.approx(optimum)


def test_an_even_plan() -> None:
    load = [9, 1, 6, 0, 1, 1, 3, 3]
    plan = plan_experts(load, num_physical=12, num_devices=4, keep_home=False)
    assert imbalance(load, plan, 4) == 1


def climbed(load: np.ndarray, expert_map: np.ndarray, num_devices: int, num_own: int, seed: int) -> float:
    """Return the imbalance after a thousand random changes, each kept unless it raises the imbalance."""
    random = np.random.default_rng(seed)
    held, value = expert_map.reshape(num_devices, -1).copy(), imbalance(load, expert_map, num_devices)
    for _ in range(1000):
        new, (a, b) = held.copy(), random.integers(num_devices, size=2)
        i, j = random.integers(num_own, held.shape[1], size=2)
        if random.random() < 0.5:
            new[a, i], new[b, j] = held[b, j], held[a, i]
        else:
            new[a, i] = random.integers(len(load))
        is_allowed = all(len(set(row)) == len(row) for row in new[[a, b]].tolist())
        if is_allowed and len(np.unique(new)) == len(load):
            after = imbalance(load, new.ravel(), num_devices)
            held, value = (new, after) if after <= value else (held, value)
    return value


@pytest.mark.parametrize("keep_home", [True, False])
def test_plans_are_as_good_as_those_of_a_local_search(keep_home: bool) -> None:
    """The search starts from a simple expert map, and from the plan itself."""
    for seed, (num_devices, slots) in enumerate([(4, 5), (4, 6), (8, 3)]):
        random = np.random.default_rng(seed)
        load = random.zipf(1.5, 16).clip(0, 100).astype(float)
        num_own = 16 // num_devices if keep_home else 0
        sizes = {"num_physical": num_devices * slots, "num_devices": num_devices, "keep_home": keep_home}
        plan = plan_experts(load, **sizes)
        own = np.arange(16).reshape(num_devices, -1)
        first = np.stack(
            [np.append(row, np.roll(np.arange(16), -row[-1] - 1)[: slots - len(row)]) for row in own]
        )
        planned = imbalance(load, plan, num_devices)
        for start in (first.ravel(), plan):
            assert planned <= climbed(load, start, num_devices, num_own, seed) * 1.02


@pytest.mark.parametrize("keep_home", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "num_devices", "slots"),
    [(16, 4, 5), (16, 4, 4), (8, 8, 3), (64, 8, 9), (6, 2, 6), (4, 1, 4)],
)
@pytest.mark.parametrize("exponent", [0, 1, 3])
def test_every_plan_is_an_expert_map(
    num_experts: int, num_devices: int, slots: int, exponent: int, keep_home: bool
) -> None:
    load = zipf(num_experts, exponent)
    sizes = {"num_physical": num_devices * slots, "num_devices": num_devices, "keep_home": keep_home}
    expert_map = plan_experts(load, **sizes)
    assert expert_map.dtype == np.int32
    assert set(expert_map.tolist()) == set(range(num_experts))
    of_device = expert_map.reshape(num_devices, slots)
    assert all(len(set(row)) == slots for row in of_device.tolist())  # no expert twice on one device
    if keep_home:
        own = np.arange(num_experts).reshape(num_devices, -1)
        np.testing.assert_array_equal(of_device[:, : own.shape[1]], own)
    np.testing.assert_array_equal(plan_experts(load, **sizes), expert_map)


def test_layers_are_planned_one_by_one() -> None:
    load = np.stack([zipf(16, seed=seed) for seed in range(3)])
    sizes = {"num_physical": 24, "num_devices": 4}
    of_layers = plan_experts(load, **sizes)
    np.testing.assert_array_equal(of_layers, [plan_experts(row, **sizes) for row in load])
    assert len({row.tobytes() for row in of_layers}) == 3


@pytest.mark.parametrize(("keep_home", "part"), [(True, 0.5), (False, 0.01)])
def test_replicas_even_out_a_skewed_load(keep_home: bool, part: float) -> None:
    """One replica on each of 8 devices for 64 experts, over five orders of the loads."""
    for seed in range(5):
        load = zipf(64, seed=seed)
        without = imbalance(load, np.arange(64), 8)
        expert_map = plan_experts(load, num_physical=72, num_devices=8, keep_home=keep_home)
        assert without > 1.5
        assert imbalance(load, expert_map, 8) - 1 < part * (without - 1)


def test_no_load_is_even() -> None:
    assert imbalance(np.zeros(4), np.arange(4), 2) == 1


def test_every_entry_takes_a_replica_of_its_expert() -> None:
    rng = np.random.default_rng(0)
    expert_map = rng.permutation([0, 0, 0, 1, 2, 2, 4, 4, 4, 4])  # expert 3 is missing
    topk_idx = np.stack([rng.permutation(5)[:3] for _ in range(40)]).astype(np.int32)
    topk_idx[::7, 1], topk_idx[::9, 2] = -1, 5  # no expert, and an invalid one
    token = np.arange(7, 47, dtype=np.int32)
    program = jax.jit(functools.partial(to_physical_experts, num_experts=5))
    physical = np.asarray(program(topk_idx, token, expert_map.astype(np.int32)))
    assert physical.dtype == np.int32
    expected = np.where(topk_idx == 3, -1, topk_idx)
    held = np.where((physical >= 0) & (topk_idx != 5), expert_map[np.clip(physical, 0, 9)], physical)
    np.testing.assert_array_equal(held, expected)
    # The choice for a token depends on no other token.
    some = np.asarray(program(topk_idx[5:9], token[5:9], expert_map.astype(np.int32)))
    np.testing.assert_array_equal(some, physical[5:9])


@pytest.mark.parametrize("period", [1, 2, 3, 8, 64])
def test_the_choice_of_replicas_has_no_period(period: int) -> None:
    """Every `period`-th token goes to expert 0, which has 2, 3 or 8 replicas."""
    token = np.arange(0, 4000 * period, period, dtype=np.int32)
    topk_idx = np.zeros((len(token), 1), np.int32)
    for replicas in (2, 3, 8):
        physical = to_physical_experts(topk_idx, token, np.zeros(replicas, np.int32), num_experts=1)
        load = np.bincount(np.asarray(physical).ravel(), minlength=replicas)
        assert abs(load * replicas / len(token) - 1).max() < 0.15


ERRORS = [
    ({"load": [[[1.0]]]}, r"load: expected shape \[num_experts\] or .*, got \[1, 1, 1\]"),
    ({"load": [1, 2, -3, 4]}, "load: expected finite numbers of at least 0, got others"),
    ({"load": [1, 2, np.nan, 4]}, "load: expected finite numbers of at least 0, got others"),
    ({"num_devices": 3}, "num_devices: expected a divisor of the 4 experts, got 3"),
    ({"num_devices": 0}, "num_devices: expected an integer of at least 1, got 0"),
    (
        {"num_physical": 5},
        "num_physical: expected a multiple of num_devices=2, at least the 4 experts, got 5",
    ),
    (
        {"num_physical": 2},
        "num_physical: expected a multiple of num_devices=2, at least the 4 experts, got 2",
    ),
    ({"num_physical": 10}, "num_physical: expected at most 8, every expert once on every device, got 10"),
]


@pytest.mark.parametrize(("wrong", "words"), ERRORS, ids=[case[1][:40] for case in ERRORS])
def test_a_wrong_argument(wrong: dict, words: str) -> None:
    arguments = {"load": [1, 2, 3, 4], "num_physical": 6, "num_devices": 2, **wrong}
    with pytest.raises(ValueError, match=words):
        plan_experts(arguments.pop("load"), **arguments)


def test_a_number_that_is_no_integer() -> None:
    with pytest.raises(TypeError, match=r"num_physical: expected a Python integer .*, got 12\.0"):
        plan_experts([1, 2, 3, 4], num_physical=12.0, num_devices=2)


def test_old_names_work_and_warn() -> None:
    sizes = {"num_physical": 6, "num_devices": 2}
    expected = plan_experts([1, 2, 3, 4], **sizes, keep_home=False)
    with pytest.warns(DeprecationWarning, match="own_first is now called keep_home") as record:
        np.testing.assert_array_equal(plan_experts([1, 2, 3, 4], **sizes, own_first=False), expected)
    assert record[0].filename == __file__
    with pytest.raises(TypeError, match="own_first: expected no old name beside keep_home"):
        plan_experts([1, 2, 3, 4], **sizes, own_first=False, keep_home=False)
    operands = np.int32([[0, 1]]), np.int32([5]), np.int32([0, 1, 0, 1])
    with pytest.warns(DeprecationWarning, match="to_slots is now called to_physical_experts"):
        old = to_slots(*operands, num_experts=2)
    np.testing.assert_array_equal(old, to_physical_experts(*operands, num_experts=2))
