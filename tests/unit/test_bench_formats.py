"""`python -m jax_deepep.bench formats`: its errors are those of the oracle."""

import math

import ml_dtypes
import numpy as np
import pytest
import quantization_oracle as oracle
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import formats
from jax_deepep.bench.__main__ import main

pytestmark = is_a_command_for_one_process


def test_errors_are_those_of_the_oracle(monkeypatch) -> None:
    """Drawn and summed in parts, of which the last one is shorter."""
    monkeypatch.setattr(formats, "ROWS_AT_ONCE", 4)
    measured = formats.measure("Student t, 3 degrees", rows=6, hidden=80, seed=5)
    x = np.random.default_rng(5).standard_t(3, size=(6, 80)).astype(ml_dtypes.bfloat16)
    exact = x.astype(np.float64)
    assert list(measured) == [*oracle.BLOCK, "float8_e4m3fn, no scales"]
    for format in oracle.BLOCK:
        rounded = oracle.dequantize(oracle.quantize(x, format), format, x.dtype).astype(np.float64)
        error = np.abs(rounded - exact)
        assert measured[format].rms == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact))
        of_rows = error.max(axis=-1) / np.abs(exact).max(axis=-1)
        assert measured[format].largest == pytest.approx(of_rows.max())


def test_a_cast_saturates() -> None:
    x = np.asarray([[1000, -1000, 1.0625, 2.0**-11]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(formats.cast(x), np.float32), [[448, -448, 1, 0]])


def test_the_table(capsys) -> None:
    assert main(["formats", "--rows", "3", "--hidden", "32"]) == 0
    title, _, head, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert "3 bfloat16 rows of H=32" in title
    names = [cell.strip() for cell in head.split("|")[1:-1]]
    assert names == ["format", *formats.DISTRIBUTIONS]
    for line, name in zip(lines, formats.ROUNDINGS, strict=True):
        first, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        assert first == name
        assert all(0 < float(number) < math.inf for cell in cells for number in cell.split(", "))


def test_an_odd_width(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["formats", "--hidden", "7"])
    assert "hidden: expected an even number" in capsys.readouterr().err
