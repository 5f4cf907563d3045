"""Runs the CUDA kernels with several ranks where there is no GPU: see cuda_on_cpu/block_threads.h.

The same program as tests/gpu/test_cuda_ranks.py, and the same bits: those of the ops on CPU. Between nodes
puts go over mapped memory; nightly also over a simulated NVSHMEM, which carries them out late.
"""

import faulthandler
import subprocess

import pytest
from rank_programs import HOST_CODE, KERNELS, ROOT, files

pytestmark = pytest.mark.any_python
SHIM = ROOT / "tests/native/cuda_on_cpu"
# Shared memory of blocks is thread_local, without code that initialises it.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-extern-tls-init", "-pthread")
TIMEOUT_S = 900  # of a process, beside two suites that compile
INCLUDES = (f"-I{SHIM}", f"-I{ROOT / 'tests/gpu'}", f"-I{ROOT / 'xla_ffi'}")


def run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("-UJAX_DEEPEP_NVSHMEM", id="mapped"),
        pytest.param("-DJAX_DEEPEP_NVSHMEM", id="nvshmem", marks=pytest.mark.nightly),
    ],
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    faulthandler.cancel_dump_traceback_later()  # what runs here has deadlines of its own
    folder = tmp_path_factory.mktemp("kernels")
    flags = (*FLAGS, request.param, *INCLUDES)
    objects = []
    for source in files("tests/gpu/cuda_ranks.cu", *KERNELS):
        objects.append(str(folder / f"{source.parent.name}_{source.stem}.o"))
        as_cpp = ["-include", str(SHIM / "shared_memory.h"), "-x", "c++", "-c", str(source)]
        run(["g++", *flags, *as_cpp, "-o", objects[-1]])
    path = str(folder / "cuda_ranks")
    sources = map(str, files("tests/native/cuda_on_cpu/*.cc", *HOST_CODE))
    run(["g++", *flags, *sources, *objects, "-ldl", "-o", path])
    return path


def test_kernels(program: str) -> None:
    """Every verb gives the bits of the CPU; beside it, ranks arrive late, never or at another op."""
    # Most of the latter is waiting, for limits of time that a busy machine keeps.
    faults = subprocess.Popen(
        [program, "faults"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        words = ("short", "short-nodes", "chunks", "formats", "channels", "router")
        assert "0 failures" in run([program, *words])
        output, _ = faults.communicate(timeout=TIMEOUT_S)
    finally:
        faults.kill()
    assert faults.returncode == 0, output[-4000:]
    assert "0 failures" in output


@pytest.mark.nightly
def test_many_steps_with_random_delays(program: str) -> None:
    assert "0 failures" in run([program, "soak", "20"])
