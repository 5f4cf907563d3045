"""Insert `python_program` between the interpreter and its program, where a command runs Python."""

import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = str(Path(__file__).parent / "inside_rank" / "python_program.py")
_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_FLAGS = re.compile(r"-[bBdEIOPqRsSuvx]+")  # that a program may follow


def through_python_program(command: Sequence[str], path: str | None = None) -> list[str]:
    """Return the command with `python_program` in it, or unchanged where it is not clearly Python.

    Covered are `python [options] script|-m module|-c code …` and scripts that begin with `#!…python`
    (such as the `pytest` command). A shell script or binary runs unchanged: then an exception in
    a rank is noticed only when its process ends.

    Args:
        command: program and arguments.
        path: the PATH to find the program on; the launcher's own by default.
    """
    found = shutil.which(command[0], path=path)
    if found is None:
        return list(command)
    if re.fullmatch(r"python[\d.]*", Path(found).name):
        position = _program_position(command)
        return [*command[:position], _PROGRAM, *command[position:]] if position is not None else list(command)
    interpreter = _python_of_script(Path(found))
    return [*interpreter, _PROGRAM, found, *command[1:]] if interpreter else list(command)


def _program_position(command: Sequence[str]) -> int | None:
    position = 1
    while position < len(command):
        word = command[position]
        if word in ("-m", "-c"):
            return position if position + 1 < len(command) else None
        if word in _OPTIONS_WITH_VALUE:
            position += 2
        elif _FLAGS.fullmatch(word) or re.match(r"-[WX].", word):
            position += 1
        elif word.startswith("-"):
            return None  # -i, -V, -um module, …: left to Python
        else:
            script = Path(word)
            return position if script.is_file() and not zipfile.is_zipfile(script) else None
    return None


def _python_of_script(script: Path) -> list[str] | None:
    with script.open("rb") as file:
        first = file.readline(512)
    if not first.startswith(b"#!"):
        return None
    words = first[2:].decode(errors="replace").split()
    if len(words) >= 2 and Path(words[0]).name == "env" and re.fullmatch(r"python[\d.]*", words[1]):
        return words[1:]
    return words if words and re.fullmatch(r"python[\d.]*", Path(words[0]).name) else None
