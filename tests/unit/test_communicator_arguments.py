"""Errors of the communicator's arguments: name of the argument, expected and given value."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
from meshes import mesh_named

import jax_deepep as ep
from jax_deepep.communicator.backend import choose
from jax_deepep.communicator.config import CommunicatorConfig, groups_of
from jax_deepep.communicator.topology import Topology

MESH = mesh_named("data × expert")
SIZE = MESH.shape["expert"]
ARGUMENTS = {
    "axis_name": "expert", "num_experts": 8, "num_experts_per_tok": 3, "max_tokens": 6, "hidden_size": 8
}  # fmt: skip

# Invalid arguments, the error, and a pattern of its text.
CASES = [
    ({"mesh": "expert"}, TypeError, r"mesh: expected a jax\.sharding\.Mesh.*, got str"),
    ({"axis_name": 3}, TypeError, r"axis_name: expected a mesh axis or a tuple.*, got 3"),
    (
        {"axis_name": "tensor"},
        ValueError,
        r"axis_name: expected an axis of mesh, .*, got .tensor.; pass axis_name=.data. or axis_name=.expert.",
    ),
    (
        {"axis_name": ("data", "data")},
        ValueError,
        r"axis_name: expected every axis once, got",
    ),
    (
        {"num_experts": 7},
        ValueError,
        rf"num_experts: expected a multiple of the {SIZE} devices .*, got 7; pass 8",
    ),
    ({"num_experts": 0}, ValueError, r"num_experts: expected an integer of at least 1, got 0"),
    ({"num_experts": 8.0}, TypeError, r"num_experts: expected a Python integer.*, got 8\.0"),
    ({"num_experts_per_tok": 9}, ValueError, r"num_experts_per_tok: expected at most num_experts=8, got 9"),
    ({"num_experts_per_tok": True}, TypeError, r"num_experts_per_tok: expected a Python integer.*, got True"),
    ({"num_experts_per_tok": np.int64(9)}, ValueError, r"num_experts_per_tok: expected at most.*, got 9"),
    ({"max_tokens": np.float32(6)}, TypeError, r"max_tokens: expected a Python integer.*, got .*6.*"),
    ({"max_tokens": -1}, ValueError, r"max_tokens: expected an integer of at least 1, got -1"),
    (
        {"max_tokens": 2**30},
        ValueError,
        rf"max_tokens: expected at most {(2**31 - 1) // (SIZE * 3)} .*, got 1073741824",
    ),
    ({"hidden_size": "wide"}, TypeError, r"hidden_size: expected a Python integer.*, got 'wide'"),
    ({"hidden_size": 2**31}, ValueError, r"hidden_size: expected at most 2147483647 .*, got 2147483648"),
    ({"num_sms": 0}, ValueError, r"num_sms: expected an integer of at least 1, got 0"),
    (
        {"implementation": "nccl"},
        ValueError,
        r'implementation: expected "auto", "native" or "xla", got \'nccl\'',
    ),
    ({"mode": "fast"}, ValueError, r'mode: expected "auto", "throughput" or "low_latency", got \'fast\''),
    ({"timeout_s": 0}, ValueError, r"timeout_s: expected seconds, a positive finite number, got 0"),
    ({"timeout_s": float("inf")}, ValueError, r"timeout_s: expected seconds, a positive finite .*, got inf"),
    ({"timeout_s": float("nan")}, ValueError, r"timeout_s: expected seconds, a positive finite .*, got nan"),
    ({"timeout_s": "10"}, TypeError, r"timeout_s: expected seconds.*, got '10'"),
    ({"ranks_per_node": "all"}, TypeError, r"ranks_per_node: expected a Python integer.*, got 'all'"),
    ({"ranks_per_node": 0}, ValueError, r"ranks_per_node: expected an integer of at least 1, got 0"),
    (
        {"ranks_per_node": SIZE + 1},
        ValueError,
        rf"ranks_per_node: expected a divisor of the {SIZE} ranks .*, got {SIZE + 1}; leave it out",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "words"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_wrong_argument(wrong: dict, error: type[Exception], words: str) -> None:
    arguments = {"mesh": MESH, **ARGUMENTS, **wrong}
    with pytest.raises(error, match=words):
        ep.Communicator(**arguments)


def test_integers_of_numpy_are_integers() -> None:
    """So that all processes agree, and limits of kernels are checked."""
    sizes = {name: np.int32(value) for name, value in ARGUMENTS.items() if isinstance(value, int)}
    comm = ep.Communicator(MESH, **sizes, num_sms=np.int64(3), ranks_per_node=np.int8(SIZE))
    assert {name: getattr(comm, name) for name in sizes} == sizes
    assert {type(getattr(comm, name)) for name in [*sizes, "num_sms", "ranks_per_node"]} == {int}


@pytest.mark.parametrize("missing", ["num_experts", "num_experts_per_tok", "max_tokens", "hidden_size"])
def test_a_missing_argument(missing: str) -> None:
    arguments = {name: value for name, value in ARGUMENTS.items() if name != missing}
    with pytest.raises(TypeError, match=missing):
        ep.Communicator(MESH, **arguments)


def test_sizes_are_named_never_positional() -> None:
    with pytest.raises(TypeError, match="positional"):
        ep.Communicator(MESH, "expert", 8, 3, 6, 8)


def test_a_wrong_argument_leaves_nothing_behind() -> None:
    """The next communicator works: the count of creations stays the same in all processes."""
    mesh = mesh_named("one device")
    with pytest.raises(ValueError, match="num_experts"):
        ep.Communicator(mesh, **{**ARGUMENTS, "num_experts": -4})
    comm = ep.Communicator(mesh, **ARGUMENTS)
    x = jax.numpy.ones((2, 8))
    topk_idx, topk_weights = jax.numpy.array([[0, 1, 2]] * 2), jax.numpy.ones((2, 3))
    dispatched, _ = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
    assert dispatched.num_rows.tolist() == [2, 2, 2, 0, 0, 0, 0, 0]


def config_of(implementation: str) -> CommunicatorConfig:
    return ep.Communicator(MESH, **ARGUMENTS, implementation=implementation).config


def test_with_an_unsupported_reason_auto_is_xla_and_native_is_an_error() -> None:
    """Without further messages to the other processes: they have agreed on the reason."""

    def chosen(implementation: str) -> tuple[str, str, object]:
        backend = choose(config_of(implementation), "group 3 spans hosts", exchange=None)
        return backend.implementation, backend.reason, backend.native

    assert chosen("auto") == ("xla", "auto: group 3 spans hosts", None)
    assert chosen("xla") == ("xla", "as asked", None)
    with pytest.raises(
        ValueError, match=r'implementation: expected "xla" or "auto" here, got "native"; group 3 '
    ):
        chosen("native")


def test_the_choice_and_its_reason_are_beside_the_arguments() -> None:
    made = {
        name: ep.Communicator(MESH, **ARGUMENTS, implementation=name) for name in ("auto", "native", "xla")
    }
    assert {name: comm.implementation for name, comm in made.items()} == {
        "auto": "native", "native": "native", "xla": "xla"
    }  # fmt: skip
    assert "native (auto: available here)" in made["auto"].describe()
    assert "native (as asked)" in made["native"].describe()
    assert "xla (as asked)" in made["xla"].describe()
    for name, comm in made.items():
        assert comm.mode == "auto"
        asked = {"mode": "auto", "implementation": name, "num_sms": None, "ranks_per_node": None, **ARGUMENTS}
        assert {argument: getattr(comm.config, argument) for argument in asked} == asked
        with pytest.raises(dataclasses.FrozenInstanceError):
            comm.config.max_tokens = 7


def test_the_configuration_has_the_arguments_of_the_communicator() -> None:
    of_communicator = inspect.signature(ep.Communicator).parameters
    of_config = inspect.signature(CommunicatorConfig).parameters
    assert list(of_config) == list(of_communicator)
    assert {name: p.annotation for name, p in of_config.items()} == {
        name: p.annotation for name, p in of_communicator.items()
    }


def test_processes_with_wrong_arguments_have_ranks_for_the_errors_of_others() -> None:
    """Those of the intended groups, while `axis_name` is valid."""
    wrong = {"mesh": MESH, **ARGUMENTS, "num_experts": 7}
    assert groups_of(wrong).has_groups_of(config_of("xla").topology)
    assert groups_of({**wrong, "axis_name": "exprt"}).groups.shape == (1, MESH.size)


def test_nodes_are_consecutive_ranks() -> None:
    topology = Topology.of(mesh_named("expert"), ("expert",), ranks_per_node=2)
    assert topology.num_nodes == topology.num_ranks // 2
    assert topology.ranks_per_node == 2
    assert [topology.node_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert ep.Communicator(MESH, **ARGUMENTS, ranks_per_node=SIZE).topology.num_nodes == 1
    declared = ep.Communicator(MESH, **ARGUMENTS, ranks_per_node=1)
    assert (declared.topology.num_nodes, declared.ranks_per_node) == (SIZE, 1)
    found = ep.Communicator(MESH, **ARGUMENTS)
    assert (found.topology.num_nodes, found.ranks_per_node, found.config.ranks_per_node) == (1, SIZE, None)
    assert declared.fingerprint != found.fingerprint
