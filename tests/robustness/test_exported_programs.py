"""An exported program with the communicators of the process that loads it."""

import re
from pathlib import Path

import pytest
from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes

MAKE = """
mesh = mesh_named("expert")
def make(max_tokens):
    return ep.Communicator(mesh, "expert", num_experts=8, num_experts_per_tok=2, max_tokens=max_tokens,
                           hidden_size=8, implementation="native", timeout_s=20.0)
spec = device_axis(mesh, "expert")
x = np.ones((8, 4, 8), np.float32)
idx = np.tile(np.array([0, 5], np.int32), (8, 4, 1))
weights = np.full((8, 4, 2), 0.5, np.float32)
operands = put_on_mesh((x, idx, weights), mesh, spec)
"""
EXPORT = """
comm = make(4)
def body(x, idx, weights):
    dispatched, handle = ep.dispatch(x, idx, weights, comm=comm)
    return ep.combine(dispatched.tokens, handle, comm=comm)
names = ("jax_deepep_dispatch", "jax_deepep_combine")
checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
step = jax.jit(per_device(body, mesh, "expert"))
exported = jax.export.export(step, disabled_checks=checks)(*operands)
open({path!r}, "wb").write(exported.serialize())
"""
LOAD = """
comm = make({max_tokens})
step = jax.jit(jax.export.deserialize(open({path!r}, "rb").read()).call)
print(fetch(step(*operands)).mean())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("exported") / "program")
    run_python(MAKE + EXPORT.format(path=path))
    assert Path(path).stat().st_size > 0
    return path


def test_it_runs_where_the_communicator_is_the_same(exported: str) -> None:
    assert float(run_python(MAKE + LOAD.format(path=exported, max_tokens=4))) == 1.0


EXPECT_ERROR = """
def expect_error(function):
    try:
        function()
    except jax.errors.JaxRuntimeError as error:
        print(error)
    else:
        raise AssertionError("no error")
"""


def error_of(load: str) -> str:
    return run_python(MAKE + EXPECT_ERROR + load.replace("print(", "expect_error(lambda: "))


def test_a_communicator_with_other_arguments_is_an_error(exported: str) -> None:
    text = error_of(LOAD.format(path=exported, max_tokens=5))
    assert "which was made with other arguments here than where the program was traced" in text


def test_devices_in_another_order_are_an_error(exported: str) -> None:
    """On a mesh of the same devices in another order; only the op itself can see that."""
    elsewhere = """
other = jax.sharding.Mesh(mesh.devices[::-1], mesh.axis_names)
operands = put_on_mesh((x, idx, weights), other, spec)
"""
    text = error_of(elsewhere + LOAD.format(path=exported, max_tokens=4))
    assert re.search(
        r"the program runs device (\d) as rank (?!\1)\d, but it is rank \1 of communicator", text
    )
