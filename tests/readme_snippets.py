"""The pieces of Python in README.md, as files: python tests/readme_snippets.py FOLDER prints their names."""

import pathlib
import re
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def write_snippets(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every piece into a file of its own, as somebody would who pastes it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, text in enumerate(re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)):
        paths.append(folder / f"readme_{number}.py")
        paths[-1].write_text(text)
    return paths


if __name__ == "__main__":
    print(*write_snippets(pathlib.Path(sys.argv[1])))
