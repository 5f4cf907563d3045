"""Ranks keep the promises of their protocol between nodes, however they interleave, and need all of it."""

from typing import NamedTuple

import pytest
from protocol_internode import Internode
from protocol_search import Protocol, find_violation

DISPATCH = Internode().protocol()
COMBINE = Internode(returns=True).protocol()
OVER_A_NETWORK = Internode(returns=True, asynchronous=True).protocol()


class Run(NamedTuple):
    """Nodes, ranks per node, ops, whether a concurrent op may fail, and the ranks that may; None for all."""

    num_nodes: int
    ranks_per_node: int
    num_ops: int
    concurrent: bool = False
    failing: tuple[int, ...] | None = None


# With 2 × 2 ranks, all of them are alike, so that one that may fail stands for any.
RUNS = [Run(2, 1, 2, True), Run(2, 1, 3), Run(3, 1, 1), Run(2, 2, 2, failing=()), Run(2, 2, 1, failing=(0,))]
NIGHTLY = [
    Run(2, 1, 3, True),
    Run(3, 1, 2),
    Run(2, 2, 2, failing=(0,)),
    *(Run(2, 2, 1, failing=pair) for pair in ((0, 1), (0, 2), (0, 3))),
]


def search(protocol: Protocol, run: Run) -> tuple[str | None, list[str], int]:
    protocol = protocol if run.failing is None else protocol.failing_only_on(*run.failing)
    return find_violation(
        protocol,
        run.num_nodes * run.ranks_per_node,
        run.num_ops,
        ranks_per_node=run.ranks_per_node,
        concurrent=run.concurrent,
    )


PROTOCOLS = {"dispatch": DISPATCH, "combine": COMBINE, "combine over a network": OVER_A_NETWORK}


@pytest.mark.parametrize("verb", PROTOCOLS)
@pytest.mark.parametrize(
    "run",
    [*RUNS, *(pytest.param(run, marks=pytest.mark.nightly) for run in NIGHTLY)],
    ids=lambda run: "-".join(map(str, run)),
)
def test_promises_are_kept(run: Run, verb: str) -> None:
    broken_promise, steps, num_states = search(PROTOCOLS[verb], run)
    assert broken_promise is None, "\n".join(steps)
    assert num_states > 100 * run.num_nodes * run.ranks_per_node


# Changes to the protocol, each of which breaks a promise.
ARRIVED, STAGED = "Exchange: PutFlag(arrived)", "Exchange: StoreReleaseSystem(staged)"
MUTATIONS = {
    "rows are put before the staging is free": (
        Internode(waits_for_staging=False).protocol(), Run(2, 1, 2), "addresses"
    ),
    "left is put to other nodes before the ranks of the node have left": (
        Internode(leaves_early=True).protocol(), Run(2, 2, 2, failing=()), "addresses"
    ),
    "rows are put after the flag": (DISPATCH.moved("Put rows", after=ARRIVED), Run(2, 1, 1), "addresses"),
    "flags between nodes are no release stores": (
        Internode(releases=False).protocol(), Run(2, 1, 1), "addresses"
    ),
    "a rank says that it has staged before other nodes have put": (
        DISPATCH.moved(STAGED, after="Exchange: IsLastBlock"), Run(2, 1, 1), "addresses"
    ),
    "no rank waits until its peers have staged": (
        DISPATCH.without("WaitUntilStaged"), Run(2, 2, 1, failing=()), "addresses"
    ),
    "counts are not passed on": (
        Internode(passes_on_counts=False).protocol(), Run(2, 2, 1, failing=()), "addresses"
    ),
    "waits for other nodes are unbounded": (Internode(bounded=False).protocol(), Run(2, 1, 1), "progress"),
    "sums are returned without a check for failed peers": (
        Internode(returns=True, checks_sums=False).protocol(), Run(2, 2, 1, failing=(0,)), "data"
    ),
    "puts read memory that the next op has written": (
        Internode(asynchronous=True, waits_first=False).protocol(), Run(2, 1, 2), "addresses"
    ),
    "puts read memory that XLA has reused": (
        Internode(asynchronous=True, copies=False).protocol(), Run(2, 1, 1), "addresses"
    ),
    "sums are returned without a fence before that check": (
        COMBINE.moved("Last loads", after="Return: Stopped").moved("Return sums", after="Last loads"),
        Run(2, 2, 1, failing=(0,)),
        "data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_part_is_needed(name: str) -> None:
    protocol, run, promise = MUTATIONS[name]
    broken_promise, steps, _ = search(protocol, run)
    assert broken_promise == promise, "\n".join(steps)
