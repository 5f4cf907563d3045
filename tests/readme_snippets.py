"""The Python in the READMEs, piece by piece: python tests/readme_snippets.py FOLDER prints the files."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
READMES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("jax_deepep/**/README.md")),
    *sorted(ROOT.glob("xla_ffi/**/README.md")),
]


def write_snippets(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every piece into a separate file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for readme in READMES:
        room = readme.parent.name if readme.parent != ROOT else "root"
        for number, text in enumerate(re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.M | re.S)):
            paths.append(folder / f"readme_{room}_{number}.py")
            paths[-1].write_text(text)
    return paths


if __name__ == "__main__":
    print(*write_snippets(pathlib.Path(sys.argv[1])))
