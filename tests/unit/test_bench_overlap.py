"""`python -m jax_deepep.bench overlap`: what it compares, its model, and what it reads from traces."""

import dataclasses
from unittest import mock

import jax
import pytest
from implementations import assert_same_bits
from meshes import fetch, mesh_named
from moe_layer import assert_close
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import report
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.kernel_trace import Kernel, overlapped_shares
from jax_deepep.bench.link_model import NVLINK4
from jax_deepep.bench.overlap_cases import IN_FLIGHT, LAYERS, PLAIN, layer_runs, op_runs
from jax_deepep.bench.overlap_model import modelled
from jax_deepep.bench.problem import Problem, draw_inputs
from jax_deepep.ops.custom_call import Call

PROBLEM = Problem(8, 32, 2, 8, jax.device_count(), dtype="float32", intermediate=16)
DS = Problem(4096, 7168, 8, 64, 2, capacity="1.25x", intermediate=2048)
QWEN = Problem(8192, 2048, 8, 128, 2, capacity="1.25x", intermediate=768)


@pytest.mark.collectives
def test_layers_agree() -> None:
    """Otherwise one may be fast because it is wrong. The plain one has nothing in flight."""
    mesh = mesh_named("expert")
    results, starts = {}, {}
    for name in LAYERS:
        comm = PROBLEM.communicator(mesh, "xla" if name == "xla" else "native")
        with mock.patch.object(Call, "start", autospec=True, side_effect=Call.start) as start:
            runs = layer_runs(PROBLEM, mesh, comm, name, shared=8)
        starts[name] = start.call_count > 0
        results[name] = [fetch(run()) for run in runs.values()]
    assert starts == {"plain": False, "in-flight": True, "two-batches": True, "xla": False}
    jax.tree.map(assert_same_bits, results[IN_FLIGHT], results[PLAIN])
    for other in results.values():
        assert_close(other, results[PLAIN])


def test_ops_agree() -> None:
    mesh = mesh_named("expert")
    problem = dataclasses.replace(PROBLEM, layout="token", intermediate=None)
    runs = op_runs(problem.communicator(mesh, "native"), draw_inputs(problem, mesh), 16)
    assert len(runs) == 4
    for of_case in runs.values():
        assert_close(fetch(of_case[IN_FLIGHT]()), fetch(of_case[PLAIN]()))


@pytest.mark.nightly  # it compiles what tests above compare
@is_a_command_for_one_process
def test_the_command(tmp_path, capsys) -> None:
    path = tmp_path / "overlap.json"
    shape = "--tokens 8 --hidden 24 --intermediate 32 --topk 2 --experts 8 --devices 2 --matmul 16 --shared 8"
    cases = "--layouts expert --layers two-batches plain --trials 2 --queued 2"
    outputs = ["--trace", str(tmp_path), "--json", str(path)]
    assert main(["overlap", *shape.split(), *cases.split(), *outputs]) == 0
    _, results = report.read_json(path)
    ops = {result.case: result for result in results if result.part == "op beside a matmul"}
    assert list(ops["dispatch"].seconds) == ["plain", "in-flight", "op", "matmul"]
    assert all(of.values["in-flight / plain"] > 0 for of in ops.values())
    layers = {result.case: result for result in results if result.part == "layer, shared experts F=8"}
    assert list(layers) == ["two-batches", "plain"]
    assert layers["plain"].values == {"forward / plain": 1, "forward + backward / plain": 1}
    output = capsys.readouterr().out
    assert "model: T=8 H=24 F=32" in output
    assert "kernels are traced on GPUs only" in output


def test_how_much_of_a_kernel_ran_beside_others() -> None:
    """Copies and collectives compute nothing; two computing kernels at once count once."""
    kernels = [
        Kernel("void jax_deepep::(anonymous namespace)::DispatchKernel<true>(Op)", 100, 100),
        Kernel("gemm", 50, 60),  # 10 beside
        Kernel("triton", 120, 50),
        Kernel("loop_fusion", 130, 60),  # 70 with the one before
        Kernel("MemcpyD2D", 190, 20),
        Kernel("ncclDevKernel_AllReduce", 190, 20),
        Kernel("void jax_deepep::(anonymous namespace)::DispatchKernel<true>(Op)", 300, 100),
        Kernel("void jax_deepep::(anonymous namespace)::CombineKernel(Op)", 500, 10),
    ]
    assert overlapped_shares(kernels) == {"DispatchKernel": 0.4, "CombineKernel": 0.0}


def test_the_model() -> None:
    """Near the measurements on two GPUs; nothing to gain where ops take no time, or all of it."""
    times = modelled(QWEN)
    assert times.in_flight / times.plain == pytest.approx(5.63 / 5.93, abs=0.03)
    for problem, native_us, xla_us in ((DS, 15360, 16770), (QWEN, 4190, 4970)):
        times = modelled(problem)
        assert times.in_flight == pytest.approx(native_us, rel=0.1)
        assert 0.85 * xla_us < times.xla < 1.01 * xla_us, "a lower bound"
    assert modelled(dataclasses.replace(QWEN, devices=8)).xla > 1.2 * times.xla
    forward = modelled(QWEN, backward=False)
    assert forward.in_flight == pytest.approx(forward.plain)
    assert forward.two_batches < 0.95 * forward.plain
    for intermediate, pulled in ((768, 1e-3), (10**8, 335)):
        machine = dataclasses.replace(NVLINK4, pulled=pulled, memory=1e30)
        limit = modelled(dataclasses.replace(QWEN, intermediate=intermediate), 768, machine)
        assert limit.in_flight == pytest.approx(limit.plain, rel=1e-3)
        assert limit.two_batches == pytest.approx(limit.plain, rel=1e-3)


def test_wrong_arguments(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["overlap", "--shared", "-1"])
    assert "--shared: expected an integer of at least 1, got '-1'" in capsys.readouterr().err
