"""`python -m jax_deepep.bench`: its commands, and what `ops` counts and reports, independent of times."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from own_processes import is_a_command_for_one_process, starts_its_own_processes

from jax_deepep.bench import report
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.kernel_trace import shares_of
from jax_deepep.bench.op_cases import KEPT, PAIR, PASSES, OpCases, check_agreement
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.report import Result, Spread
from jax_deepep.bench.trials import slopes

OPS = [op for op in PASSES if op != KEPT]  # without formats
SHAPE = "--tokens 16 --hidden 32 --topk 2 --experts 8 --layout expert"


@is_a_command_for_one_process
def test_ops(tmp_path, capsys) -> None:
    """The command without a name."""
    paths = {"json": tmp_path / "a.json", "markdown": tmp_path / "a.md", "plot": tmp_path / "a.png"}
    outputs = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    assert main([*SHAPE.split(), "--devices", "2", "--trials", "5", "--limit-s", "0.1", *outputs]) == 0

    _, results = report.read_json(paths["json"])
    ops = {result.case: result for result in results if result.part == "ops"}
    assert list(ops) == OPS
    rows, row_bytes = 2 * 16 * 2, 32 * 2
    for name, result in ops.items():
        assert result.bytes_moved == PASSES[name] * rows * row_bytes
        assert set(result.seconds) == {"native", "xla"}
        assert result.values["xla / native"] > 0
        assert result.best_baseline == "memcpy"
        for spread in (*result.seconds.values(), *result.baselines.values()):
            assert spread.trials == 5
            assert 0 < spread.p10 <= spread.median <= spread.p90
        assert result.rate == pytest.approx(result.bytes_moved / result.seconds["native"].median / 1e9)
    [chain] = [result for result in results if result.part == "chain"]
    assert chain.case == f"native {PAIR}"
    assert chain.values["captured"] == "no"
    assert chain.values["lengths"] == "1, 3"
    assert list(chain.seconds) == ["pair"]
    assert paths["markdown"].read_text().count("\n| ") == (2 + len(OPS)) + (2 + 1)
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    assert "T=16 H=32 K=2 E=8 R=2 bfloat16 expert-major C=worst" in capsys.readouterr().out


@is_a_command_for_one_process
def test_ops_with_a_format(tmp_path) -> None:
    path = tmp_path / "a.json"
    options = ["--devices", "2", "--trials", "2", "--limit-s", "0.1", "--no-chain", "--wires", "none", "fp8"]
    assert main([*SHAPE.split(), *options, "--keep-quantized", "--json", str(path)]) == 0
    _, results = report.read_json(path)
    assert [result.case for result in results] == [*OPS, *PASSES]


@starts_its_own_processes
def test_ops_of_two_processes(tmp_path) -> None:
    """Under the launcher, by name: the first process reports the slower one's times."""
    path = tmp_path / "a.json"
    launch = ["-m", "jax_deepep.launch", "-n", "2", "--platform", "cpu", "--log-dir", str(tmp_path / "logs")]
    bench = ["-m", "jax_deepep.bench", "ops", *SHAPE.split(), "--trials", "2", "--chain", "1,2"]
    bench += ["--implementations", "native", "--modes", "throughput", "low_latency"]
    command = [*launch, "--", sys.executable, *bench, "--json", str(path)]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    environment, results = report.read_json(path)
    assert environment["processes"] == 2
    assert [result.case for result in results] == [*OPS, f"native {PAIR}"] * 2
    assert {result.part.partition(", ")[2] for result in results} == {"throughput", "low_latency"}
    assert {result.primary.trials for result in results if result.primary} == {2}
    assert {result.problem.devices for result in results} == {2}


def test_a_slope_excludes_what_both_lengths_cost() -> None:
    assert slopes([8, 48], [np.array([5.0, 6.0]), np.array([45.0, 86.0])]).tolist() == [1.0, 2.0]


def test_results_are_restored_from_json(tmp_path) -> None:
    spread = Spread.of([1.0, 2.0, 4.0])
    results = [
        Result(Problem(), "ops", "dispatch", {"device": spread}, {"link: push": spread}, 7, {"SMs": 24}),
        Result(Problem(intermediate=8), "layer", "xla", values={"shares": {"a": 0.5}}, failure="too large"),
    ]
    report.write_json(tmp_path / "a.json", {"commit": "abc"}, "what it is", results)
    environment, back = report.read_json(tmp_path / "a.json")
    assert back == results
    assert environment == {"commit": "abc", "meaning": "what it is"}
    assert json.loads((tmp_path / "a.json").read_text())["results"][0]["over_baseline"] == 1.0


def test_a_table_has_no_empty_columns() -> None:
    spread = Spread.of([1e-3, 2e-3, 4e-3])
    one = Result(Problem(), "ops", "dispatch", {"native": spread}, bytes_moved=4_000_000)
    other = dataclasses.replace(one, case="combine", baselines={"memcpy": Spread.of([1e-3] * 3)})
    failed = Result(Problem(), "ops", "xla", failure="too large")
    [table] = report.tables_of([one, other, failed], "ms")
    assert table.columns == ["case", "MB", "native ms", "best baseline", "baseline ms", "/ baseline", "GB/s"]
    assert table.rows[0] == ("dispatch", "4.0", "2.00 (1.20–3.60)", "–", "–", "–", "2.0")
    assert table.rows[1][3:] == ("memcpy", "1.00 (1.00–1.00)", "2.00", "2.0")
    assert table.rows[2] == ("xla: too large", "–", "–", "–", "–", "–", "–")
    assert len({len(line) for line in table.markdown().splitlines()[2:]}) == 1


def test_shares_of_kernels() -> None:
    """By name without the suffixes of instances; the small ones are summed."""
    events = [
        ("void jax_deepep::(anonymous namespace)::DispatchKernel<true>(Op)", 500.0),
        ("void jax_deepep::(anonymous namespace)::DispatchKernel<false>(Op)", 100.0),
        ("loop_multiply_fusion_12", 300.0),
        ("loop_multiply_fusion", 99.0),
        ("tiny", 1.0),
    ]
    shares = shares_of(events)
    assert list(shares) == ["DispatchKernel", "loop_multiply_fusion", "others"]
    assert list(shares.values()) == pytest.approx([0.6, 0.399, 0.001])


def test_implementations_that_disagree_are_not_timed() -> None:
    one = OpCases(None, None, {}, {}, jnp.ones((2, 8)))  # type: ignore[arg-type]
    check_agreement(one, dataclasses.replace(one, round_trip=jnp.ones((2, 8)) + 2**-8))
    with pytest.raises(RuntimeError, match=r"expected the same .* got a difference of up to 0.0625"):
        check_agreement(one, dataclasses.replace(one, round_trip=jnp.ones((2, 8)) + 2**-4))


@is_a_command_for_one_process
def test_wrong_arguments(capsys) -> None:
    assert main(["--experts", "9", "--devices", "2"]) == 2
    assert "experts: expected a multiple of devices=2, got 9" in capsys.readouterr().err
    assert main(["ops", "--capacity", "0"]) == 2
    assert 'capacity: expected "worst", "fitting", rows' in capsys.readouterr().err
    assert main(["opps", "--tokens", "1"]) == 2
    expected = "command: expected ops, moe, matmuls, overlap, routing, formats, model or check, got 'opps'"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["--tokens 0", "ops --tokens 8,0", "moe --tokens 0", "routing --tokens 0", "--repeats -1",
             "moe --devices 0", "moe --chunks 1 0", "routing --copies 0", "moe --hidden many",
             "formats --rows 0"],
)  # fmt: skip
def test_numbers_that_are_not_positive(line: str, capsys) -> None:
    *_, option, number = line.replace(" 1 0", " 0").replace("8,0", "0").split()
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert f"expected an integer of at least 1, got '{number}'" in error
