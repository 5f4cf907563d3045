"""`python -m jax_deepep.bench`: what it counts and reports, whatever the times are."""

import json

import jax.numpy as jnp
import pytest
from own_processes import is_a_command_for_one_process

from jax_deepep.bench.__main__ import main
from jax_deepep.bench.ops_under_test import PASSES, OpsUnderTest, check_agreement

pytestmark = is_a_command_for_one_process
SHAPE = "--tokens 16 --hidden 32 --topk 2 --experts 8 --devices 2 --dtype bfloat16 --layout expert"


def test_the_command(tmp_path, capsys) -> None:
    paths = {"json": tmp_path / "a.json", "markdown": tmp_path / "a.md", "plot": tmp_path / "a.png"}
    outputs = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    assert main([*SHAPE.split(), "--repeats", "5", "--limit-s", "0.1", *outputs]) == 0

    document = json.loads(paths["json"].read_text())
    assert [result["op"] for result in document["results"]] == list(PASSES)
    rows, row_bytes = 2 * 16 * 2, 32 * 2
    for result in document["results"]:
        assert result["bytes_moved"] == PASSES[result["op"]] * rows * row_bytes
        assert {spread["runs"] for spread in result["seconds"].values()} == {5}
        assert set(result["seconds"]) == {"native", "xla", "memcpy"}
        for name, spread in result["seconds"].items():
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
            rate = result["bytes_moved"] / spread["median"] / 1e9
            assert result["gigabytes_per_second"][name] == pytest.approx(rate)
    assert paths["markdown"].read_text().count("\n| ") == 1 + len(PASSES)
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    assert "T=16 H=32 K=2 E=8 R=2 bfloat16 expert-major C=worst" in capsys.readouterr().out


def test_implementations_that_disagree_have_no_speed() -> None:
    one = OpsUnderTest({}, 4, jnp.ones((2, 8)))
    check_agreement(one, OpsUnderTest({}, 4, jnp.ones((2, 8)) + 2**-8))
    for other in (OpsUnderTest({}, 4, jnp.ones((2, 8)) + 2**-4), OpsUnderTest({}, 5, jnp.ones((2, 8)))):
        with pytest.raises(RuntimeError, match="the implementations differ by up to"):
            check_agreement(one, other)


def test_a_wrong_shape(capsys) -> None:
    assert main(["--experts", "9", "--devices", "2"]) == 2
    assert "experts: got 9; takes a multiple of devices=2" in capsys.readouterr().err
    assert main(["--capacity", "0"]) == 2
    assert "capacity: got '0'; takes \"worst\", rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["--tokens 0", "moe --tokens 0", "routing --tokens 0", "--repeats -1", "moe --devices 0",
             "moe --chunks 1 0", "routing --copies 0", "moe --hidden many"],
)  # fmt: skip
def test_numbers_that_are_not_positive(line: str, capsys) -> None:
    *_, option, number = line.replace(" 1 0", " 0").split()
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert f"argument {option}: expected an integer of at least 1, got '{number}'" in capsys.readouterr().err
