"""The number of rows in the worst case."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest

from jax_deepep.capacity import bounded_rows, num_groups, round_up, worst_case_rows
from jax_deepep.ops.dispatch import _route_shape


@pytest.mark.parametrize(
    ("value", "multiple", "expected"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)]
)
def test_round_up(value: int, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(
    ("layout", "num_experts_per_tok", "num_local_experts", "alignment", "expected"),
    [
        ("expert", 2, 4, 1, 80),  # R·T·K
        ("expert", 8, 4, 1, 160),  # no token goes to a device more than L times
        ("expert", 2, 4, 8, 112),  # 80 + 4·7 = 108, rounded up
        ("token", 2, 4, 1, 40),  # R·T
        ("token", 8, 4, 16, 48),
    ],
)
def test_worst_case(
    layout: str, num_experts_per_tok: int, num_local_experts: int, alignment: int, expected: int
) -> None:
    rows = worst_case_rows(
        layout=layout,
        num_ranks=4,
        num_tokens=10,
        num_experts_per_tok=num_experts_per_tok,
        num_local_experts=num_local_experts,
        alignment=alignment,
    )
    assert rows == expected


def test_the_worst_case_of_many_devices_does_not_overflow() -> None:
    """It is refused by name where the rows of all devices are too many for int32."""

    def capacity_of(num_local_experts: int, num_tokens: int = 4096) -> int:
        comm: Any = SimpleNamespace(
            size=512,
            num_experts_per_tok=8,
            num_local_experts=num_local_experts,
            mode_of=lambda num_tokens: "throughput",
        )
        return _route_shape(
            comm,
            num_tokens=num_tokens,
            layout="expert",
            capacity=None,
            expert_capacity=None,
            alignment=1,
        ).capacity

    assert capacity_of(1) == 512 * 4096
    assert capacity_of(2, 4095) == 512 * 4095 * 2
    words = (
        r"capacity: expected at most 4194303 rows on each of 512 devices \(row numbers are int32\), got "
        r"None, which stands for the worst case of 4194304; pass a smaller capacity, or dispatch the tokens "
        r"in several ops"
    )
    with pytest.raises(ValueError, match=words):
        capacity_of(2)


@pytest.mark.parametrize("alignment", [1, 2, 3, 8])
def test_the_worst_case_drops_nothing(alignment: int) -> None:
    """For every choice of two of four experts by two tokens on two devices."""
    pairs = list(itertools.permutations(range(4), 2))
    for first, second in itertools.product(pairs, pairs):
        topk_idx = np.array([[first], [second]], np.int32)
        routes = oracle.route(
            topk_idx, np.ones_like(topk_idx, np.float32), num_experts=4, max_tokens=1, alignment=alignment
        )
        rows = worst_case_rows(
            layout="expert", num_ranks=2, num_tokens=1, num_experts_per_tok=2, num_local_experts=2,
            alignment=alignment,
        )  # fmt: skip
        assert routes.group_sizes.sum(axis=1).max() <= rows
        assert not routes.num_dropped.any()


@pytest.mark.parametrize(
    ("factor", "alignment", "expected"),
    # On average 10 · 3 rows; four groups may each be padded by alignment − 1; 80 · 3 in the worst case.
    [(1.0, 1, 30), (1.25, 1, 38), (1.0, 8, 64), (100.0, 1, 240), (100.0, 8, 272)],
)
def test_a_bound_on_rows(factor: float, alignment: int, expected: int) -> None:
    rows = bounded_rows(
        capacity_factor=factor, num_ranks=8, num_tokens=10, num_experts_per_tok=3, num_local_experts=4,
        alignment=alignment,
    )  # fmt: skip
    assert rows == expected


def test_a_factor_is_a_float_of_python_in_computations() -> None:
    sizes = {"num_ranks": 2, "num_tokens": 4001, "num_experts_per_tok": 2, "num_local_experts": 4}
    assert bounded_rows(capacity_factor=np.float16(1.25), alignment=1, **sizes) == 10003  # 10000 in float16


def test_groups_of_rows() -> None:
    assert num_groups("expert", 4) == 4
    assert num_groups("token", 4) == 1
