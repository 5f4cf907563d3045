"""The ids of communicators, stored in programs: never used twice."""

import sys
import threading

import pytest
from meshes import mesh_named

import jax_deepep as ep
from jax_deepep.communicator import native_half, native_module

SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8}
NUM_THREADS, NUM_MADE = 4, 12


@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_threads_that_make_communicators_get_different_ids(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = mesh_named("one device")
    together = threading.Barrier(NUM_THREADS)
    made: list[ep.Communicator] = []

    def make() -> None:
        together.wait(60)
        for _ in range(NUM_MADE):
            made.append(ep.Communicator(mesh, **SIZES, implementation=implementation))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=make) for _ in range(NUM_THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert len(made) == NUM_THREADS * NUM_MADE
    assert len({comm.id for comm in made}) == len(made)


def test_the_registry_rejects_a_used_id() -> None:
    comm = ep.Communicator(mesh_named("one device"), **SIZES, implementation="native")
    again = native_half.arguments_of(comm.config, comm.id)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"#{again['id']}: expected an id that is new"):
            native_module.load("cpu").Communicator(**again)
        comm = None  # the first one is freed
