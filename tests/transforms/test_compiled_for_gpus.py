"""What XLA for GPUs makes of layers, for GPUs that need not be there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from own_processes import starts_its_own_processes

from jax_deepep.communicator import native_module

TESTS = Path(__file__).parents[1]
CALL = r'custom_call_target="((?:jax_deepep|mosaic_gpu)\w*)"'
# A start (1) or a done (2): its name, its operands, what is said of them, and which of the two it is.
PART = (
    r"^ *(%jax_deepep[\w.]+) = .* custom-call\((.*?)\), (.*custom_call_has_side_effect=true.*), ([12])\]> :"
)
EXACT = "algorithm=dot_bf16_bf16_f32_x6"  # of the router's products
LOOP: dict[str, Any] = {"num_layers": 2}
SHARED: dict[str, Any] = {"shared_intermediate_size": 256}
TWO_BATCHES: dict[str, Any] = {"two_batch_overlap": True}


def plugin_is_missing() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return True
    return not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{major}") for major in (12, 13))


pytestmark = [
    starts_its_own_processes,
    pytest.mark.nightly,
    pytest.mark.skipif(plugin_is_missing(), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt"),
    pytest.mark.skipif(bool(native_module.unsupported_reason("cuda")), reason="needs the module _cuda"),
]


def compiled(folder: Path, **options: Any) -> tuple[str, str]:
    """Return the program before and after XLA's passes."""
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, TESTS / "compile_for_gpus.py", folder, json.dumps(options)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    names = ("before_optimizations", "gpu_after_optimizations")
    before, after = (next(folder.glob(f"*jit_program*{name}.txt")).read_text() for name in names)
    return before, after


def fusions_of_slices(program: str) -> list[str]:
    return re.findall(r"^%dynamic-slice-fusion.*?^}", program, re.MULTILINE | re.DOTALL)


def check_parts(program: str) -> None:
    """Nothing but its done uses what a start returns, and the done has the same operands.

    Otherwise XLA might copy results that are not there yet, or reuse the memory of what the op reads.
    """
    program = with_elements(program)
    parts = re.findall(PART, program, re.MULTILINE)
    assert len(parts) == program.count("custom_call_has_side_effect=true")
    starts = {name: (operands_in(text), rest) for name, text, rest, part in parts if part == "1"}
    dones = [operands_in(text) for _, text, _, part in parts if part == "2"]
    assert len(starts) == len(dones) == len(parts) / 2
    for _, _, *operands in dones:  # after the rank, and what the op comes after
        [name] = {operand.partition("#")[0] for operand in operands} & set(starts)
        results = [operand for operand in operands if operand.startswith(f"{name}#")]
        (_, _, *own), rest = starts[name]
        for index in re.findall(r"\((\d+), {}\)", rest):  # a result has the memory of this operand
            del own[int(index) - 2]
        assert operands == own + results
        assert results == [f"{name}#{index}" for index in range(len(results))]
        for result in results:
            assert len(re.findall(rf"{re.escape(result)}\b", program)) == 1


def with_elements(program: str) -> str:
    """Write elements of tuples as XLA does since JAX 0.11, `%name#index`."""
    element = r"^ *(?:ROOT )?(%[\w.-]+) = .* get-tuple-element\((%[\w.-]+)\), index=(\d+).*$"
    elements = {name: f"{of}#{index}" for name, of, index in re.findall(element, program, re.MULTILINE)}
    program = re.sub(element, "", program, flags=re.MULTILINE)
    return re.sub(r"%[\w.-]+", lambda name: elements.get(name[0], name[0]), program)


def operands_in(text: str) -> list[str]:
    return re.sub(r"/\*index=\d+\*/", "", text).split(", ")


def calls_of(folder: Path, unused: int = 0, **options: Any) -> Counter[str]:
    """Return how many calls of each op and kernel there are; XLA keeps them, but for `unused` kernels."""
    before, after = compiled(folder, **options)
    calls = Counter(re.findall(CALL, before))
    assert Counter(re.findall(CALL, after)) == calls - Counter(mosaic_gpu_v2=unused)
    check_parts(after)
    assert after.count(EXACT) >= before.count(EXACT)  # more where a fusion has the product again
    # Fusions of slices that an op reads are useful, unless results are to have the memory of operands.
    for fusion in fusions_of_slices(after):
        assert "output_to_operand_aliasing" not in fusion
        assert "custom_call_has_side_effect" not in fusion
    return calls


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        pytest.param(LOOP, 0, id="loop"),
        pytest.param(LOOP | SHARED | {"remat": True}, 0, id="loop, recomputed"),
        pytest.param(LOOP | {"mode": "low_latency", "num_tokens": 64}, 0, id="loop, low latency"),
        pytest.param({"num_tokens": 1}, 0, id="a token"),
        pytest.param({"num_chunks": 4}, 0, id="chunks"),
        pytest.param(TWO_BATCHES | SHARED | {"num_chunks": 2}, 1, id="two batches, chunks"),
        pytest.param(LOOP | TWO_BATCHES, 0, id="two batches, loop"),
        pytest.param(LOOP | TWO_BATCHES | {"capacity_factor": 1.25}, 0, id="two batches, loop, drops"),
    ],
)
@pytest.mark.parametrize("grouped_matmul", ["mosaic", "ragged_dot"])
def test_every_op_and_kernel_of_layers_once(
    options: dict[str, Any], unused: int, grouped_matmul: str, tmp_path: Path
) -> None:
    """XLA would add fusions of these and slices that a loop reads or saves.

    Of two batches, a recomputed chunk does not use the output of the experts of the second.
    """
    calls = calls_of(tmp_path, unused, **options, grouped_matmul=grouped_matmul)
    assert calls["jax_deepep_dispatch"] + calls["jax_deepep_dispatch_uncaptured"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(LOOP, "start kernel kernel done kernel", id="one batch"),
        pytest.param(
            LOOP | TWO_BATCHES, "start done start kernel done start kernel kernel done", id="two batches"
        ),
    ],
)
def test_a_loop_saves_gradients_of_weights_without_a_copy(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """Kernels write them where they are saved, those of wi_0 and wi_1 beside an op that ends after them."""
    _, after = compiled(tmp_path, **options, grouped_matmul="mosaic")
    part_or_kernel = PART + r"|^ *%\S+ = \(bf16\[(?:2,)?4,256,256\]\S+ f32\[1\].* (?:custom-call|fusion)\("
    backward = max(after.split("\n\n"), key=lambda text: len(re.findall(part_or_kernel, text, re.MULTILINE)))
    found = re.findall(part_or_kernel, backward, re.MULTILINE)
    events = [{"1": "start", "2": "done", "": "kernel"}[part] for *_, part in found]
    assert " ".join(events) == expected
    saving = [fusion for fusion in fusions_of_slices(after) if "dynamic-update-slice" in fusion]
    if jax.__version_info__ >= (0, 11):  # XLA of JAX 0.10 makes no such fusion
        assert [re.findall(CALL, fusion) for fusion in saving] == [["mosaic_gpu_v2"]] * 3


def test_every_choice_of_experts_once(tmp_path: Path) -> None:
    assert calls_of(tmp_path, router=True, num_layers=2) == {"jax_deepep_expert_choice": 1}
