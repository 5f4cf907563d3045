"""Whether ops in flight beside computation can deadlock, since kernels hold SMs while they wait for peers.

A rank launches a program: the list of what its host calls, the same on all ranks. The host is ahead of its
GPU, so that only streams and SMs delay a kernel:

* "start": an op in flight, on a stream for such ops, once the main stream has reached this point. The main
  stream then waits for its `event`.
* "done": the main stream waits until the first op that was started, and is not done yet, has ended.
* "plain": another op of the communicator, on its other channel, on the main stream; cooperative.
* "collective": of XLA, on a third stream, once the main stream has reached this point; not cooperative.
* "collected": the main stream waits for the last collective.
* "matmul": a kernel on the main stream that waits for nobody. It may have more blocks than there are SMs.

A block holds one SM. All blocks of a cooperative kernel begin at once; others begin one by one. A block of a
matmul may end at any moment. An op or a collective may end at any moment after all its blocks have begun on
all ranks, and frees all its SMs.

Every state that these steps lead to is visited. A deadlock is a state without a next step in which some
kernel has not ended. Memory plays no part, unlike in protocol_search.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NOBODY = -1


class Needed(NamedTuple):
    """What a kernel waits for before its first block begins: the blocks of another kernel on its rank."""

    kernel: int
    ended: bool  # all have ended, or only begun


class Kernel(NamedTuple):
    name: str
    num_blocks: int
    cooperative: bool
    has_peers: bool  # waits for the blocks of this kernel on all ranks
    needs: frozenset[Needed]


class Rank(NamedTuple):
    """How far a rank is. Counts are of blocks, by kernel."""

    begun: tuple[int, ...]
    ended: tuple[int, ...]
    next: int  # with `in_order`: the kernel that is chosen, or NOBODY


World = tuple[Rank, ...]  # sorted: all ranks run the same program, so that it does not matter which is which


class Moves(NamedTuple):
    """What a rank may do next."""

    begins: list[Rank]
    ends: list[tuple[int, Rank]]  # with the kernel whose blocks must first have begun on all ranks, or NOBODY


@dataclass(frozen=True)
class Overlap:
    """The sizes of kernels, and the rules.

    Attributes:
        num_sms: of each rank.
        start, plain, collective, matmul: the number of blocks of each such kernel.
        cooperative: whether ops in flight are.
        event: what the main stream waits for after a start. "begun": all blocks of the op have begun, on this
            rank. "ended": the op has ended. "none": nothing. CUDA's event is the first as a best effort: it
            may come as late as the second, or too early, as if it were the third.
        in_order: once a kernel is chosen to begin, no other kernel's blocks begin until all of its have, as
            on a GPU that takes kernels from a queue. Otherwise any block that finds an SM may begin.
    """

    num_ranks: int = 2
    num_sms: int = 4
    start: int = 2
    plain: int = 1
    collective: int = 1
    matmul: int = 5
    cooperative: bool = True
    event: str = "begun"
    in_order: bool = False

    def kernels(self, program: Sequence[str]) -> list[Kernel]:
        """Streams and events, as what every kernel waits for."""
        kernels: list[Kernel] = []
        main: frozenset[Needed] = frozenset()  # for the main stream to reach this point
        # For the last kernel of each other stream to have ended.
        last: dict[str, frozenset[Needed]] = {"start": frozenset(), "collective": frozenset()}
        started: list[int] = []

        def add(name: str, num_blocks: int, cooperative: bool, has_peers: bool) -> frozenset[Needed]:
            needs = main | last.get(name, frozenset())
            kernels.append(Kernel(name, num_blocks, cooperative, has_peers, needs))
            return frozenset([Needed(len(kernels) - 1, ended=True)])

        for call in program:
            match call:
                case "start":
                    last[call] = add(call, self.start, self.cooperative, True)
                    started.append(len(kernels) - 1)
                    if self.event != "none":
                        main |= {Needed(started[-1], ended=self.event == "ended")}
                case "done":
                    main |= {Needed(started.pop(0), ended=True)}
                case "plain":
                    main = add(call, self.plain, True, True)  # it needed all that was in `main`
                case "collective":
                    last[call] = add(call, self.collective, False, True)
                case "collected":
                    main |= last["collective"]
                case "matmul":
                    main = add(call, self.matmul, False, False)
                case _:
                    raise ValueError(call)
        return kernels


class Search:
    """All states of a program.

    With `at_once`, what may end ends at once. That hides no deadlock: such a step remains possible until it
    is taken, and makes no other impossible, so that it may as well come first. But it hides other states.
    """

    def __init__(self, overlap: Overlap, program: Sequence[str], *, at_once: bool = False) -> None:
        self.overlap = overlap
        self.kernels = overlap.kernels(program)
        self.at_once = at_once
        self._moves: dict[Rank, Moves] = {}

    def worlds(self) -> Iterator[tuple[World, bool]]:
        """Every state, and whether it is a deadlock."""
        zeros = (0,) * len(self.kernels)
        start: World = (Rank(zeros, zeros, NOBODY),) * self.overlap.num_ranks
        known, pending = {start}, [start]
        while pending:
            world = pending.pop()
            successors = list(self._successors(world))
            yield world, not successors and not self.has_ended(world)
            for after in successors:
                if after not in known:
                    known.add(after)
                    pending.append(after)

    def has_ended(self, world: World) -> bool:
        return all(self._has_ended(rank, i) for rank in world for i in range(len(self.kernels)))

    def deadlocks(self) -> Iterator[str]:
        """The kernels that run or wait for SMs in each, on every rank, with how many blocks have begun."""
        stops = False
        for world, stuck in self.worlds():
            if stuck:
                yield "; ".join(self._describe(rank) for rank in world)
            stops = stops or stuck or self.has_ended(world)
        assert stops

    def _describe(self, rank: Rank) -> str:
        return ", ".join(
            f"{kernel.name} {rank.begun[i]}/{kernel.num_blocks}"
            for i, kernel in enumerate(self.kernels)
            if not self._has_ended(rank, i) and self._may_begin(rank, kernel)
        )

    def _successors(self, world: World) -> Iterator[World]:
        if not self.at_once:
            yield from self._after_ends(world)
        for i, rank in enumerate(world):
            if i == 0 or rank != world[i - 1]:
                for after in self._moves_of(rank).begins:
                    begun = tuple(sorted((*world[:i], after, *world[i + 1 :])))
                    yield self._settle(begun) if self.at_once else begun

    def _settle(self, world: World) -> World:
        """Let all end that may."""
        while after := next(self._after_ends(world), None):
            world = after
        return world

    def _after_ends(self, world: World) -> Iterator[World]:
        for i, rank in enumerate(world):
            for kernel, after in self._moves_of(rank).ends:
                if kernel == NOBODY or all(self._has_begun(other, kernel) for other in world):
                    yield tuple(sorted((*world[:i], after, *world[i + 1 :])))

    def _moves_of(self, rank: Rank) -> Moves:
        if rank not in self._moves:
            self._moves[rank] = Moves(list(self._begins(rank)), list(self._ends(rank)))
        return self._moves[rank]

    def _begins(self, rank: Rank) -> Iterator[Rank]:
        num_free = self.overlap.num_sms - sum(rank.begun) + sum(rank.ended)
        for i, kernel in enumerate(self.kernels):
            if self._has_begun(rank, i) or not self._may_begin(rank, kernel):
                continue
            if self.overlap.in_order and rank.next != i:
                if rank.next == NOBODY:
                    yield rank._replace(next=i)
                continue
            count = kernel.num_blocks if kernel.cooperative else 1
            if count <= num_free:
                after = rank._replace(begun=_with(rank.begun, i, rank.begun[i] + count))
                yield after._replace(next=NOBODY) if self._has_begun(after, i) else after

    def _ends(self, rank: Rank) -> Iterator[tuple[int, Rank]]:
        for i, kernel in enumerate(self.kernels):
            if rank.ended[i] == rank.begun[i]:
                continue
            if not kernel.has_peers:
                yield NOBODY, rank._replace(ended=_with(rank.ended, i, rank.ended[i] + 1))
            elif self._has_begun(rank, i):
                yield i, rank._replace(ended=_with(rank.ended, i, kernel.num_blocks))

    def _has_begun(self, rank: Rank, kernel: int) -> bool:
        return rank.begun[kernel] == self.kernels[kernel].num_blocks

    def _has_ended(self, rank: Rank, kernel: int) -> bool:
        return rank.ended[kernel] == self.kernels[kernel].num_blocks

    def _may_begin(self, rank: Rank, kernel: Kernel) -> bool:
        return all((self._has_ended if ended else self._has_begun)(rank, i) for i, ended in kernel.needs)


def _with(counts: tuple[int, ...], index: int, count: int) -> tuple[int, ...]:
    return (*counts[:index], count, *counts[index + 1 :])
