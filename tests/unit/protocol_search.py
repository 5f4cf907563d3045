"""An exhaustive search of the runs of a protocol: every interleaving, and every order that memory allows.

Three arguments keep the search small without losing a run:

* How long before its first load a store was visible cannot be observed. So the loads choose what is seen.
* A step that loads nothing of its peers runs at once: it only adds to what they may see.
* Peers' words are loaded twice in an op, as early as a rank may and as late. A word only advances, from an
  op's operand to memory that XLA reuses to the next op's operand: right both times means right in between.

Each of the first two can be turned off, to see that the answer is the same.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from protocol_world import BEGIN, END, Rank, Violation, World

# What a step may lead to. It gets its own copy of the world, with the rank already at the next step.
Run = Callable[[World, int], Iterator[World]]

# What a step loads of peers' stores: nothing, only `broken`, or more.
LOCAL, LOOK, LOAD = "local", "look", "load"


class Step(NamedTuple):
    name: str
    run: Run
    loads: str


class Protocol:
    """The steps of every rank, in order, except for jumps."""

    def __init__(self, steps: list[Step], may_fail: frozenset[int] | None = None) -> None:
        self.steps = steps
        self.may_fail = may_fail  # None: any rank
        self._indices = {step.name: i for i, step in enumerate(steps)} | {"End": END}

    def replaced(self, name: str, run: Run) -> "Protocol":
        assert name in self._indices
        steps = [step._replace(run=run) if step.name == name else step for step in self.steps]
        return Protocol(steps, self.may_fail)

    def without(self, *names: str) -> "Protocol":
        result = self
        for name in names:
            result = result.replaced(name, lambda world, rank: iter([world]))
        return result

    def moved(self, name: str, *, after: str) -> "Protocol":
        steps = [step for step in self.steps if step.name != name]
        index = [step.name for step in steps].index(after) + 1
        return Protocol([*steps[:index], self.steps[self._indices[name]], *steps[index:]], self.may_fail)

    def failing_only_on(self, *ranks: int) -> "Protocol":
        """The same in runs where no other rank fails unless it is notified: a smaller search.

        A rank that waits may then have no step to take. If no rank may fail and none has a step, that is a
        deadlock.
        """
        return Protocol(self.steps, frozenset(ranks))

    def step_of(self, world: World, rank: int) -> Step | None:
        at = world.ranks[rank].at
        return None if at == END else self.steps[at]

    def take_step(self, world: World, rank: int) -> Iterator[World]:
        step = self.step_of(world, rank)
        assert step is not None
        before = self._progress(world.ranks[rank])
        world = world.copy()
        world.change(rank, at=world.ranks[rank].at + 1)
        fails_already = bool(world.ranks[rank].back) or world.ranks[rank].lost
        for after in step.run(world, rank):
            begins_to_fail = bool(after.ranks[rank].back) and not fails_already
            if begins_to_fail and self.may_fail is not None and rank not in self.may_fail:
                continue
            if after.ranks[rank].jump:
                after.change(rank, at=self._indices[after.ranks[rank].jump], jump="")
            if not before < self._progress(after.ranks[rank]):
                raise Violation("progress")
            yield after

    def run_local_steps(self, world: World, rank: int) -> Iterator[World]:
        """Run up to the next step whose loads have several possible results."""
        step = self.step_of(world, rank)
        stopped = world.ranks[rank].failed > 0 or bool(world.reporters_seen(rank))
        if step is None or not (step.loads == LOCAL or (step.loads == LOOK and stopped)):
            yield world
            return
        for after in self.take_step(world, rank):
            yield from self.run_local_steps(after, rank)

    def _progress(self, rank: Rank) -> tuple[int, int, int]:
        """A value that grows with every step: Fail is between a step and the one after it."""
        if rank.at == BEGIN:
            return (rank.op + 1, 0, 0)
        if rank.back:
            return (rank.op, 2 * self._indices[rank.back] - 1, rank.at)
        return (rank.op, 2 * rank.at, 0)


class Result(NamedTuple):
    broken_promise: str | None
    run: list[str]  # the steps that lead there, without those that ran at once
    num_states: int


def find_violation(
    protocol: Protocol,
    num_ranks: int,
    num_ops: int,
    *,
    ranks_per_node: int | None = None,
    concurrent: bool = False,
    at_once: bool = True,
    on_demand: bool = True,
) -> Result:
    """Search all runs of `num_ranks` ranks through `num_ops` ops, depth first.

    By default all ranks are on one node.

    With `concurrent`, a concurrent op may fail on any rank, at any moment: see protocol_failure.py.
    Without `at_once`, steps that load nothing are taken separately; without `on_demand`, stores also become
    visible at any moment.
    """
    start = World.at_start(num_ranks, num_ops, ranks_per_node or num_ranks)
    run: list[str] = []
    known = {start.key()}
    pending = [
        _successors(protocol, start, run, concurrent, at_once, on_demand)
    ]  # of every state on the way to the current one
    try:
        while pending:
            name_and_world = next(pending[-1], None)
            if name_and_world is None:
                pending.pop()
                if run:
                    run.pop()
                continue
            name, world = name_and_world
            key = world.key()
            if key not in known:
                known.add(key)
                run.append(name)
                pending.append(_successors(protocol, world, run, concurrent, at_once, on_demand))
    except Violation as violation:
        return Result(str(violation), run, len(known))
    return Result(None, [], len(known))


def _successors(
    protocol: Protocol, world: World, run: list[str], concurrent: bool, at_once: bool, on_demand: bool
) -> Iterator[tuple[str, World]]:
    waits_only = protocol.may_fail == frozenset() and any(rank.at != END for rank in world.ranks)
    for rank, me in enumerate(world.ranks):
        if concurrent and not me.failed and me.at != END:
            after = world.copy()
            after.fail_concurrent(rank)
            yield f"rank {rank}, op {max(me.op, 1)}: a concurrent op fails", after
        if me.notifying:
            after = world.copy()
            after.notify_concurrent(rank)
            yield f"rank {rank}, op {max(me.op, 1)}: the concurrent op notifies", after
        step = protocol.step_of(world, rank)
        if step is not None:
            name = f"rank {rank}, op {max(me.op, 1)}: {step.name}"
            run.append(name)  # for a violation that the step itself finds
            successors = list(protocol.take_step(world, rank))
            if at_once:
                successors = [end for after in successors for end in protocol.run_local_steps(after, rank)]
            if not successors and protocol.may_fail is None:
                raise Violation("progress")
            run.pop()
            waits_only = waits_only and not successors
            yield from ((name, after) for after in successors)
        if not on_demand:
            for i, (word, _, _) in enumerate(world.queues[rank]):
                if i in world.unseen(rank, word) and word >= 0:
                    after = world.copy()
                    after.see(rank, i)
                    yield f"rank {rank}: word {word} is seen", after
    if waits_only:
        raise Violation("progress")
