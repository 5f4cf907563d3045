"""Ranks and the memory between them, for the model of a flag protocol: which stores are visible when.

A store waits in its rank's queue until it is seen. Any may be the next, except that

* stores to one word are seen in order;
* a release store is seen after all loads and stores before it;
* stores after a fence are seen after all loads and stores before the fence.

The value of a put is that of its source when the put is seen: a network reads what it sends late.

Neither a release nor a fence makes anything visible at once: nothing here is sequentially consistent. An
acquire load is ordered before later loads, not after earlier ones. Every word has one home, so that all its
readers agree.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

BEGIN, END = 0, 1 << 20  # indices in the list of steps

Item = tuple[int, int, bool]  # a store in a queue: word, value (or -1 - source), whether it is a release
FENCE: Item = (-1, 0, False)
LOADS: Item = (-2, 0, False)  # of peers' words, in flight


class Rank(NamedTuple):
    """The local state of a rank."""

    at: int = BEGIN  # the next of its steps
    jump: str = ""  # the step to go to instead
    back: str = ""  # in Fail: the step to return to
    op: int = 0  # shared_.step
    failed: int = 0  # own_.failed: the op that it aborted
    reporter: int = 0  # in Fail: whose report goes to its host
    succeeded: int = 0  # the last op that succeeded
    lost: bool = False  # it has seen in this op that the communicator is broken
    wrong: bool = False  # it has loaded words of another op
    notifying: bool = False  # a concurrent op has aborted and not yet notified all


class Words:
    """The address of each word. Those of a pair are in the first rank's control block."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.count = 23 * num_ranks * num_ranks

    def _at(self, table: int, home: int, writer: int) -> int:
        return (table * self.num_ranks + home) * self.num_ranks + writer

    def arrived(self, home: int, writer: int) -> int:
        return self._at(0, home, writer)

    def left(self, home: int, writer: int) -> int:
        return self._at(1, home, writer)

    def published(self, home: int, writer: int) -> int:
        return self._at(2, home, writer)

    def counts(self, home: int, writer: int) -> int:  # as dispatch.cu pushes them
        return self._at(3, home, writer)

    def report(self, home: int, reporter: int) -> int:
        return self._at(4, home, reporter)

    def broken(self, home: int, reporter: int) -> int:
        """One word for each value of own_.broken: a load may return any that was stored.

        The real word has only the last one, so the model allows more than is possible.
        """
        return self._at(5, home, reporter)

    def header(self, bank: int, home: int, writer: int) -> int:
        return self._at(8 + bank, home, writer)

    def slots(self, bank: int, home: int, writer: int) -> int:
        """Rows and their counts, from which addresses are computed."""
        return self._at(12 + bank, home, writer)

    def signal(self, bank: int, home: int, writer: int) -> int:
        return self._at(16 + bank, home, writer)

    # Between nodes in low-latency mode, with at most two banks of the words above:

    def received(self, bank: int, home: int, writer: int) -> int:
        """What a rank of another node has put there."""
        return self._at(10 + bank, home, writer)

    def tag(self, bank: int, home: int, writer: int) -> int:
        """Which op that was."""
        return self._at(18 + bank, home, writer)

    def staged_in_turn(self, home: int, writer: int) -> int:
        """`staged`, in ops that take banks in turn."""
        return self._at(14, home, writer)

    # Between nodes in throughput mode, in place of the words of low-latency mode:

    def staging(self, home: int, writer: int) -> int:
        """What a rank of another node has put there."""
        return self._at(8, home, writer)

    def staged(self, home: int, writer: int) -> int:
        return self._at(9, home, writer)

    def sums(self, home: int, writer: int) -> int:
        """2 n: sums of op n, of its operands; 2 n + 1: of others."""
        return self._at(10, home, writer)

    def returned(self, home: int, writer: int) -> int:
        return self._at(11, home, writer)

    def source(self, rank: int, index: int) -> int:
        """Memory of the rank from which it puts, in its order."""
        return self._at(12 + index, rank, 0)

    # The same in chunks; the first four are flags.
    def put_chunk(self, home: int, writer: int) -> int:
        return self._at(16, home, writer)

    def staged_chunk(self, home: int, writer: int) -> int:
        return self._at(17, home, writer)

    def taken_chunk(self, home: int, writer: int) -> int:
        return self._at(18, home, writer)

    def credit(self, home: int, writer: int) -> int:
        return self._at(19, home, writer)

    def chunk(self, slot: int, home: int, writer: int) -> int:
        """What a rank of another node has put into one of two slots: rows, or sums."""
        return self._at(20 + slot, home, writer)

    def chunk_source(self, rank: int, slot: int) -> int:
        """Memory from which the rank puts a chunk."""
        return self._at(22, rank, slot)

    def operand(self, rank: int) -> int:
        """2 n: of op n; 2 n + 1: reused after it. In XLA's memory; peers only load it."""
        return self._at(6, rank, 0)

    def host_report(self, rank: int) -> int:
        return self._at(7, rank, 0)

    def host_flag(self, rank: int) -> int:
        return self._at(7, rank, 1)


class Violation(Exception):
    """A promise that a run has broken."""


@dataclass
class World:
    """All ranks, the stores of each that are not visible yet, and the visible words."""

    num_ops: int
    ranks_per_node: int
    at: Words
    ranks: list[Rank]
    queues: list[tuple[Item, ...]]
    seen: bytearray

    @staticmethod
    def at_start(num_ranks: int, num_ops: int, ranks_per_node: int) -> "World":
        at = Words(num_ranks)
        # The second half of the queues has the stores of concurrent ops, not ordered with the rank's own.
        queues: list[tuple[Item, ...]] = [()] * (2 * num_ranks)
        return World(num_ops, ranks_per_node, at, [Rank()] * num_ranks, queues, bytearray(at.count))

    def copy(self) -> "World":
        return World(self.num_ops, self.ranks_per_node, self.at, self.ranks[:], self.queues[:], self.seen[:])

    def key(self) -> tuple[object, ...]:
        return (*self.ranks, *self.queues, bytes(self.seen))

    def peers(self, rank: int) -> list[int]:
        """The ranks whose control blocks the rank writes to: all others, if there is one node."""
        return [*self.of_node(rank), *self.of_other_nodes(rank)]

    def of_node(self, rank: int) -> list[int]:
        """The other ranks of its node."""
        first = rank - rank % self.ranks_per_node
        return [peer for peer in range(first, first + self.ranks_per_node) if peer != rank]

    def of_other_nodes(self, rank: int) -> list[int]:
        """The ranks of other nodes with the same index."""
        same = range(rank % self.ranks_per_node, len(self.ranks), self.ranks_per_node)
        return [peer for peer in same if peer != rank]

    def writers(self, rank: int) -> list[int]:
        """The queues with stores that notify a rank that the communicator is broken."""
        num_ranks = len(self.ranks)
        return [*self.peers(rank), *(num_ranks + other for other in (rank, *self.peers(rank)))]

    def reporters_seen(self, rank: int) -> list[int]:
        """The values that the rank may find in its own_.broken."""
        return [peer for peer in range(len(self.ranks)) if self.seen[self.at.broken(rank, peer)]]

    # --- Effects of steps.

    def change(self, rank: int, **changes: Any) -> None:
        self.ranks[rank] = self.ranks[rank]._replace(**changes)

    def go_to(self, rank: int, step: str) -> None:
        self.change(rank, jump=step)

    def fail(self, rank: int, back: str) -> None:
        """Call Fail, and continue at the step `back`."""
        self.change(rank, jump="Fail", back=back)

    def fail_concurrent(self, rank: int) -> None:
        """Let a concurrent op of the rank abort: on its other channel, or by mistake on the same."""
        self.change(rank, failed=max(self.ranks[rank].op, 1), notifying=True)

    def notify_concurrent(self, rank: int) -> None:
        self.change(rank, notifying=False)
        queue = len(self.ranks) + rank
        for home in sorted([rank, *self.peers(rank)]):
            if home != rank:
                self.store(queue, self.at.report(home, rank), 1)
            self.store(queue, self.at.broken(home, rank), 1, release=True)

    def wait_until_notified(self, rank: int) -> None:
        """What the rank does next is seen after the notifications of the concurrent op."""
        if self.ranks[rank].notifying:
            self.notify_concurrent(rank)
        queue = len(self.ranks) + rank
        if self.queues[queue]:
            self.queues[rank] += self.queues[queue]
            self.queues[queue] = ()
            self.fence(rank)

    def store(self, rank: int, word: int, value: int, *, release: bool = False) -> None:
        self.queues[rank] += ((word, value, release),)

    def put(self, rank: int, word: int, source: int) -> None:
        """Store what the word `source` of the rank's own memory has when this is seen."""
        self.queues[rank] += ((word, -1 - source, False),)

    def fence(self, rank: int) -> None:
        if self.queues[rank] and self.queues[rank][-1] != FENCE:
            self.queues[rank] += (FENCE,)

    def begin_loads(self, rank: int) -> None:
        self.queues[rank] += (LOADS,)

    def end_loads(self, rank: int) -> None:
        self.queues[rank] = tuple(item for item in self.queues[rank] if item != LOADS)

    def overwrite(self, rank: int, words: set[int], value: int) -> None:
        """Let stores of the rank to these words that are not seen yet store another value.

        They copy from memory that the rank overwrites.
        """
        self.queues[rank] = tuple(
            (item[0], value, item[2]) if item[0] in words else item for item in self.queues[rank]
        )

    def forget(self, rank: int, *words: int) -> None:
        """Drop stores that no other rank reads."""
        self.queues[rank] = tuple(item for item in self.queues[rank] if item[0] not in words)

    # --- Effects of memory.

    def unseen(self, rank: int, word: int) -> list[int]:
        """The indices in the queue of the stores of `rank` to `word` that may be seen now."""
        queue = self.queues[rank]
        found = [i for i, item in enumerate(queue) if item[0] == word]
        if LOADS in queue:
            loads = queue.index(LOADS)
            found = [i for i in found if self._num_seen_before(rank, i) <= loads]
        return found

    def see(self, rank: int, index: int) -> None:
        """Make a store of `rank` visible, and all that are to be seen before it."""
        queue = self.queues[rank]
        bound = self._num_seen_before(rank, index)
        needed = {index}
        for i in range(index - 1, -1, -1):
            if i >= bound and queue[i][0] == queue[index][0]:
                bound = max(bound, self._num_seen_before(rank, i))
                needed.add(i)
        kept: list[Item] = []
        for i, item in enumerate(queue):
            if item == FENCE:
                if kept and kept[-1] != FENCE:
                    kept.append(item)
            elif item != LOADS and (i < bound or i in needed):
                self.seen[item[0]] = item[1] if item[1] >= 0 else self.seen[-1 - item[1]]
            else:
                kept.append(item)
        self.queues[rank] = tuple(kept)

    def _num_seen_before(self, rank: int, index: int) -> int:
        """How many of the first items of the queue must be seen before the one at `index`."""
        queue = self.queues[rank]
        if queue[index][2]:
            return index
        return max((i for i in range(index) if queue[i] == FENCE), default=0)
