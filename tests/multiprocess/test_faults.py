"""What the survivors find when a rank dies, stalls, raises, or was started differently.

Every test ends by itself, long before its hard deadline, and leaves no process and no shared memory.
"""

import re
import signal
from collections.abc import Callable

import pytest
from implementations import CAPTURE_ALL_OPS
from own_processes import starts_its_own_processes
from rank_processes import RankProcesses

pytestmark = starts_its_own_processes

NUM_PROCESSES = 3
TIMEOUT_S = 4  # as in ranks/faults.py
OPS_BEFORE = 3 * 4  # runs of `first_step` there, and ops of a run
DEADLINE_S = 60.0  # a run takes about 12 s on two cores

KILLED = -signal.SIGKILL


@pytest.fixture(
    params=[
        pytest.param(("cpu", {}), id="cpu"),
        pytest.param(("cuda", {}), id="cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", {"XLA_FLAGS": CAPTURE_ALL_OPS}), id="cuda in graphs", marks=pytest.mark.gpu),
    ]
)
def faults(request: pytest.FixtureRequest) -> Callable[..., RankProcesses]:
    """Return what starts the ranks of a fault."""
    platform, environment = request.param

    def start(name: str, victim: int, *arguments: object) -> RankProcesses:
        return RankProcesses(
            "faults",
            NUM_PROCESSES,
            (name, victim, *arguments),
            platform=platform,
            environment=environment,
            deadline_s=DEADLINE_S,
        )

    return start


def survivors_of(victim: int) -> list[int]:
    return [rank for rank in range(NUM_PROCESSES) if rank != victim]


def assert_abandoned(report: dict, victim: int) -> None:
    """Check what a rank found on the broken communicator: NaN and zeros, at once and for ever."""
    assert report["results"]
    assert report["later_results"]
    assert report["later_seconds"] < TIMEOUT_S / 2
    assert report["error"].startswith("PeerTimeoutError: ")
    assert report["sticky"]
    assert report["trace_error"] == report["error"]
    assert report["device_works"]
    assert "timeout_s" in report["state"]
    assert re.search(rf"waited {TIMEOUT_S} s \(timeout_s\) .*for rank {victim} \(", report["error"])
    assert "then make a new Communicator" in report["error"]


def assert_names_steps(error: str, victim: int, expected: int, seen: int) -> None:
    waiting = "|".join(str(rank) for rank in survivors_of(victim))
    wanted = (
        rf"dispatch on rank ({waiting}) waited {TIMEOUT_S} s \(timeout_s\) for rank {victim} "
        rf"\(expected at step {expected}, seen at step {seen}\) \(communicator #\d+\)"
    )
    assert re.search(wanted, error), error


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_dies_before_an_op(faults: Callable[..., RankProcesses], victim: int) -> None:
    with faults("dies_before_the_op", victim) as run:
        run.finish({victim: KILLED})
        for rank in survivors_of(victim):
            report = run.wait_for_report(rank, "abandoned")
            assert_abandoned(report, victim)
            assert_names_steps(report["error"], victim, expected=OPS_BEFORE + 1, seen=OPS_BEFORE)
        run.assert_nothing_is_left()


def test_a_rank_raises_before_an_op(faults: Callable[..., RankProcesses]) -> None:
    with faults("raises_before_the_op", 1) as run:
        run.finish({1: 1})
        assert "ValueError: the data loader of this rank failed" in run.ranks[1].text()
        for rank in survivors_of(1):
            report = run.wait_for_report(rank, "abandoned")
            if run.platform == "cpu":  # where its end closes the communicator, and others are told
                assert report["results"]
                assert report["later_results"]
                assert report["error"].startswith("CommunicatorError: dispatch on rank ")
                assert f"at step {OPS_BEFORE + 1} waits for rank 1, which has closed" in report["error"]
                continue
            assert_abandoned(report, 1)
            assert_names_steps(report["error"], 1, expected=OPS_BEFORE + 1, seen=OPS_BEFORE)
        run.assert_nothing_is_left()


def test_a_rank_raises_during_an_op() -> None:
    """Its program waits for a rank that waits for it, outside of any op: it leaves, and tells all. On CPU."""
    with RankProcesses("faults", NUM_PROCESSES, ("raises_during_an_op", 1), deadline_s=DEADLINE_S) as run:
        run.finish({1: 1})
        for rank in survivors_of(1):
            report = run.wait_for_report(rank, "left")
            assert report["abandoned"]
            assert report["error"].startswith(
                "CommunicatorError: the program of rank 1 ended while its ops ran"
            )
            assert "ValueError: this rank failed" in report["error"]
        run.assert_nothing_is_left()


@pytest.mark.gpu
def test_an_op_cannot_be_launched_on_a_rank() -> None:
    """The others need not wait for it, and its next op does not meet their present one."""
    environment = {"XLA_FLAGS": CAPTURE_ALL_OPS}
    with RankProcesses(
        "faults",
        NUM_PROCESSES,
        ("cannot_launch", 1),
        platform="cuda",
        environment=environment,
        deadline_s=DEADLINE_S,
    ) as run:
        run.finish({})
        for rank in range(NUM_PROCESSES):
            report = run.wait_for_report(rank, "told")
            assert "dispatch on rank 1 could not be launched" in report["error"]
            assert report["abandoned"]
            assert ("constant of the program" in report["launch_error"]) == (rank == 1)


def test_a_rank_dies_after_an_op_that_nobody_follows(faults: Callable[..., RankProcesses]) -> None:
    with faults("dies_after_the_op", 1) as run:
        run.finish({1: KILLED})
        for rank in survivors_of(1):
            assert run.wait_for_report(rank, "unharmed")["same"]
        run.assert_nothing_is_left()


def test_a_rank_dies_in_a_loop() -> None:
    """The same op has been there before, in earlier iterations. On CPU, where ops have names."""
    with RankProcesses("faults", NUM_PROCESSES, ("dies_in_a_loop", 1), deadline_s=DEADLINE_S) as run:
        run.finish({1: KILLED})
        for rank in survivors_of(1):
            report = run.wait_for_report(rank, "abandoned")
            assert_abandoned(report, 1)
            ops_before = OPS_BEFORE + 4 * 2
            assert_names_steps(report["error"], 1, expected=ops_before + 1, seen=ops_before)
            lines = [line for line in run.ranks[rank].text().splitlines() if line.startswith("jax_deepep: ")]
            assert lines == ["jax_deepep: " + report["error"].removeprefix("PeerTimeoutError: ")]
        run.assert_nothing_is_left()


def test_a_thread_that_compiles_beside_does_no_harm(faults: Callable[..., RankProcesses]) -> None:
    with faults("compiles_beside", 1) as run:
        run.finish({})
        for rank in range(NUM_PROCESSES):
            assert not run.wait_for_report(rank, "unharmed")["abandoned"]


def test_calls_that_share_a_number_are_told_and_end() -> None:
    """What must not happen, forced: it is an error, and no op is left running."""
    with RankProcesses("faults", NUM_PROCESSES, ("calls_share_a_number", 0), deadline_s=DEADLINE_S) as run:
        run.finish({})
        for rank in range(NUM_PROCESSES):
            report = run.wait_for_report(rank, "told")
            # Of the same calls on every rank, or of others, depending on which were numbered anew.
            assert re.search(
                r"bear the same number|met a different op|waited 4 s \(timeout_s\)", report["error"]
            )
            assert report["abandoned"]
        run.assert_nothing_is_left()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rank_dies_at_any_moment_of_many_ops(faults: Callable[..., RankProcesses], seed: int) -> None:
    victim = 1 + seed % 2
    with faults("dies_during_ops", victim, seed) as run:
        run.finish({victim: KILLED})
        assert_survivors_agree(run, victim)
        run.assert_nothing_is_left()


def assert_survivors_agree(run: RankProcesses, victim: int) -> None:
    """Check that the survivors lost the same step, and that nothing of it could be trained on."""
    steps = {run.wait_for_report(rank, "steps before")["steps"] for rank in survivors_of(victim)}
    assert len(steps) == 1
    for rank in survivors_of(victim):
        assert run.wait_for_report(rank, "broke in a step")["gradients"]
        assert_abandoned(run.wait_for_report(rank, "abandoned"), victim)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_stalls_before_an_op_and_returns(faults: Callable[..., RankProcesses], victim: int) -> None:
    with faults("stalls_before_the_op", victim) as run:
        for rank in range(NUM_PROCESSES):
            run.wait_for_report(rank, "ready")
        run.ranks[victim].signal(signal.SIGSTOP)
        for rank in survivors_of(victim):
            report = run.wait_for_report(rank, "abandoned")
            assert_abandoned(report, victim)
            assert_names_steps(report["error"], victim, expected=OPS_BEFORE + 1, seen=OPS_BEFORE)
        run.ranks[victim].signal(signal.SIGCONT)
        assert_late_rank_does_no_harm(run, victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stalls_at_any_moment_of_many_ops_and_returns(
    faults: Callable[..., RankProcesses], victim: int
) -> None:
    with faults("stalls_during_ops", victim, victim) as run:
        for rank in survivors_of(victim):
            run.wait_for_report(rank, "abandoned")
        assert_survivors_agree(run, victim)
        run.ranks[victim].signal(signal.SIGCONT)
        assert_late_rank_does_no_harm(run, victim)


def assert_late_rank_does_no_harm(run: RankProcesses, victim: int) -> None:
    """Check that the late rank finds its communicator broken as well, and all others whole."""
    run.finish({})
    assert_abandoned(run.wait_for_report(victim, "abandoned"), victim)
    for rank in range(NUM_PROCESSES):
        report = run.wait_for_report(rank, "unharmed")
        assert report["other"], "a communicator that lived beside the broken one"
        assert report["new"], "a communicator made after it"
        assert report["earlier"], "results from before"
        assert report["still_broken"].startswith("PeerTimeoutError: ")
    run.assert_nothing_is_left()


@pytest.mark.collectives
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rank_comes_late_to_a_layer(platform: str) -> None:
    """A layer has collectives of XLA, whose waits nothing bounds: ours come first and say who is missing."""
    victim, ranks = 1, 2  # NCCL takes no two ranks on one GPU
    with RankProcesses("late_to_a_layer", ranks, (victim,), platform=platform, deadline_s=DEADLINE_S) as run:
        report = run.wait_for_report(0, "told")
        assert re.search(rf"waited {TIMEOUT_S} s \(timeout_s\) for rank {victim} \(", report["error"])
        assert report["seconds"] < 3 * TIMEOUT_S
        assert (
            f"jax_deepep: {report['error']}" in run.ranks[0].text()
        )  # printed, whatever the program waits for
        run.finish({})
        for rank in range(ranks):
            assert not run.wait_for_report(rank, "first step")["abandoned"]
            report = run.wait_for_report(rank, "ended")
            assert report["abandoned"]
            assert report["error"].startswith("PeerTimeoutError: ")
        run.assert_nothing_is_left()


def test_the_process_of_the_coordinator_dies(faults: Callable[..., RankProcesses]) -> None:
    with faults("process_0_dies", 0) as run:
        codes = run.finish()
        assert codes[0] == KILLED
        assert all(code != 0 for code in codes)
        run.assert_nothing_is_left()


@pytest.fixture(scope="module")
def mismatches():
    with RankProcesses("mismatches", NUM_PROCESSES, (1,), deadline_s=DEADLINE_S) as run:
        run.finish({})
        yield run


@pytest.mark.parametrize(
    ("argument", "usual", "other"),
    [
        ("num_experts", "3", "6"),
        ("num_experts_per_tok", "2", "1"),
        ("max_tokens", "4", "5"),
        ("hidden_size", "16", "24"),
        ("timeout_s", "4.0", "9.0"),
        ("implementation", "'native'", "'xla'"),
        ("mode", "'auto'", "'throughput'"),
        ("ranks_per_node", "None", "3"),
        ("wrong max_tokens", "4", "0"),
        ("wrong num_experts", "3", "2.5"),
        ("wrong hidden_size", "16", "2147483648"),
        ("wrong axis_name", "'expert'", "'exprt'"),
        ("wrong ranks_per_node", "None", "1"),
    ],
)
def test_arguments_differ_between_processes(
    mismatches: RankProcesses, argument: str, usual: str, other: str
) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, argument)["error"]
        assert error.startswith(
            f"CommunicatorError: {argument.removeprefix('wrong ')}: rank 0 (process 0) got {usual}, "
            f"but rank 1 (process 1) got {other};"
        )


@pytest.mark.parametrize(
    ("function", "what", "sources"),
    [
        ("_python_sources", "build", "Python sources"),
        ("_native_sources", "build of native ops", "native sources"),
    ],
)
def test_builds_differ_between_processes(
    mismatches: RankProcesses, function: str, what: str, sources: str
) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, function)["error"]
        assert re.match(
            rf"CommunicatorError: {what}: rank 0 \(process 0\) got version \S+, {sources} [0-9a-f]{{12}}, "
            rf"but rank 1 \(process 1\) got version \S+, {sources} f00d; .*the same build of jax_deepep\.",
            error,
        ), error


def test_arguments_are_wrong_on_all_processes(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        tokens, experts, hidden, axis, nodes = mismatches.wait_for_report(rank, "all wrong")["errors"]
        assert tokens.startswith("ValueError: max_tokens: got 0; takes an integer of at least 1")
        assert experts.startswith("TypeError: num_experts: got 2.5; takes a Python integer")
        assert hidden.startswith("ValueError: hidden_size: got 2147483648; takes at most 2147483647")
        assert axis.startswith(
            "ValueError: axis_name: expected an axis of mesh, ('expert',), got 'exprt'; say"
        )
        assert nodes.startswith("ValueError: ranks_per_node: expected None or all 3 ranks")


def test_a_mesh_without_a_device_of_the_process(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        error = mismatches.wait_for_report(rank, "mesh of others")["error"]
        assert error.startswith(f"ValueError: mesh: got one without a device of this process ({rank});")


def test_equal_arguments_work_after_different_ones(mismatches: RankProcesses) -> None:
    for rank in range(NUM_PROCESSES):
        assert mismatches.wait_for_report(rank, "equal arguments")["mean"] == 1.0


def test_a_rank_makes_no_communicator(mismatches: RankProcesses) -> None:
    for rank in survivors_of(1):
        report = mismatches.wait_for_report(rank, "absence")
        assert re.match(
            rf"PeerTimeoutError: making a communicator on rank [02] \(process [02]\) waited {TIMEOUT_S} s "
            r"\(timeout_s\) in the exchange of arguments for rank 1 \(process 1\)\. ",
            report["error"],
        )
        assert report["seconds"] < 3 * TIMEOUT_S
    longest = max(mismatches.wait_for_report(rank, "absence")["seconds"] for rank in survivors_of(1))
    assert longest > TIMEOUT_S - 0.5  # the first to have waited so long tells the other


def test_mismatches_leave_nothing_behind(mismatches: RankProcesses) -> None:
    mismatches.assert_nothing_is_left()
