"""The model of links against measurements of ops, of other libraries by their authors and of this one."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_deepep.bench.copies import Copies, drawn_copies, uniform_copies
from jax_deepep.bench.link_model import (
    NVLINK4,
    NVLINK5,
    Machine,
    Mode,
    Op,
    overlapped_us,
    phases,
    row_bytes,
)
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.report import Table
from jax_deepep.capacity import Layout
from jax_deepep.quantization.formats import Format


@dataclass(frozen=True)
class Check:
    """One measurement and the model's number for it.

    Attributes:
        source: who measured what; the title of its table.
        case: the row there.
        reported, modelled: us.
        gives_constant: whether a constant of the model was taken from it, so that it checks nothing.
    """

    source: str
    case: str
    reported: float
    modelled: float
    gives_constant: bool = False

    @property
    def error(self) -> float:
        """Modelled over reported, less 1."""
        return self.modelled / self.reported - 1


# DeepSeek-V3's sizes, which all of them have in common.
_V3 = Problem(hidden=7168, topk=8, experts=256, layout="token", capacity="worst")
# "H800 (~160 GB/s NVLink maximum bandwidth)", docs/legacy.md of DeepEP; memory nominal.
_H800 = dataclasses.replace(NVLINK4, name="H800", pulled=160, pushed=160, memory=0.9 * 3350)


def _of_v3(ranks: int, tokens: int, layout: Layout = "token") -> Problem:
    return dataclasses.replace(_V3, devices=ranks, tokens=tokens, layout=layout)


def _copies(problem: Problem, nodes: int) -> Copies:
    # "top-4 groups": a group is a node there, and up to 4 nodes are not limited by it.
    if nodes <= 4:
        return uniform_copies(problem, nodes)
    return drawn_copies(problem, nodes, "group_limited", num_groups=nodes, topk_groups=4)


# https://github.com/deepseek-ai/DeepEP, docs/legacy.md at 0297fc8, "Normal kernels with NVLink and RDMA
# forwarding": H800, CX7 400 Gb/s, 4096 tokens, top-4 groups, FP8 dispatch, BF16 combine; GB/s. 24 SMs, as in
# its tests. Bytes: rows received, own rank's included (1 node); (token, node) pairs, own node's included.
_DEEPEP_V1 = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
# The same, "Low-latency kernels with pure RDMA": 128 tokens; us. EP8 exceeds a network card: over NVLink.
_DEEPEP_V1_LL = {
    8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)
}  # fmt: skip
# The same, README.md, "Performance" (V2): 8192 tokens ("8K"), FP8 dispatch, BF16 combine; GB/s of logical
# bandwidth, local traffic included: (machine, ranks, SMs).
_DEEPEP_V2 = {
    ("SM90", 16, 12): (90, 81), ("SM90", 32, 6): (61, 61), ("SM100", 16, 12): (90, 91),
    ("SM100", 8, 64): (726, 740), ("SM100", 8, 24): (643, 675),
}  # fmt: skip
# Its bytes of a row in dispatch: besides data and scales 8 indices of int64 and 8 weights of float32.
_V2_RECORD = 8 * 8 + 8 * 4
# https://github.com/NVIDIA/nccl, contrib/nccl_ep/README.md at 3619159, "Reference performance numbers": H100,
# 8 GPUs per node, low latency, BF16, 128 tokens, NCCL 2.29; GB/s. Bytes: a row per (token, expert), which it
# sends to experts directly; later versions send one per rank between nodes (issue 2088 of that repository).
_NCCL_EP_LL = {8: (224.3, 185.2), 16: (76.7, 73.0), 32: (53.6, 50.0), 64: (48.8, 43.8)}


_FP8_DISPATCH: tuple[tuple[Op, Format | None], ...] = (("dispatch", "fp8"), ("combine", None))
_BFLOAT16: tuple[tuple[Op, Format | None], ...] = (("dispatch", None), ("combine", None))


def published() -> Iterator[Check]:
    """Yield the published tables of DeepEP V1 and V2 and NCCL EP."""
    for ranks, rates in _DEEPEP_V1.items():
        source = "DeepEP V1, normal, 8 H800 per node, 24 SMs"
        yield from _throughput(source, f"EP{ranks}", _of_v3(ranks, 4096), _H800, 24, rates)
    for (chip, ranks, num_sms), rates in _DEEPEP_V2.items():
        machine = {"SM90": NVLINK4, "SM100": NVLINK5}[chip]
        pushing = dataclasses.replace(machine, pulled=machine.pushed)
        constant = "dispatch" if (chip, ranks) == ("SM90", 16) else ""
        case = f"{chip} EP{ranks} {num_sms} SMs"
        source, problem = "DeepEP V2, 8 GPUs per node", _of_v3(ranks, 8192)
        yield from _throughput(source, case, problem, pushing, num_sms, rates, _V2_RECORD, constant)
    for ranks, times in _DEEPEP_V1_LL.items():
        for (op, wire), reported in zip(_FP8_DISPATCH, times, strict=True):
            modelled = _row_per_expert(op, ranks, _H800, wire)
            source = "DeepEP V1, low latency, 8 H800 per node, T = 128"
            yield Check(source, f"EP{ranks} {op}", reported, modelled)
    for ranks, logical in _NCCL_EP_LL.items():
        for (op, wire), rate in zip(_BFLOAT16, logical, strict=True):
            modelled = _row_per_expert(op, ranks, NVLINK4, wire)
            source = "NCCL EP, low latency, 8 H100 per node, T = 128"
            yield Check(source, f"EP{ranks} {op}", 128 * 8 * row_bytes(_V3, wire) / rate / 1e3, modelled)


def _throughput(
    source: str, case: str, problem: Problem, machine: Machine, num_sms: int, rates: tuple[float, float],
    record: int = 0, constant: str = "",
) -> Iterator[Check]:  # fmt: skip
    """Yield both ops of a row in GB/s, own rank and node included; `record` more bytes a row in dispatch."""
    nodes = problem.devices // 8
    copies = _copies(problem, nodes)
    for (op, wire), rate in zip(_FP8_DISPATCH, rates, strict=True):
        row = row_bytes(problem, wire) + (record if op == "dispatch" else 0)
        reported = problem.tokens * (copies.ranks if nodes == 1 else copies.nodes) * row / rate / 1e3
        of = phases(op, problem, nodes, copies, machine, num_sms=num_sms, wire=wire, encoded=wire is not None)
        yield Check(source, f"{case} {op}", reported, of.pipelined, op == constant)


def _row_per_expert(op: Op, ranks: int, machine: Machine, wire: Format | None) -> float:
    problem, nodes = _of_v3(ranks, 128), ranks // 8
    return phases(
        op, problem, nodes, uniform_copies(problem, nodes), machine, mode="low_latency", num_sms=132,
        wire=wire, encoded=wire is not None, scheme="per_expert",
    ).pipelined  # fmt: skip


# This library, T = 4096, bfloat16, device us (dispatch, combine) of results/two_h200_nvlink.md (4e210b9) and
# four_h200_nvlink.md (50299ae), "Ops by SMs": (ranks, layout, SMs).
_THROUGHPUT: dict[tuple[int, Layout, int], tuple[float, float]] = {
    (2, "token", 16): (219, 199), (2, "token", 24): (210, 192), (2, "token", 64): (208, 190),
    (2, "expert", 16): (553, 634), (2, "expert", 24): (384, 496), (2, "expert", 64): (241, 356),
    (4, "token", 8): (705, 612), (4, "token", 24): (507, 515), (4, "token", 64): (520, 521),
    (4, "expert", 8): (1119, 1562), (4, "expert", 24): (509, 713), (4, "expert", 64): (524, 607),
}  # fmt: skip
# Two H200, T = 4096, 50299ae, "Low precision" of RESULTS.md: (format, layout, SMs).
_LOW_PRECISION: dict[tuple[Format, Layout, int], tuple[float, float | None]] = {
    ("fp8", "token", 24): (211, 278), ("nvfp4", "token", 24): (290, None),
    ("fp8", "token", 64): (153, 149), ("nvfp4", "token", 64): (151, None),
    ("fp8", "expert", 24): (417, 653), ("nvfp4", "expert", 24): (480, None),
    ("fp8", "expert", 64): (219, 325), ("nvfp4", "expert", 64): (241, None),
}  # fmt: skip
# Two H200, d22fa80, "Decoding" of two_h200_nvlink.md, low latency, 96 SMs, single ops: (layout, T).
_LOW_LATENCY: dict[tuple[Layout, int], tuple[float, float]] = {
    ("token", 1): (5.58, 5.95), ("token", 8): (5.76, 6.59), ("token", 32): (7.89, 6.70),
    ("token", 128): (14.0, 12.0), ("expert", 1): (6.14, 6.50), ("expert", 8): (6.14, 7.18),
    ("expert", 32): (8.58, 8.98), ("expert", 128): (16.5, 14.5),
}  # fmt: skip
# Four H200, 2247f43, "Decoding, kernels alone" of four_h200_nvlink.md, pairs of a chain: (layout, T).
_PAIRS: dict[tuple[Layout, int], float] = {
    ("token", 1): 15.3, ("token", 8): 17.8, ("token", 32): 25.8, ("token", 128): 54.6,
    ("token", 256): 91.6, ("expert", 1): 17.1, ("expert", 8): 18.2, ("expert", 32): 26.5,
    ("expert", 128): 60.5, ("expert", 256): 102.1,
}  # fmt: skip
# "Overlap" of RESULTS.md, a97f1d1: beside a matmul of 1425 us, ops in flight that take 24 SMs.
_MATMUL_US = 1425
_BESIDE_MATMUL: dict[tuple[Layout, tuple[Op, ...]], float] = {
    ("token", ("dispatch",)): 1574, ("expert", ("dispatch",)): 1583, ("expert", ("dispatch", "combine")): 1837
}  # fmt: skip


def measured() -> Iterator[Check]:
    """Yield the measurements of this library on two and four H200."""
    source = "This library, throughput, bfloat16, H200, T = 4096"
    for (ranks, layout, num_sms), times in _THROUGHPUT.items():
        for (op, _), reported in zip(_BFLOAT16, times, strict=True):
            case = f"{ranks} GPUs, {layout}-major, {num_sms} SMs, {op}"
            yield Check(source, case, reported, _ours(op, _of_v3(ranks, 4096, layout), "throughput", num_sms))
    source = "This library, low precision, two H200, T = 4096"
    for (wire, layout, num_sms), both in _LOW_PRECISION.items():
        for (op, _), known in zip(_BFLOAT16, both, strict=True):
            if known is not None:
                modelled = _ours(op, _of_v3(2, 4096, layout), "throughput", num_sms, wire)
                constant = (op, layout, num_sms) == ("dispatch", "token", 24)
                yield Check(source, f"{wire}, {layout}-major, {num_sms} SMs, {op}", known, modelled, constant)
    source = "This library, low latency, H200"
    for (layout, tokens), times in _LOW_LATENCY.items():
        for (op, _), reported in zip(_BFLOAT16, times, strict=True):
            modelled = _ours(op, _of_v3(2, tokens, layout), "low_latency", 96)
            constant = (layout, tokens) == ("token", 1)
            case = f"2 GPUs, {layout}-major, T = {tokens}, {op}"
            yield Check(source, case, reported, modelled, constant)
    for (layout, tokens), reported in _PAIRS.items():
        modelled = sum(_ours(op, _of_v3(4, tokens, layout), "low_latency", 96) for op, _ in _BFLOAT16)
        case = f"4 GPUs, {layout}-major, T = {tokens}, dispatch + combine"
        yield Check(source, case, reported, modelled)
    source = "This library, in flight beside a matmul of 1425 us, two H200, T = 4096"
    for (layout, ops), reported in _BESIDE_MATMUL.items():
        ops_us = sum(_ours(op, _of_v3(2, 4096, layout), "throughput", 24) for op in ops)
        modelled = overlapped_us(_MATMUL_US, ops_us, 24, NVLINK4)
        yield Check(source, f"{layout}-major, {' + '.join(ops)}", reported, modelled)


def _ours(op: Op, problem: Problem, mode: Mode, num_sms: int, wire: Format | None = None) -> float:
    copies = uniform_copies(problem, 1)
    return phases(op, problem, 1, copies, NVLINK4, mode=mode, num_sms=num_sms, wire=wire).pipelined


def error_tables(checks: list[Check]) -> list[Table]:
    """Return a table of the errors of all sources, constants left out, and one for each source."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.source, []).append(check)
    tables, summary = [], []
    for source, group in groups.items():
        cells = [
            [check.case, f"{check.reported:.1f}", f"{check.modelled:.1f}",
             "constant" if check.gives_constant else f"{100 * check.error:+.0f}"]
            for check in group
        ]  # fmt: skip
        tables.append(Table(source, ["case", "reported us", "modelled us", "error %"], cells))
        errors = 100 * np.array([check.error for check in group if not check.gives_constant])
        signed = (np.median(errors), errors.min(), errors.max())
        summary.append(
            [source, str(len(errors)), f"{np.median(np.abs(errors)):.0f}", *(f"{e:+.0f}" for e in signed)]
        )
    columns = ["source", "rows", "median size of the error %", "median %", "lowest %", "highest %"]
    return [Table("Errors of the model", columns, summary, text_columns=("source",)), *tables]
