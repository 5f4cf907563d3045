"""What the protocols of all modes share: how a rank waits for its peers, aborts, and learns that one has.

The steps model lines of xla_ffi/cuda/group_op.cuh, and are named after its functions.

Two ops of a communicator may run at once on one rank: on its two channels, or by mistake on one. They share
only the state of the group: `failed` and `broken` of the rank's control block. So one op sees of the other
only that the rank fails at some moment and notifies its peers a little later. With `concurrent`, the search
lets that happen at any moment, on any rank (World.fail_concurrent).
"""

from collections.abc import Iterator

from protocol_search import LOAD, LOCAL, Step
from protocol_world import Violation, World

# --- Loads, with every value that they may return.


def look(world: World, rank: int) -> Iterator[tuple[World, bool]]:
    """IsBroken: whether this rank or a peer has aborted."""
    if world.ranks[rank].failed or world.reporters_seen(rank):
        yield world, True
        return
    for notified, _ in see_broken(world, rank):
        yield notified, True
    yield world, False


def see_broken(world: World, rank: int) -> Iterator[tuple[World, int]]:
    """Let the rank see a store to its `broken` that it has not seen yet."""
    for reporter in range(len(world.ranks)):
        for writer in world.writers(rank):
            for i in world.unseen(writer, world.at.broken(rank, reporter)):
                notified = world.copy()
                notified.see(writer, i)
                yield notified, reporter


def see_flag(world: World, flag: int, writer: int, op: int) -> bool:
    """Let all see that a flag has reached the op, if its writer has stored that."""
    if world.seen[flag] >= op:
        return True
    stored = [i for i in world.unseen(writer, flag) if world.queues[writer][i][1] >= op]
    if stored:
        world.see(writer, stored[0])
    return bool(stored)


def wait(world: World, rank: int, flags: dict[int, int], op: int) -> Iterator[tuple[World, str]]:
    """WaitForAll, of the flags that peers write for the rank. Its own needs no wait."""
    if any(world.seen[flag] < op for flag in flags.values()):
        for looked, stopped in look(world.copy(), rank):
            yield looked, "stopped" if stopped else "late"
    if all(see_flag(world, flag, peer, op) for peer, flag in flags.items()):
        yield world, "all"


def find_different_op(world: World, rank: int, flags: dict[int, int], op: int, back: str) -> Iterator[World]:
    """Each peer that has arrived may have arrived at another op; then the wait ends."""
    for peer, flag in flags.items():
        different = world.copy()
        if see_flag(different, flag, peer, op):
            different.fail(rank, back=back)
            yield different


def fence(world: World, rank: int) -> Iterator[World]:
    world.fence(rank)
    yield world


# --- The steps of Fail.


def claim(world: World, rank: int, *, waits: bool = True) -> Iterator[World]:
    me = world.ranks[rank]
    if me.failed:
        if waits:
            world.wait_until_notified(rank)
        world.change(rank, jump=me.back, back="")
    elif any(other.succeeded > me.op for other in world.ranks):
        raise Violation("stays broken")
    else:
        world.change(rank, failed=me.op)
    yield world


def load_broken(world: World, rank: int) -> Iterator[World]:
    found = [(world.copy(), reporter) for reporter in world.reporters_seen(rank) or [rank]]
    for notified, reporter in [*found, *see_broken(world, rank)]:
        if reporter != rank and not notified.seen[notified.at.report(rank, reporter)]:
            raise Violation("report")
        notified.change(rank, reporter=reporter)
        yield notified


def report_to_host(world: World, rank: int) -> Iterator[World]:
    world.store(rank, world.at.host_report(rank), 1)
    yield world


def notify_host(world: World, rank: int) -> Iterator[World]:
    """The host may read at any moment: assume that the flag is seen at once."""
    world.store(rank, world.at.host_flag(rank), 1)
    now = world.copy()
    now.see(rank, len(now.queues[rank]) - 1)
    if not now.seen[now.at.host_report(rank)]:
        raise Violation("report")
    world.forget(rank, world.at.host_report(rank), world.at.host_flag(rank))
    yield world


def notify_peers(world: World, rank: int, *, release: bool = True) -> Iterator[World]:
    """A rank that was notified forwards the report: the reporter may have notified no other rank yet."""
    reporter = world.ranks[rank].reporter
    for peer in world.peers(rank):
        if peer != reporter:
            world.store(rank, world.at.report(peer, reporter), 1)
        world.store(rank, world.at.broken(peer, reporter), 1, release=release)
    yield world


def return_from_fail(world: World, rank: int) -> Iterator[World]:
    world.change(rank, jump=world.ranks[rank].back, back="", reporter=0)
    yield world


FAIL_STEPS = [
    Step("Fail", claim, LOCAL),
    Step("Fail: LoadAcquireSystem(broken)", load_broken, LOAD),
    Step("Fail: CopyReport(status)", report_to_host, LOCAL),
    Step("Fail: __threadfence_system", fence, LOCAL),
    Step("Fail: status.failed", notify_host, LOCAL),
    Step("Fail: StoreReleaseSystem(broken)", notify_peers, LOCAL),
    Step("Fail: FenceSystem", fence, LOCAL),
    Step("Fail: return", return_from_fail, LOCAL),
]
