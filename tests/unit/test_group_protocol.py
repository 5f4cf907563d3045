"""Ranks keep the promises of their protocol on GPUs, however they interleave, and need all of it for that."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
from protocol_failure import claim, notify_peers, wait
from protocol_low_latency import LowLatency
from protocol_search import Protocol, find_violation
from protocol_throughput import (
    PROTOCOL,
    begin,
    flags_of_peers,
    signal_arrival,
    signal_leaving,
    wait_for_arrivals,
)
from protocol_world import World

pytestmark = pytest.mark.any_python
LOW_LATENCY = LowLatency().protocol()
HEADER_FIRST = LowLatency(header_first=True).protocol()  # dispatch
THROUGHPUT_RUNS = [(2, 1, True), (2, 2, True), (2, 3, False), (3, 1, False)]
THROUGHPUT_NIGHTLY = [(2, 3, True), (2, 4, False), (3, 1, True), (3, 2, False)]
LOW_LATENCY_RUNS = [(2, 4, True), (3, 1, False)]
LOW_LATENCY_NIGHTLY = [(2, 6, True), (3, 1, True), (3, 3, False)]


@pytest.mark.parametrize(
    ("protocol", "num_ranks", "num_ops", "concurrent"),
    [
        pytest.param(protocol, *run, marks=marks, id="-".join([mode, *map(str, run)]))
        for mode, protocol, runs, marks in (
            ("throughput", PROTOCOL, THROUGHPUT_RUNS, ()),
            ("throughput", PROTOCOL, THROUGHPUT_NIGHTLY, pytest.mark.nightly),
            ("low_latency", LOW_LATENCY, LOW_LATENCY_RUNS, ()),
            ("low_latency dispatch", HEADER_FIRST, LOW_LATENCY_RUNS, ()),
            ("low_latency", LOW_LATENCY, LOW_LATENCY_NIGHTLY, pytest.mark.nightly),
            ("low_latency dispatch", HEADER_FIRST, LOW_LATENCY_NIGHTLY, pytest.mark.nightly),
        )
        for run in runs
    ],
)
def test_promises_are_kept(protocol: Protocol, num_ranks: int, num_ops: int, concurrent: bool) -> None:
    """With `concurrent`, also if two ops of the communicator run at once on a rank."""
    result = find_violation(protocol, num_ranks, num_ops, concurrent=concurrent)
    assert result.broken_promise is None, "\n".join(result.run)
    assert result.num_states > 100 * num_ranks


# --- Changes to the protocol, each of which breaks a promise.


def keep_the_report(world: World, rank: int) -> Iterator[World]:
    return notify_peers(world, rank) if world.ranks[rank].reporter == rank else iter([world])


def leave_before_notifying(world: World, rank: int) -> Iterator[World]:
    world.store(rank, world.at.operand(rank), 2 * world.ranks[rank].op + 1)
    return notify_peers(world, rank)


def load_before_waiting(world: World, rank: int) -> Iterator[World]:
    """As if the flags were loaded without acquire: later loads may return older values."""
    for notified in signal_arrival(world, rank):
        op = notified.ranks[rank].op
        stale = any(notified.seen[notified.at.operand(peer)] != 2 * op for peer in notified.peers(rank))
        notified.change(rank, wrong=stale)
        yield notified


def wait_without_bound(world: World, rank: int) -> Iterator[World]:
    return (waited for waited in wait_for_arrivals(world, rank) if waited.ranks[rank].jump != "Fail")


def wait_for_previous_op(world: World, rank: int) -> Iterator[World]:
    op = world.ranks[rank].op
    flags = flags_of_peers(world, rank, world.at.arrived)
    for waited, answer in wait(world, rank, flags, op - 1):
        if answer == "all":
            waited.begin_loads(rank)
            yield waited


class Mutation(NamedTuple):
    name: str
    protocol: Protocol
    promise: str
    num_ranks: int = 2
    num_ops: int = 1
    concurrent: bool = False


ARRIVED, LEFT = "Publish: StoreReleaseSystem(arrived)", "Finish: StoreReleaseSystem(left)"
BROKEN = "Fail: StoreReleaseSystem(broken)"
MUTATIONS = [
    Mutation("operands are written after the flag", PROTOCOL.moved("Write operands", after=ARRIVED), "data"),
    Mutation("counts are pushed after the flag", PROTOCOL.moved("Push counts", after=ARRIVED), "addresses"),
    Mutation(
        "arrived is no release store",
        PROTOCOL.replaced(ARRIVED, partial(signal_arrival, release=False)),
        "addresses",
    ),
    Mutation("arrived is loaded without acquire", PROTOCOL.replaced(ARRIVED, load_before_waiting), "data"),
    Mutation(
        "the flag of the previous op suffices",
        PROTOCOL.replaced("WaitForArrivals", wait_for_previous_op),
        "addresses",
    ),
    Mutation("waits are unbounded", PROTOCOL.replaced("WaitForArrivals", wait_without_bound), "progress"),
    Mutation(
        "an op begins on a broken communicator",
        PROTOCOL.replaced("Begin", partial(begin, looks=False)),
        "addresses",
        num_ops=2,
    ),
    Mutation("left is stored before the loads", PROTOCOL.moved(LEFT, after=ARRIVED), "data"),
    Mutation(
        "left is no release store, and no fence precedes it",
        PROTOCOL.without("Finish: IsLastBlock")
        .replaced(LEFT, partial(signal_leaving, release=False))
        .moved("Last loads", after="Finish: WaitForAll(left)"),
        "data",
    ),
    Mutation("no rank waits for left", PROTOCOL.without("Finish: WaitForAll(left)"), "data"),
    # Each of the two fences, and each of the two checks, is enough without the other.
    Mutation(
        "no fence between the loads and the check",
        PROTOCOL.without("Finish: IsLastBlock", "Finish: FenceSystem").moved(
            "Last loads", after="Finish: Stopped again"
        ),
        "data",
    ),
    Mutation(
        "no check after the loads", PROTOCOL.without("Finish: Stopped", "Finish: Stopped again"), "data"
    ),
    Mutation("peers are not notified", PROTOCOL.without(BROKEN), "data"),
    Mutation("peers are notified after leaving", PROTOCOL.replaced(BROKEN, leave_before_notifying), "data"),
    # Two ranks have another fence on the way out, but not one that forwards a report.
    Mutation(
        "no fence between notifying and leaving", PROTOCOL.without("Fail: FenceSystem"), "data", num_ranks=3
    ),
    Mutation(
        "a notified rank does not forward the report",
        PROTOCOL.replaced(BROKEN, keep_the_report),
        "data",
        num_ranks=3,
    ),
    Mutation(
        "broken is no release store",
        PROTOCOL.replaced(BROKEN, partial(notify_peers, release=False)),
        "report",
    ),
    Mutation(
        "an abort does not wait for the notifications of a concurrent one",
        PROTOCOL.replaced("Fail", partial(claim, waits=False)),
        "data",
        concurrent=True,
    ),
    Mutation("no fence before the host's flag", PROTOCOL.without("Fail: __threadfence_system"), "report"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_part_is_needed(mutation: Mutation) -> None:
    result = find_violation(
        mutation.protocol, mutation.num_ranks, mutation.num_ops, concurrent=mutation.concurrent
    )
    assert result.broken_promise == mutation.promise, "\n".join(result.run)


LOW_LATENCY_MUTATIONS = [
    Mutation("one bank", LowLatency(num_banks=1).protocol(), "data", num_ops=2),
    Mutation(
        "headers are sent before the loads of the previous op are complete",
        LowLatency(num_in_flight=2).protocol(),
        "data",
        num_ops=3,
    ),
    Mutation(
        "two ops in flight over three banks",
        LowLatency(num_in_flight=2, num_banks=3).protocol(),
        "data",
        num_ops=4,
    ),
    Mutation(
        "only peers with rows send headers",
        LowLatency(sends_to_all=False).protocol(),
        "stays broken",
        num_ops=2,
    ),
    Mutation(
        "a header is no release store, and no fence precedes it",
        LowLatency(releases=False).protocol().without("Push: IsLastBlock"),
        "data",
    ),
    Mutation(
        "an op begins on a broken communicator", LowLatency(looks=False).protocol(), "stays broken", num_ops=2
    ),
    Mutation("waits are unbounded", LowLatency(bounded=False).protocol(), "progress"),
    Mutation(
        "rows are loaded without their signals",
        LowLatency(header_first=True, waits_for_rows=False).protocol(),
        "data",
    ),
    Mutation(
        "a signal is no release store, and no fence precedes it",
        LowLatency(header_first=True, releases=False).protocol().without("Push: IsLastBlock"),
        "data",
    ),
    Mutation(
        "a header only goes to peers with rows",
        LowLatency(header_first=True, sends_to_all=False).protocol(),
        "stays broken",
        num_ops=2,
    ),
    Mutation(
        "step and signature of an op are two words",
        LowLatency(announces_at_once=False).protocol(),
        "no false alarm",
        num_ops=2,
    ),
    Mutation(
        "broken is no release store",
        LOW_LATENCY.replaced(BROKEN, partial(notify_peers, release=False)),
        "report",
    ),
]


@pytest.mark.parametrize("mutation", LOW_LATENCY_MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_part_of_low_latency_is_needed(mutation: Mutation) -> None:
    test_every_part_is_needed(mutation)


def test_two_ops_in_flight_take_four_banks() -> None:
    """The cost of a channel with two ops at once; two channels of two banks need no more."""
    protocol = LowLatency(num_in_flight=2, num_banks=4).protocol()
    assert find_violation(protocol, 2, 6).broken_promise is None


@pytest.mark.nightly
@pytest.mark.parametrize("off", ["at_once", "on_demand"])
@pytest.mark.parametrize("num_ops", [1, 2])
def test_a_longer_search_has_the_same_answer(off: str, num_ops: int) -> None:
    """The reductions of the search hide nothing: see protocol_search.py."""
    assert find_violation(PROTOCOL, 2, num_ops, **{off: False}).broken_promise is None
    for mutation in MUTATIONS:
        if (mutation.num_ranks, mutation.num_ops, mutation.concurrent) == (2, num_ops, False):
            assert find_violation(mutation.protocol, 2, num_ops, **{off: False}).broken_promise is not None
