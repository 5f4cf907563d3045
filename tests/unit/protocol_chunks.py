"""Ops between nodes whose rows cross in chunks, as their specification: xla_ffi/cuda/internode/node_op.cuh.

The protocol of protocol_internode.py, where the staging of a rank has not room for the rows of all tokens of
each peer, but two *slots*. Chunk c of an op is put into slot c % 2. The rank that has the staging returns a
*credit* for a chunk when all who read it have: in dispatch the ranks of its node, which tell it so (`taken`);
in combine, whose chunks are of sums, the rank itself. Who puts waits for the credit of the chunk before the
last. So no credit is needed for the last two chunks: that is `left`, as without chunks.

Flags count chunks: their value is that of the op times the most chunks of an op, plus the chunk's index. The
first chunk of dispatch needs no flags beyond those of an op.

Chunk c + 1 is put before chunk c is awaited, so that it crosses while the ranks of the node read. Nothing can
wait in a circle: what waits for chunk c is preceded by all that its peers do before they put it, which waits
for chunks up to c - 2 to be read, and reading one waits for nothing but that it has been put.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from protocol_failure import fence
from protocol_internode import Internode, flags_of_other_nodes
from protocol_search import LOAD, LOCAL, LOOK, Protocol, Step
from protocol_throughput import (
    FINISH,
    FINISH_STEPS,
    flags_of_peers,
    go_on_unless_stopped,
    leave,
    load_late,
    wait_for_flags,
    writers_of_loads,
)
from protocol_world import Violation, World

NUM_SLOTS = 2


@dataclass(frozen=True)
class Chunked(Internode):
    """The steps of an op in chunks. Arguments other than the defaults make a protocol that breaks promises.

    Attributes:
        num_chunks: of every op.
        credits_before: the credit that is awaited before a chunk is put is that of so many chunks earlier;
            None: no credit is awaited.
        returns_credits: credits are returned.
        awaits_node: a credit is returned when all ranks of the node have taken the chunk, not just this one.
        most_chunks: by which flags count ops; None: num_chunks, as the kernels' is more than an op can have.
        checks_chunks: a rank that returns sums checks for failed peers before each chunk, not just the first.
    """

    num_chunks: int = 3
    credits_before: int | None = NUM_SLOTS
    returns_credits: bool = True
    awaits_node: bool = True
    most_chunks: int | None = None
    checks_chunks: bool = True

    def mark(self, world: World, rank: int, chunk: int) -> int:
        """The value of the flags of a chunk."""
        most = self.num_chunks if self.most_chunks is None else self.most_chunks
        return world.ranks[rank].op * most + chunk

    # --- Staging a chunk of rows or sums, and putting it.

    def wait_for_credit(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        assert self.credits_before is not None
        flags = flags_of_other_nodes(world, rank, world.at.credit)
        yield from wait_for_flags(world, rank, flags, self.mark(world, rank, chunk - self.credits_before))

    def stage_chunk(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        slot, me = chunk % NUM_SLOTS, world.ranks[rank]
        value = world.ranks[rank].op * self.num_chunks + chunk
        value = 2 * value + me.wrong if self.returns else value
        self._stage(world, rank, partial(world.at.chunk, slot), world.at.chunk_source(rank, slot), value)
        yield world

    def put_chunk(self, world: World, rank: int, chunk: int) -> None:
        slot = chunk % NUM_SLOTS
        self._put_staged(world, rank, partial(world.at.chunk, slot), world.at.chunk_source(rank, slot))

    def put_flags(self, world: World, rank: int) -> Iterator[World]:
        if not self.returns:
            self.put_chunk(world, rank, 0)
        yield from super().put_flags(world, rank)

    def put_chunk_flag(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        self.put_chunk(world, rank, chunk)
        peers = world.of_other_nodes(rank)
        yield from self._tell(world, rank, chunk, peers, world.at.put_chunk, release=self.releases)

    def check_chunk(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        checks = self.checks_chunks or chunk == 0
        yield from go_on_unless_stopped(world, rank, FINISH) if checks else [world]

    # --- Reading one.

    def wait_for_chunk(
        self, world: World, rank: int, chunk: int, *, begins_loads: bool = False
    ) -> Iterator[World]:
        flags, mark = flags_of_other_nodes(world, rank, world.at.put_chunk), self.mark(world, rank, chunk)
        yield from wait_for_flags(world, rank, flags, mark, begins_loads=begins_loads)

    def pass_chunk_on(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        yield from self._tell(world, rank, chunk, world.of_node(rank), world.at.staged_chunk)

    def wait_until_chunk_is_staged(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        flags = flags_of_peers(world, rank, world.at.staged_chunk)
        yield from wait_for_flags(world, rank, flags, self.mark(world, rank, chunk), begins_loads=True)

    def first_loads_of(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        self._check_chunk(world, rank, chunk)
        yield world

    def last_loads_of(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        at, slot = world.at, chunk % NUM_SLOTS
        if self.returns:
            writers = {at.chunk(slot, rank, peer): peer for peer in world.of_other_nodes(rank)}
        else:
            writers = writers_of_loads(world, rank) if chunk == 0 else {}
            for source, proxy in self._sources(world, rank):
                writers[at.staging(proxy, source)] = source
                writers[at.chunk(slot, proxy, source)] = source
        yield from load_late(world, rank, writers, partial(self._check_chunk, chunk=chunk))

    def last_operands(self, world: World, rank: int) -> Iterator[World]:
        """What combine reads of the ranks of its node, before it returns each chunk."""
        yield from self.last_loads(world, rank)

    def begin_loads(self, world: World, rank: int) -> Iterator[World]:
        world.begin_loads(rank)
        yield world

    def signal_taken(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        yield from self._tell(world, rank, chunk, world.of_node(rank), world.at.taken_chunk)

    def wait_until_taken(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        if not self.awaits_node:
            yield world
            return
        flags = flags_of_peers(world, rank, world.at.taken_chunk)
        yield from wait_for_flags(world, rank, flags, self.mark(world, rank, chunk))

    def return_credit(self, world: World, rank: int, chunk: int) -> Iterator[World]:
        peers = world.of_other_nodes(rank) if self.returns_credits else []
        yield from self._tell(world, rank, chunk, peers, world.at.credit, release=self.releases)

    def leave(self, world: World, rank: int) -> Iterator[World]:
        if self.asynchronous and not self.copies:
            for slot in range(NUM_SLOTS):
                world.seen[world.at.chunk_source(rank, slot)] = 0
        yield from leave(world, rank)

    # --- Helpers.

    def _tell(
        self,
        world: World,
        rank: int,
        chunk: int,
        peers: Iterable[int],
        flag: Callable[[int, int], int],
        release: bool = True,
    ) -> Iterator[World]:
        """Store the mark of a chunk in a flag of each peer."""
        for peer in peers:
            world.store(rank, flag(peer, rank), self.mark(world, rank, chunk), release=release)
        yield world

    def _check_chunk(self, world: World, rank: int, chunk: int) -> None:
        at, slot, op = world.at, chunk % NUM_SLOTS, world.ranks[rank].op
        value = op * self.num_chunks + chunk
        if self.returns:
            for peer in world.of_other_nodes(rank):
                found = world.seen[at.chunk(slot, rank, peer)]
                if found // 2 != value:
                    raise Violation("addresses")
                if found % 2:
                    world.change(rank, wrong=True)
            return
        if chunk == 0:
            self._check_loads(world, rank)
        for source, proxy in self._sources(world, rank):
            if (
                world.seen[at.staging(proxy, source)] != op
                or world.seen[at.chunk(slot, proxy, source)] != value
            ):
                raise Violation("addresses")

    # --- The steps.

    def _steps_of_put(self, chunk: int) -> list[Step]:
        if chunk == self.num_chunks:
            return []
        waits = self.credits_before is not None and chunk >= self.credits_before
        check = Step(f"Put {chunk}: Stopped", partial(self.check_chunk, chunk=chunk), LOOK)
        operands = [
            *([Step("First loads", self.first_loads, LOCAL)] if chunk == 0 else []),
            Step(f"Begin loads for {chunk}", self.begin_loads, LOCAL),
            Step(f"Last loads for {chunk}", self.last_operands, LOAD),
        ]
        return [
            *([Step(f"Wait for credit {chunk}", partial(self.wait_for_credit, chunk=chunk), LOAD)] * waits),
            *(operands if self.returns else []),
            Step(f"Stage {chunk}", partial(self.stage_chunk, chunk=chunk), LOCAL),
            Step(f"Put {chunk}: IsLastBlock", fence, LOCAL),
            *([check] if self.returns else []),
            Step(f"Put {chunk}: PutFlag", partial(self.put_chunk_flag, chunk=chunk), LOCAL),
        ]

    def _steps_of_credit(self, chunk: int) -> list[Step]:
        if chunk + NUM_SLOTS >= self.num_chunks:
            return []
        of_node = [
            Step(f"Taken {chunk}", partial(self.signal_taken, chunk=chunk), LOCAL),
            Step(f"Wait until taken {chunk}", partial(self.wait_until_taken, chunk=chunk), LOAD),
        ]
        return [
            Step(f"Credit {chunk}: IsLastBlock", fence, LOCAL),
            *([] if self.returns else of_node),
            Step(f"Credit {chunk}", partial(self.return_credit, chunk=chunk), LOCAL),
        ]

    def _steps_of_rows(self, chunk: int) -> list[Step]:
        ahead = self._steps_of_put(chunk + 1)
        arrival = [
            Step(f"Wait for chunk {chunk}", partial(self.wait_for_chunk, chunk=chunk), LOAD),
            Step(f"Staged {chunk}", partial(self.pass_chunk_on, chunk=chunk), LOCAL),
            Step(f"Wait until staged {chunk}", partial(self.wait_until_chunk_is_staged, chunk=chunk), LOAD),
        ]
        first = Step(f"First loads {chunk}", partial(self.first_loads_of, chunk=chunk), LOCAL)
        return [
            *([first, *ahead, Step("Begin loads", self.begin_loads, LOCAL)] if chunk == 0 else []),
            *([*ahead, *arrival, first] if chunk > 0 else []),
            Step(f"Last loads {chunk}", partial(self.last_loads_of, chunk=chunk), LOAD),
            *self._steps_of_credit(chunk),
        ]

    def _steps_of_sums(self, chunk: int) -> list[Step]:
        waits = partial(self.wait_for_chunk, chunk=chunk, begins_loads=True)
        return [
            *(self._steps_of_put(0) if chunk == 0 else []),
            *self._steps_of_put(chunk + 1),
            Step(f"Wait for chunk {chunk}", waits, LOAD),
            Step(f"First loads {chunk}", partial(self.first_loads_of, chunk=chunk), LOCAL),
            Step(f"Last loads {chunk}", partial(self.last_loads_of, chunk=chunk), LOAD),
            *self._steps_of_credit(chunk),
        ]

    def protocol(self) -> Protocol:
        waits_first = self.asynchronous and self.waits_first
        steps_of = self._steps_of_sums if self.returns else self._steps_of_rows
        first_rows = Step("Stage 0", partial(self.stage_chunk, chunk=0), LOCAL)
        protocol = Protocol(
            [
                *self.steps_until_arrivals([] if self.returns else [first_rows]),
                Step("WaitUntilStaged", self.wait_until_staged_first, LOAD),
                *(step for chunk in range(self.num_chunks) for step in steps_of(chunk)),
                *FINISH_STEPS,
            ]
        )
        return self._complete(protocol, waits_first)

    def wait_until_staged_first(self, world: World, rank: int) -> Iterator[World]:
        flags = flags_of_peers(world, rank, world.at.staged)
        yield from wait_for_flags(world, rank, flags, world.ranks[rank].op)
