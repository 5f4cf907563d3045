"""The C++ programs of gpu/ with several ranks in one process: their files, and how nvcc compiles them.

Compile one with `python3 tests/rank_programs.py PROGRAM OUT_FOLDER`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = ("xla_ffi/cuda/rank_kernels.cu", "xla_ffi/cuda/*/*.cu", "xla_ffi/router/*.cu")
HOST_CODE = (
    "xla_ffi/cpu/*.cc",
    "xla_ffi/cuda/block_count.cc",
    "xla_ffi/cuda/kernels.cc",
    "xla_ffi/cuda/*/*.cc",
    "xla_ffi/transport/*_memory.cc",
)
_FLAGS = (
    f"-I{ROOT / 'xla_ffi'}", "-std=c++17", "-O2", "-arch=native", "-lineinfo", "-fmad=false",
    "-Xcompiler", "-ffp-contract=off,-pthread",
)  # fmt: skip


def files(*patterns: str) -> list[pathlib.Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def compile_with_nvcc(program: str, folder: pathlib.Path) -> pathlib.Path:
    """Compile tests/gpu/`program`.cu for the GPU of this machine, all files at once, and return the program.

    Raises:
        subprocess.CalledProcessError: nvcc failed; its output is on stderr.
    """
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    assert pathlib.Path(nvcc).exists(), "needs nvcc: put a CUDA toolkit on PATH"

    def compiled(source: pathlib.Path) -> str:
        output = folder / f"{source.parent.name}_{source.stem}.o"
        in_and_out = ["-c", str(source), "-o", str(output)]
        subprocess.run([nvcc, *_FLAGS, *in_and_out], check=True, timeout=280)
        return str(output)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compiled, files(f"tests/gpu/{program}.cu", *KERNELS, *HOST_CODE)))
    path = folder / program
    subprocess.run([nvcc, "-arch=native", *objects, "-lpthread", "-o", str(path)], check=True, timeout=280)
    return path


if __name__ == "__main__":
    compile_with_nvcc(sys.argv[1], pathlib.Path(sys.argv[2]))
