"""Ops in flight beside computation cannot deadlock if all kernels that wait for peers find SMs at once."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
from protocol_overlap import Overlap, Search

pytestmark = pytest.mark.any_python
EVENTS = ("begun", "ended", "none")
PROGRAMS = (
    "start matmul done",
    "start matmul plain done",
    "start plain matmul done",
    "start start matmul done done plain",
    "start plain start matmul done done plain",
    "start plain collective matmul done collected",
    "start collective plain matmul done collected",
    "collective start plain matmul done collected",
)


def deadlocks(overlap: Overlap, program: str, *, at_once: bool = True) -> Iterator[str]:
    return Search(overlap, program.split(), at_once=at_once).deadlocks()


def variants(program: str, event: str, num_ranks: int, num_sms: int) -> Iterator[Overlap]:
    """All sizes, and every way in which blocks may begin."""
    blocks = range(1, num_sms + 1)
    sizes = product(*(blocks if name in program else [0] for name in ("start", "plain", "collective")))
    for (start, plain, collective), cooperative, in_order in product(sizes, (True, False), (True, False)):
        if cooperative or start > 1:  # a single block makes no difference
            matmul = num_sms + 1 if num_ranks == 2 else 2  # three ranks have many states
            yield Overlap(num_ranks, num_sms, start, plain, collective, matmul, cooperative, event, in_order)


# --- The rule: a start, a plain op and a collective fit at once.


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_deadlock_if_all_fit(program: str, num_ranks: int, event: str) -> None:
    """Whatever the event is worth, and in whatever order blocks begin."""
    for overlap in variants(program, event, num_ranks, num_sms=6 - num_ranks):
        if overlap.start + overlap.plain + overlap.collective == overlap.num_sms:
            assert not any(deadlocks(overlap, program)), overlap


# --- What less than the rule leads to.

START_PLAIN, START_COLLECTIVE = ("start", "plain"), ("start", "collective")
PLAIN_COLLECTIVE, ALL = ("plain", "collective"), ("start", "plain", "collective")


@pytest.mark.parametrize(
    ("program", "event", "together"),
    [
        ("start plain done", "none", [START_PLAIN]),
        ("start plain done", "begun", []),
        ("start plain done", "ended", []),
        ("start plain collective done collected", "none", [START_PLAIN, START_COLLECTIVE]),
        ("start plain collective done collected", "begun", []),
        ("start collective plain done collected", "none", [ALL]),
        ("start collective plain done collected", "begun", [PLAIN_COLLECTIVE]),
        ("start collective plain done collected", "ended", [PLAIN_COLLECTIVE]),
        ("collective start plain done collected", "none", [ALL]),
        ("collective start plain done collected", "begun", [START_COLLECTIVE, PLAIN_COLLECTIVE]),
        ("collective start plain done collected", "ended", [START_COLLECTIVE, PLAIN_COLLECTIVE]),
    ],
)
def test_what_must_fit(program: str, event: str, together: list[tuple[str, ...]]) -> None:
    """There is a deadlock exactly if one of these sets of kernels does not fit.

    With an event that comes when it should, no rank begins what follows a start before all of the start. CUDA
    does not promise that, and without it nothing less than the rule is enough.
    """
    for overlap in variants(program, event, num_ranks=3, num_sms=3):
        fit = all(sum(getattr(overlap, name) for name in names) <= overlap.num_sms for names in together)
        assert any(deadlocks(overlap, program)) != fit, overlap


@pytest.mark.parametrize(
    ("program", "overlap", "state"),
    [
        (
            "start matmul plain done",
            Overlap(start=3, plain=2, event="none"),
            "start 0/3, plain 2/2; start 3/3, plain 0/2",
        ),
        (
            "start collective plain matmul done collected",
            Overlap(start=1, plain=2, collective=3),
            "collective 2/3, plain 2/2; collective 3/3, plain 0/2",
        ),
        (
            "collective start done collected",
            Overlap(start=2, collective=3),
            "collective 2/3, start 2/2; collective 3/3, start 0/2",
        ),
        # Any two of them fit.
        (
            "start collective plain done collected",
            Overlap(start=2, plain=2, collective=2, cooperative=False, event="none"),
            "start 1/2, collective 1/2, plain 2/2; start 2/2, collective 2/2, plain 0/2",
        ),
        (
            "start collective plain done collected",
            Overlap(num_ranks=3, start=2, plain=2, collective=2, event="none"),
            "start 0/2, collective 2/2, plain 2/2; start 2/2, collective 0/2, plain 2/2; "
            "start 2/2, collective 2/2, plain 0/2",
        ),
    ],
)
def test_deadlock(program: str, overlap: Overlap, state: str) -> None:
    assert set(deadlocks(overlap, program)) == {state}


@pytest.mark.parametrize(
    ("program", "num_sms"),
    [
        *((program, 2) for program in PROGRAMS if "collective" not in program),
        *(pytest.param(program, 3, marks=pytest.mark.nightly) for program in PROGRAMS),
    ],
)
def test_a_longer_search_finds_the_same_deadlocks(program: str, num_sms: int) -> None:
    for event in EVENTS:
        for overlap in variants(program, event, num_ranks=2, num_sms=num_sms):
            longer = deadlocks(overlap, program, at_once=False)
            assert set(deadlocks(overlap, program)) == set(longer), overlap


# --- What the event is for.


class Beside(NamedTuple):
    """A state of a rank in which blocks of the matmul run."""

    num_running: int
    op_begun: int  # blocks of an op in flight
    op_ended: int


def beside_matmul(overlap: Overlap, program: str, op: int) -> set[Beside]:
    """Every such state, with the op that was started as number `op`."""
    search = Search(overlap, program.split())
    names = [kernel.name for kernel in search.kernels]
    start = [i for i, name in enumerate(names) if name == "start"][op]
    matmul = names.index("matmul")
    return {
        Beside(num_running, rank.begun[start], rank.ended[start])
        for world, _ in search.worlds()
        for rank in world
        if (num_running := rank.begun[matmul] - rank.ended[matmul]) > 0
    }


@pytest.mark.parametrize("cooperative", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_event_lets_op_begin_before_matmul(program: str, cooperative: bool) -> None:
    """Without it, the matmul may take every SM first: the op then only begins as the matmul ends."""
    overlap = Overlap(cooperative=cooperative, matmul=4)
    in_time = beside_matmul(overlap, program, op=-1)
    assert all(state.op_begun == overlap.start for state in in_time)
    assert Beside(overlap.num_sms - overlap.start, overlap.start, 0) in in_time

    early = beside_matmul(replace(overlap, event="none"), program, op=-1)
    assert Beside(overlap.num_sms, 0, 0) in early

    late = beside_matmul(replace(overlap, event="ended"), program, op=-1)
    assert all(state.op_ended == overlap.start for state in late)


def test_second_op_waits_for_first() -> None:
    """They share a stream: with the event, what follows both starts runs beside the second op only."""
    overlap = Overlap()
    program = "start start matmul done done"
    assert all(state.op_ended == overlap.start for state in beside_matmul(overlap, program, op=0))
    without = beside_matmul(replace(overlap, event="none"), program, op=0)
    assert Beside(overlap.num_sms - overlap.start, overlap.start, 0) in without
