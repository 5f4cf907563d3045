"""Failures of the native half of a communicator, with mocks of GPUs and their driver."""

import dataclasses
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from meshes import mesh_named

import jax_deepep as ep
from jax_deepep.communicator import backend, cuda_half, native, native_module
from jax_deepep.communicator.native_types import CpuCommunicator
from jax_deepep.communicator.process_exchange import Summary

SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}


class Gpu:
    """A device, with the attributes that the search for unsupported reasons uses."""

    platform = "gpu"
    local_hardware_id = 0

    def __init__(self, stats: Any) -> None:
        self.process_index = jax.process_index()
        self.client = SimpleNamespace(platform_version="cuda 13000")
        self._stats = stats

    def memory_stats(self) -> Any:
        if isinstance(self._stats, Exception):
            raise self._stats
        return self._stats


def config_on(device: Gpu, implementation: str = "auto") -> Any:
    topology = SimpleNamespace(
        platforms={"cuda"},
        platform="cuda",
        num_ranks=1,
        local_devices=lambda process: [device],
    )
    return SimpleNamespace(
        topology=topology,
        implementation=implementation,
        most_low_latency_tokens=6,
        low_latency_row_bytes=32,
        **SIZES,
    )


@pytest.fixture
def cuda_module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module without an unsupported reason, and an address in a pool without a GPU."""
    module = SimpleNamespace(unsupported_reason=lambda *arguments: "")
    monkeypatch.setattr(native_module, "unsupported_reason", lambda platform: "")
    monkeypatch.setattr(native_module, "load", lambda platform: module)
    monkeypatch.setattr(backend, "address_in_pool", lambda device: (0, 4096))
    return module


def test_no_reason_against_native_ops(cuda_module: SimpleNamespace) -> None:
    assert backend.unsupported_reason_here(config_on(Gpu({"bytes_limit": 1}))) == ""


def test_the_module_is_asked_about_sizes_and_pool(cuda_module: SimpleNamespace) -> None:
    asked = []
    cuda_module.unsupported_reason = lambda *arguments: asked.append(arguments) or "too small"
    assert backend.unsupported_reason_here(config_on(Gpu({"bytes_limit": 77}))) == "too small"
    assert asked == [(1, 8, 3, 6, (0, 4096), 77, (6, 48))]


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}], ids=str)
def test_an_unknown_limit_of_the_pool_is_a_reason(cuda_module: SimpleNamespace, stats: Any) -> None:
    text = backend.unsupported_reason_here(config_on(Gpu(stats)))
    assert "bytes_limit" in text
    assert "leave XLA_PYTHON_CLIENT_ALLOCATOR" in text


def test_what_fails_in_the_search_is_a_reason(cuda_module: SimpleNamespace) -> None:
    """Not an error of this process alone: the others would wait."""
    text = backend.unsupported_reason_here(config_on(Gpu(NotImplementedError("no stats"))))
    assert text == "looking for native ops failed: NotImplementedError: no stats"


def test_xla_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    monkeypatch.setattr(native_module, "unsupported_reason", touched.append)
    assert backend.unsupported_reason_here(config_on(Gpu(None), "xla")) == ""
    assert touched == []


class Exchange:
    """One that fails in a named phase. The other process, number 1, offers the same as this one."""

    process = 0
    processes = (0, 1)
    id = 7

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.published: dict[str, Any] = {}
        self.of_others: dict[str, list] = {}

    def publish(self, name: str, message: Any) -> None:
        self.published[name] = message

    def read(self, name: str, processes: list[int]) -> dict[int, Any]:
        return dict.fromkeys(processes, self.published[name])

    def read_all_others(self, name: str) -> list:
        return self.of_others.get(name, [])

    def agree(self, phase: str, summary: Summary) -> dict[str, str]:
        if phase == self.fails_at:
            raise ep.PeerTimeoutError(phase)
        return {kind: text for kind, (_, text) in summary.findings.items()}

    def seconds_left(self) -> float:
        return 60.0


class NativeOnGpu:
    """Two devices of this process, with a file for each memory."""

    def __init__(self) -> None:
        self.descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)
        self.attached: dict[int, list] = {}
        self.fails = True
        self.ranks_per_gpu: list[int] = []

    def exports(self) -> list[tuple[int, int, str, int]]:
        return [(descriptor, 512, f"0{at // 2}", at) for at, descriptor in enumerate(self.descriptors)]

    def attach_peer(self, process: int, exports: list) -> None:
        self.attached[process] = [descriptor for descriptor, *_ in exports]
        assert not any(os.get_inheritable(descriptor) for descriptor in self.attached[process])
        if self.fails:
            raise RuntimeError(f"process {process} cannot be mapped")

    def start(self, ranks_per_gpu: list[int], processes: Sequence[int]) -> None:
        assert processes == Exchange.processes
        self.ranks_per_gpu = ranks_per_gpu


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class HalfOnGpu(cuda_half.CudaHalf):
    """With a mock of the native communicator."""

    def __init__(self, config: Any, id: int) -> None:
        self.native = config.stand_in
        self._between_hosts = False


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The configuration of a communicator on GPUs of two processes."""
    monkeypatch.setitem(native.HALVES, "cuda", HalfOnGpu)
    topology = SimpleNamespace(
        platform="cuda", memory_peers_of=lambda process: {1}, describe_process=lambda process: "rank 1"
    )
    return SimpleNamespace(topology=topology, stand_in=NativeOnGpu())


@pytest.mark.parametrize("fails_at", ["creation", "attachment", "nothing"])
def test_no_descriptor_is_left_open(on_gpus: SimpleNamespace, fails_at: str) -> None:
    """None, and none that a child process would have inherited meanwhile."""
    if fails_at == "nothing":
        made = native.make_native_half(on_gpus, Exchange())
        assert made == (None, "process 1 cannot be mapped")
    else:
        with pytest.raises(ep.PeerTimeoutError, match=fails_at):
            native.make_native_half(on_gpus, Exchange(fails_at))
    everything = on_gpus.stand_in.descriptors + on_gpus.stand_in.attached.get(1, [])
    assert len(everything) == (4 if fails_at == "creation" else 8)
    assert not [descriptor for descriptor in everything if is_open(descriptor)]


def test_ranks_on_a_gpu_are_counted_by_machine_and_address(
    on_gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the whole mesh, in any group; on another machine the same address is another GPU."""
    on_gpu = on_gpus.stand_in
    on_gpu.fails = False
    names = [cuda_half.name_of_gpu(gpu) for gpu in ("00", "01")]
    with monkeypatch.context() as on_another_machine:
        on_another_machine.setattr(cuda_half, "machine_identity", lambda: "another machine")
        elsewhere = [cuda_half.name_of_gpu(gpu) for gpu in ("00", "01")]
    monkeypatch.setenv("JAX_DEEPEP_HOST_ID", "pretended")  # a GPU is shared nevertheless
    assert names == [cuda_half.name_of_gpu(gpu) for gpu in ("00", "01")]
    monkeypatch.delenv("JAX_DEEPEP_HOST_ID")
    exchange = Exchange()
    exchange.of_others = {names[1]: [1, 2], elsewhere[0]: [5]}
    half, error = native.make_native_half(on_gpus, exchange)
    assert error == ""
    assert half.native is on_gpu
    assert on_gpu.ranks_per_gpu == [1, 4]
    assert [exchange.published[name] for name in names] == [1, 1]
    assert set(on_gpu.attached) == {0, 1}


class BrokenNative:
    invalid_routing = ""

    def __init__(self, *, broken: str = "", timed_out: bool = False, error: str = "") -> None:
        self.broken, self.timed_out, self._error = broken, timed_out, error

    def wait_for_ops(self) -> str:
        return self._error


@pytest.mark.parametrize(
    ("native", "error", "words"),
    [
        (BrokenNative(broken="rank 1 is late", timed_out=True), ep.PeerTimeoutError, "rank 1 is late"),
        (BrokenNative(broken="closed too early"), ep.CommunicatorError, "closed too early"),
        (BrokenNative(error="GPU 0 reports an error"), ep.CommunicatorError, "GPU 0 reports an error"),
    ],
    ids=["late peer", "anything else", "error of the GPU"],
)
def test_only_a_missing_peer_is_a_timeout(native: BrokenNative, error: type, words: str) -> None:
    comm = ep.Communicator(mesh_named("data × expert"), **SIZES)
    comm._set("_backend", dataclasses.replace(comm._backend, half=SimpleNamespace(native=native)))
    with pytest.raises(ep.CommunicatorError, match=words) as raised:
        comm.check()
    assert type(raised.value) is error


class Calls:
    """A native communicator and launched programs that only record what is called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def wait(self) -> None:
        self.names.append("wait")

    def leave(self, why: str) -> None:
        self.names.append(f"leave: {why}")

    def close(self) -> None:
        self.names.append("close")


@pytest.mark.parametrize(
    ("error", "num_processes", "forked", "expected"),
    [
        (None, 1, False, ["wait", "close"]),
        (None, 2, False, ["wait", "close"]),
        (ValueError("wrong"), 1, False, ["wait", "close"]),
        (ValueError("wrong"), 2, False, ["leave: ValueError: wrong", "close"]),
        (None, 1, True, []),
    ],
)
def test_the_end_of_a_process(
    error: Exception | None,
    num_processes: int,
    forked: bool,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for what was launched, but not for peers that may never come; a fork does nothing."""
    calls = Calls()
    at_exit: list[Any] = []
    monkeypatch.setattr(native_module.atexit, "register", at_exit.append)
    native_module.close_at_exit(calls, calls, calls)
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    monkeypatch.setattr(native_module.sys, "last_value", error, raising=False)
    pid = os.getpid()
    monkeypatch.setattr(native_module.os, "getpid", lambda: pid + forked)
    [close] = at_exit
    close()
    assert calls.names == expected


def test_the_native_communicator_matches_its_protocol() -> None:
    comm = ep.Communicator(mesh_named("data × expert"), **SIZES, implementation="native")
    assert isinstance(comm._native, CpuCommunicator)
