"""Ranks keep the promises of their protocol between nodes, however they interleave, and need all of it."""

from typing import NamedTuple

import pytest
from protocol_chunks import Chunked
from protocol_internode import Internode
from protocol_low_latency_nodes import LowLatencyNodes
from protocol_search import Protocol, find_violation

pytestmark = pytest.mark.any_python

DISPATCH = Internode().protocol()
COMBINE = Internode(returns=True).protocol()
OVER_A_NETWORK = Internode(returns=True, asynchronous=True).protocol()

LOW_LATENCY = {
    "dispatch": LowLatencyNodes().protocol(),
    "combine": LowLatencyNodes(kinds=("combine",)).protocol(),
    "both": LowLatencyNodes(kinds=("dispatch", "combine")).protocol(),
}


class Run(NamedTuple):
    """Nodes, ranks per node, ops, whether a concurrent op may fail, and the ranks that may; None for all."""

    num_nodes: int
    ranks_per_node: int
    num_ops: int
    concurrent: bool = False
    failing: tuple[int, ...] | None = None


# With 2 × 2 ranks, all of them are alike, so that one that may fail stands for any.
RUNS = [Run(2, 1, 2, True), Run(2, 1, 3), Run(2, 2, 2, failing=())]
# Of the two combines, the one over a network has more states.
LARGE_RUNS = [Run(3, 1, 1), Run(2, 2, 1, failing=(0,))]
NIGHTLY = [
    Run(2, 1, 3, True),
    Run(3, 1, 2),
    Run(2, 2, 2, failing=(0,)),
    *(Run(2, 2, 1, failing=pair) for pair in ((0, 1), (0, 2), (0, 3))),
]

CHUNKS = {"rows": Chunked().protocol(), "rows over a network": Chunked(asynchronous=True).protocol()}
CHUNKS_OF_SUMS = {
    "sums": Chunked(returns=True).protocol(),
    "sums over a network": Chunked(returns=True, asynchronous=True).protocol(),
}
MORE_CHUNKS = {
    "5 of rows": Chunked(num_chunks=5).protocol(),
    "4 of sums over a network": Chunked(num_chunks=4, returns=True, asynchronous=True).protocol(),
}
CHUNKS_NIGHTLY = [
    Run(2, 1, 2, True), Run(2, 1, 3), Run(3, 1, 1), Run(2, 2, 2, failing=()), Run(2, 2, 1, failing=(0,))
]  # fmt: skip

LOW_LATENCY_RUNS = [Run(2, 1, 4, True), Run(3, 1, 1), Run(2, 2, 4, failing=()), Run(2, 2, 1, failing=(0,))]
LOW_LATENCY_NIGHTLY = [
    Run(3, 1, 2),
    *(Run(2, 2, num_ops, failing=(0,)) for num_ops in (2, 3)),
    *(Run(2, 2, 1, failing=pair) for pair in ((0, 1), (0, 2), (0, 3))),
    Run(3, 2, 2, failing=()),
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


LARGE = {"dispatch": DISPATCH, "combine over a network": OVER_A_NETWORK}
PROTOCOLS = {**LARGE, "combine": COMBINE}
CASES = [
    pytest.param(protocol, run, marks=marks, id=f"{mode}-{'-'.join(map(str, run))}-{verb}")
    for mode, protocols, runs, marks in [
        ("throughput", PROTOCOLS, RUNS, ()),
        ("throughput", LARGE, LARGE_RUNS, ()),
        ("throughput", {"combine": COMBINE}, LARGE_RUNS, pytest.mark.nightly),
        ("throughput", PROTOCOLS, NIGHTLY, pytest.mark.nightly),
        ("chunks", CHUNKS | CHUNKS_OF_SUMS | MORE_CHUNKS, [Run(2, 1, 2)], ()),
        ("chunks", CHUNKS, [Run(2, 2, 1, failing=())], ()),
        ("chunks", CHUNKS | CHUNKS_OF_SUMS, CHUNKS_NIGHTLY, pytest.mark.nightly),
        ("low latency", LOW_LATENCY, LOW_LATENCY_RUNS, ()),
        ("low latency", LOW_LATENCY, LOW_LATENCY_NIGHTLY, pytest.mark.nightly),
    ]
    for run in runs
    for verb, protocol in protocols.items()
]


@pytest.mark.parametrize(("protocol", "run"), CASES)
def test_promises_are_kept(protocol: Protocol, run: Run) -> None:
    broken_promise, steps, num_states = search(protocol, run)
    assert broken_promise is None, "\n".join(steps)
    assert num_states > 100 * run.num_nodes * run.ranks_per_node


# Changes to the protocol, each of which breaks a promise.
ARRIVED, STAGED = "Exchange: PutFlag(arrived)", "Exchange: StoreReleaseSystem(staged)"
MUTATIONS = {
    "rows are staged before the staging is free": (
        Internode(waits_for_staging=False).protocol(), Run(2, 1, 2), "addresses"
    ),
    "left is put to other nodes before the ranks of the node have left": (
        Internode(leaves_early=True).protocol(), Run(2, 2, 2, failing=()), "addresses"
    ),
    "rows are staged after the flag": (
        DISPATCH.moved("Stage rows", after=ARRIVED), Run(2, 1, 1), "addresses"
    ),
    "rows are staged after they have been put": (
        Internode(asynchronous=True).protocol().moved("Stage rows", after="Exchange: WaitForOtherNodes"),
        Run(2, 1, 1),
        "addresses",
    ),
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
        COMBINE.moved("Last loads", after="Return: Stopped").moved("Stage sums", after="Last loads"),
        Run(2, 2, 1, failing=(0,)),
        "data",
    ),
}  # fmt: skip

TWO_CHUNKS = Chunked(num_chunks=2)
CHUNK_MUTATIONS = {
    "no credit is awaited": (Chunked(credits_before=None).protocol(), Run(2, 1, 1), "addresses"),
    "puts read a slot that the next chunk has written": (
        Chunked(credits_before=None, asynchronous=True).protocol(), Run(2, 1, 1), "addresses"
    ),
    "the credit of an earlier chunk is awaited": (
        Chunked(num_chunks=4, credits_before=3).protocol(), Run(2, 1, 1), "addresses"
    ),
    "the credit of a chunk that has not been put is awaited": (
        Chunked(num_chunks=4, credits_before=1).protocol(), Run(2, 1, 1, failing=()), "progress"
    ),
    "a credit is missing": (
        Chunked(returns_credits=False).protocol(), Run(2, 1, 1, failing=()), "progress"
    ),
    "a credit is returned before the chunk is read": (
        Chunked().protocol().moved("Credit 0", after="WaitUntilStaged"), Run(2, 1, 1), "addresses"
    ),
    "a credit for sums is returned before they are read": (
        Chunked(returns=True).protocol().moved("Credit 0", after="Put 1: PutFlag"), Run(2, 1, 1), "addresses"
    ),
    "a credit is returned before the node has read the chunk": (
        Chunked(awaits_node=False).protocol(), Run(2, 2, 1, failing=()), "addresses"
    ),
    "flags of chunks do not count ops": (Chunked(most_chunks=0).protocol(), Run(2, 1, 2), "addresses"),
    "the last chunk of an op has the flag of the first one of the next": (
        Chunked(most_chunks=2, returns=True).protocol(), Run(2, 1, 2), "addresses"
    ),
    "a chunk is staged after its flag": (
        Chunked().protocol().moved("Stage 2", after="Put 2: PutFlag"), Run(2, 1, 1), "addresses"
    ),
    "a rank says that it has staged a chunk before other nodes have put it": (
        TWO_CHUNKS.protocol().moved("Staged 1", after="Begin loads"),
        Run(2, 2, 1, failing=()),
        "addresses",
    ),
    "no rank waits until its peers have staged a chunk": (
        TWO_CHUNKS.protocol().without("Wait until staged 1"), Run(2, 2, 1, failing=()), "addresses"
    ),
    "a later chunk of sums is returned without a check for failed peers": (
        Chunked(num_chunks=2, returns=True, checks_chunks=False).protocol(),
        Run(2, 2, 1, failing=(0,)),
        "data",
    ),
}  # fmt: skip

PUT_ARRIVED, RETURN = "Send: PutStaged(arrived)", "Return: PutStaged(arrived)"
PASSED_ON = "PassOn: StoreReleaseSystem(staged)"
LOW_LATENCY_MUTATIONS = {
    "windows have one bank": (LowLatencyNodes(window_banks=1).protocol(), Run(2, 2, 2, failing=()), "data"),
    "what other nodes put has one bank": (
        LowLatencyNodes(received_banks=1).protocol(), Run(2, 1, 2), "data"
    ),
    "sums that other nodes put have one bank": (
        LowLatencyNodes(kinds=("combine",), received_banks=1).protocol(), Run(2, 1, 2), "data"
    ),
    "what is put has one bank": (LowLatencyNodes(sent_banks=1).protocol(), Run(2, 1, 2), "data"),
    "sums that are put have one bank": (
        LowLatencyNodes(kinds=("combine",), sent_banks=1).protocol(), Run(2, 1, 2), "data"
    ),
    "tags have one bank": (LowLatencyNodes(tag_banks=1).protocol(), Run(2, 1, 2), "no false alarm"),
    "rows are staged after the flag": (
        LOW_LATENCY["dispatch"].moved("Stage rows", after=PUT_ARRIVED), Run(2, 1, 1), "data"
    ),
    "flags between nodes are no release stores, and no fence precedes them": (
        LowLatencyNodes(releases=False).protocol().without("Send: IsLastBlock"), Run(2, 1, 1), "data"
    ),
    "entries are passed on before other nodes have put": (
        LOW_LATENCY["dispatch"].moved(PASSED_ON, after=PUT_ARRIVED), Run(2, 2, 1, failing=()), "data"
    ),
    "entries are not passed on": (
        LowLatencyNodes(passes_on=False).protocol(), Run(2, 2, 1, failing=()), "data"
    ),
    "no rank waits until entries are passed on": (
        LOW_LATENCY["dispatch"].without("WaitUntilStaged"), Run(2, 2, 1, failing=()), "data"
    ),
    "only ops with rows for other nodes send flags": (
        LowLatencyNodes(flags_all=False).protocol(), Run(2, 1, 2), "stays broken"
    ),
    "sums are returned before the ranks of the node have pushed theirs": (
        LOW_LATENCY["both"].moved("Combine: WaitForSignals", after=RETURN)
        .moved("Combine: first loads", after="Combine: WaitForSignals")
        .moved("Combine: last loads", after="Combine: first loads"),
        Run(2, 2, 3, failing=()),
        "data",
    ),
    "an op begins on a broken communicator": (
        LowLatencyNodes(looks=False).protocol(), Run(2, 1, 2), "no false alarm"
    ),
    "waits for other nodes are unbounded": (
        LowLatencyNodes(bounded=False).protocol(), Run(2, 1, 1), "progress"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("protocol", "run", "promise"),
    [
        pytest.param(*mutation, id=f"{mode}: {name}")
        for mode, mutations in (
            ("throughput", MUTATIONS),
            ("chunks", CHUNK_MUTATIONS),
            ("low latency", LOW_LATENCY_MUTATIONS),
        )
        for name, mutation in mutations.items()
    ],
)
def test_every_part_is_needed(protocol: Protocol, run: Run, promise: str) -> None:
    broken_promise, steps, _ = search(protocol, run)
    assert broken_promise == promise, "\n".join(steps)
