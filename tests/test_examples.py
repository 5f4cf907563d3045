"""The examples, end to end: implementations train alike from one seed, and the trained model writes text."""

import os
import re
import subprocess
import sys
from pathlib import Path

from own_processes import starts_its_own_processes
from quick_compilation import QUICK_COMPILATION

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = starts_its_own_processes

# Flags follow the example's own choice of devices; a smaller model replaces the default one.
AS_A_SMALL_MODEL = f"""
import functools, os, runpy, sys
sys.path[0] = {str(EXAMPLES)!r}
import virtual_devices
os.environ["XLA_FLAGS"] += " {QUICK_COMPILATION}"
import moe_language_model as model
small = dict(hidden=32, expert_hidden=32, layers=1, context=32, sequences_per_device=1)
model.Config = functools.partial(model.Config, **small)
sys.argv = sys.argv[1:]
runpy.run_path(os.path.join(sys.path[0], sys.argv[0]), run_name="__main__")
"""


def run(script: str, *arguments: str) -> str:
    """Run an example; return its output."""
    # It chooses its devices itself, as for a new user.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", AS_A_SMALL_MODEL, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_both_implementations_train_alike() -> None:
    output = run("train_moe.py", "--compare", "--steps", "20")
    losses = [float(native) for native in re.findall(r"^ +\d+ +(\d\.\d{5}) +\d\.\d{5} ", output, re.M)]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


def test_a_saved_model_writes_text(tmp_path: Path) -> None:
    """More prompts than slots, of different lengths; with the cache as without."""
    model = str(tmp_path / "model")
    run("train_moe.py", "--steps", "2", "--save", model, "--out", str(tmp_path / "loss.png"))
    prompts = ["def f(", "x", "import ", *("a" * length for length in range(1, 9))]
    output = run("decode_moe.py", model, "--prompts", *prompts, "--bytes", "6", "--check")
    assert [line.split(" → ")[0] for line in output.splitlines()[: len(prompts)]] == [*map(repr, prompts)]
    assert re.search(rf"^prefill +{sum(map(len, prompts))} tokens, ", output, re.M)
    assert re.search(rf"^decode +{5 * len(prompts)} tokens, ", output, re.M)
    assert "without a cache" in output
    assert "\n0 collectives of XLA in a step\n" in output


def test_packed_documents_and_padded_prompts() -> None:
    """Padding has no effect, and documents of a row do not attend to each other: the example asserts it."""
    output = run("packed_sequences.py")
    before, after = map(float, re.search(r"^loss +(\S+) → (\S+)$", output, re.M).groups())
    assert after < before / 2
    rows = {name: int(rows) for name, rows in re.findall(r"^(packed|prompts) +(\d+) rows", output, re.M)}
    assert rows["packed"] < rows["prompts"] / 2


def test_two_batches_compute_the_same() -> None:
    """The example asserts it; its times mean nothing on a CPU."""
    small = "--trials 1 --tokens 32 --hidden 32 --inner 32 --experts 16 --shared 32 --capacity-factor 4"
    output = run("two_batch_overlap.py", *small.split())
    ratios = dict(re.findall(r"^(forward.*?)  .* ms +(\d+\.\d{3})$", output, re.M))
    assert list(ratios) == ["forward", "forward + backward"]
