"""`python -m jax_deepep.bench check`: what it says where devices reach each other, and where they do not."""

import pathlib
import subprocess
import sys

import pytest
from own_processes import is_a_command_for_one_process, starts_its_own_processes

from jax_deepep.bench import check
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.check import BETWEEN, IN_HOST, SAME

SIZES = ["--tokens", "4", "--hidden", "32"]


@is_a_command_for_one_process
def test_devices_of_a_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["check", *SIZES]) == 0
    hosts, devices, *_, head, _, itself, other = capsys.readouterr().out.strip().splitlines()
    assert hosts.startswith("hosts        1 with ")
    assert devices.startswith("all devices  native; process memory")
    assert head.split()[1:4] == ["to", "|", "ranks"]
    assert (itself.split("|")[1].strip(), other.split("|")[1].strip()) == (SAME, IN_HOST)
    monkeypatch.setattr(check, "Communicator", lambda *_, **__: 1 / 0)
    assert main(["check", *SIZES]) == 1
    assert "all devices  ZeroDivisionError: division by zero" in capsys.readouterr().out


@starts_its_own_processes
def test_two_hosts(tmp_path: pathlib.Path) -> None:
    """Which are pretended, of two processes each."""
    launch = [
        sys.executable,
        "-m",
        "jax_deepep.launch",
        "-n",
        "4",
        "--platform",
        "cpu",
        "--log-dir",
        str(tmp_path),
    ]
    pretend = 'JAX_DEEPEP_HOST_ID=$((JAX_DEEPEP_LAUNCH_RANK / 2)) exec "$@"'
    command = [sys.executable, "-m", "jax_deepep.bench", "check", *SIZES]
    ran = subprocess.run(
        [*launch, "--", "bash", "-c", pretend, "bash", *command], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "hosts        2 with 2 devices (cpu) of 2 process(es)" in ran.stdout
    assert "TCP between nodes" in ran.stdout
    assert [kind for kind in (SAME, IN_HOST, BETWEEN) if f"| {kind} " not in ran.stdout] == [IN_HOST]


def test_links_are_compared_by_distance() -> None:
    hosts = ["a", "a", "b", "b"]
    assert [check.kinds_of(hosts, distance) for distance in range(3)] == [
        {SAME},
        {IN_HOST, BETWEEN},
        {BETWEEN},
    ]
    assert check.of_hosts(hosts).tolist() == [[0, 1], [2, 3]]
    assert check.of_hosts(["a", "b", "b"]) is None


def test_the_network(tmp_path: pathlib.Path) -> None:
    assert check._network(tmp_path) == "no RDMA devices"
    for name in ("class/infiniband/mlx5_0", "class/infiniband/mlx5_1", "module/nvidia_peermem"):
        (tmp_path / name).mkdir(parents=True)
    assert check._network(tmp_path) == "2 RDMA devices (mlx5_0, mlx5_1); nvidia_peermem is loaded"
