"""`python -m jax_deepep.bench routing`: its counts match the routing, and it draws them."""

import numpy as np
import pytest
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import report
from jax_deepep.bench.__main__ import main

pytestmark = is_a_command_for_one_process


def test_rows_are_counted_and_drawn(tmp_path, capsys) -> None:
    paths = {name: tmp_path / f"routing.{name}" for name in ("png", "json", "md")}
    sizes = "--tokens 64 --hidden 8 --topk 2 --experts 16 --devices 2 --capacity 1.25x --skew 2 --copies 3"
    outputs = ["--plot", str(paths["png"]), "--json", str(paths["json"]), "--markdown", str(paths["md"])]
    assert main(["routing", *sizes.split(), *outputs]) == 0

    _, results = report.read_json(paths["json"])
    alone, with_replicas = (result.values for result in results)
    for run in (alone, with_replicas):
        rows, dropped = np.array(run["rows"]), np.array(run["dropped"])
        assert (rows + dropped).sum() == sum(run["expert_load"]) == 2 * 64 * 2
        assert rows.max() <= 1.25 * 64 * 2
        # A token goes to a device once, or twice in rows of experts.
        sent = np.array(run["rows_sent"])
        assert sent.shape == (2, 2)
        assert 2 * 64 <= sent.sum() <= 2 * 64 * 2
    assert alone["replicas"] == [1] * 16
    assert sum(with_replicas["replicas"]) == 16 + 2 * 3
    assert sum(alone["dropped"]) > sum(with_replicas["dropped"]) == 0
    assert paths["md"].read_text().count("\n| ") == 4
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "every expert once" in capsys.readouterr().out


def test_a_wrong_shape(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["routing", "--experts", "9", "--devices", "2"])
    assert "experts: expected a multiple of devices=2, got 9" in capsys.readouterr().err
