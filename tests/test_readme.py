"""The Python in the READMEs runs as pasted, on a laptop, and their tables are correct.

`mypy` reads the Python with the style checks.
"""

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_processes import starts_its_own_processes
from quick_compilation import QUICK_COMPILATION
from readme_snippets import READMES, ROOT, write_snippets

import jax_deepep as ep

LAPTOP_BYTES = 8 * 2**30


@starts_its_own_processes
def test_every_piece_runs_as_pasted(tmp_path: Path) -> None:
    # Each chooses its devices itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "JAX_PLATFORMS")}
    environment["XLA_FLAGS"] = QUICK_COMPILATION
    paths = write_snippets(tmp_path)
    assert sorted(path.stem for path in paths) == sorted(SNIPPETS)
    for path in paths:
        run = subprocess.run(
            [sys.executable, path], capture_output=True, text=True, timeout=200, env=environment
        )
        assert run.returncode == 0, path.read_text() + run.stdout + run.stderr
    # Of the largest child process that has ended.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < LAPTOP_BYTES / 2


SNIPPETS = {
    "readme_root_0", "readme_root_1", "readme_jax_deepep_0", "readme_jax_deepep_1", "readme_jax_deepep_2",
    "readme_moe_0", "readme_moe_1", "readme_moe_2",
}  # fmt: skip


def functions_of(name: str, folder: Path, **known: Any) -> dict[str, Any]:
    """Return the functions that a snippet defines, without running the rest of it."""
    path = next(path for path in write_snippets(folder) if path.stem == name)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    exec(compile(tree, path, "exec"), known)
    return known


@pytest.mark.parametrize("slots", [3, 7])
def test_the_masked_layout(slots: int, tmp_path: Path) -> None:
    """Rows and counts of every expert, also of one without rows; nothing of padding, and no NaN; and back."""
    recipe = functions_of("readme_jax_deepep_2", tmp_path, jax=jax, jnp=jnp, ep=ep)
    num_rows, alignment, capacity = np.array([3, 0, 2, 3]), 4, 16
    group_sizes = -(-num_rows // alignment) * alignment
    tokens = np.full((capacity, 2), np.nan, np.float32)
    mask = np.zeros(capacity, bool)
    expected = np.zeros((len(num_rows), slots, 2), np.float32)
    for expert, count in enumerate(num_rows):
        first = group_sizes[:expert].sum()
        tokens[first : first + group_sizes[expert]] = 0
        tokens[first : first + count] = expected[expert, :count] = 1 + np.arange(2 * count).reshape(-1, 2)
        tokens[first : first + count] += expert
        expected[expert, :count] += expert
        mask[first : first + count] = True
    arrays = map(jnp.asarray, (tokens, group_sizes, num_rows, np.ones(capacity, np.float32), mask))
    dispatched = ep.ExpertMajor(*arrays)

    slabs = recipe["to_masked"](dispatched, slots)
    np.testing.assert_array_equal(slabs, expected)
    rows = np.asarray(recipe["to_rows"](slabs, dispatched))
    np.testing.assert_array_equal(rows[mask], tokens[mask])
    assert not np.isnan(rows).any()


def literals() -> str:
    """Return the literals in the sources, one per line; f-strings are split at their values."""
    texts = []
    for path in (ROOT / "jax_deepep").rglob("*.py"):
        texts += [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    literal = r'"((?:[^"\\\n]|\\.)*)"'
    for path in [*(ROOT / "xla_ffi").rglob("*.cc"), *(ROOT / "xla_ffi").rglob("*.h")]:
        joined = re.sub(r'(?<=[^\\])"\s*\n\s*"', "", path.read_text())
        texts += re.findall(literal, joined)
    return "\n".join(texts)


def test_symptoms_are_texts_of_the_sources() -> None:
    """What a table of symptoms quotes is what users read."""
    known, tables = literals(), 0
    for readme in READMES:
        for table in re.findall(r"^\| symptom \|.*\n\|.*\n((?:\|.*\n)+)", readme.read_text(), re.M):
            tables += 1
            for row in table.splitlines():
                for quoted in re.findall(r"`([^`]+)`", row.split("|")[1]):
                    assert quoted in known or hasattr(ep, quoted.split(".")[-1]), (readme, quoted)
    assert tables


def test_links_lead_to_files() -> None:
    for readme in [*READMES, ROOT / "tests" / "README.md", ROOT / "jax_deepep" / "CHANGELOG.md"]:
        for target, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", readme.read_text()):
            path = (readme.parent / target).resolve() if target else readme
            assert path.exists(), (readme, target)
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, (readme, target, anchor, slugs)
