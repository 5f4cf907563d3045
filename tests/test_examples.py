"""The examples, end to end: implementations learn the same from one seed, and what was learnt writes text."""

import os
import re
import subprocess
import sys
from pathlib import Path

from own_processes import starts_its_own_processes

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = starts_its_own_processes


def run(script: str, *arguments: str) -> str:
    """Run an example; return its output."""
    # It chooses its devices itself, as on a newcomer's machine.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")}
    command = [sys.executable, EXAMPLES / script, *arguments]
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
