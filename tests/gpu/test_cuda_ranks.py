"""Compiles and runs cuda_ranks.cu: several ranks in one process on one GPU, compared with the CPU's bits.

And the same under compute-sanitizer, which watches every kernel.
"""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = (
    "tests/gpu/cuda_ranks.cu",
    "xla_ffi/cuda/block_count.cc",
    "xla_ffi/cuda/kernels.cc",
    "xla_ffi/cuda/rank_kernels.cu",
    "xla_ffi/cuda/*/*.cu",
    "xla_ffi/cpu/*.cc",
    "xla_ffi/transport/*_memory.cc",
)
FLAGS = (
    "-std=c++17",
    "-O2",
    "-lineinfo",
    "-fmad=false",
    "-Xcompiler",
    "-ffp-contract=off,-pthread",
    "-lpthread",
)

pytestmark = pytest.mark.gpu


def nvcc() -> str:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    assert pathlib.Path(found).exists(), "needs nvcc: put a CUDA toolkit on PATH"
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("cuda") / "cuda_ranks"
    sources = [str(source) for pattern in SOURCES for source in sorted(ROOT.glob(pattern))]
    command = [nvcc(), *FLAGS, "-arch=native", f"-I{ROOT / 'xla_ffi'}", *sources, "-o", str(path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr[-4000:]
    return path


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


def test_many_steps_with_random_delays(program: pathlib.Path) -> None:
    run(str(program), "soak", "3000")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(program: pathlib.Path, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert pathlib.Path(sanitizer).exists(), "needs compute-sanitizer: put a CUDA toolkit on PATH"
    run(sanitizer, "--tool", tool, "--error-exitcode", "1", str(program), "short", "short-nodes", "chunks")
