"""Compiles and runs native_test.cc: numbers in rows, ops of a group, shapes."""

import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.any_python
ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-trapping-math")


def test_the_code_without_python(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "native_test"
    code = ROOT / "xla_ffi"
    sources = (
        *sorted((ROOT / "tests/native").glob("*_test.cc")),
        code / "cpu/group_exchange.cc",
        code / "cpu/pages.cc",
        code / "cpu/row_math.cc",
        code / "cpu/threads.cc",
        code / "cpu/windows.cc",
        code / "cpu/wire_rows.cc",
        code / "cuda/block_count.cc",
        code / "transport/shared_memory.cc",
        code / "transport/tcp_memory.cc",
    )
    command = ["g++", *FLAGS, f"-I{code}", *map(str, sources), "-pthread", "-ldl", "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr
    assert "0 failures" in ran.stdout
