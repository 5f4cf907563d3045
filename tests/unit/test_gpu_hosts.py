"""GPU groups that span hosts: who puts rows there, and why not; processes and their devices are mocks."""

import _ctypes
import ctypes
import pathlib
import shutil
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from meshes import mesh_named

from jax_deepep.communicator import backend, nvshmem
from jax_deepep.communicator.backend import Agreement
from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.process_exchange import Summary
from jax_deepep.communicator.topology import Topology

HOSTS = ("one", "one", "another", "another")
SPANS = "group 0 spans hosts"


class Exchange:
    """Of process 0 with others, which have found the same."""

    process = 0
    processes = tuple(range(len(HOSTS)))

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts
        self.findings: dict[str, str] = {}

    def begin_phase(self, phase: str) -> None: ...

    def publish(self, name: str, message: Any) -> None: ...

    def read(self, name: str, processes: set[int]) -> dict[int, str]:
        return {process: self.hosts[process] for process in processes}

    def report(self, summary: Summary) -> None:
        self.findings = {kind: text for kind, (_, text) in summary.findings.items()}

    def verdict(self) -> dict[str, str]:
        # Process 2, the first of the second host, finds these.
        of_process_2 = {"group between hosts": SPANS, "first node ends": "2"}
        return of_process_2 | self.findings

    def agree(self, phase: str, summary: Summary) -> dict[str, str]:
        self.report(summary)
        return self.findings


def topology_of(process_of: list[int], num_nodes: int = 1) -> Topology:
    devices = np.empty((1, len(process_of)), dtype=object)
    client = SimpleNamespace(platform_version="cuda 13000")
    devices[0] = [
        SimpleNamespace(process_index=process, platform="gpu", client=client) for process in process_of
    ]
    return Topology(devices, ("expert",), num_nodes)


def agreement(
    monkeypatch: pytest.MonkeyPatch, topology: Topology, hosts: tuple[str, ...] = HOSTS, **arguments: Any
) -> Agreement:
    monkeypatch.setattr(backend, "texts_of_build", lambda *of: {})
    monkeypatch.setattr(backend, "host_identity", lambda: hosts[Exchange.process])
    monkeypatch.setattr(backend, "unsupported_reason_here", lambda config: "")
    arguments = {
        "mesh": mesh_named("expert"), "axis_name": "expert", "num_experts": 8, "num_experts_per_tok": 2,
        "max_tokens": 4, "hidden_size": 8, "implementation": "native", "mode": "auto", "num_sms": None,
        "timeout_s": 10.0, "ranks_per_node": None, **arguments,
    }  # fmt: skip
    return backend.agree(Exchange(hosts), topology, arguments, CommunicatorConfig(**arguments))


def test_rows_go_to_other_hosts_by_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "unsupported_reason", lambda topology, process: "")
    topology = topology_of([0, 1, 2, 3])
    assert agreement(monkeypatch, topology, implementation="native") == Agreement("", 2, True)
    reason, *rest = agreement(monkeypatch, topology, implementation="auto")
    untested = 'NVSHMEM has not been tested between hosts yet: implementation="native" takes it there'
    assert reason == f"{SPANS}, and {untested}"
    assert rest == [2, False]


def test_why_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = topology_of([0, 1, 2, 3])
    monkeypatch.setattr(nvshmem, "unsupported_reason", lambda topology, process: "it is missing")
    assert agreement(monkeypatch, topology) == Agreement(f"{SPANS}, and it is missing", 2, False)


def test_a_declared_node_is_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 compares its host with that of process 0, the first of its node."""
    monkeypatch.setattr(
        Exchange, "verdict", lambda exchange: {"group between hosts": SPANS} | exchange.findings
    )
    monkeypatch.setattr(nvshmem, "unsupported_reason", lambda topology, process: "")
    monkeypatch.setattr(Exchange, "process", 1)
    topology = topology_of([0, 1, 2, 3], 2)
    assert agreement(monkeypatch, topology, ranks_per_node=2) == Agreement("", 2, True)
    hosts = ("one", "another", "another", "another")
    reason, *rest = agreement(monkeypatch, topology, hosts, ranks_per_node=2)
    assert ", and a node of 2 ranks (ranks_per_node) is on several hosts" in reason
    assert rest == [2, False]


def test_nodes_between_hosts_share_no_memory() -> None:
    topology = topology_of([0, 1, 2, 3], 2)
    assert topology.memory_peers_of(0) == {1, 2, 3}
    between = Topology(topology.groups, topology.axis_names, 2, between_hosts=True)
    assert between.memory_peers_of(0) == {1}


def test_what_nvshmem_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    text = nvshmem.unsupported_reason(topology_of([0, 0, 1, 1]), 0)
    assert "has one GPU per process, and ranks 0, 1 (process 0) has 2: start one process for each GPU" in text
    topology = topology_of([0, 1])
    monkeypatch.setattr(nvshmem, "LIBRARY", tmp_path / "_nvshmem.so")
    assert "installed without NVSHMEM" in nvshmem.unsupported_reason(topology, 0)
    nvshmem.LIBRARY.touch()
    monkeypatch.setattr(nvshmem, "_host_library", lambda: None)
    assert "install nvidia-nvshmem-cu13" in nvshmem.unsupported_reason(topology, 0)
    monkeypatch.setattr(nvshmem, "_host_library", lambda: "libnvshmem_host.so.3")
    assert nvshmem.unsupported_reason(topology, 0) == ""
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "libfabric")
    text = nvshmem.unsupported_reason(topology, 0)
    assert text.startswith("NVSHMEM_REMOTE_TRANSPORT=libfabric cannot be used, because ")
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ibrc")
    assert nvshmem.unsupported_reason(topology, 0) == ""


def test_the_library_that_this_process_has_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """As JAX does with the wheel's: another one would be loaded beside it, and not be used."""
    named = tmp_path / "named" / "lib"
    named.mkdir(parents=True)
    (named / "libtaken.so.3").touch()
    monkeypatch.setenv("NVSHMEM_HOME", str(named.parent))
    monkeypatch.setattr(nvshmem, "_HOST_LIBRARY", "libtaken.so.3")
    assert nvshmem._host_library() == str(named / "libtaken.so.3")
    loaded = tmp_path / "a folder" / "libtaken.so.3.4"
    loaded.parent.mkdir()
    shutil.copy(_ctypes.__file__, loaded)  # any library
    link = loaded.with_suffix("")
    link.symlink_to(loaded)
    ctypes.CDLL(str(link))
    assert nvshmem._host_library() == str(loaded)


def test_a_library_that_ends_the_process_is_tried_in_another_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(nvshmem, "_host_library", lambda: "libc.so.6")
    monkeypatch.setattr(nvshmem, "_PROBE", "import os; print('no network device'); os._exit(3)")
    module = SimpleNamespace(load_remote_library=loaded.append)
    with pytest.raises(RuntimeError, match="NVSHMEM does not work on this host: no network device"):
        nvshmem.load(module, 5)
    assert loaded == []
    monkeypatch.setattr(nvshmem, "_PROBE", "")
    nvshmem.load(module, 6)
    assert loaded == [str(nvshmem.LIBRARY)]


def test_collective_calls_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """After one that has been given up, none is begun: its peers may still be in the first."""
    monkeypatch.setattr(nvshmem, "_given_up", "")
    monkeypatch.setattr(nvshmem, "_host_library", lambda: "libnvshmem_host.so.3")
    monkeypatch.setattr(nvshmem, "LIBRARY", tmp_path / "_nvshmem.so")
    nvshmem.LIBRARY.touch()
    ends = threading.Event()
    assert nvshmem.within(60.0, "adding", lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(KeyError, match="seven"):
        nvshmem.within(60.0, "looking", {}.__getitem__, "seven")
    with pytest.raises(TimeoutError, match=r"waiting did not end in 0\.05 s: a process of another host"):
        nvshmem.within(0.05, "waiting", ends.wait)
    ends.set()
    text = nvshmem.unsupported_reason(topology_of([0, 1]), 0)
    assert text.startswith(
        "waiting did not end before, and a call of NVSHMEM is still waiting in this process"
    )
