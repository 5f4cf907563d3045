"""The protocol of ops between nodes, as its specification: xla_ffi/cuda/internode/node_op.cuh.

Rank r has the index r % L in its node. Inside a node ranks read each other as in protocol_throughput.py.
Between nodes, a rank puts data only to those with its index, into their control blocks and staging (memory
of their communicators), and then a flag. So what another node sent to the rank with index j is read in the
staging of the own node's rank j, which says so by a flag (`staged`), and passes on the counts.

With `returns`, as combine: a rank also puts sums of what it has read in its node, and a second flag.

Why staging needs no banks: a rank puts data of op n after `left` of op n - 1 of the rank that has staging.
That one stores it at the end of a successful op, when all readers of its staging have left.

All blocks of a rank stage rows, and the last one tells the peers. Over mapped memory rows are staged where
they go. Over a network, they are staged in memory of the rank's communicator, from which the last block puts
them, before the flag. Such puts are *asynchronous*: what they send is read after they return, up to when the
peer has it. So a rank waits for `left` of the op before ahead of its first write there.

The promises are those of protocol_throughput.py, and for staging the stronger one: *whether or not* the op
succeeds, all that is loaded from it is of the current op. A rank that returns sums checks for failed peers
first: otherwise an op of the other node could succeed with sums of memory that XLA has reused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from protocol_failure import fence
from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_throughput import (
    FINISH,
    FINISH_STEPS,
    PUBLISH_STEPS,
    check_loads,
    compare_ops,
    flags_of_peers,
    go_on_unless_stopped,
    leave,
    load_late,
    push_counts,
    signal_arrival,
    signal_leaving,
    succeed_or_fail,
    wait_for_arrivals,
    wait_for_flags,
    writers_of_loads,
)
from protocol_world import Violation, World


def flags_of_other_nodes(world: World, rank: int, flag: Callable[[int, int], int]) -> dict[int, int]:
    return {peer: flag(rank, peer) for peer in world.of_other_nodes(rank)}


# What a rank puts to other nodes: indices of World.at.source.
ROWS, COUNTS, PUBLISHED, SUMS = range(4)


@dataclass(frozen=True)
class Internode:
    """The steps of an op. Arguments other than the defaults make a protocol that breaks its promises.

    Attributes:
        returns: as combine, see above.
        waits_for_staging: data is put after `left` of the op before.
        releases: flags between nodes are release stores.
        passes_on_counts: the counts that another node has put are written to the ranks of the own node.
        checks_sums: a rank that returns sums checks for failed peers first.
        bounded: a wait for another node ends after timeout_s.
        leaves_early: `left` is put to other nodes before the ranks of the own node have left.
        asynchronous: puts are, see above.
        waits_first: `left` of the op before is awaited first, where puts are asynchronous.
        copies: what XLA will reuse is staged, where puts are asynchronous.
    """

    returns: bool = False
    waits_for_staging: bool = True
    releases: bool = True
    passes_on_counts: bool = True
    checks_sums: bool = True
    bounded: bool = True
    leaves_early: bool = False
    asynchronous: bool = False
    waits_first: bool = True
    copies: bool = True

    # --- Inside the node, as in protocol_throughput.py.

    def push_counts(self, world: World, rank: int) -> Iterator[World]:
        world.seen[world.at.source(rank, COUNTS)] = world.ranks[rank].op
        yield from push_counts(world, rank)

    def signal_arrival(self, world: World, rank: int) -> Iterator[World]:
        world.seen[world.at.source(rank, PUBLISHED)] = world.ranks[rank].op
        yield from signal_arrival(world, rank)

    # --- Between nodes.

    def wait_until_free(self, world: World, rank: int) -> Iterator[World]:
        if not self.waits_for_staging:
            yield world
            return
        flags = flags_of_other_nodes(world, rank, world.at.left)
        yield from wait_for_flags(world, rank, flags, world.ranks[rank].op - 1)

    def stage(self, world: World, rank: int) -> Iterator[World]:
        self._stage(world, rank, world.at.staging, world.at.source(rank, ROWS), world.ranks[rank].op)
        yield world

    def put_flags(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        self._put_staged(world, rank, world.at.staging, world.at.source(rank, ROWS))
        for peer in world.of_other_nodes(rank):
            self._put(world, rank, world.at.counts(peer, rank), COUNTS)
            self._put(world, rank, world.at.published(peer, rank), PUBLISHED)
            world.store(rank, world.at.arrived(peer, rank), op, release=self.releases)
        yield world

    def wait_for_other_nodes(self, world: World, rank: int) -> Iterator[World]:
        flags = flags_of_other_nodes(world, rank, world.at.arrived)
        yield from compare_ops(world.copy(), rank, flags)
        yield from wait_for_flags(world, rank, flags, world.ranks[rank].op, bounded=self.bounded)

    def pass_on(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        for source in world.of_other_nodes(rank):
            if world.seen[world.at.counts(rank, source)] != op:
                raise Violation("addresses")
        for peer in world.of_node(rank):
            for source in world.of_other_nodes(rank) if self.passes_on_counts else []:
                world.store(rank, world.at.counts(peer, source), op)
            world.store(rank, world.at.staged(peer, rank), op, release=True)
        yield world

    def wait_until_staged(self, world: World, rank: int) -> Iterator[World]:
        flags = flags_of_peers(world, rank, world.at.staged)
        yield from wait_for_flags(world, rank, flags, world.ranks[rank].op, begins_loads=True)

    # --- What a rank loads, once early and once late.

    def first_loads(self, world: World, rank: int) -> Iterator[World]:
        self._check_loads(world, rank)
        yield world

    def last_loads(self, world: World, rank: int) -> Iterator[World]:
        at = world.at
        writers = writers_of_loads(world, rank)
        for source, proxy in self._sources(world, rank):
            writers[at.staging(proxy, source)] = source
            writers[at.counts(rank, source)] = source if proxy == rank else proxy
        yield from load_late(world, rank, writers, self._check_loads)

    def stage_sums(self, world: World, rank: int) -> Iterator[World]:
        me = world.ranks[rank]
        self._stage(world, rank, world.at.sums, world.at.source(rank, SUMS), 2 * me.op + me.wrong)
        yield world

    def check_sums(self, world: World, rank: int) -> Iterator[World]:
        yield from go_on_unless_stopped(world, rank, FINISH) if self.checks_sums else [world]

    def put_returned(self, world: World, rank: int) -> Iterator[World]:
        self._put_staged(world, rank, world.at.sums, world.at.source(rank, SUMS))
        for peer in world.of_other_nodes(rank):
            world.store(rank, world.at.returned(peer, rank), world.ranks[rank].op, release=self.releases)
        yield world

    def wait_for_sums(self, world: World, rank: int) -> Iterator[World]:
        flags, op = flags_of_other_nodes(world, rank, world.at.returned), world.ranks[rank].op
        yield from wait_for_flags(world, rank, flags, op, bounded=self.bounded, begins_loads=True)

    def first_sums(self, world: World, rank: int) -> Iterator[World]:
        self._check_sums(world, rank)
        yield world

    def last_sums(self, world: World, rank: int) -> Iterator[World]:
        writers = {world.at.sums(rank, peer): peer for peer in world.of_other_nodes(rank)}
        yield from load_late(world, rank, writers, self._check_sums)

    # --- The end.

    def signal_leaving(self, world: World, rank: int) -> Iterator[World]:
        for left in signal_leaving(world, rank):
            if self.leaves_early:
                self._put_left(left, rank)
            yield left

    def succeed_or_fail(self, world: World, rank: int) -> Iterator[World]:
        for ended in succeed_or_fail(world, rank):
            if ended.ranks[rank].succeeded == ended.ranks[rank].op:
                self._put_left(ended, rank)
            yield ended

    def _put_left(self, world: World, rank: int) -> None:
        for peer in world.of_other_nodes(rank):
            world.store(rank, world.at.left(peer, rank), world.ranks[rank].op, release=self.releases)

    def leave(self, world: World, rank: int) -> Iterator[World]:
        if self.asynchronous and not self.copies:  # XLA reuses what the puts still read
            world.seen[world.at.source(rank, ROWS)] = 0
        yield from leave(world, rank)

    # --- Helpers.

    def _stage(
        self, world: World, rank: int, word: Callable[[int, int], int], source: int, value: int
    ) -> None:
        """Write what is put to each peer where it is put from, or over mapped memory where it goes."""
        world.seen[source] = value
        for peer in world.of_other_nodes(rank) if not self.asynchronous else []:
            world.store(rank, word(peer, rank), value)

    def _put_staged(self, world: World, rank: int, word: Callable[[int, int], int], source: int) -> None:
        for peer in world.of_other_nodes(rank) if self.asynchronous else []:
            world.put(rank, word(peer, rank), source)

    def _put(self, world: World, rank: int, word: int, source: int) -> None:
        at = world.at.source(rank, source)
        if self.asynchronous:
            world.put(rank, word, at)
        else:
            world.store(rank, word, world.seen[at])

    def _sources(self, world: World, rank: int) -> Iterator[tuple[int, int]]:
        """Each rank of another node, with the rank of this node that has its index."""
        for proxy in sorted([rank, *world.of_node(rank)]):
            for source in world.of_other_nodes(proxy):
                yield source, proxy

    def _check_loads(self, world: World, rank: int) -> None:
        op, at = world.ranks[rank].op, world.at
        check_loads(world, rank)
        for source, proxy in self._sources(world, rank):
            if world.seen[at.counts(rank, source)] != op or world.seen[at.staging(proxy, source)] != op:
                raise Violation("addresses")

    def _check_sums(self, world: World, rank: int) -> None:
        op = world.ranks[rank].op
        for peer in world.of_other_nodes(rank):
            sums = world.seen[world.at.sums(rank, peer)]
            if sums // 2 != op:
                raise Violation("addresses")
            if sums % 2:
                world.change(rank, wrong=True)

    def steps_until_arrivals(self, after_rows: Sequence[Step] = ()) -> list[Step]:
        """The steps up to WaitForArrivals, with further ones after rows have been staged."""
        return [
            *PUBLISH_STEPS,
            Step("WaitUntilFree", self.wait_until_free, LOAD),
            Step("Stage rows", self.stage, LOCAL),
            *after_rows,
            Step("Exchange: IsLastBlock", fence, LOCAL),
            Step("Exchange: PutFlag(arrived)", self.put_flags, LOCAL),
            Step("Exchange: WaitForOtherNodes", self.wait_for_other_nodes, LOAD),
            Step("Exchange: StoreReleaseSystem(staged)", self.pass_on, LOCAL),
            Step("WaitForArrivals", partial(wait_for_arrivals, begins_loads=False), LOAD),
        ]

    def protocol(self) -> Protocol:
        waits_first = self.asynchronous and self.waits_first
        sums = [
            Step("Stage sums", self.stage_sums, LOCAL),
            Step("Return: IsLastBlock", fence, LOCAL),
            Step("Return: Stopped", self.check_sums, LOOK),
            Step("Return: PutFlag(returned)", self.put_returned, LOCAL),
            Step("WaitForSums", self.wait_for_sums, LOAD),
            Step("First loads of sums", self.first_sums, LOCAL),
            Step("Last loads of sums", self.last_sums, LOAD),
        ]
        steps = [
            *self.steps_until_arrivals(),
            Step("WaitUntilStaged", self.wait_until_staged, LOAD),
            Step("First loads", self.first_loads, LOCAL),
            Step("Last loads", self.last_loads, LOAD),
            *(sums if self.returns else []),
            *FINISH_STEPS,
        ]
        return self._complete(Protocol(steps), waits_first)

    def _complete(self, protocol: Protocol, waits_first: bool) -> Protocol:
        """With the steps of one node that do more between nodes, and the wait where it belongs."""
        protocol = (
            protocol.replaced("Push counts", self.push_counts)
            .replaced("Publish: StoreReleaseSystem(arrived)", self.signal_arrival)
            .replaced("Finish: StoreReleaseSystem(left)", self.signal_leaving)
            .replaced("Finish: succeed or fail", self.succeed_or_fail)
            .replaced("Leave", self.leave)
        )
        return protocol.moved("WaitUntilFree", after="Begin") if waits_first else protocol
