"""`python -m jax_deepep.bench model`: copies per token, bytes, what makes ops slower, the errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_processes import is_a_command_for_one_process

from jax_deepep.bench import link_checks, model
from jax_deepep.bench.__main__ import main
from jax_deepep.bench.copies import Copies, drawn_copies, uniform_copies
from jax_deepep.bench.link_model import NVLINK4, NVLINK5, overlapped_us, phases, row_bytes
from jax_deepep.bench.problem import Problem
from jax_deepep.quantization.block_scaled import quantize
from jax_deepep.quantization.packed_rows import pack

pytestmark = is_a_command_for_one_process

V3 = Problem(tokens=4096, hidden=7168, topk=8, experts=256, devices=64, layout="token")
EIGHT = uniform_copies(V3, 8)


def test_uniform_copies_are_the_mean_over_all_choices() -> None:
    problem = Problem(experts=8, topk=3, devices=4)
    choices = list(itertools.combinations(range(8), 3))
    copies = uniform_copies(problem, 2)
    assert copies.ranks == pytest.approx(np.mean([len({e // 2 for e in choice}) for choice in choices]))
    assert copies.nodes == pytest.approx(np.mean([len({e // 4 for e in choice}) for choice in choices]))
    assert uniform_copies(problem, 1).nodes == 1


def test_drawn_copies() -> None:
    drawn = drawn_copies(V3, 8, "uniform")
    assert drawn.nodes == pytest.approx(EIGHT.nodes, rel=0.01)
    assert drawn.ranks == pytest.approx(EIGHT.ranks, rel=0.01)
    assert drawn.busiest_node == drawn.busiest_rank == 1

    # A token takes all experts of its 2 groups, and a node is a group, or half of one.
    all_of_two = dataclasses.replace(V3, experts=64, topk=16)
    assert drawn_copies(all_of_two, 8, "group_limited", topk_groups=2, samples=99) == Copies(2, 16)
    assert drawn_copies(all_of_two, 16, "group_limited", topk_groups=2, samples=99) == Copies(4, 16)
    limited = drawn_copies(V3, 8, "group_limited")
    assert 3.5 < limited.nodes <= 4 < EIGHT.nodes

    even, some, more = (drawn_copies(V3, 8, "skewed", skew=skew) for skew in (0, 0.5, 1))
    assert even.nodes == pytest.approx(EIGHT.nodes, rel=0.01)
    assert even.busiest_node == pytest.approx(1, abs=0.03)
    assert even.busiest_rank < some.busiest_rank < more.busiest_rank <= 64 / more.ranks
    assert even.busiest_node < some.busiest_node < more.busiest_node <= 8 / more.nodes


def test_bytes_of_a_row() -> None:
    known = {
        None: 14336,
        "fp8": 7168 + 56 * 4,
        "fp8_ue8m0": 7168 + 64,
        "mxfp8": 7168 + 224,
        "nvfp4": 3584 + 448 + 16,
    }
    assert {wire: row_bytes(V3, wire) for wire in known} == known
    assert row_bytes(dataclasses.replace(V3, dtype="float32"), None) == 2 * known[None]
    for wire in (wire for wire in known if wire):
        x = jax.ShapeDtypeStruct((1, 1000), jnp.bfloat16)
        packed = jax.eval_shape(lambda x, wire=wire: pack(quantize(x, wire)), x).shape[1]
        assert row_bytes(dataclasses.replace(V3, hidden=1000), wire) == packed


def test_bytes_over_each_link() -> None:
    record = 16 * 8 + 4
    for op, wire, extra in (("dispatch", None, record), ("dispatch", "nvfp4", record), ("combine", "fp8", 0)):
        of = phases(op, V3, 8, EIGHT, NVLINK4, wire=wire, num_sms=10_000)
        row = row_bytes(V3, wire)
        rows_between = 4096 * EIGHT.nodes * 7 / 8
        assert of.network * NVLINK4.network * 1e3 == pytest.approx(rows_between * (row + extra))
        if wire is None:
            crossing = (of.own_node + of.other_nodes) * NVLINK4.pulled * 1e3
            assert crossing == pytest.approx(4096 * EIGHT.ranks * 7 / 8 * row)
            assert of.own_node == pytest.approx(of.other_nodes / 7)
    one = phases("dispatch", dataclasses.replace(V3, devices=8), 1, EIGHT, NVLINK4)
    assert one.network == one.other_nodes == 0
    assert one.pipelined == one.in_turn
    # A row to each of 8 experts, of which those of 7 nodes leave this one.
    apart = phases("combine", V3, 8, EIGHT, NVLINK4, mode="low_latency", scheme="per_expert")
    assert apart.network * NVLINK4.network * 1e3 == pytest.approx(4096 * 7 * 14336)
    assert apart.own_node * NVLINK4.pushed * 1e3 == pytest.approx(4096 * 7 / 8 * 14336)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
@pytest.mark.parametrize("layout", ["token", "expert"])
def test_more_work_takes_longer_and_better_machines_less(op, mode, layout) -> None:
    problem = dataclasses.replace(V3, layout=layout)

    def times(problem=problem, nodes=8, machine=NVLINK4, copies=None, **options) -> np.ndarray:
        of = phases(
            op, problem, nodes, copies or uniform_copies(problem, nodes), machine, mode=mode, **options
        )
        assert of.pipelined <= of.in_turn
        return np.array([of.pipelined, of.in_turn])

    usual = times()
    assert (usual < times(dataclasses.replace(problem, tokens=4097))).all()
    assert (usual < times(dataclasses.replace(problem, devices=128), 16)).all()
    assert (usual > times(dataclasses.replace(problem, devices=32), 4)).all()
    assert (usual < times(copies=dataclasses.replace(EIGHT, busiest_node=1.1))).all()
    assert (usual < times(copies=dataclasses.replace(EIGHT, busiest_rank=8))).all()
    assert (usual >= times(num_sms=48)).all()
    assert (usual < times(num_sms=1)).all()
    assert (usual >= times(machine=NVLINK5)).all()
    assert (usual > times(machine=dataclasses.replace(NVLINK4, network=100))).all()
    plain, fp8, nvfp4 = (times(wire=wire, encoded=wire is not None) for wire in (None, "fp8", "nvfp4"))
    assert (plain > fp8).all()
    assert (fp8 > nvfp4).all()
    assert (times(wire="nvfp4") > nvfp4).all()


def test_overlap() -> None:
    assert overlapped_us(1000, 100, 33, NVLINK4) == 1025  # a quarter of the SMs for a tenth of the time
    assert overlapped_us(100, 1000, 24, NVLINK4) == 1000


def test_the_errors() -> None:
    """They are computed from what is shown; constants are reproduced, and count nowhere."""
    checks = [*link_checks.published(), *link_checks.measured()]
    assert len(checks) > 100
    assert all(check.modelled > 0 and check.reported > 0 for check in checks)
    assert all(abs(check.error) < 0.05 for check in checks if check.gives_constant)
    [v1] = [
        check
        for check in checks
        if check.source.startswith("DeepEP V1, normal") and check.case == "EP16 dispatch"
    ]
    nodes = uniform_copies(dataclasses.replace(V3, devices=16), 2).nodes
    assert v1.reported == pytest.approx(4096 * nodes * 7392 / 43e3)
    summary, *tables = link_checks.error_tables(checks)
    assert sum(len(table.rows) for table in tables) == len(checks)
    for (source, rows, *_, lowest, highest), table in zip(summary.rows, tables, strict=True):
        assert source == table.title
        errors = [100 * (float(modelled) / float(reported) - 1)
                  for _, reported, modelled, error in table.rows if error != "constant"]  # fmt: skip
        assert len(errors) == int(rows)
        assert (min(errors), max(errors)) == pytest.approx((float(lowest), float(highest)), abs=2)


def test_the_command(tmp_path, capsys) -> None:
    plot = tmp_path / "model.png"
    arguments = ["--nodes", "1,2", "--wires", "none", "nvfp4", "--machines", "nvlink4"]
    assert main(["model", *arguments, "--routings", "uniform", "group_limited", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "**Errors of the model**" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    [throughput, low_latency] = [part for part in printed.split("**us, pipelined")[1:]]
    assert "T=4096" in throughput
    assert "T=128" in low_latency
    lines = [line.split("|")[1:-1] for line in throughput.split("**")[1].strip().splitlines()]
    two_nodes = dataclasses.replace(V3, devices=16)
    of = phases("dispatch", two_nodes, 2, uniform_copies(two_nodes, 2), NVLINK4)
    cells = [cell.strip() for cell in lines[3]]
    assert cells[:2] == ["uniform", "2"]
    assert cells[6] == f"{of.pipelined:.0f} ({of.in_turn:.0f})"
    assert cells[-1] == model.NONE  # combine does not take nvfp4
    with pytest.raises(SystemExit):
        main(["model", "--nodes", "3", "--no-checks"])
    assert "experts: expected a multiple of devices=24, got 256" in capsys.readouterr().err
