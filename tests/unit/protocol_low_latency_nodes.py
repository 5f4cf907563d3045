"""The protocol of low-latency ops between nodes: xla_ffi/cuda/low_latency_nodes/signalled_node_op.cuh.

Rank r has the index r % L in its node. Inside a node ranks push to each other as in protocol_low_latency.py.
To other nodes a rank puts only to those with its index, and sends each of them one message per op with a flag
(`arrived`):

* dispatch: its rows and entries. The rank that gets them passes the entries on to the ranks of its node, and
  tells them so (`staged`); those read the rows where they are, in that rank's memory.
* combine: once all ranks of its node have pushed their sums to it, what it has added up of them.

All blocks of a rank stage what its last block then puts. A put copies from an area of the rank's own memory
(`sent`), possibly only when it is seen, into an area of the other rank (`received`), which ranks of that node
read; over mapped memory it is staged there. Both are in banks, as windows are. So is the tag that says which
op was put, at the beginning of the message: `arrived` may already be that of the next op. Messages and flags
of a rank arrive in the order of its ops, which a transport without that order has to see to.

Why two banks are enough: a rank that ends op n has heard that every rank has begun it, from those of its node
and through them, or from those with its index. So a rank that begins op n + 2 knows that all have ended op n:
their loads from the bank that it writes, and their waits for the puts that copied from it.

The promises are those of protocol_low_latency.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from protocol_failure import FAIL_STEPS, fence, find_different_op, look, wait
from protocol_low_latency import FINISH
from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_world import LOADS, Violation, World


@dataclass(frozen=True)
class LowLatencyNodes:
    """The steps of an op. Arguments other than the defaults make a protocol that breaks its promises.

    Attributes:
        kinds: of ops, taken in turn: "dispatch", "combine".
        window_banks: of the memory that ranks of the own node write.
        received_banks: of the memory that ranks of other nodes write.
        sent_banks: of the memory from which puts copy.
        tag_banks: of the tags of what was put.
        releases: flags between nodes are release stores.
        passes_on: entries that another node has put are passed on to the ranks of the own node.
        flags_all: every op sends its flags; otherwise only ops with rows, here every other one.
        looks: an op begins with a check whether the communicator is broken.
        bounded: waits for other nodes end after timeout_s.
    """

    kinds: tuple[str, ...] = ("dispatch",)
    window_banks: int = 2
    received_banks: int = 2
    sent_banks: int = 2
    tag_banks: int = 2
    releases: bool = True
    passes_on: bool = True
    flags_all: bool = True
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

    # --- Inside the node.

    def push(self, world: World, rank: int) -> Iterator[World]:
        """Rows and entries in dispatch, sums in combine."""
        op = world.ranks[rank].op
        for peer in world.of_node(rank):
            if self._is_dispatch(op):
                world.store(rank, world.at.header(op % self.window_banks, peer, rank), op)
            world.store(rank, world.at.slots(op % self.window_banks, peer, rank), op)
        yield world

    def send_signals(self, world: World, rank: int) -> Iterator[World]:
        op = world.ranks[rank].op
        for peer in world.of_node(rank):
            world.store(rank, world.at.signal(op % self.window_banks, peer, rank), op, release=True)
        if not self._is_dispatch(op):
            world.go_to(rank, "Combine")
        yield world

    def wait_for_signals(self, world: World, rank: int) -> Iterator[World]:
        op, at = world.ranks[rank].op, world.at
        flags = {peer: at.signal(op % self.window_banks, rank, peer) for peer in world.of_node(rank)}
        yield from find_different_op(world, rank, flags, op, back=FINISH)
        yield from self._wait(world, rank, flags, begins_loads=not self._is_dispatch(op))

    # --- Between nodes.

    def stage(self, world: World, rank: int) -> Iterator[World]:
        """Copies of what this rank now writes to the area for it."""
        op, at = world.ranks[rank].op, world.at
        others = world.of_other_nodes(rank) if self._flags(op) else []
        before = {op - n * self.sent_banks for n in (1, 2, 3)}
        late = {at.received(old % self.received_banks, peer, rank) for old in before for peer in others}
        world.overwrite(rank, late, op)
        for peer in others:
            world.store(rank, at.received(op % self.received_banks, peer, rank), op)
        yield world

    def put_flags(self, world: World, rank: int) -> Iterator[World]:
        op, at = world.ranks[rank].op, world.at
        for peer in world.of_other_nodes(rank) if self._flags(op) else []:
            world.store(rank, at.tag(op % self.tag_banks, peer, rank), op)
            world.store(rank, at.arrived(peer, rank), op, release=self.releases)
        yield world

    def wait_for_other_nodes(self, world: World, rank: int) -> Iterator[World]:
        op, at = world.ranks[rank].op, world.at
        peers = world.of_other_nodes(rank) if self._flags(op) else []
        flags = {peer: at.arrived(rank, peer) for peer in peers}
        yield from find_different_op(world, rank, flags, op, back=FINISH)
        for waited in self._wait(world, rank, flags, begins_loads=not self._is_dispatch(op)):
            if not waited.ranks[rank].jump:
                self._check_tags(waited, rank, peers)
            yield waited

    def _check_tags(self, world: World, rank: int, peers: list[int]) -> None:
        """IsInOtherOp: here all ranks run the same ops, so that no peer may look as if it were in another."""
        op = world.ranks[rank].op
        for peer in peers:
            later, tag = world.copy(), world.at.tag(op % self.tag_banks, rank, peer)
            if unseen := later.unseen(peer, tag):
                later.see(peer, unseen[-1])
            if later.seen[tag] != op:
                raise Violation("no false alarm")

    def pass_on(self, world: World, rank: int) -> Iterator[World]:
        op, at = world.ranks[rank].op, world.at
        for peer in sorted([rank, *world.of_node(rank)]):
            for source in world.of_other_nodes(rank) if self.passes_on else []:
                world.store(rank, at.header(op % self.window_banks, peer, source), op)
            if peer != rank:
                world.store(rank, at.staged_in_turn(peer, rank), op, release=True)
        yield world

    def wait_until_staged(self, world: World, rank: int) -> Iterator[World]:
        flags = {peer: world.at.staged_in_turn(rank, peer) for peer in world.of_node(rank)}
        yield from self._wait(world, rank, flags, begins_loads=True)

    # --- What a rank loads, once early and once late.

    def first_loads(self, world: World, rank: int) -> Iterator[World]:
        self._check_loads(world, rank, self._loads(world, rank))
        yield world

    def last_loads(self, world: World, rank: int) -> Iterator[World]:
        yield from self._end_loads(world, rank, self._loads(world, rank))

    def end_dispatch(self, world: World, rank: int) -> Iterator[World]:
        world.go_to(rank, FINISH)
        yield world

    def begin_combine(self, world: World, rank: int) -> Iterator[World]:
        yield world

    def first_sums(self, world: World, rank: int) -> Iterator[World]:
        self._check_loads(world, rank, self._loads_of_sums(world, rank))
        yield world

    def last_sums(self, world: World, rank: int) -> Iterator[World]:
        yield from self._end_loads(world, rank, self._loads_of_sums(world, rank))

    # --- The end.

    def succeed_or_fail(self, world: World, rank: int) -> Iterator[World]:
        me = world.ranks[rank]
        if me.lost:
            world.fail(rank, back="Leave")
        elif not me.failed:
            if any(0 < other.failed < me.op for other in world.ranks):
                raise Violation("stays broken")
            world.change(rank, succeeded=me.op)
        yield world

    def leave(self, world: World, rank: int) -> Iterator[World]:
        world.change(rank, lost=False)
        world.go_to(rank, "Begin" if world.ranks[rank].op < world.num_ops else "End")
        yield world

    # --- Helpers.

    def _is_dispatch(self, op: int) -> bool:
        return self.kinds[(op - 1) % len(self.kinds)] == "dispatch"

    def _flags(self, op: int) -> bool:
        """Whether the op sends flags to other nodes; with `flags_all` off, if it has rows for them."""
        return self.flags_all or op % 2 == 1

    def _wait(self, world: World, rank: int, flags: dict[int, int], *, begins_loads: bool) -> Iterator[World]:
        for waited, answer in wait(world, rank, flags, world.ranks[rank].op):
            if answer == "all":
                if begins_loads:
                    waited.begin_loads(rank)
            elif answer == "stopped":
                waited.change(rank, lost=True)
                waited.go_to(rank, FINISH)
            elif self.bounded:
                waited.fail(rank, back=FINISH)
            else:
                continue
            yield waited

    def _loads(self, world: World, rank: int) -> dict[int, int]:
        """The words of others that the rank loads in its node, and who has written them."""
        op, at = world.ranks[rank].op, world.at
        bank, words = op % self.window_banks, {}
        for peer in world.of_node(rank):
            words[at.slots(bank, rank, peer)] = peer
        if not self._is_dispatch(op):
            return words
        for proxy in sorted([rank, *world.of_node(rank)]):
            if proxy != rank:
                words[at.header(bank, rank, proxy)] = proxy
            for source in world.of_other_nodes(proxy) if self._flags(op) else []:
                words[at.header(bank, rank, source)] = proxy
                words[at.received(op % self.received_banks, proxy, source)] = source
        return words

    def _loads_of_sums(self, world: World, rank: int) -> dict[int, int]:
        op = world.ranks[rank].op
        peers = world.of_other_nodes(rank) if self._flags(op) else []
        return {world.at.received(op % self.received_banks, rank, peer): peer for peer in peers}

    def _check_loads(self, world: World, rank: int, words: dict[int, int]) -> None:
        for word, writer in words.items():
            if writer == rank:  # its own store
                stored = [item[1] for item in world.queues[rank] if item[0] == word]
                value = stored[-1] if stored else world.seen[word]
            else:
                value = world.seen[word]
            if value != world.ranks[rank].op:
                raise Violation("data")

    def _end_loads(self, world: World, rank: int, words: dict[int, int]) -> Iterator[World]:
        """Any word may have been overwritten by its writer since; one wrong word is enough."""
        if LOADS not in world.queues[rank]:
            yield world  # the op has failed already
            return
        world.end_loads(rank)
        for word, writer in words.items():
            for i in world.unseen(writer, word) if writer != rank else []:
                later = world.copy()
                later.see(writer, i)
                self._check_loads(later, rank, words)
                yield later
        self._check_loads(world, rank, words)
        yield world

    def protocol(self) -> Protocol:
        return Protocol(
            [
                Step("Begin", self.begin, LOOK),
                Step("Push", self.push, LOCAL),
                Step("Push: __syncthreads", fence, LOCAL),
                Step("Push: StoreReleaseSystem(signal)", self.send_signals, LOCAL),
                Step("Stage rows", self.stage, LOCAL),
                Step("Send: IsLastBlock", fence, LOCAL),
                Step("Send: PutStaged(arrived)", self.put_flags, LOCAL),
                Step("PassOn: WaitForOtherNodes", self.wait_for_other_nodes, LOAD),
                Step("PassOn: StoreReleaseSystem(staged)", self.pass_on, LOCAL),
                Step("WaitForSignals", self.wait_for_signals, LOAD),
                Step("WaitUntilStaged", self.wait_until_staged, LOAD),
                Step("First loads", self.first_loads, LOCAL),
                Step("Last loads", self.last_loads, LOAD),
                Step("End of dispatch", self.end_dispatch, LOCAL),
                Step("Combine", self.begin_combine, LOCAL),
                Step("Combine: WaitForSignals", self.wait_for_signals, LOAD),
                Step("Combine: first loads", self.first_loads, LOCAL),
                Step("Combine: last loads", self.last_loads, LOAD),
                Step("Stage sums", self.stage, LOCAL),
                Step("Return: IsLastBlock", fence, LOCAL),
                Step("Return: PutStaged(arrived)", self.put_flags, LOCAL),
                Step("WaitForSums", self.wait_for_other_nodes, LOAD),
                Step("First loads of sums", self.first_sums, LOCAL),
                Step("Last loads of sums", self.last_sums, LOAD),
                Step(FINISH, self.succeed_or_fail, LOCAL),
                Step("Leave", self.leave, LOCAL),
                *FAIL_STEPS,
            ]
        )
