"""Many steps with random routing, random stalls, and every row checked.

A default run takes some seconds. Before a release, 10,000 steps, which take some minutes on two cores:

    JAX_DEEPEP_STRESS_STEPS=10000 pytest -s tests/multiprocess/test_stress.py

It prints resident memory, file descriptors and threads of every process after its first steps and after its
last. Figures that grow with the number of steps are a leak.
"""

import faulthandler
import os

import pytest
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses, pretended_hosts

pytestmark = starts_its_own_processes

NUM_STEPS = int(os.environ.get("JAX_DEEPEP_STRESS_STEPS", "300"))
NUM_PROCESSES = 4
DEADLINE_S = 90 + 0.2 * NUM_STEPS

# The allocators of XLA and Python keep freed memory: this much is noise, independent of the steps.
GROWTH_MIB = 24
GROWTH_DESCRIPTORS = 2
GROWTH_THREADS = 8  # completions run on threads that come and go


@pytest.fixture
def own_deadline(request: pytest.FixtureRequest) -> None:
    """Replace the suite's deadline, which is meant for short tests."""
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.usefixtures("own_deadline")
@pytest.mark.parametrize(
    ("platform", "ranks_per_node", "environment"),
    [
        pytest.param("cpu", NUM_PROCESSES, {}, id="cpu"),
        pytest.param("cpu", NUM_PROCESSES // 2, {}, id="cpu, between nodes"),
        pytest.param("cuda", 2, {}, id="cuda, between nodes", marks=pytest.mark.gpu),
        pytest.param("cuda", 1, pretended_hosts(1), id="cuda, between hosts", marks=pytest.mark.gpu),
    ],
)
def test_nothing_is_lost_mixed_up_or_leaked(
    platform: str, ranks_per_node: int, environment: dict[str, str]
) -> None:
    processes = RankProcesses(
        "stress", NUM_PROCESSES, (NUM_STEPS, ranks_per_node), platform=platform, environment=environment,
        deadline_s=DEADLINE_S,
    )  # fmt: skip
    with processes as run:
        run.finish({})
        reports = [run.wait_for_report(rank, "figures") for rank in range(NUM_PROCESSES)]
        for rank, report in enumerate(reports):
            print(f"process {rank}, {NUM_STEPS} steps: {report}")
        run.assert_nothing_is_left()
    for report in reports:
        before, after = report["before"], report["after"]
        assert after["resident_mib"] - before["resident_mib"] < GROWTH_MIB
        assert after["descriptors"] - before["descriptors"] <= GROWTH_DESCRIPTORS
        assert after["threads"] - before["threads"] <= GROWTH_THREADS
        assert (
            after["segments_open"] == before["segments_open"] == (ranks_per_node if platform == "cpu" else 0)
        )
    assert sum(report["rows_sent"] for report in reports) == sum(
        report["rows_received"] for report in reports
    )
