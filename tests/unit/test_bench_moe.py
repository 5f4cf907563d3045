"""`python -m jax_deepep.bench moe`: every case computes the same, and reports its measurements."""

import jax
import pytest
from meshes import fetch, mesh_named
from moe_layer import assert_close
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import report
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.layers import (
    FORWARD,
    GATHERED,
    config_of,
    decode_step,
    experts_programs,
    layer_programs,
)  # fmt: skip
from jax_deepep.bench.problem import AXIS, Problem
from jax_deepep.moe import moe

PROBLEM = Problem(8, 16, 2, 8, jax.device_count(), dtype="float32", intermediate=32)


def results_of(programs: dict) -> list:
    return [fetch(jax.jit(function)(*operands)) for function, operands in programs.values()]


@pytest.mark.collectives
def test_layers_agree() -> None:
    """Otherwise a case may be fast because it is wrong."""
    mesh = mesh_named("expert")
    assert mesh.axis_names == (AXIS,)
    comm = PROBLEM.communicator(mesh, "auto")
    expected = results_of(layer_programs(PROBLEM, mesh, comm))
    for programs in (layer_programs(PROBLEM, mesh, None), layer_programs(PROBLEM, mesh, comm, num_chunks=2)):
        assert_close(results_of(programs), expected)


def test_a_decode_step_is_layers_one_after_the_other() -> None:
    mesh = mesh_named("expert")
    with PROBLEM.communicator(mesh, "native") as comm:
        step, (parameters, x) = decode_step(PROBLEM, mesh, comm, 2, "blocks")[FORWARD]
        config = config_of(PROBLEM, comm, grouped_matmul="blocks")
        layer = jax.jit(lambda parameters, x: x + moe(config, parameters, x)[0])
        expected = layer(parameters[1], layer(parameters[0], x))
        assert_close([fetch(jax.jit(step)(parameters, x))], [fetch(expected)])


def test_grouped_matmuls_agree() -> None:
    """Groups are padded differently, rows after the last one are arbitrary: weights' gradients compare."""
    of_weights = {
        name: results_of(experts_programs(PROBLEM, name))[1][2]
        for name in ("ragged_dot", GATHERED, "blocks", "triton")
    }
    for other in of_weights.values():
        assert_close(other, of_weights["ragged_dot"])


@is_a_command_for_one_process
def test_the_command(tmp_path, capsys) -> None:
    path = tmp_path / "moe.json"
    shape = {"tokens": 8, "hidden": 24, "intermediate": 32, "topk": 2, "experts": 8, "devices": 2}
    sizes = [text for name, size in shape.items() for text in (f"--{name}", str(size))]
    cases = "--matmuls blocks triton --layers native --chunks 2 --loop-layers 2 --decode-layers 2"
    cases += " --trials 2 --queued 2"
    assert main(["moe", *sizes, *cases.split(), "--json", str(path)]) == 0

    _, [blocks, triton, layer, loop, *steps] = report.read_json(path)
    passes = ("forward", "forward, queued", "forward + backward", "forward + backward, queued")
    assert tuple(blocks.seconds) == passes
    assert {spread.trials for spread in blocks.seconds.values()} == {2}
    assert "hidden_size: expected a multiple of 16 with grouped_matmul=" in triton.failure
    assert layer.case == "native, 2 chunks"
    assert layer.values["temporary MiB"] > 0
    assert (loop.part, loop.case, *loop.seconds) == ("loop, 2 layers", "native", *passes)
    assert [step.case for step in steps] == ["native", "native, throughput"]
    assert {(step.part, *step.seconds) for step in steps} == {("decode step, 2 layers", *passes[:2])}
    output = capsys.readouterr().out
    assert "T=8 H=24 F=32 K=2 E=8 R=2 float32 C=worst" in output
    assert "kernels are traced on GPUs only" in output


@is_a_command_for_one_process
def test_a_wrong_shape(capsys) -> None:
    """Before anything is measured."""
    assert main(["moe", "--experts", "9", "--topk", "2", "--devices", "2"]) == 2
    assert "error: experts: expected a multiple of devices=2, got 9" in capsys.readouterr().err


def test_a_wrong_argument(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["moe", "--capacity-factor", "all"])
    assert "--capacity-factor: expected a positive number, got 'all'" in capsys.readouterr().err
