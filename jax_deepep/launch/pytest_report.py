"""One report of a pytest run from the events that the plugin of every rank has recorded.

The console has shown the lowest rank's report, unless that rank was ended before. This adds on which ranks
each test failed, and the text of failures that were not shown.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jax_deepep.launch.rank_identity import LaunchedRank
from jax_deepep.launch.rank_logs import rank_names

Event = dict[str, Any]


def pytest_summary(identities: Sequence[LaunchedRank], shown: int) -> list[str]:
    """Return the lines to print; none if no rank ran pytest or nothing failed.

    Args:
        identities: of the ranks of this host.
        shown: the rank whose console output has been shown.
    """
    events = {identity.rank: _events(identity) for identity in identities}
    lines = _differing_collections({rank: _collected(found) for rank, found in events.items() if found})
    has_reported = any("reported" in event for event in events.get(shown, []))
    failures: dict[tuple[str, str], dict[int, Event]] = defaultdict(dict)
    for rank, found in events.items():
        for event in found:
            if "failed" in event:
                failures[event["failed"], event["when"]][rank] = event
    for (test, when), by_rank in failures.items():
        during = "" if when == "call" else f" in {when}"
        lines.append(f"FAILED{during} {test} on {rank_names(by_rank)} of {rank_names(events)}")
        printed = {by_rank[shown]["message"]} if shown in by_rank and has_reported else set()
        for rank, event in by_rank.items():
            if event["message"] not in printed:
                printed.add(event["message"])
                lines.extend(f"  [{rank}] {line}" for line in event["text"].splitlines())
    stuck: dict[str, list[int]] = defaultdict(list)
    for rank, found in events.items():
        unfinished = _unfinished(found)
        if unfinished is not None:
            stuck[unfinished].append(rank)
    lines.extend(
        f"NOT FINISHED {test} on {rank_names(ranks)} of {rank_names(events)}" for test, ranks in stuck.items()
    )
    return lines


def _events(identity: LaunchedRank) -> list[Event]:
    try:
        text = identity.state_file("pytest").read_text()
    except FileNotFoundError:
        return []
    # A killed rank may leave half a line.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _collected(events: Sequence[Event]) -> list[str] | None:
    return next((event["collected"] for event in events if "collected" in event), None)


def _unfinished(events: Sequence[Event]) -> str | None:
    running = None
    for event in events:
        if "started" in event:
            running = event["started"]
        elif "finished" in event:
            running = None
    return running


def _differing_collections(collected: dict[int, list[str] | None]) -> list[str]:
    known = {rank: tests for rank, tests in collected.items() if tests is not None}
    if not known:
        return []
    lowest = min(known)
    lines = []
    for rank, tests in known.items():
        if tests != known[lowest]:
            length = min(len(tests), len(known[lowest]))
            first = next((i for i in range(length) if tests[i] != known[lowest][i]), length)
            mine, theirs = (ids[first] if first < len(ids) else "nothing" for ids in (known[lowest], tests))
            lines.append(
                f"the ranks did not collect the same tests: number {first + 1} is {mine} on rank {lowest} "
                f"and {theirs} on rank {rank}; collectives of different tests wait for each other forever"
            )
    return lines
