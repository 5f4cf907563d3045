"""The library of NVSHMEM compiles against the real headers, links, and loads without a GPU."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sysconfig

import pytest

pytestmark = [pytest.mark.any_python, pytest.mark.nightly]
ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(os.environ.get("NVSHMEM_HOME", f"{sysconfig.get_path('purelib')}/nvidia/nvshmem"))
DIGEST = "of the test"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(not FOLDER.exists(), reason="needs nvidia-nvshmem-cu13, or NVSHMEM_HOME")
def test_the_library(tmp_path: pathlib.Path) -> None:
    (tmp_path / "source_digest.h").write_text(f'#define JAX_DEEPEP_SOURCE_DIGEST "{DIGEST}"\n')
    flags = ["-std=c++17", "-arch=sm_90", "-DJAX_DEEPEP_NVSHMEM", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    options = subprocess.run(["nvcc", "--help"], capture_output=True, text=True, check=True).stdout
    flags += ["-Ofc=max"] if "--Ofast-compile" in options else []
    includes = [f"-I{FOLDER}/include", f"-I{ROOT}/xla_ffi", f"-I{tmp_path}"]
    code = ROOT / "xla_ffi"
    sources = [code / "nvshmem/transport.cu", *code.glob("cuda/internode/*.cu")]
    sources += code.glob("cuda/low_latency_nodes/*.cu")
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    compile_one = ["nvcc", *flags, *includes, "-rdc=true", "-c", "-o"]
    compilers = [
        subprocess.Popen([*compile_one, to, source]) for source, to in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait(timeout=280) for compiler in compilers] == [0] * len(sources)
    host_library = FOLDER / "lib/libnvshmem_host.so.3"
    libraries = [FOLDER / "lib/libnvshmem_device.a", host_library]
    linker = ["-Xlinker", f"--no-undefined,--version-script={ROOT}/xla_ffi/nvshmem/exports.map"]
    library = tmp_path / "_nvshmem.so"
    inputs = [*objects, ROOT / "xla_ffi/cuda/block_count.cc", *libraries]
    subprocess.run(
        ["nvcc", *flags, *includes, *inputs, "-shared", *linker, "-o", library], check=True, timeout=280
    )
    ctypes.CDLL(str(host_library))
    transport = ctypes.CDLL(str(library)).jax_deepep_remote_transport
    transport.restype = ctypes.POINTER(ctypes.c_char_p)
    assert transport()[0] == DIGEST.encode()
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert all(line.split()[-1].startswith("jax_deepep_") for line in symbols.stdout.splitlines()), (
        symbols.stdout
    )
