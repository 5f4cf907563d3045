"""The native half of a communicator with something in its way: stand-ins for GPUs and their driver."""

import os
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from meshes import mesh_named

import jax_deepep as ep
from jax_deepep import native_communicator, native_module

SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}


class Gpu:
    """A device, as far as the search for obstacles looks at it."""

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


def communicator_on(device: Gpu, implementation: str = "auto") -> Any:
    topology = SimpleNamespace(
        platforms={"cuda"}, platform="cuda", num_ranks=1, local_devices=lambda process: [device]
    )
    return SimpleNamespace(topology=topology, implementation=implementation, **SIZES)


@pytest.fixture
def cuda_module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module that finds nothing in the way, and an address in a pool without a GPU."""
    module = SimpleNamespace(obstacle=lambda *arguments: "")
    monkeypatch.setattr(native_module, "obstacle", lambda platform: "")
    monkeypatch.setattr(native_module, "load", lambda platform: module)
    monkeypatch.setattr(native_communicator, "_in_pool", lambda device: (0, 4096))
    return module


def test_no_obstacle(cuda_module: SimpleNamespace) -> None:
    assert native_communicator.obstacle(communicator_on(Gpu({"bytes_limit": 1}))) == ""


def test_the_module_is_asked_about_sizes_and_pool(cuda_module: SimpleNamespace) -> None:
    asked = []
    cuda_module.obstacle = lambda *arguments: asked.append(arguments) or "too small"
    assert native_communicator.obstacle(communicator_on(Gpu({"bytes_limit": 77}))) == "too small"
    assert asked == [(1, 8, 3, (0, 4096), 77)]


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}], ids=str)
def test_an_unknown_limit_of_the_pool_is_an_obstacle(cuda_module: SimpleNamespace, stats: Any) -> None:
    text = native_communicator.obstacle(communicator_on(Gpu(stats)))
    assert "bytes_limit" in text
    assert "leave XLA_PYTHON_CLIENT_ALLOCATOR" in text


def test_what_fails_in_the_search_is_an_obstacle(cuda_module: SimpleNamespace) -> None:
    """Not an error of this process alone, for which the others would wait."""
    text = native_communicator.obstacle(communicator_on(Gpu(NotImplementedError("no stats"))))
    assert text == "looking for native ops failed: NotImplementedError: no stats"


def test_xla_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    monkeypatch.setattr(native_module, "obstacle", touched.append)
    assert native_communicator.obstacle(communicator_on(Gpu(None), "xla")) == ""
    assert touched == []


class Exchange:
    """One that fails at the step of a name; the other process, number 1, gives a descriptor."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.given: list[int] = []

    def all_gather(self, name: str, message: dict) -> dict[int, dict]:
        if name == self.fails_at:
            raise ep.PeerTimeoutError(name)
        return {0: message, 1: message}

    def send_descriptors_to_all(self, descriptors: list[int]) -> dict[int, list[int]]:
        self.given = [os.open(os.devnull, os.O_RDONLY) for _ in descriptors]
        return {1: self.given}


class NativeOnGpu:
    def __init__(self) -> None:
        self.descriptor = os.open(os.devnull, os.O_RDONLY)

    def exports(self) -> list[tuple[int, int, str]]:
        return [(self.descriptor, 512, "0000:01:00.0")]

    def attach_peer(self, process: int, exports: list) -> None:
        raise RuntimeError(f"process {process} cannot be mapped")


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("fails_at", ["creation", "sizes", "attachment", "nothing"])
def test_no_descriptor_is_left_open(monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    native, exchange = NativeOnGpu(), Exchange(fails_at)
    monkeypatch.setattr(native_communicator, "_make_cuda", lambda comm: native)
    comm = SimpleNamespace(platform="cuda")
    if fails_at == "nothing":
        assert native_communicator.make(comm, exchange) == (None, "process 1 cannot be mapped")
    else:
        with pytest.raises(ep.PeerTimeoutError, match=fails_at):
            native_communicator.make(comm, exchange)
    assert not [descriptor for descriptor in [native.descriptor, *exchange.given] if is_open(descriptor)]


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
        (BrokenNative(error="GPU 0 has met an error"), ep.CommunicatorError, "GPU 0 has met an error"),
    ],
    ids=["late peer", "anything else", "error of the GPU"],
)
def test_only_a_missing_peer_is_a_timeout(native: BrokenNative, error: type, words: str) -> None:
    comm = ep.Communicator(mesh_named("data × expert"), **SIZES)
    comm._set("_native", native)
    with pytest.raises(ep.CommunicatorError, match=words) as raised:
        comm.check()
    assert type(raised.value) is error
