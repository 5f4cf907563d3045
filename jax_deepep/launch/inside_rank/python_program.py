"""Run a Python program inside a rank, and report a failure to the launcher at once.

It runs as a script, with the standard library alone, between the interpreter and the program:
`python -u python_program.py train.py …`, also with `-m module` or `-c code`.

Why: when a rank raises after `jax.distributed.initialize()`, Python prints the traceback and then
runs JAX's exit handler, which waits up to five minutes for the other ranks, while they wait for this one in
a collective. Seen from outside, no process has died. So the failure is reported here, before the exit
handlers run. The launcher then ends the job, with its grace period for this rank's handlers.
"""

import contextlib
import faulthandler
import io
import os
import runpy
import signal
import sys
import time
import types
from typing import Any


def main() -> None:
    """Do what `python ARGUMENTS` would do."""
    state, pid = state_path(), os.getpid()
    if state is not None:
        dump_stacks_on_request(state)
    arguments = sys.argv[1:]
    try:
        _run(arguments)
    except BaseException as error:
        state = state if os.getpid() == pid else None  # the end of a fork is not the rank's
        if isinstance(error, SystemExit):
            if error.code is not None and error.code != 0:
                report_failure(state, error.code & 0xFF if isinstance(error.code, int) else 1)
            raise
        if isinstance(error, KeyboardInterrupt):
            report_failure(state, 128 + signal.SIGINT)
            raise  # Python itself then dies from SIGINT, as callers expect
        try:
            _print_without_this_file(error)
        finally:  # the program's excepthook may raise
            report_failure(state, 1)
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    kind, rest = arguments[0], arguments[1:]
    # This file's folder must not be importable; what replaces it depends on how the program is given.
    # With -P or -I, Python has not added it.
    own_path = not sys.flags.safe_path
    if kind == "-m":
        if own_path:
            sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if own_path:
        sys.path[0] = "" if kind == "-c" else os.path.dirname(os.path.realpath(kind))
    # A new, lasting __main__: threads and exit handlers may use it after the program's last line.
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv = arguments
        module.__file__ = kind
        with io.open_code(os.path.abspath(kind)) as file:
            code = compile(file.read(), kind, "exec")
    names: dict[str, Any] = module.__dict__
    names["__builtins__"] = __builtins__
    exec(code, names)


def _print_without_this_file(error: BaseException) -> None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    with contextlib.suppress(Exception):
        sys.stderr.flush()


def state_path() -> str | None:
    """Return the path of files for the launcher, without their suffix; None outside of ranks."""
    folder, rank = os.environ.get("JAX_DEEPEP_LAUNCH_LOG_DIR"), os.environ.get("JAX_DEEPEP_LAUNCH_RANK")
    return None if folder is None or rank is None else os.path.join(folder, ".launch", f"rank{rank}")


def report_failure(state: str | None, status: int) -> None:
    """Report a failure to the launcher before this process ends."""
    if state is None:
        return
    with contextlib.suppress(OSError), open(state + ".failed.new", "w") as file:
        file.write(f"{status} {time.monotonic()}")
        file.close()
        os.replace(state + ".failed.new", state + ".failed")


def dump_stacks_on_request(state: str) -> None:
    """On SIGUSR1, write the stack of every thread to a file that the launcher reads."""
    folder, name = os.path.split(state)
    with contextlib.suppress(OSError):
        stacks = os.open(
            os.path.join(os.path.dirname(folder), name + ".stacks"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        # Python removes its handler at exit: a request that arrives then must not kill the process.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        with open(state + ".dumps", "w") as file:
            file.write(str(os.getpid()))


if __name__ == "__main__":
    main()
