"""NPROC is set for the devices of a process on few cores, and never overrides the user."""

import os
import sys
from types import SimpleNamespace

import pytest

from jax_deepep import cpu_threads, jax_compat

DEVICES = "--xla_force_host_platform_device_count={}"


@pytest.fixture(autouse=True)
def fresh_process_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(jax_compat, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(cpu_threads, "_written", None)
    monkeypatch.setenv("NPROC", "to be put back")  # also what the code under test sets
    monkeypatch.delenv("NPROC")


def test_two_threads_for_each_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(1))
    cpu_threads.reserve_cpu_threads()
    assert "NPROC" not in os.environ  # one device waits for no other, and children may have more
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(4))
    cpu_threads.reserve_cpu_threads()
    assert os.environ["NPROC"] == "8"


def test_devices_of_jax_are_counted_whether_it_is_imported_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    monkeypatch.delitem(sys.modules, "jax")
    cpu_threads.reserve_cpu_threads()
    assert os.environ["NPROC"] == "6"
    config = SimpleNamespace(
        jax_num_cpu_devices=4
    )  # JAX has read the variable, or was configured otherwise since
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config))
    cpu_threads.reserve_cpu_threads()
    assert os.environ["NPROC"] == "8"


def test_what_we_wrote_is_not_taken_for_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(4))
    cpu_threads.reserve_cpu_threads()
    of_child = dict(os.environ)
    cpu_threads.set_num_threads(of_child, 8)
    assert of_child["NPROC"] == "16"
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(8))
    cpu_threads.reserve_cpu_threads()
    assert os.environ["NPROC"] == "16"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(8))
    cpu_threads.reserve_cpu_threads()
    of_child = dict(os.environ)
    cpu_threads.set_num_threads(of_child, 8)
    assert os.environ["NPROC"] == of_child["NPROC"] == "3"


def test_enough_cores_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("XLA_FLAGS", DEVICES.format(8))
    cpu_threads.reserve_cpu_threads()
    assert "NPROC" not in os.environ
