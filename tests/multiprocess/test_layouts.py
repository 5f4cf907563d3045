"""The same bits, forward and backward, however many processes hold the eight devices."""

import functools

import pytest
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses

pytestmark = starts_its_own_processes

ONE_PROCESS = (1, 8)
# Processes, devices of each. `test_conformance_under_launcher.py` compares two processes with the oracle.
LAYOUTS = [(4, 2), *(pytest.param(layout, marks=pytest.mark.nightly) for layout in ((2, 4), (8, 1)))]
DEADLINE_S = 120.0  # of one layout

CASES = [
    "expert-major",
    "token-major, bfloat16",
    "drops, alignment, bfloat16",
    "token-major, drops",
    "groups of neighbours",
    "groups far apart",
    "pairs",
    "two axes",
    "two nodes",
    "independent ops",
    "one inner function",
]


@functools.cache
def digests_by_case(num_processes: int, num_devices: int) -> dict[str, dict[str, str]]:
    """Run all cases in one layout; return the digest of every device's results, by case."""
    found: dict[str, dict[str, str]] = {case: {} for case in CASES}
    with RankProcesses("layouts", num_processes, num_devices=num_devices, deadline_s=DEADLINE_S) as run:
        run.finish({})
        for rank in range(num_processes):
            for case in CASES:
                report = run.wait_for_report(rank, case)
                assert report["repeatable"], f"{case} on process {rank}"
                if case == "groups of neighbours":  # of four
                    assert report["between_processes"] == (num_devices < 4)
                assert found[case].keys().isdisjoint(report["digests"])
                found[case] |= report["digests"]
        if num_processes > 1:
            run.assert_nothing_is_left()
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_results_do_not_depend_on_the_processes(layout: tuple[int, int], case: str) -> None:
    expected = digests_by_case(*ONE_PROCESS)[case]
    assert len(expected) == 8
    assert digests_by_case(*layout)[case] == expected


def test_devices_have_different_results() -> None:
    for case, digests in digests_by_case(*ONE_PROCESS).items():
        assert len(set(digests.values())) == 8, case
