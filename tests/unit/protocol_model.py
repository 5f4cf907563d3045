"""The flag protocol of xla_ffi/cuda/group_op.cuh, to be read as its specification and searched exhaustively.

A rank is a list of steps (PROTOCOL); each stands for a line or a few of group_op.cuh, and is named after it.
What memory allows is in protocol_world.py, and the search in protocol_search.py.

The promises:

* "data": an op that succeeds has read the operands of that very op, of every peer.
* "addresses": the offsets and counts that a rank takes from its control block are those of the op that it
  is in, whatever becomes of the op: they lead to addresses, its own writes included. What a rank writes to
  a peer goes to fixed words of the peer's control block: `Words` has no others.
* "progress": no rank waits for good. A step leads to a later one, so that an op has a bounded number of
  them, and a rank that has not ended can always take one, whatever the others do. A rank that is killed
  or late is one that the search does not choose.
* "broken for good": no op succeeds on a rank that has failed, or after an op that failed on any rank.
* "report": what a host reads after its flag is complete, and so is the peer's report in it.

Time: a wait may time out as long as a flag is missing. XLA reuses a rank's operand as soon as it has left.

Blocks: a rank has one, which stands for the last one to come to each ticket: IsLastBlock orders all that the
others did, giving up included, before what that one does.
"""

from collections.abc import Callable, Iterator

from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_world import LOADS, Violation, World

# --- Loads, with all that they may find.


def look(world: World, rank: int) -> Iterator[tuple[World, bool]]:
    """IsBroken: whether this rank or a peer has given up."""
    if world.ranks[rank].failed or world.reporters_seen(rank):
        yield world, True
        return
    for told, _ in word_of_a_peer(world, rank):
        yield told, True
    yield world, False


def word_of_a_peer(world: World, rank: int) -> Iterator[tuple[World, int]]:
    """Let the rank see a store to its `broken` that it has not seen yet."""
    for reporter in range(len(world.ranks)):
        for writer in world.writers(rank):
            for i in world.unseen(writer, world.at.broken(rank, reporter)):
                told = world.copy()
                told.see(writer, i)
                yield told, reporter


def missing_peers(world: World, rank: int, flag: Callable[[int, int], int]) -> list[int]:
    op = world.ranks[rank].op
    return [peer for peer in world.peers(rank) if world.seen[flag(rank, peer)] < op]


def wait(world: World, rank: int, flag: Callable[[int, int], int]) -> Iterator[tuple[World, str]]:
    """WaitForAll. A rank's own flag needs no wait."""
    op = world.ranks[rank].op
    missing = missing_peers(world, rank, flag)
    if missing:
        for looked, stopped in look(world.copy(), rank):
            yield looked, "stopped" if stopped else "late"
    for peer in missing:
        stored = [i for i in world.unseen(peer, flag(rank, peer)) if world.queues[peer][i][1] >= op]
        if not stored:
            return
        world.see(peer, stored[0])
    yield world, "all"


def check_loads(world: World, rank: int) -> None:
    """Load the words of all peers as they are seen now."""
    op, at = world.ranks[rank].op, world.at
    for peer in world.peers(rank):
        if world.seen[at.published(rank, peer)] != op or world.seen[at.counts(rank, peer)] != op:
            raise Violation("addresses")
        if world.seen[at.operand(peer)] != 2 * op:
            world.change(rank, wrong=True)


# --- The steps of an op.


def fence(world: World, rank: int) -> Iterator[World]:
    world.fence(rank)
    yield world


def begin(world: World, rank: int, *, looks: bool = True) -> Iterator[World]:
    """Not where the group was lost before this op: a peer may still be in the lost one."""
    world.change(rank, op=world.ranks[rank].op + 1)
    for back in (
        "Finish: IsLastBlock",  # the program takes the device for another rank
        "Leave",  # the op cannot be launched: a kernel in its place tells the peers
    ):
        mistaken = world.copy()
        mistaken.fail(rank, back=back)
        yield mistaken
    for looked, stopped in look(world, rank) if looks else [(world, False)]:
        if stopped:
            looked.change(rank, lost=True)
            looked.go_to(rank, "Finish: IsLastBlock")
        yield looked


def write_operands(world: World, rank: int) -> Iterator[World]:
    world.store(rank, world.at.operand(rank), 2 * world.ranks[rank].op)
    yield world


def sync_grid(world: World, rank: int) -> Iterator[World]:
    """Blocks that find no SM in time fail the op."""
    late = world.copy()
    late.fail(rank, back="Finish: IsLastBlock")
    yield late
    yield world


def push_counts(world: World, rank: int) -> Iterator[World]:
    for peer in world.peers(rank):
        world.store(rank, world.at.counts(peer, rank), world.ranks[rank].op)
    yield world


def tell_arrival(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    op = world.ranks[rank].op
    for peer in world.peers(rank):
        world.store(rank, world.at.published(peer, rank), op)
        world.store(rank, world.at.arrived(peer, rank), op, release=release)
    yield world


def wait_for_arrivals(world: World, rank: int) -> Iterator[World]:
    yield from compare_ops(world.copy(), rank)
    for waited, answer in wait(world, rank, world.at.arrived):
        if answer == "all":
            waited.begin_loads(rank)
        elif answer == "stopped":
            waited.change(rank, lost=True)
            waited.go_to(rank, "Finish: IsLastBlock")
        else:
            waited.fail(rank, back="Finish: IsLastBlock")
        yield waited


def compare_ops(world: World, rank: int) -> Iterator[World]:
    """Each peer that has arrived may turn out to have come to another op; nobody else is waited for then."""
    op, at = world.ranks[rank].op, world.at
    missing = missing_peers(world, rank, at.arrived)
    for peer in world.peers(rank):
        different = world.copy()
        if peer in missing:
            stored = [i for i in world.unseen(peer, at.arrived(rank, peer)) if world.queues[peer][i][1] >= op]
            if not stored:
                continue
            different.see(peer, stored[0])
        if different.seen[at.published(rank, peer)] != op:
            raise Violation("addresses")
        different.fail(rank, back="Finish: IsLastBlock")
        yield different


def first_loads(world: World, rank: int) -> Iterator[World]:
    check_loads(world, rank)
    yield world


def last_loads(world: World, rank: int) -> Iterator[World]:
    """Any word may have become what its writer has stored since; one that is wrong is enough."""
    if LOADS not in world.queues[rank]:
        yield world  # the op has failed already
        return
    at = world.at
    world.end_loads(rank)
    for peer in world.peers(rank):
        for word in (at.published(rank, peer), at.counts(rank, peer), at.operand(peer)):
            for i in world.unseen(peer, word):
                later = world.copy()
                later.see(peer, i)
                check_loads(later, rank)
                yield later
    check_loads(world, rank)
    yield world


def finish_unless_stopped(world: World, rank: int) -> Iterator[World]:
    for looked, stopped in look(world, rank):
        if stopped:
            looked.change(rank, lost=True)
            looked.go_to(rank, "Finish: FenceSystem")
        yield looked


def tell_leaving(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    for peer in world.peers(rank):
        world.store(rank, world.at.left(peer, rank), world.ranks[rank].op, release=release)
    yield world


def wait_for_leaving(world: World, rank: int) -> Iterator[World]:
    for waited, answer in wait(world, rank, world.at.left):
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
        raise Violation("broken for good")
    else:
        world.change(rank, succeeded=me.op)
    yield world


def leave(world: World, rank: int) -> Iterator[World]:
    """XLA reuses the operand. The end of a kernel is not taken for a fence towards peers."""
    op = world.ranks[rank].op
    world.store(rank, world.at.operand(rank), 2 * op + 1)
    world.change(rank, lost=False, wrong=False)
    world.go_to(rank, "Begin" if op < world.num_ops else "End")
    yield world


# --- The steps of Fail.


def claim(world: World, rank: int, *, waits: bool = True) -> Iterator[World]:
    me = world.ranks[rank]
    if me.failed:
        if waits:
            world.wait_until_told(rank)
        world.change(rank, jump=me.back, back="")
    elif any(other.succeeded > me.op for other in world.ranks):
        raise Violation("broken for good")
    else:
        world.change(rank, failed=me.op)
    yield world


def load_broken(world: World, rank: int) -> Iterator[World]:
    found = [(world.copy(), reporter) for reporter in world.reporters_seen(rank) or [rank]]
    for told, reporter in [*found, *word_of_a_peer(world, rank)]:
        if reporter != rank and not told.seen[told.at.report(rank, reporter)]:
            raise Violation("report")
        told.change(rank, reporter=reporter)
        yield told


def report_to_host(world: World, rank: int) -> Iterator[World]:
    world.store(rank, world.at.host_report(rank), 1)
    yield world


def tell_host(world: World, rank: int) -> Iterator[World]:
    """The host may look at any moment: what if the flag is seen at once?"""
    world.store(rank, world.at.host_flag(rank), 1)
    now = world.copy()
    now.see(rank, len(now.queues[rank]) - 1)
    if not now.seen[now.at.host_report(rank)]:
        raise Violation("report")
    world.forget(rank, world.at.host_report(rank), world.at.host_flag(rank))
    yield world


def tell_peers(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    """Who was told passes the report on: the first to tell may have come no further than to this rank."""
    reporter = world.ranks[rank].reporter
    for peer in world.peers(rank):
        if peer != reporter:
            world.store(rank, world.at.report(peer, reporter), 1)
        world.store(rank, world.at.broken(peer, reporter), 1, release=release)
    yield world


def return_from_fail(world: World, rank: int) -> Iterator[World]:
    world.change(rank, jump=world.ranks[rank].back, back="", reporter=0)
    yield world


PROTOCOL = Protocol(
    [
        Step("Begin", begin, LOOK),
        Step("Write operands", write_operands, LOCAL),
        Step("SyncGrid", sync_grid, LOCAL),
        Step("Push counts", push_counts, LOCAL),
        Step("Publish: IsLastBlock", fence, LOCAL),
        Step("Publish: StoreReleaseSystem(arrived)", tell_arrival, LOCAL),
        Step("WaitForArrivals", wait_for_arrivals, LOAD),
        Step("First loads", first_loads, LOCAL),  # of what is seen already: no others matter
        Step("Last loads", last_loads, LOAD),
        Step("Finish: IsLastBlock", fence, LOCAL),
        Step("Finish: Stopped", finish_unless_stopped, LOOK),
        Step("Finish: StoreReleaseSystem(left)", tell_leaving, LOCAL),
        Step("Finish: WaitForAll(left)", wait_for_leaving, LOAD),
        Step("Finish: FenceSystem", fence, LOCAL),
        Step("Finish: Stopped again", look_again, LOOK),
        Step("Finish: succeed or fail", succeed_or_fail, LOCAL),
        Step("Leave", leave, LOCAL),
        Step("Fail", claim, LOCAL),
        Step("Fail: LoadAcquireSystem(broken)", load_broken, LOAD),
        Step("Fail: CopyReport(status)", report_to_host, LOCAL),
        Step("Fail: __threadfence_system", fence, LOCAL),
        Step("Fail: status.failed", tell_host, LOCAL),
        Step("Fail: StoreReleaseSystem(broken)", tell_peers, LOCAL),
        Step("Fail: FenceSystem", fence, LOCAL),
        Step("Fail: return", return_from_fail, LOCAL),
    ]
)
