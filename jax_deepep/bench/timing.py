"""Rounds in which all contenders take turns, and what is kept of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

MIN_ROUNDS = 5  # below this, percentiles mean nothing

# Before each run, so that it pays less for what the one before left behind: right after a large run of
# xla, dispatch + combine took twice the CPU time natively. 0.3 s did not remove all of it either.
SETTLE_S = 0.03


def wall_clock(run: Callable[[], Any]) -> float:
    """Return seconds from the launch until all results are there."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    del result  # freed outside of the measurement
    return seconds


@dataclass(frozen=True)
class Spread:
    """Seconds of many runs.

    Attributes:
        median, p10, p90: seconds.
        runs: how many there were.
    """

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Summarise `seconds`."""
        p10, median, p90 = np.percentile(seconds, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), len(seconds))

    def text(self, per_second: float, digits: int) -> str:
        """Return "median (p10–p90)" in a unit of which a second has `per_second`."""
        median, p10, p90 = (f"{per_second * s:.{digits}f}" for s in (self.median, self.p10, self.p90))
        return f"{median} ({p10}–{p90})"


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int, limit_s: float
) -> dict[str, list[float]]:
    """Time every contender once per round, so that a slow moment of the machine meets all of them.

    Args:
        contenders: what to run, by name; every one runs twice before anything counts.
        repeats: rounds; fewer, but at least MIN_ROUNDS, where they would take longer than limit_s.
        limit_s: seconds.

    Returns:
        Seconds of each round by name; entry i of all names is of one round.
    """
    names = list(contenders)
    for name in names:
        wall_clock(contenders[name])
    round_s = sum(SETTLE_S + wall_clock(contenders[name]) for name in names)
    rounds = min(repeats, max(MIN_ROUNDS, int(limit_s / max(round_s, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in turns(names, rounds):
        time.sleep(SETTLE_S)
        seconds[name].append(wall_clock(contenders[name]))
    return seconds


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round.

    Another one begins each time: none always comes after the same one, whose traces are in the cache.
    """
    for number in range(rounds):
        for place in range(len(names)):
            yield names[(number + place) % len(names)]
