"""Kernels of a program on GPUs, by XLA's profiler: their shares of the time, and which overlap."""

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

CPU_REASON = "kernels are traced on GPUs only: on a CPU, XLA's trace has no times of custom calls"
_SMALLEST_SHARE = 0.005
_NO_COMPUTATION = ("nccl", "Memcpy", "Memset")


class Kernel(NamedTuple):
    """A kernel in the profiler: its full name, and nanoseconds."""

    name: str
    start: float
    duration: float

    @property
    def is_ours(self) -> bool:
        """Whether it is one of the ops."""
        return "jax_deepep" in self.name

    @property
    def computes(self) -> bool:
        """Whether it is neither an op nor a copy nor a collective."""
        return not self.is_ours and not any(word in self.name for word in _NO_COMPUTATION)


def trace_kernels(run: Callable[[], Any], folder: Path | None = None) -> list[list[Kernel]]:
    """Run a compiled program once under the profiler; return the kernels of each GPU of this process.

    The trace stays in a folder of this process in `folder`, for TensorBoard or XProf, if one is given.
    """
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary) if folder is None else folder / f"process_{jax.process_index()}"
        before = set(where.rglob("*.xplane.pb"))
        with jax.profiler.trace(str(where)):
            jax.block_until_ready(run())
        [path] = set(where.rglob("*.xplane.pb")) - before
        data = jax.profiler.ProfileData.from_file(str(path))
        return [
            [
                Kernel(event.name, event.start_ns, event.duration_ns)
                for line in plane.lines
                if line.name.startswith("Stream #")
                for event in line.events
            ]
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
        ]


def kernel_shares(run: Callable[[], Any]) -> dict[str, float]:
    """Run a compiled program once under the profiler; return each kernel's share on GPUs of this process."""
    return shares_of((kernel.name, kernel.duration) for of_gpu in trace_kernels(run) for kernel in of_gpu)


def shares_of(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return each kernel's share of the time of all, largest first; small ones are summed.

    Args:
        events: names in the profiler, and nanoseconds.
    """
    spent: dict[str, float] = {}
    for name, nanoseconds in events:
        spent[short_name(name)] = spent.get(short_name(name), 0) + nanoseconds
    total = sum(spent.values())
    shares = {name: spent[name] / total for name in sorted(spent, key=lambda name: -spent[name])}
    large = {name: share for name, share in shares.items() if share >= _SMALLEST_SHARE}
    rest = sum(shares.values()) - sum(large.values())
    return {**large, "others": rest} if len(large) < len(shares) else large


def overlapped_shares(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Return, for each kernel of our ops on one GPU, the share of its time beside computing kernels.

    Kernels of a name count together, in the order in which the first of each began.
    """
    spans: list[tuple[float, float]] = []  # of computing kernels, joined
    for start, end in sorted((k.start, k.start + k.duration) for k in kernels if k.computes):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    spent: dict[str, list[float]] = {}
    for kernel in sorted((k for k in kernels if k.is_ours), key=lambda k: k.start):
        until = kernel.start + kernel.duration
        beside = sum(max(0.0, min(end, until) - max(start, kernel.start)) for start, end in spans)
        total = spent.setdefault(short_name(kernel.name), [0.0, 0.0])
        total[0] += beside
        total[1] += kernel.duration
    return {name: beside / duration for name, (beside, duration) in spent.items() if duration}


def short_name(kernel: str) -> str:
    """Return a kernel's name without namespaces, template arguments, parameters and numbers of XLA."""
    plain = re.sub(r"[<(].*", "", kernel.replace("(anonymous namespace)::", "")).split()[-1:]
    return re.sub(r"_\d+$", "", plain[0].split("::")[-1]) if plain else kernel
