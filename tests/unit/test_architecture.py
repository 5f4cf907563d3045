"""Rules of the code base that can be checked automatically."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = sorted(
    path for folder in ("jax_deepep", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
)
NATIVE = sorted(path for path in (ROOT / "xla_ffi").rglob("*") if path.suffix in {".cc", ".h", ".cu", ".cuh"})
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "buffer"}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: pathlib.Path) -> int:
    return len(path.read_text().splitlines())


def includes_of(folder: str) -> dict[str, list[str]]:
    """Return what each native file under a folder of xla_ffi includes."""
    files = [path for path in NATIVE if path.relative_to(ROOT / "xla_ffi").parts[0] == folder]
    assert files, f"xla_ffi/{folder} has no files any more: correct this test"
    return {name_of(path): re.findall(r'#include\s+[<"]([^">]+)', path.read_text()) for path in files}


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) > 20
    assert len(NATIVE) > 10


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_python_files_are_short(path: pathlib.Path) -> None:
    """A file has one subject. 300 lines is the aim; 400 is the limit."""
    assert lines_of(path) <= 400


def test_most_python_files_keep_to_the_aim() -> None:
    longer = [name_of(path) for path in PYTHON if lines_of(path) > 300]
    assert len(longer) <= len(PYTHON) // 20, longer


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_native_files_are_short(path: pathlib.Path) -> None:
    """Kernels may be longer: they may have several roles in one launch."""
    assert lines_of(path) <= (600 if path.suffix in {".cu", ".cuh"} else 400)


def test_names_say_what_is_in_a_file() -> None:
    silent = [name_of(path) for path in PYTHON + NATIVE if SAYS_NOTHING & set(path.stem.lower().split("_"))]
    assert not silent


@pytest.mark.parametrize("folder", ["cpu", "interface", "routing"])
def test_algorithms_do_not_know_xla(folder: str) -> None:
    for name, includes in includes_of(folder).items():
        assert not [include for include in includes if include.startswith("xla/")], name


@pytest.mark.parametrize("folder", ["interface", "handlers", "routing"])
def test_only_kernels_know_cuda(folder: str) -> None:
    for name, includes in includes_of(folder).items():
        text = (ROOT / name).read_text()
        assert not re.search(r"<<<|__global__|__shared__", text), name
        assert not [include for include in includes if "cuda" in pathlib.PurePath(include).name], name


def test_private_jax_is_used_in_one_file() -> None:
    users = [name_of(path) for path in PYTHON if path != pathlib.Path(__file__)
             and re.search(r"jax\._src|jaxlib\._", path.read_text())]  # fmt: skip
    assert users == ["jax_deepep/jax_compat.py"]


def test_every_python_file_says_what_it_is() -> None:
    silent = [
        name_of(path)
        for path in PYTHON
        if path.read_text().strip() and not path.read_text().startswith('"""')
    ]
    assert not silent
