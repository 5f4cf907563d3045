"""Compiles and runs cuda_ranks.cu: several ranks in one process on one GPU, compared with the CPU's bits.

And the same under compute-sanitizer, which watches every kernel.
"""

import pathlib
import shutil
import subprocess

import pytest
from rank_programs import compile_with_nvcc

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return compile_with_nvcc("cuda_ranks", tmp_path_factory.mktemp("cuda"))


def run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_every_verb_gives_the_bits_of_the_cpu(program: pathlib.Path) -> None:
    run(str(program), "conformance")


def test_declared_nodes(program: pathlib.Path) -> None:
    run(str(program), "nodes", "chunks")


def test_rows_that_stay_encoded(program: pathlib.Path) -> None:
    run(str(program), "formats")


def test_ranks_that_arrive_late_or_never_or_at_another_op(program: pathlib.Path) -> None:
    run(str(program), "faults")


def test_ops_on_two_channels_at_once(program: pathlib.Path) -> None:
    run(str(program), "channels")


def test_the_choice_of_experts(program: pathlib.Path) -> None:
    run(str(program), "router")


def test_many_steps_with_random_delays(program: pathlib.Path) -> None:
    run(str(program), "soak", "3000")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(program: pathlib.Path, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert pathlib.Path(sanitizer).exists(), "needs compute-sanitizer: put a CUDA toolkit on PATH"
    words = ("short", "short-nodes", "chunks", "router")
    run(sanitizer, "--tool", tool, "--error-exitcode", "1", str(program), *words)
