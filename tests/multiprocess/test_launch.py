"""The launcher runs one job, reports its end correctly, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_runs import alive, launch, launcher, pids, program, two_hosts, wait_until
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

PSUM = """
import jax, jax.numpy as jnp
jax.distributed.initialize()
from functools import partial
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((jax.device_count(),), ("r",))
total = jax.jit(jax.shard_map(lambda: jax.lax.psum(jax.lax.axis_index("r") + 1, "r"), mesh=mesh,
                              in_specs=(), out_specs=P()))()
print(f"process {jax.process_index()} of {jax.process_count()}:",
      f"{jax.local_device_count()} devices, sum {int(total.addressable_data(0))}")
"""

# Rank FIRST ends as given; the others would keep sleeping, each with a grandchild.
END = """
import os, pathlib, subprocess, sys, time
rank, folder = int(os.environ["JAX_DEEPEP_LAUNCH_RANK"]), pathlib.Path(sys.argv[1])
child = subprocess.Popen(["sleep", "300"])
stray = subprocess.Popen(["sleep", "300"], start_new_session=True)
for name, pid in (("self", os.getpid()), ("child", child.pid), ("stray", stray.pid)):
    part = folder / f"{rank}.{name}.part"
    part.write_text(str(pid))
    part.rename(folder / f"{rank}.{name}.pid")
while len(list(folder.glob("*.self.pid"))) < int(os.environ["JAX_DEEPEP_LAUNCH_NUM_RANKS"]):
    time.sleep(0.01)
exec(sys.argv[2])
time.sleep(300)
"""

# As if JAX's exit handler waited for the other ranks.
STAYS = "import atexit\natexit.register(time.sleep, 300)\n"


def test_bare_initialize_joins_the_processes(tmp_path: Path) -> None:
    processes, devices = 2, 2
    script = program(tmp_path, PSUM)
    status, output = launch(
        "-n", str(processes), "--platform", "cpu", "--devices-per-process", str(devices),
        "--log-dir", tmp_path / "log",
        "--", sys.executable, script, cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, output
    size = processes * devices
    for rank in range(processes):
        line = f"process {rank} of {processes}: {devices} devices, sum {size * (size + 1) // 2}"
        assert f"[{rank}] {line}\n" in output
        assert line in (tmp_path / "log" / f"rank{rank}.log").read_text()


@pytest.mark.parametrize(
    ("end", "expected", "words"),
    [
        ("rank == 1 and sys.exit(7)", 7, "exit status 7"),
        ("rank == 1 and os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
        ("rank == 1 and os.abort()", 134, "killed by SIGABRT"),
        ("rank == 1 and [][0]", 1, "exit status 1"),
        ("rank == 1 and sys.exit(4); time.sleep(0.4); sys.exit(5)", 4, "exit status 4"),
        (STAYS + "if rank == 1: raise KeyboardInterrupt", 130, "exit status 130"),
        (STAYS + "sys.excepthook = lambda *_: 1 / 0\nif rank == 1: raise ValueError", 1, "exit status 1"),
        ("if rank == 1: (os.fork() == 0 and sys.exit(3)); time.sleep(0.5); sys.exit(6)", 6, "exit status 6"),
    ],
)
def test_the_first_bad_status_counts_and_nothing_is_left(
    tmp_path: Path, end: str, expected: int, words: str
) -> None:
    script = program(tmp_path, END)
    status, output = launch(
        "-n", "2", "--grace", "1", "--", sys.executable, script, tmp_path, end, cwd=tmp_path
    )
    assert status == expected, output
    assert f"rank 1 failed first: {words}" in output
    assert len(pids(tmp_path)) == 6
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


def test_the_first_failure_is_shown_last_with_its_traceback(tmp_path: Path) -> None:
    script = program(
        tmp_path, "import os\nassert os.environ['JAX_DEEPEP_LAUNCH_RANK'] != '2', 'two is wrong'\n"
    )
    status, output = launch("-n", "3", "--", sys.executable, script, cwd=tmp_path)
    assert status == 1
    lines = output.splitlines()
    assert lines[-1] == "[2] AssertionError: two is wrong"
    assert "[2] Traceback (most recent call last):" in lines[-5:]
    assert "python_program" not in output


def test_a_rank_that_raises_ends_the_others_although_jax_waits_for_them(tmp_path: Path) -> None:
    # JAX's exit handler keeps a failed rank alive for 5 minutes: longer than `launch` waits.
    script = program(
        tmp_path,
        PSUM + "if jax.process_index() == 1: raise ValueError('boom')\nimport time; time.sleep(300)\n",
    )
    status, output = launch(
        "-n", "2", "--platform", "cpu", "--grace", "1", "--", sys.executable, script, cwd=tmp_path
    )
    assert status == 1, output
    assert output.splitlines()[-1] == "[1] ValueError: boom"


def test_the_death_of_the_coordinator_is_named_as_the_cause(tmp_path: Path) -> None:
    tail = "import os, time\nif jax.process_index() == 0: os.kill(os.getpid(), 9)\ntime.sleep(300)\n"
    script = program(tmp_path, PSUM + tail)
    status, output = launch("-n", "2", "--platform", "cpu", "--", sys.executable, script, cwd=tmp_path)
    assert status == 137, output
    assert "rank 0 hosts JAX's coordinator: it died, and JAX then aborts the others" in output
    assert "The end of rank 1 is a consequence" in output
    assert "rank 0 failed first: killed by SIGKILL" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    script = program(tmp_path, END)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with launcher("-n", "2", "--", sys.executable, script, tmp_path, "pass", cwd=tmp_path) as process:
        signal.signal(signal.SIGHUP, before)
        wait_until(lambda: len(pids(tmp_path)) == 6)
        process.send_signal(signal.SIGHUP)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert f"got {number.name}" in output
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


@pytest.mark.parametrize("victim", ["launcher", "parent of the ranks"])
def test_nothing_survives_a_launcher_killed_with_9(tmp_path: Path, victim: str) -> None:
    script = program(tmp_path, END)
    with launcher("-n", "2", "--", sys.executable, script, tmp_path, "pass", cwd=tmp_path) as process:
        wait_until(lambda: len(pids(tmp_path)) == 6)
        victim_pid = process.pid
        if victim == "parent of the ranks":
            stat = Path("/proc", (tmp_path / "0.self.pid").read_text(), "stat").read_text()
            victim_pid = int(stat.rpartition(")")[2].split()[1])
        os.kill(victim_pid, signal.SIGKILL)
        assert process.wait(timeout=30) in (-9, 137)
        wait_until(lambda: not any(alive(pid) for pid in pids(tmp_path)))


def test_two_simulated_hosts_run_one_job(tmp_path: Path) -> None:
    script = program(tmp_path, PSUM)
    hosts = two_hosts()
    line = ["-n", "1", "--platform", "cpu", "--hosts", ",".join(hosts), "--coordinator", hosts[0]]
    with (
        launcher(*line, "--node-rank", "1", "--", sys.executable, script, cwd=tmp_path) as second,
        launcher(*line, "--node-rank", "0", "--", sys.executable, script, cwd=tmp_path) as first,
    ):
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    for rank, output in enumerate(outputs):
        assert f"[{rank}] process {rank} of 2: 1 devices, sum 3\n" in output


def test_a_failure_on_one_host_ends_the_job_on_the_other(tmp_path: Path) -> None:
    line = ["-n", "1", "--hosts", ",".join(two_hosts()), "--grace", "1"]
    sleeper = ["--", "sleep", "300"]
    with (
        launcher(*line, "--node-rank", "0", *sleeper, cwd=tmp_path) as first,
        launcher(*line, "--node-rank", "1", "--", "sh", "-c", "sleep 1; exit 9", cwd=tmp_path) as second,
    ):
        outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [9, 9], outputs
    assert "failed on another host (rank 1 on" in outputs[0]


def test_the_program_is_run_as_python_would_run_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 5\n")
    text = "import beside, sys\nif __name__ == '__main__': print(sys.argv, beside.value, __file__)\n"
    script = program(tmp_path, text)
    for command in ([sys.executable, "-u", script, "a"], [sys.executable, "-m", "program", "a"]):
        _, output = launch("-n", "1", "--", *command, cwd=tmp_path)
        plain = subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
        )
        assert f"[0] {plain.stdout}" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "0", "--", "true"], ["argument -n", "'0'", "whole number from 1 to 4096"]),
        (["--", "true"], ["required", "-n"]),
        (["-n", "2"], ["COMMAND: expected", "got nothing", "-- python train.py"]),
        (
            ["-n", "2", "--", "no-such-program"],
            ["COMMAND: expected", "got 'no-such-program'; check its name"],
        ),
        (["-n", "2", "--share-gpu", "--platform", "cpu", "--", "true"], ["--share-gpu", "leave one"]),
        (["-n", "2", "--memory-fraction", "0.5", "--", "true"], ["expected --share-gpu with it, got 0.5"]),
        (
            ["-n", "2", "--share-gpu", "--memory-fraction", "2", "--", "true"],
            ["--memory-fraction: expected", "up to 1", "got '2'"],
        ),
        (
            ["-n", "2", "--share-gpu", "--devices-per-process", "2", "--", "true"],
            ["--devices-per-process: expected 1", "got 2"],
        ),
        (
            ["-n", "2", "--hosts", "2", "--", "true"],
            ["--hosts: expected", "got the number 2", "add --coordinator"],
        ),
        (
            ["-n", "2", "--hosts", "a,b", "--node-rank", "5", "--", "true"],
            ["--node-rank: expected 0..1", "got 5"],
        ),
        (["-n", "2", "--coordinator", "a:b:c", "--", "true"], ["expected HOST or HOST:PORT", "got 'a:b:c'"]),
        (["-n", "2", "--hosts", "127.0.0.1,127.0.0.2", "--", "true"], ["--node-rank", "must be given"]),
        (["-n", "2", "--grace", "x", "--", "true"], ["argument --grace", "'x'", "seconds >= 0"]),
    ],
)
def test_bad_arguments_are_explained(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    status, output = launch(*arguments, cwd=tmp_path)
    assert status in (2, 127)
    assert all(word in output for word in words), output
    assert "Traceback" not in output


def test_a_program_without_its_interpreter_is_explained(tmp_path: Path) -> None:
    script = program(tmp_path, "#!/no/such/interpreter\n")
    script.chmod(0o755)
    status, output = launch("-n", "2", "--", script, cwd=tmp_path)
    assert status == 127, output
    assert f"COMMAND: expected a program that can be run, got '{script}' (No such file" in output
    assert "Traceback" not in output


def test_a_log_dir_may_be_used_again(tmp_path: Path) -> None:
    """Files of the first job do not affect the second; files that belong to no job stay."""
    others = [tmp_path / "log" / name for name in ("rank0.npz", "rank1.ckpt/state")]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("a user's")
    command = ["-n", "2", "--log-dir", tmp_path / "log", "--", sys.executable, "-c"]
    status, output = launch(*command, "raise SystemExit(3)", cwd=tmp_path)
    assert status == 3, output
    status, output = launch(*command, "print('well')", cwd=tmp_path)
    assert status == 0, output
    assert [(tmp_path / "log" / f"rank{rank}.log").read_text() for rank in (0, 1)] == ["well\n"] * 2
    assert [other.read_text() for other in others] == ["a user's"] * 2


def test_the_console_can_show_the_first_rank_alone(tmp_path: Path) -> None:
    command = ["--log-dir", tmp_path / "log", "--", sys.executable, "-c", "print('a line')"]
    status, output = launch("-n", "2", "--console", "first", *command, cwd=tmp_path)
    assert status == 0
    assert "[0] a line\n" in output
    assert "[1]" not in output
    assert (tmp_path / "log" / "rank1.log").read_text() == "a line\n"


def test_the_death_of_a_launcher_ends_the_job_on_the_other_host(tmp_path: Path) -> None:
    line = ["-n", "1", "--hosts", ",".join(two_hosts()), "--grace", "1", "--node-rank"]
    script = program(tmp_path, END)
    with (
        launcher(*line, "0", "--", sys.executable, script, tmp_path, "pass", cwd=tmp_path) as first,
        launcher(*line, "1", "--", sys.executable, script, tmp_path, "pass", cwd=tmp_path) as second,
    ):
        wait_until(lambda: len(pids(tmp_path)) == 6)
        second.kill()
        output, _ = first.communicate(timeout=30)
    assert first.returncode == 1, output
    assert "the launcher of host 1 is gone" in output
