"""The position of a launcher, and the environment of a rank; without processes."""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from meshes import mesh_named
from own_processes import is_a_command_for_one_process

import jax_deepep as ep
from jax_deepep.launch import launched_rank
from jax_deepep.launch.hosts.cluster_environment import (
    LauncherPosition,
    PositionError,
    first_slurm_host,
    position_from_arguments,
    position_from_cluster,
    split_address,
)
from jax_deepep.launch.hosts.kubernetes_job import KubernetesError, KubernetesJob, read_job
from jax_deepep.launch.python_command import through_python_program
from jax_deepep.launch.rank_environment import JobPosition, RankSettings, rank_environ, without_launch
from jax_deepep.launch_variables import PREFIX

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "moe-3"}
POSITION = JobPosition(4, 4, 8, "10.0.0.1:6000", "10.0.0.1:6000")


def environ_of(
    local_rank: int,
    settings: RankSettings,
    base: Mapping[str, str] | None = None,
    position: JobPosition = POSITION,
) -> dict[str, str]:
    return rank_environ(base or {}, position, local_rank, settings, Path("/logs"))


def test_outside_of_clusters_there_is_no_position() -> None:
    assert position_from_cluster({}) is None
    assert position_from_cluster({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None  # a shell of salloc
    assert position_from_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a pod without a Job


def test_slurm() -> None:
    assert position_from_cluster(SLURM) == LauncherPosition(2, 4, "gpu03", job="77.2", found_in="SLURM")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"), ("a[2-3]-ib,b", "a2-ib"),
    ],
)  # fmt: skip
def test_first_slurm_host(nodes: str, first: str) -> None:
    assert first_slurm_host(nodes) == first


def test_a_variable_that_is_no_integer() -> None:
    words = "SLURM_NTASKS: expected an integer, as the cluster sets it, got '4x'; unset it, or pass --hosts"
    with pytest.raises(PositionError, match=words):
        position_from_cluster({**SLURM, "SLURM_NTASKS": "4x"})


def test_open_mpi_takes_precedence_over_slurm() -> None:
    position = position_from_cluster({**SLURM, **OPEN_MPI})
    assert position is not None
    assert (position.index, position.count, position.coordinator, position.found_in) == (
        1,
        2,
        "10.96.0.1",
        "Open MPI",
    )


def test_open_mpi_5_on_one_host_and_on_several() -> None:
    variables = {name: value for name, value in OPEN_MPI.items() if name.startswith("OMPI_COMM")}
    here = position_from_cluster(
        {**variables, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    )
    assert here is not None
    assert (here.coordinator, here.local_index) == ("127.0.0.1", 1)
    with pytest.raises(PositionError, match=r"Open MPI do not say where .* add --coordinator"):
        position_from_cluster(variables)
    given = position_from_cluster(variables, "10.0.0.5:6000")
    assert given is not None
    assert (given.index, given.count, given.coordinator, given.port) == (1, 2, "10.0.0.5", 6000)


def test_pmi() -> None:
    variables = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
    position = position_from_cluster(variables)
    assert position is not None
    assert (position.index, position.count, position.coordinator, position.local_index) == (
        1,
        2,
        "127.0.0.1",
        1,
    )
    with pytest.raises(PositionError, match="--coordinator"):
        position_from_cluster({**variables, "MPI_LOCALNRANKS": "1"})


def test_kubernetes() -> None:
    job = KubernetesJob("moe", 8, "moe-0.pods")
    position = position_from_cluster(POD, kubernetes=lambda _: job)
    assert position == LauncherPosition(3, 8, "moe-0.pods", job="moe", found_in="Kubernetes")


def test_kubernetes_job() -> None:
    def fetch(_: Mapping[str, str], name: str) -> dict[str, Any]:
        assert name == "moe"
        return {"spec": {"parallelism": 8, "template": {"spec": {"subdomain": subdomain}}}}

    subdomain: str | None = "pods"
    assert read_job(POD, fetch) == KubernetesJob("moe", 8, "moe-0.pods")
    subdomain = None
    with pytest.raises(KubernetesError, match="headless Service"):
        read_job(POD, fetch)
    with pytest.raises(KubernetesError, match="give --hosts NUMBER_OF_PODS"):
        read_job({**POD, "HOSTNAME": "other"}, fetch)


def test_positions_from_arguments() -> None:
    assert position_from_arguments(None, None, None).coordinator == "127.0.0.1"
    position = position_from_arguments("a,b,c", None, 2)
    assert (position.index, position.count, position.coordinator, position.port) == (2, 3, "a", None)
    position = position_from_arguments("2", "10.0.0.1:6000", 1)
    assert (position.index, position.count, position.coordinator, position.port) == (1, 2, "10.0.0.1", 6000)
    assert position_from_arguments("192.0.2.1,127.0.0.1", None, None).index == 1  # 192.0.2.x is reserved
    assert position_from_arguments("4", "moe-0.pods", None, POD).index == 3
    for hosts in ("0", "a,,b"):
        with pytest.raises(PositionError, match=r"--hosts: expected .*, got"):
            position_from_arguments(hosts, "a", 0)


def test_addresses() -> None:
    assert split_address("host") == ("host", None)
    assert split_address("[fe80::1]:80") == ("fe80::1", 80)
    for bad in ("", "a:0", "a:99999", "a:b", "a:1:2"):
        with pytest.raises(PositionError, match="expected HOST or HOST:PORT"):
            split_address(bad)


def test_a_rank_is_a_slurm_task_to_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    env = environ_of(
        1, RankSettings("cpu", 2), {**OPEN_MPI, "XLA_FLAGS": "--a --xla_force_host_platform_device_count=9"}
    )
    assert (env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]) == ("5", "8", "1")
    assert env["JAX_COORDINATOR_ADDRESS"] == env["JAX_COORDINATOR_BIND_ADDRESS"] == "10.0.0.1:6000"
    assert env["JAX_LOCAL_DEVICE_IDS"] == "2,3"
    assert env["JAX_PLATFORMS"] == "cpu"
    assert env["XLA_FLAGS"] == "--a --xla_force_host_platform_device_count=2"
    assert env["NPROC"] == "4"
    assert not [name for name in env if name.startswith("OMPI")]
    position = launched_rank(env)
    assert position is not None
    assert (position.rank, position.num_ranks, position.local_rank, position.log_dir) == (
        5,
        8,
        1,
        Path("/logs"),
    )


def test_ranks_of_other_launchers_on_the_host_have_the_first_devices() -> None:
    position = replace(POSITION, first_local_index=4)
    env = environ_of(1, RankSettings("cuda", 2), position=position)
    assert (env["SLURM_LOCALID"], env["JAX_LOCAL_DEVICE_IDS"]) == ("5", "10,11")


def test_what_the_user_has_set_stays() -> None:
    assert environ_of(0, RankSettings("cpu", 8), {"NPROC": "3"})["NPROC"] == "3"
    assert "NPROC" not in environ_of(0, RankSettings("cuda"))
    assert "JAX_PLATFORMS" not in environ_of(0, RankSettings())
    assert environ_of(0, RankSettings("cuda"))["JAX_PLATFORMS"] == "cuda,cpu"
    assert environ_of(0, RankSettings(), {"PYTEST_PLUGINS": "mine"})["PYTEST_PLUGINS"].startswith("mine,")


def test_an_inner_launcher_does_not_see_the_outer_one() -> None:
    inner = without_launch(environ_of(0, RankSettings()))
    assert position_from_cluster(inner) is None
    assert not [name for name in inner if name.startswith((PREFIX, "JAX_COORDINATOR", "PYTEST"))]
    assert without_launch(SLURM) == SLURM


def test_python_commands_are_recognised(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("")
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\n")
    tool.chmod(0o755)
    python = sys.executable
    for command, position in (
        ([python, str(script), "-m"], 1), ([python, "-u", "-X", "dev", "-m", "pytest"], 4),
        ([python, "-c", "1"], 1),
        ([str(tool), "x"], 1),
    ):  # fmt: skip
        result = through_python_program(command)
        assert Path(result[position]).name == "python_program.py"
        assert (
            result[:position] + result[position + 1 :]
            == ([python] if command[0] == str(tool) else []) + command
        )
    for command in (
        ["sh", "-c", "true"],
        [python, "-V"],
        [python],
        [python, "-um", "pytest"],
        ["no-such-program"],
    ):
        assert through_python_program(command) == command


@pytest.mark.parametrize(
    ("platform", "backend", "warns"),
    [("cuda", "cpu", True), ("cuda", "gpu", False), ("cpu", "cpu", False)],
)
def test_a_rank_that_runs_on_cpus_instead_of_gpus_is_warned(
    monkeypatch: pytest.MonkeyPatch, platform: str, backend: str, warns: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", environ_of(1, RankSettings(platform))["JAX_PLATFORMS"])
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ep.Communicator(
            mesh_named("one device"), num_experts=2, num_experts_per_tok=1, max_tokens=4, hidden_size=4
        )
    texts = [str(warning.message) for warning in warned]
    assert any("JAX runs on CPUs: it found no GPU" in text for text in texts) is warns, texts


@is_a_command_for_one_process
def test_a_rank_that_has_not_joined_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ_of(1, RankSettings("cpu")).items():
        if name.startswith(PREFIX):
            monkeypatch.setenv(name, value)
    mesh = mesh_named("one device")
    with pytest.warns(UserWarning, match="This is rank 5 of 8 .*, and JAX knows") as warned:
        ep.Communicator(mesh, num_experts=2, num_experts_per_tok=1, max_tokens=4, hidden_size=4)
    assert "of no other process: call jax.distributed.initialize() first" in str(warned[0].message)


def test_ranks_reach_their_coordinator_without_a_proxy() -> None:
    assert environ_of(0, RankSettings())["no_grpc_proxy"] == "10.0.0.1"
    assert environ_of(0, RankSettings(), {"no_proxy": "a,b"})["no_grpc_proxy"] == "a,b,10.0.0.1"
