"""`python -m jax_deepep.bench matmuls`: every case computes the same, and reports its measurements."""

import numpy as np
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import report
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.experts import PRECISIONS
from jax_deepep.bench.matmuls import GROUPS, OPERANDS, TILES, cases_of, group_sizes_of, parse

pytestmark = is_a_command_for_one_process
SIZES = {"tokens": 128, "hidden": 64, "intermediate": 64, "topk": 2, "experts": 2, "devices": 1}
SHAPE = ["--shapes", "ds", *(text for name, size in SIZES.items() for text in (f"--{name}", str(size)))]


def test_the_command(tmp_path) -> None:
    """Without "mosaic", whose simulation is slow: `tests/flax` has it."""
    path = tmp_path / "matmuls.json"
    cases = "--matmuls dense triton ragged_dot --trials 1 --queued 1"
    assert main(["matmuls", *SHAPE, *cases.split(), "--json", str(path)]) == 0
    _, results = report.read_json(path)
    products, (small, large), router = results[:-5], results[-5:-3], results[-3:]
    assert [result.case for result in products] == [
        name
        for product in OPERANDS
        for name in 2 * ["dense", "triton", *(["ragged_dot"] if product == "up" else [])]
    ]
    for result in products:
        assert result.values["TF/s"] > 0
        assert result.values["of dense"] > 0
        assert float(result.values["deviation"] or 0) < 2e-2
    assert [small.case, large.case] == ["triton, C=1.25x", "triton, C=worst"]
    assert large.values["of C=1.25x"] > 0
    assert [result.case for result in router] == list(PRECISIONS)
    assert float(router[0].values["error"]) < 3e-6
    assert set(cases_of(parse([]), "down", 2, 128)) == {"dense", "triton", *(f"mosaic, {t}" for t in TILES)}


def test_a_number_of_rows_that_groups_cannot_have(capsys) -> None:
    assert main(["matmuls", *SHAPE, "--tokens", "129"]) == 2
    assert "error: tokens: expected tokens * topk to be a multiple of 256, that is of 128 rows" in (
        capsys.readouterr().err
    )


def test_groups() -> None:
    for groups in GROUPS:
        sizes = group_sizes_of(groups, 32, 32768, 128)
        assert sizes.sum() == 32768
        assert not np.any(sizes % 128)
    assert sizes[0] > 4 * sizes[8] > 0
