"""Which rank failed first, and reports on ranks that ended before."""

import itertools
import signal
import sys
from pathlib import Path

import pytest
from launcher_runs import launch, launcher, program, two_hosts
from own_processes import starts_its_own_processes

from jax_deepep.launch.rank_ends import RankEnd, end_by_status, first_failure

pytestmark = starts_its_own_processes

KILLED, ABORTED, RAISED = 128 + signal.SIGKILL, 128 + signal.SIGABRT, 1


def end(rank: int, status: int, when: float, sent: tuple[int, ...] = (), by_jax: bool = False) -> RankEnd:
    return end_by_status(rank, status, when, sent=sent, aborted_by_jax=by_jax)


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([end(0, RAISED, 1.0), end(1, KILLED, 1.4)], 1),  # broken connections are seen before the death
        ([end(0, RAISED, 1.0), end(1, ABORTED, 1.4)], 1),
        ([end(0, ABORTED, 1.0), end(1, KILLED, 1.4)], 1),
        ([end(2, KILLED, 1.1), end(1, KILLED, 1.0)], 1),
        ([end(2, RAISED, 1.0), end(1, RAISED, 1.0), end(0, 0, 0.5)], 1),  # of one poll
        ([end(0, ABORTED, 1.0, by_jax=True), end(1, RAISED, 1.4)], 1),
        ([end(0, 128 + signal.SIGTERM, 1.0, sent=(signal.SIGTERM,)), end(1, RAISED, 1.4)], 1),
    ],
)
def test_of_failures_within_a_second_the_likeliest_cause_is_first(ends: list[RankEnd], first: int) -> None:
    for looked_at in itertools.permutations([*ends, None]):
        found = first_failure(looked_at)
        assert found is not None
        assert found.rank == first


def test_without_failures_none_is_first() -> None:
    assert first_failure([end(0, 0, 1.0), None]) is None


# Rank 0 raises. Only then rank 1 is killed, as observed when a large process takes time to die.
KILL_AFTER_EXCEPTION = """
import os, pathlib, sys, time
if os.environ["JAX_DEEPEP_LAUNCH_RANK"] == "0":
    raise ConnectionResetError("Connection reset by peer")
while not pathlib.Path(sys.argv[1], ".launch", "rank0.failed").exists():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def test_a_kill_outranks_the_exception_that_is_seen_before_it(tmp_path: Path) -> None:
    script = program(tmp_path, KILL_AFTER_EXCEPTION)
    log = tmp_path / "log"
    status, output = launch("-n", "2", "--log-dir", log, "--", sys.executable, script, log, cwd=tmp_path)
    assert status == 137, output
    assert "rank 1 failed first: killed by SIGKILL" in output
    assert "rank 0 failed later: exit status 1" in output


@pytest.mark.parametrize("killed", [0, 1])
def test_hosts_agree_on_the_first_failure(tmp_path: Path, killed: int) -> None:
    log = tmp_path / "log"
    text = KILL_AFTER_EXCEPTION.replace('== "0"', f'== "{1 - killed}"').replace("rank0", f"rank{1 - killed}")
    line = ["-n", "1", "--hosts", ",".join(two_hosts()), "--log-dir", log]
    command = ["--", sys.executable, program(tmp_path, text), log]
    with (
        launcher(*line, "--node-rank", "0", *command, cwd=tmp_path) as first,
        launcher(*line, "--node-rank", "1", *command, cwd=tmp_path) as second,
    ):
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [137, 137], outputs
    assert f"rank {killed} failed first: killed by SIGKILL" in outputs[killed]
    assert f"failed on another host (rank {killed} on" in outputs[1 - killed]
    assert "killed by SIGKILL" in outputs[1 - killed]


def test_a_rank_killed_amid_collectives_is_the_one_that_failed(tmp_path: Path) -> None:
    text = """
import jax, jax.numpy as jnp, os
jax.distributed.initialize()
mesh = jax.make_mesh((2,), ("r",))
add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "r"), mesh=mesh, in_specs=jax.P(), out_specs=jax.P()))
x = jnp.zeros(1 << 16)
for step in range(1000000):
    x = add(x)
    if step == 20 and jax.process_index() == 1:
        os.kill(os.getpid(), 9)
    jax.block_until_ready(x)
"""
    script = program(tmp_path, text)
    line = ["-n", "2", "--platform", "cpu", "--grace", "1", "--", sys.executable, script]
    status, output = launch(*line, cwd=tmp_path)
    assert status == 137, output
    assert "rank 1 failed first: killed by SIGKILL" in output


def test_a_rank_that_ends_well_before_the_others_is_named(tmp_path: Path) -> None:
    text = """
import os, pathlib, sys, time
while os.environ["JAX_DEEPEP_LAUNCH_RANK"] != "1":
    if pathlib.Path(sys.argv[1]).exists():
        raise ValueError("no peer is there")
    time.sleep(0.02)
"""
    go_on = tmp_path / "go_on"
    line = ["-n", "3", "--", sys.executable, program(tmp_path, text), go_on]
    with launcher(*line, cwd=tmp_path) as process:
        assert process.stdout is not None
        said = next((text for text in process.stdout if "rank 1 ended with status 0" in text), "")
        go_on.touch()
        output, _ = process.communicate(timeout=30)
    assert "rank 1 ended with status 0, and ranks 0, 2 still at work" in said
    assert process.returncode == 1, output
    assert "rank 1 had already ended with status 0" in output
