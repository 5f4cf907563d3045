"""The flag protocol of xla_ffi/cuda/group_op.cuh, as its specification, searched exhaustively.

A rank is a list of steps (PROTOCOL); each models one or a few lines of group_op.cuh, and is named after them.
The memory model is in protocol_world.py, and the search in protocol_search.py.

The promises:

* "data": an op that succeeds has read the operands of this op, of every peer.
* "addresses": the offsets and counts that a rank takes from its control block are those of its current
  op, whether or not the op succeeds: addresses are computed from them, even those of its own writes. A rank
  writes only to fixed words of a peer's control block: `Words` has no others.
* "progress": no rank waits forever. A step leads to a later one, so that an op has a bounded number of them,
  and a rank that has not ended can always take one, whatever the others do. A rank that is killed or late is
  one that the search does not choose.
* "stays broken": no op succeeds on a rank that has failed, or after an op that failed on any rank.
* "report": the report that a host reads after its flag is complete, including a forwarded one.

Time: a wait may time out while a flag is missing. XLA reuses a rank's operand as soon as it has left.

Nodes: a rank reads the others of its own node. There is one node here; protocol_internode.py adds what is
between several.

Blocks: a rank has one, which models the last one to arrive at each counter: IsLastBlock orders everything
that the others did, aborts included, before what that one does.
"""

from collections.abc import Callable, Iterator

from protocol_failure import FAIL_STEPS, fence, find_different_op, look, wait
from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_world import LOADS, Violation, World

FINISH = "Finish: IsLastBlock"


def flags_of_peers(world: World, rank: int, flag: Callable[[int, int], int]) -> dict[int, int]:
    return {peer: flag(rank, peer) for peer in world.of_node(rank)}


def go_on_unless_stopped(world: World, rank: int, end: str) -> Iterator[World]:
    """Go to the step `end` if this rank or a peer has aborted."""
    for looked, stopped in look(world, rank):
        if stopped:
            looked.change(rank, lost=True)
            looked.go_to(rank, end)
        yield looked


def wait_for_flags(
    world: World,
    rank: int,
    flags: dict[int, int],
    op: int,
    *,
    bounded: bool = True,
    begins_loads: bool = False,
) -> Iterator[World]:
    """Wait until peers have stored that they have come to the op, and load what they wrote before."""
    for waited, answer in wait(world, rank, flags, op):
        if answer == "all":
            if begins_loads:
                waited.begin_loads(rank)
        elif answer == "stopped":
            waited.change(rank, lost=True)
            waited.go_to(rank, FINISH)
        elif bounded:
            waited.fail(rank, back=FINISH)
        else:
            continue
        yield waited


def compare_ops(world: World, rank: int, flags: dict[int, int]) -> Iterator[World]:
    """Compare the published signature of each peer that has arrived."""
    op = world.ranks[rank].op
    for different in find_different_op(world, rank, flags, op, back=FINISH):
        for peer, flag in flags.items():
            if different.seen[flag] >= op != different.seen[different.at.published(rank, peer)]:
                raise Violation("addresses")
        yield different


def load_late(
    world: World, rank: int, writers: dict[int, int], check: Callable[[World, int], None]
) -> Iterator[World]:
    """Any word may have been overwritten by its writer since; one wrong word is enough."""
    if LOADS not in world.queues[rank]:
        yield world  # the op has failed already
        return
    world.end_loads(rank)
    for word, writer in writers.items():
        for i in world.unseen(writer, word):
            later = world.copy()
            later.see(writer, i)
            check(later, rank)
            yield later
    check(world, rank)
    yield world


def writers_of_loads(world: World, rank: int) -> dict[int, int]:
    """The words that a rank loads, with who writes them."""
    at = world.at
    return {
        word: peer
        for peer in world.of_node(rank)
        for word in (at.published(rank, peer), at.counts(rank, peer), at.operand(peer))
    }


def check_loads(world: World, rank: int) -> None:
    """Load the currently visible words of all peers."""
    op, at = world.ranks[rank].op, world.at
    for peer in world.of_node(rank):
        if world.seen[at.published(rank, peer)] != op or world.seen[at.counts(rank, peer)] != op:
            raise Violation("addresses")
        if world.seen[at.operand(peer)] != 2 * op:
            world.change(rank, wrong=True)


# --- The steps of an op.


def begin(world: World, rank: int, *, looks: bool = True) -> Iterator[World]:
    """Not if the communicator was broken before this op: a peer may still be in the failed op."""
    world.change(rank, op=world.ranks[rank].op + 1)
    for back in (
        FINISH,  # the program runs the device as another rank
        "Leave",  # the op cannot be launched: a kernel in its place notifies the peers
    ):
        mistaken = world.copy()
        mistaken.fail(rank, back=back)
        yield mistaken
    yield from go_on_unless_stopped(world, rank, FINISH) if looks else [world]


def write_operands(world: World, rank: int) -> Iterator[World]:
    world.store(rank, world.at.operand(rank), 2 * world.ranks[rank].op)
    yield world


def sync_grid(world: World, rank: int) -> Iterator[World]:
    """Blocks that find no SM in time fail the op."""
    late = world.copy()
    late.fail(rank, back=FINISH)
    yield late
    yield world


def push_counts(world: World, rank: int) -> Iterator[World]:
    for peer in world.of_node(rank):
        world.store(rank, world.at.counts(peer, rank), world.ranks[rank].op)
    yield world


def signal_arrival(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    op = world.ranks[rank].op
    for peer in world.of_node(rank):
        world.store(rank, world.at.published(peer, rank), op)
        world.store(rank, world.at.arrived(peer, rank), op, release=release)
    yield world


def wait_for_arrivals(world: World, rank: int, *, begins_loads: bool = True) -> Iterator[World]:
    flags = flags_of_peers(world, rank, world.at.arrived)
    yield from compare_ops(world.copy(), rank, flags)
    yield from wait_for_flags(world, rank, flags, world.ranks[rank].op, begins_loads=begins_loads)


def first_loads(world: World, rank: int) -> Iterator[World]:
    check_loads(world, rank)
    yield world


def last_loads(world: World, rank: int) -> Iterator[World]:
    yield from load_late(world, rank, writers_of_loads(world, rank), check_loads)


def finish_unless_stopped(world: World, rank: int) -> Iterator[World]:
    yield from go_on_unless_stopped(world, rank, "Finish: FenceSystem")


def signal_leaving(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    for peer in world.of_node(rank):
        world.store(rank, world.at.left(peer, rank), world.ranks[rank].op, release=release)
    yield world


def wait_for_leaving(world: World, rank: int) -> Iterator[World]:
    for waited, answer in wait(world, rank, flags_of_peers(world, rank, world.at.left), world.ranks[rank].op):
        if answer == "stopped":
            waited.change(rank, lost=True)
        elif answer == "late":
            waited.fail(rank, back="Finish: FenceSystem")
        yield waited


def look_again(world: World, rank: int) -> Iterator[World]:
    for looked, stopped in look(world, rank):
        looked.change(rank, lost=stopped)
        yield looked


def succeed_or_fail(world: World, rank: int) -> Iterator[World]:
    me = world.ranks[rank]
    if me.lost:
        world.fail(rank, back="Leave")
    elif me.wrong:
        raise Violation("data")
    elif any(0 < other.failed < me.op for other in world.ranks):
        raise Violation("stays broken")
    else:
        world.change(rank, succeeded=me.op)
    yield world


def leave(world: World, rank: int) -> Iterator[World]:
    """XLA reuses the operand. The end of a kernel is not assumed to be a fence towards peers."""
    op = world.ranks[rank].op
    world.store(rank, world.at.operand(rank), 2 * op + 1)
    world.change(rank, lost=False, wrong=False)
    world.go_to(rank, "Begin" if op < world.num_ops else "End")
    yield world


# Up to the flag of the own arrival, and from the end of the loads on.
PUBLISH_STEPS = [
    Step("Begin", begin, LOOK),
    Step("Write operands", write_operands, LOCAL),
    Step("SyncGrid", sync_grid, LOCAL),
    Step("Push counts", push_counts, LOCAL),
    Step("Publish: IsLastBlock", fence, LOCAL),
    Step("Publish: StoreReleaseSystem(arrived)", signal_arrival, LOCAL),
]
FINISH_STEPS = [
    Step(FINISH, fence, LOCAL),
    Step("Finish: Stopped", finish_unless_stopped, LOOK),
    Step("Finish: StoreReleaseSystem(left)", signal_leaving, LOCAL),
    Step("Finish: WaitForAll(left)", wait_for_leaving, LOAD),
    Step("Finish: FenceSystem", fence, LOCAL),
    Step("Finish: Stopped again", look_again, LOOK),
    Step("Finish: succeed or fail", succeed_or_fail, LOCAL),
    Step("Leave", leave, LOCAL),
    *FAIL_STEPS,
]
PROTOCOL = Protocol(
    [
        *PUBLISH_STEPS,
        Step("WaitForArrivals", wait_for_arrivals, LOAD),
        Step("First loads", first_loads, LOCAL),  # of what is visible already: others do not matter
        Step("Last loads", last_loads, LOAD),
        *FINISH_STEPS,
    ]
)
