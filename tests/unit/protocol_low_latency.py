"""The protocol of ops in low-latency mode: one one-way message per op and peer, no final barrier.

A rank pushes its rows into slots of its peers' windows, then a header {step, signature, counts} to every
peer, whether it has rows for it or not, and waits for every peer's. Windows are memory of the communicator
in two banks, which the ops of a channel use alternately; headers are in banks as well.

Dispatch sends its header first, in packets that arrive whole and in any order, so that the receiver plans
while rows travel; a signal then follows the rows, to the ranks that get some (`header_first`).

Why that is enough: a rank that begins op n has received a header of all peers in op n - 1. Each of them sent
it after it had ended op n - 2, and with it all its loads from the bank that op n writes. And a peer
that fails sends no header from then on, so that no later op succeeds on any rank.

The promises are those of protocol_throughput.py, with a stronger one: *whether or not* the op succeeds, all
that a rank loads from slots is of its current op. No peer overwrites them early, so a rank need not check for
failed peers after its last load. A late rank writes only to windows and control blocks: `Words` has no other
words that peers write.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from protocol_failure import FAIL_STEPS, fence, find_different_op, look, see_flag, wait
from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_world import Violation, World

FINISH = "Finish: succeed or fail"


@dataclass(frozen=True)
class LowLatency:
    """The steps of an op. Arguments other than the defaults make a protocol that breaks its promises.

    Attributes:
        num_banks: of a channel's windows.
        num_in_flight: ops of a channel that a rank has begun and not ended. With 2, it loads what it received
            for an op only after it has sent the next one's headers.
        sends_to_all: an op sends its header to all peers and waits for all of theirs; otherwise only to
            ranks that get rows, which here is in every other op.
        header_first: as dispatch, see above. Ranks get rows in every other op.
        releases: what follows the rows is a release store.
        waits_for_rows: a rank waits for the signals.
        announces_at_once: the step and the signature of an op are stored at once; otherwise the signature
            first, in `published`, and then the step, in `arrived`, by a release store.
        looks: an op begins with a check whether the communicator is broken.
        bounded: a wait ends after timeout_s.
    """

    num_banks: int = 2
    num_in_flight: int = 1
    sends_to_all: bool = True
    header_first: bool = False
    releases: bool = True
    waits_for_rows: bool = True
    announces_at_once: bool = True
    looks: bool = True
    bounded: bool = True

    def begin(self, world: World, rank: int) -> Iterator[World]:
        """If the communicator was broken before, nothing is sent: no peer's op may succeed with it."""
        world.change(rank, op=world.ranks[rank].op + 1)
        mistaken = world.copy()  # the program runs the device as another rank, or the op cannot be launched
        mistaken.fail(rank, back=FINISH)
        yield mistaken
        for looked, stopped in look(world, rank) if self.looks else [(world, False)]:
            if stopped:
                looked.change(rank, lost=True)
                looked.go_to(rank, FINISH)
            yield looked

    def push_rows(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        for peer in self._row_peers(world, rank, op):
            world.store(rank, world.at.slots(op % self.num_banks, peer, rank), op)
        yield world

    def send_signals(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        for peer in self._row_peers(world, rank, op):
            world.store(rank, world.at.signal(op % self.num_banks, peer, rank), op, release=self.releases)
        yield world

    def send_headers(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        for peer in self._peers(world, rank, op):
            release = self.releases and not self.header_first
            world.store(rank, world.at.header(op % self.num_banks, peer, rank), op, release=release)
        yield world

    def announce(self, world: World, rank: int) -> Iterator[World]:
        """By one warp: nothing orders its stores with those of others."""
        op, warp = world.ranks[rank].op, len(world.ranks) + rank
        for peer in world.peers(rank):
            world.store(warp, world.at.published(peer, rank), op)
            world.store(warp, world.at.arrived(peer, rank), op, release=True)
        yield world

    def _check_announcements(self, world: World, rank: int, op: int, headers: dict[int, int]) -> None:
        """IsInOtherOp: here all ranks run the same ops, so that no peer may look as if it were in another.

        With two words, its writer may have gone on between the loads, and what it stores in the next op may
        be seen before its header of this one, so that another look at the header does not help.
        """
        if self.announces_at_once:
            return  # a signature of this step is that of this op
        for peer, header in headers.items():
            warp = len(world.ranks) + peer
            later, published = world.copy(), world.at.published(rank, peer)
            has_arrived = see_flag(later, later.at.arrived(rank, peer), warp, op)
            if unseen := later.unseen(warp, published):
                later.see(warp, unseen[-1])
            if has_arrived and later.seen[published] > op and later.seen[header] < op:
                raise Violation("no false alarm")

    def wait_for_headers(self, world: World, rank: int) -> Iterator[World]:
        op = self._op_to_end(world, rank)
        bank = op % self.num_banks
        headers = {peer: world.at.header(bank, rank, peer) for peer in self._peers(world, rank, op)}
        self._check_announcements(world, rank, op, headers)
        yield from find_different_op(world, rank, headers, op, back=FINISH)
        yield from self._wait(world, rank, headers, op, loads=not self.header_first)

    def wait_for_signals(self, world: World, rank: int) -> Iterator[World]:
        op = self._op_to_end(world, rank)
        peers = self._row_peers(world, rank, op) if self.waits_for_rows else []
        signals = {peer: world.at.signal(op % self.num_banks, rank, peer) for peer in peers}
        yield from self._wait(world, rank, signals, op, loads=True)

    def _wait(
        self, world: World, rank: int, flags: dict[int, int], op: int, *, loads: bool
    ) -> Iterator[World]:
        for waited, answer in wait(world, rank, flags, op):
            if answer == "all":
                if loads:
                    waited.begin_loads(rank)
            elif answer == "stopped":
                waited.change(rank, lost=True)
                waited.go_to(rank, FINISH)
            elif self.bounded:
                waited.fail(rank, back=FINISH)
            else:
                continue
            yield waited

    def first_loads(self, world: World, rank: int) -> Iterator[World]:
        self._check_loads(world, rank)
        yield world

    def last_loads(self, world: World, rank: int) -> Iterator[World]:
        """Any word may have been overwritten by its writer since; one wrong word is enough."""
        op = self._op_to_end(world, rank)
        world.end_loads(rank)
        for peer in self._row_peers(world, rank, op):
            for i in world.unseen(peer, world.at.slots(op % self.num_banks, rank, peer)):
                later = world.copy()
                later.see(peer, i)
                self._check_loads(later, rank)
                yield later
        yield world

    def succeed_or_fail(self, world: World, rank: int) -> Iterator[World]:
        me = world.ranks[rank]
        if me.lost:
            world.fail(rank, back="Leave")
        elif not me.failed:
            op = self._op_to_end(world, rank)
            if any(0 < other.failed < op for other in world.ranks):
                raise Violation("stays broken")
            world.change(rank, succeeded=op)
        yield world

    def leave(self, world: World, rank: int) -> Iterator[World]:
        world.change(rank, lost=False)
        world.go_to(rank, "Begin" if world.ranks[rank].op < world.num_ops else "End")
        yield world

    def _op_to_end(self, world: World, rank: int) -> int:
        """The op whose headers the rank waits for after it has sent those of its current one; 0 for none."""
        return world.ranks[rank].op - (self.num_in_flight - 1)

    def _peers(self, world: World, rank: int, op: int) -> list[int]:
        """The ranks that exchange headers with the rank in an op. Here, no rank has rows in even ops."""
        return world.peers(rank) if op > 0 and (self.sends_to_all or op % 2) else []

    def _row_peers(self, world: World, rank: int, op: int) -> list[int]:
        """The ranks that exchange rows with the rank in an op."""
        return self._peers(world, rank, op) if op % 2 or not self.header_first else []

    def _check_loads(self, world: World, rank: int) -> None:
        op = self._op_to_end(world, rank)
        for peer in self._row_peers(world, rank, op):
            if world.seen[world.at.slots(op % self.num_banks, rank, peer)] != op:
                raise Violation("data")

    def _pushes(self) -> list[Step]:
        # Stored at once, it changes nothing that a rank decides, so that the search goes without it.
        announcement = [] if self.announces_at_once else [Step("Announce", self.announce, LOCAL)]
        rows = [Step("Push rows", self.push_rows, LOCAL), Step("Push: IsLastBlock", fence, LOCAL)]
        if self.header_first:
            return [
                Step("Push: StorePacket(header)", self.send_headers, LOCAL),
                *rows,
                Step("Push: StoreReleaseSystem(signal)", self.send_signals, LOCAL),
                *announcement,
                Step("WaitForHeaders", self.wait_for_headers, LOAD),
                Step("WaitForSignals", self.wait_for_signals, LOAD),
            ]
        return [
            *rows,
            Step("Push: StoreReleaseSystem(header)", self.send_headers, LOCAL),
            *announcement,
            Step("WaitForHeaders", self.wait_for_headers, LOAD),
        ]

    def protocol(self) -> Protocol:
        return Protocol(
            [
                Step("Begin", self.begin, LOOK),
                *self._pushes(),
                Step("First loads", self.first_loads, LOCAL),
                Step("Last loads", self.last_loads, LOAD),
                Step(FINISH, self.succeed_or_fail, LOCAL),
                Step("Leave", self.leave, LOCAL),
                *FAIL_STEPS,
            ]
        )
