"""Sums of pairs that are written in parts while peers read earlier ones: combine on one node.

A rank arrives before it has written its sums. It tells its peers of each part, once all of its warps have
written what they have of it (`part_ready`), and a warp waits for the part of all ranks before it reads it.

* The search of protocol_throughput.py, with two parts. A rank has one warp there.
* A warp that waits for a part, of whichever rank, has summed what it has of all parts up to that one. So no
  warps wait for each other in a circle: of those that wait, consider one that waits for the earliest part.
  All warps of that rank have summed this part, or will. `is_stuck` runs warps of several ranks. What a warp
  does never hinders another, so that one order of steps shows whether any ends.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from protocol_search import LOAD, LOCAL, Protocol, Step
from protocol_throughput import (
    FINISH_STEPS,
    PUBLISH_STEPS,
    check_loads,
    compare_ops,
    flags_of_peers,
    load_late,
    wait_for_flags,
    writers_of_loads,
)
from protocol_world import World

NUM_PARTS = 2


# Both in place of words of low-latency mode.


def rows_of(world: World, rank: int, part: int) -> int:
    """As `operand`, of the sums of a part."""
    return world.at.slots(part, rank, rank)


def flags_of_part(world: World, rank: int, part: int) -> dict[int, int]:
    """`part_ready`, which peers write."""
    return flags_of_peers(world, rank, partial(world.at.header, part))


def sum_pairs(world: World, rank: int, *, part: int) -> Iterator[World]:
    world.store(rank, rows_of(world, rank, part), 2 * world.ranks[rank].op)
    yield world


def signal_part(world: World, rank: int, *, part: int, release: bool = True) -> Iterator[World]:
    for peer in world.of_node(rank):
        world.store(rank, world.at.header(part, peer, rank), world.ranks[rank].op, release=release)
    yield world


def wait_for_arrivals(world: World, rank: int) -> Iterator[World]:
    """Then only routes may be read."""
    flags = flags_of_peers(world, rank, world.at.arrived)
    yield from compare_ops(world.copy(), rank, flags)
    for waited in wait_for_flags(world, rank, flags, world.ranks[rank].op):
        if not waited.ranks[rank].jump:
            check_routes(waited, rank)
        yield waited


def wait_for_part(
    world: World, rank: int, *, part: int, bounded: bool = True, ops_before: int = 0
) -> Iterator[World]:
    """Loads may be late from the last part on: those of another warp are not before the flag of a part."""
    flags, op = flags_of_part(world, rank, part), world.ranks[rank].op
    is_last = part == NUM_PARTS - 1
    yield from wait_for_flags(world, rank, flags, op - ops_before, bounded=bounded, begins_loads=is_last)


def read_without_waiting(world: World, rank: int) -> Iterator[World]:
    world.begin_loads(rank)
    yield world


def check_routes(world: World, rank: int) -> None:
    """Load what peers have published and counted; in check_loads `operand` stands for routes in scratch."""
    check_loads(world, rank)


def check_part(world: World, rank: int, *, part: int) -> None:
    """Load the currently visible rows of a part."""
    for peer in world.of_node(rank):
        if world.seen[rows_of(world, peer, part)] != 2 * world.ranks[rank].op:
            world.change(rank, wrong=True)


def read_part(world: World, rank: int, *, part: int) -> Iterator[World]:
    check_part(world, rank, part=part)
    yield world


def check_all(world: World, rank: int) -> None:
    check_routes(world, rank)
    for part in range(NUM_PARTS):
        check_part(world, rank, part=part)


def last_loads(world: World, rank: int) -> Iterator[World]:
    writers = writers_of_loads(world, rank)
    for peer in world.of_node(rank):
        writers |= {rows_of(world, peer, part): peer for part in range(NUM_PARTS)}
    yield from load_late(world, rank, writers, check_all)


def leave(world: World, rank: int) -> Iterator[World]:
    """XLA reuses the rows as well."""
    for part in range(NUM_PARTS):
        world.store(rank, rows_of(world, rank, part), 2 * world.ranks[rank].op + 1)
    [step] = [step for step in FINISH_STEPS if step.name == "Leave"]
    yield from step.run(world, rank)


PARTS = Protocol(
    [
        *PUBLISH_STEPS,
        Step("WaitForArrivals", wait_for_arrivals, LOAD),
        Step("Sum part 0", partial(sum_pairs, part=0), LOCAL),
        Step("SignalPart 0", partial(signal_part, part=0), LOCAL),
        Step("Sum part 1", partial(sum_pairs, part=1), LOCAL),
        Step("SignalPart 1", partial(signal_part, part=1), LOCAL),
        Step("WaitForPart 0", partial(wait_for_part, part=0), LOAD),
        Step("Read part 0", partial(read_part, part=0), LOCAL),
        Step("WaitForPart 1", partial(wait_for_part, part=1), LOAD),
        Step("Read part 1", partial(read_part, part=1), LOCAL),
        Step("Last loads", last_loads, LOAD),
        *FINISH_STEPS,
    ]
).replaced("Leave", leave)

# A warp that sums a part as late as it may.
LATE = PARTS.moved("Sum part 1", after="Read part 0").moved("SignalPart 1", after="Sum part 1")


# --- Warps.

Waits = Sequence[tuple[int, int]]  # the rank and part of each row that a warp reads, in order


def is_stuck(warps: Sequence[tuple[int, Waits]], num_parts: int, *, ahead: int = 0) -> bool:
    """Return whether warps, of a rank each, wait for each other.

    Args:
        warps: the rank and the reads of each.
        num_parts: of every rank; each of its warps has sums of all.
        ahead: how many parts beyond the one it waits for a warp has summed at least.
    """
    summed, read = [0] * len(warps), [0] * len(warps)

    def is_ready(rank: int, part: int) -> bool:
        return all(summed[i] > part for i, (of, _) in enumerate(warps) if of == rank)

    moved = True
    while moved:
        moved = False
        for i, (_, waits) in enumerate(warps):
            done = read[i] == len(waits)
            wanted = num_parts if done else min(waits[read[i]][1] + 1 + ahead, num_parts)
            if summed[i] < wanted:
                summed[i], moved = wanted, True
            elif not done and is_ready(*waits[read[i]]):
                read[i], moved = read[i] + 1, True
    return any(read[i] < len(waits) for i, (_, waits) in enumerate(warps))
