"""Sums that are written while peers read keep the promises of the mode, and nothing waits in a circle."""

import itertools
from functools import partial

import pytest
from protocol_parts import LATE, PARTS, is_stuck, read_without_waiting, signal_part, wait_for_part
from protocol_search import Protocol, find_violation
from test_group_protocol import Mutation

pytestmark = pytest.mark.any_python
RUNS = [(PARTS, 2, 2, False), (PARTS, 2, 1, True), (LATE, 2, 2, False), (PARTS, 3, 1, False)]
NIGHTLY = [(PARTS, 2, 2, True), (LATE, 2, 1, True), (PARTS, 2, 3, False), (LATE, 3, 1, False)]


@pytest.mark.parametrize(
    ("protocol", "num_ranks", "num_ops", "concurrent"),
    [
        pytest.param(*run, marks=marks, id=f"{'late' if run[0] is LATE else 'parts'}-{run[1:]}")
        for runs, marks in ((RUNS, ()), (NIGHTLY, pytest.mark.nightly))
        for run in runs
    ],
)
def test_promises_are_kept(protocol: Protocol, num_ranks: int, num_ops: int, concurrent: bool) -> None:
    result = find_violation(protocol, num_ranks, num_ops, concurrent=concurrent)
    assert result.broken_promise is None, "\n".join(result.run)
    assert result.num_states > 100 * num_ranks


@pytest.mark.parametrize("protocol", [PARTS, LATE], ids=["parts", "late"])
def test_all_ranks_end_if_none_fails(protocol: Protocol) -> None:
    result = find_violation(protocol.failing_only_on(), 2, 2)
    assert result.broken_promise is None, "\n".join(result.run)


NOT_SUMMED = PARTS.moved("Sum part 1", after="WaitForPart 1").moved("SignalPart 1", after="Sum part 1")
MUTATIONS = [
    Mutation(
        "a part is signalled before its rows are stored",
        PARTS.moved("Sum part 1", after="SignalPart 1"),
        "data",
    ),
    Mutation(
        "part_ready is no release store",
        PARTS.replaced("SignalPart 1", partial(signal_part, part=1, release=False)),
        "data",
    ),
    Mutation("a row is read without its part", PARTS.replaced("WaitForPart 1", read_without_waiting), "data"),
    Mutation(
        "the part of the previous op suffices",
        PARTS.replaced("WaitForPart 1", partial(wait_for_part, part=1, ops_before=1)),
        "data",
    ),
    Mutation(
        "waits are unbounded",
        LATE.replaced("WaitForPart 1", partial(wait_for_part, part=1, bounded=False)),
        "progress",
    ),
    Mutation("a rank waits before it has summed the same part", NOT_SUMMED.failing_only_on(), "progress"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_step_is_needed(mutation: Mutation) -> None:
    result = find_violation(mutation.protocol, mutation.num_ranks, mutation.num_ops)
    assert result.broken_promise == mutation.promise, "\n".join(result.run)


NUM_PARTS = 3
READS = [(rank, part) for rank in range(2) for part in range(NUM_PARTS)]
WAITS = [waits for length in range(3) for waits in itertools.product(READS, repeat=length)]


def test_warps_do_not_wait_in_a_circle() -> None:
    """Two warps of one rank and one of another, that read any two rows in any order."""
    for waits in itertools.product(WAITS, repeat=3):
        assert not is_stuck(list(zip((0, 0, 1), waits, strict=True)), NUM_PARTS), waits


def test_a_warp_must_have_summed_what_it_waits_for() -> None:
    found = [
        waits
        for waits in itertools.product(WAITS, repeat=2)
        if is_stuck(list(zip((0, 1), waits, strict=True)), NUM_PARTS, ahead=-1)
    ]
    assert found
