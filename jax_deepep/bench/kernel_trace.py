"""The share of each kernel in a program's time on GPUs, by XLA's profiler."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

CPU_REASON = "kernels are traced on GPUs only: on a CPU, XLA's trace has no times of custom calls"
_SMALLEST_SHARE = 0.005


def kernel_shares(run: Callable[[], Any]) -> dict[str, float]:
    """Run a compiled program once under the profiler; return each kernel's share on GPUs of this process."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        return shares_of(
            (event.name, event.duration_ns)
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream #")
            for event in line.events
        )


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


def short_name(kernel: str) -> str:
    """Return a kernel's name without namespaces, template arguments, parameters and numbers of XLA."""
    plain = re.sub(r"[<(].*", "", kernel.replace("(anonymous namespace)::", "")).split()[-1:]
    return re.sub(r"_\d+$", "", plain[0].split("::")[-1]) if plain else kernel
