"""--share-gpu: the private MPS daemon lives exactly as long as the job. Here the daemon is a script."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from launcher_runs import alive, launch, launcher, pids, program, wait_until
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

# As the real one: -d starts a daemon that writes its id; without it, commands come on the standard input.
CONTROL = """#!/bin/sh
echo "$CUDA_MPS_PIPE_DIRECTORY" > {folder}/pipe_folder
if [ "$1" = -d ]; then
  [ -n "$MPS_REFUSES" ] && {{ echo "no such GPU"; exit 3; }}
  sleep 300 < /dev/null &
  echo $! > "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
  echo $! > {folder}/daemon.pid
else
  read command
  echo "$command" > {folder}/command
  [ -n "$MPS_IS_DEAF" ] || kill "$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid")"
fi
"""

REPORT = """
import json, os, pathlib, sys, time
names = ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_MULTI_RANK_GPU_ENABLE",
         "JAX_LOCAL_DEVICE_IDS", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES",
         "XLA_PYTHON_CLIENT_PREALLOCATE"]
rank = os.environ["JAX_DEEPEP_LAUNCH_RANK"]
part = pathlib.Path(sys.argv[1], f"reported{rank}.part")
part.write_text(json.dumps({name: os.environ.get(name) for name in names}))
part.rename(part.with_suffix(".json"))
exec(sys.argv[2])
"""


@pytest.fixture
def path_with_mps(tmp_path: Path) -> str:
    control = program(tmp_path, CONTROL.format(folder=tmp_path), "nvidia-cuda-mps-control")
    control.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def assert_mps_is_gone(folder: Path) -> None:
    [daemon] = pids(folder)
    assert not alive(daemon)
    assert (folder / "command").read_text().startswith("quit")
    assert not Path((folder / "pipe_folder").read_text().strip()).parent.exists()


@pytest.mark.parametrize(
    ("end", "expected"), [("pass", 0), ("sys.exit(6)", 6), ("os.kill(os.getpid(), 9)", 137)]
)
def test_the_ranks_share_and_the_daemon_ends(
    tmp_path: Path, path_with_mps: str, end: str, expected: int
) -> None:
    script = program(tmp_path, REPORT)
    status, output = launch(
        "-n",
        "4",
        "--share-gpu",
        "--memory-fraction",
        "0.6",
        "--",
        sys.executable,
        script,
        tmp_path,
        end,
        cwd=tmp_path,
        PATH=path_with_mps,
    )
    assert status == expected, output
    assert_mps_is_gone(tmp_path)
    reported = [json.loads(path.read_text()) for path in tmp_path.glob("reported*.json")]
    assert reported
    for variables in reported:
        # With a limit on SMs, ranks do not always get all of theirs, and wait for each other.
        assert variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] is None
        assert float(variables["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.15)
        assert variables["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
        assert variables["JAX_LOCAL_DEVICE_IDS"] == "0"
        assert variables["CUDA_MPS_PIPE_DIRECTORY"] == (tmp_path / "pipe_folder").read_text().strip()
        assert variables["CUDA_VISIBLE_DEVICES"] == "0"
        assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_ends_when_the_launcher_gets_a_signal(
    tmp_path: Path, path_with_mps: str, number: signal.Signals
) -> None:
    script = program(tmp_path, REPORT)
    arguments = ["-n", "2", "--share-gpu", "--", sys.executable, script, tmp_path, "time.sleep(300)"]
    with launcher(*arguments, cwd=tmp_path, PATH=path_with_mps) as process:
        wait_until(lambda: len(list(tmp_path.glob("reported*.json"))) == 2)
        process.send_signal(number)
        process.wait(timeout=30)
        wait_until(lambda: not Path((tmp_path / "pipe_folder").read_text().strip()).parent.exists())
    assert_mps_is_gone(tmp_path)


def test_a_daemon_that_does_not_respond_is_killed(tmp_path: Path, path_with_mps: str) -> None:
    status, output = launch(
        "-n", "1", "--share-gpu", "--", "true", cwd=tmp_path, PATH=path_with_mps, MPS_IS_DEAF="1"
    )
    assert status == 0, output
    assert_mps_is_gone(tmp_path)


def test_a_daemon_that_does_not_start_is_an_error_with_its_output(tmp_path: Path, path_with_mps: str) -> None:
    status, output = launch(
        "-n", "1", "--share-gpu", "--", "true", cwd=tmp_path, PATH=path_with_mps, MPS_REFUSES="1"
    )
    assert status == 1
    assert "ended with status 3: no such GPU" in output
    assert not Path((tmp_path / "pipe_folder").read_text().strip()).parent.exists()


def test_without_mps_the_job_runs_with_a_warning_about_times(tmp_path: Path) -> None:
    folders = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not Path(folder, "nvidia-cuda-mps-control").exists()
    ]
    status, output = launch(
        "-n", "2", "--share-gpu", "--", "true", cwd=tmp_path, PATH=os.pathsep.join(folders)
    )
    assert status == 0, output
    assert "times are not meaningful" in output
