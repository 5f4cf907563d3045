"""A model of dispatch and combine over both links: NVLink inside nodes, a network card per GPU between them.

Between nodes a token crosses once per node, to the rank with the same index there, and is pulled (throughput
mode) or pushed on (low-latency mode) inside that node. On the way back a node sums before it sends. Every
constant is a measurement of parts, a published number or nominal, and says which; none is fitted to the ops
that `link_checks` compares, except where it says so.
"""

from dataclasses import dataclass
from typing import Literal

from jax_deepep.bench.copies import Copies
from jax_deepep.bench.problem import Problem
from jax_deepep.quantization.formats import Format
from jax_deepep.quantization.packed_rows import packed_size

Op = Literal["dispatch", "combine"]
Mode = Literal["throughput", "low_latency"]
# "two_level" is what the top of this file describes. "per_expert", as in others' low-latency kernels, sends a
# row straight to the rank of every chosen expert, even if they share it.
Scheme = Literal["two_level", "per_expert"]

NUM_SMS: dict[Mode, int] = {"throughput": 24, "low_latency": 96}  # by default on H200; fewer for few rows

# Bytes per second of an SM, GB/s: "What an SM moves" of results/one_h100.md. Token-major copies write 49, and
# expert-major ones, which read a row once per four writes, 58; hence reading at 237 and writing at 61.8:
# 1/49 = 1/r + 1/w and 1/58 = 1/(4 r) + 1/w. Sums read 75.
SM_READS, SM_WRITES, SM_SUMS = 237.0, 61.8, 75.0

# GB/s of bfloat16 rows that an SM encodes, or decodes: from dispatch, token-major, 24 SMs ("Low precision" of
# RESULTS.md: 211 and 290 us) less START_US, for encoding T rows and then decoding the 1.9965 T received
# (R = 2). fp8_ue8m0 and mxfp8 were not measured with these kernels, and count as fp8.
SM_CODES: dict[str, float] = {"fp8": 38.6, "fp8_ue8m0": 38.6, "mxfp8": 38.6, "nvfp4": 27.3}

# Starting, counting and meeting, in us: single ops at T = 1, token-major, "Decoding" of
# results/two_h200_nvlink.md.
START_US: dict[tuple[Mode, Op], float] = {
    ("throughput", "dispatch"): 21.1, ("throughput", "combine"): 19.9,
    ("low_latency", "dispatch"): 5.58, ("low_latency", "combine"): 5.95,
}  # fmt: skip

# What crossing to another node adds, in us: a put with a signal one way, half of the 16.7 us there and back
# of NCCL GIN over GDAKI (https://arxiv.org/abs/2511.15076, small messages, H100), and a flag to the local
# ranks (1.3, RESULTS.md).
HOP_US = 16.7 / 2 + 1.3

# The part of its nominal rate that a network card carries: DeepEP V2, EP 8 x 2, dispatch at 90 GB/s of
# logical bandwidth, half of which stays in the node (its README; `_DEEPEP_V2` of link_checks.py).
NETWORK_SHARE = 0.9


@dataclass(frozen=True)
class Machine:
    """Links and memory of a GPU; GB/s, the links' in each direction with both in use.

    Attributes:
        name: of the links.
        pulled, pushed: over NVLink.
        network: of its network card.
        memory: reads and writes.
        num_sms: in total.
    """

    name: str
    pulled: float
    pushed: float
    network: float
    memory: float
    num_sms: int


_CX7 = 50 * NETWORK_SHARE  # 400 Gbit/s
# The "link" table of results/two_h200_nvlink.md: pulled 335 to 337, pushed 365 by 132 SMs. Memory, here and
# below: 0.9 of nominal (assumed).
NVLINK4 = Machine("NVLink 4, CX7", 335, 365, _CX7, 0.9 * 4800, 132)
# Not measured: twice NVLink 4, as nominal rates are (900 and 450); memory and SMs are those of B200, and an
# SM is as fast as one of H200 (assumed).
NVLINK5 = Machine("NVLink 5, CX7", 670, 730, _CX7, 0.9 * 8000, 148)
MACHINES = {"nvlink4": NVLINK4, "nvlink5": NVLINK5}


def row_bytes(problem: Problem, wire: Format | None) -> int:
    """Return the bytes of a row on links, plain for None."""
    if wire is None:
        return problem.row_bytes
    return packed_size(wire, problem.hidden)


@dataclass(frozen=True)
class Phases:
    """The parts of one op on the busiest rank, in us.

    Attributes:
        start: launch, counting, flags.
        first: what is done before any row crosses a link: encoding, sums over local experts.
        network: rows between nodes.
        own_node: rows between the ranks of a node that came from, or go to, this node's own tokens.
        other_nodes: those of other nodes' tokens: after the network in dispatch, before it in combine.
        last: copies out of windows; the sum over nodes.
    """

    start: float
    first: float
    network: float
    own_node: float
    other_nodes: float
    last: float

    @property
    def in_turn(self) -> float:
        """Time if ranks wait for all of a node's rows: only the node's own rows move beside the network."""
        return self.start + self.first + max(self.network, self.own_node) + self.other_nodes + self.last

    @property
    def pipelined(self) -> float:
        """Time if rows pass on in small chunks: the slower link hides the other."""
        return self.start + self.first + max(self.network, self.own_node + self.other_nodes) + self.last


def phases(
    op: Op, problem: Problem, nodes: int, copies: Copies, machine: Machine, *, mode: Mode = "throughput",
    num_sms: int = NUM_SMS["throughput"], wire: Format | None = None, encoded: bool = False,
    scheme: Scheme = "two_level",
) -> Phases:  # fmt: skip
    """Return the model's times of one op.

    Inside a node rows cross NVLink while SMs copy or sum them: the slower of both counts. Encoding and sums
    over local experts (combine, expert-major) come before, one after the other. The kernels sum in parts
    while they pull, which so far hides little of the sums.

    Args:
        op: a gradient takes as long as the op that moves the same rows the other way. That of a weighted
            expert-major combine also reads the rows of the forward pass, which is left out: layers have none.
        problem: its tokens, hidden, topk, experts, devices (over all nodes), dtype and layout.
        nodes: G, a divisor of the devices.
        copies: of a token.
        machine: the links.
        mode, num_sms: of the op.
        wire: format of the rows on links; None for plain rows.
        encoded: rows come and stay in that format, so that nothing is encoded or decoded.
        scheme: how rows cross.
    """
    tokens, local = problem.tokens, problem.devices // nodes
    wide, row = problem.row_bytes, row_bytes(problem, wire)
    record = 16 * problem.topk + 4 if op == "dispatch" else 0  # experts, weights and rows of a token: staging
    pairs = tokens * copies.ranks * copies.busiest_rank  # rows of (token, rank) that a rank gets or returns
    crossing, passing = tokens * copies.nodes * copies.busiest_node, pairs
    if scheme == "per_expert":
        crossing = passing = float(tokens * problem.topk)

    def sm_us(num_bytes: float, rate: float) -> float:
        return _us(num_bytes, num_sms * rate)

    rows = pairs if problem.layout == "token" else float(tokens * problem.topk) * copies.busiest_rank
    codec = SM_CODES[wire] if wire and not encoded else None
    stored = row if encoded else wide  # bytes of a row in memory
    if op == "dispatch":
        first = sm_us(tokens * wide, codec) if codec else 0.0
        copied = sm_us(pairs * row, SM_READS) + sm_us(pairs * stored, SM_WRITES)
        if codec:
            copied = sm_us(pairs * wide, codec)
        copied += sm_us((rows - pairs) * stored, SM_WRITES)
        copied = max(copied, _us((pairs + rows) * stored, machine.memory))
        last = 0.0
    else:
        first = 0.0
        if problem.layout == "expert":
            first = max(sm_us(rows * wide, SM_SUMS), _us((rows + pairs) * wide, machine.memory))
        summed = (
            tokens * copies.ranks * copies.busiest_node
        )  # a node's ranks share the sums for other nodes evenly
        copied = sm_us(summed * wide, codec or SM_SUMS)
        last = sm_us(tokens * copies.nodes * wide, codec or SM_SUMS) if nodes > 1 else 0.0
        if codec:
            first += sm_us((pairs + tokens * copies.nodes * (nodes - 1) / nodes) * wide, codec)
    rate = machine.pulled if mode == "throughput" else machine.pushed
    linked = _us(passing * (local - 1) / local * row, rate)
    if mode == "low_latency":  # pushed into windows; copied, or summed, from there
        inside, last = linked, last + copied
    else:
        inside = max(linked, copied)
    return Phases(
        START_US[mode, op] + (HOP_US if nodes > 1 else 0.0),
        first,
        _us(crossing * (nodes - 1) / nodes * (row + record), machine.network),
        inside / nodes,
        inside * (nodes - 1) / nodes if scheme == "two_level" else 0.0,
        last,
    )


def _us(num_bytes: float, rate: float) -> float:
    return num_bytes / rate / 1e3


def overlapped_us(compute_us: float, op_us: float, num_sms: int, machine: Machine) -> float:
    """Return the time of an op and of a computation beside it, which has `num_sms` SMs less for `op_us`.

    What both lose to each other in memory and caches is not modelled: see `link_checks`.
    """
    return max(op_us, compute_us + op_us * num_sms / machine.num_sms)
