"""A process that cannot start threads, as under a limit on pids: an error, without a hang or crash."""

import pathlib
import subprocess

from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes

# Wraps the system's function: limits of the system do not apply to root.
NO_THREADS = """
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
static bool refuses = false;
extern "C" void refuse_threads(int on) { refuses = on; }
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                              void* of) {
  using Function = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Function real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "pthread_create"));
  return refuses ? EAGAIN : real(thread, attributes, run, of);
}
"""
PROGRAM = """
import ctypes
mesh = mesh_named("data × expert")
def make(implementation="native"):
    return ep.Communicator(mesh, "expert", num_experts=8, num_experts_per_tok=2, max_tokens=4, hidden_size=8,
                           implementation=implementation, timeout_s=300.0)
x = np.ones((8, 4, 8), np.float32)
idx = np.tile(np.array([0, 5], np.int32), (8, 4, 1))
operands = put_on_mesh((x, idx, np.full((8, 4, 2), 0.5, np.float32)), mesh, device_axis(mesh, "expert"))
def compiled(comm):
    def body(x, idx, weights):
        dispatched, handle = ep.dispatch(x, idx, weights, comm=comm)
        out = ep.combine(dispatched.tokens, handle, comm=comm)
        return jax.lax.psum(out, ("data", "expert")) / 8  # in which a device would wait for the others
    return jax.jit(per_device(body, mesh, "expert", check_vma=False)).lower(*operands).compile()
def error_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
fetch(compiled(make("xla"))(*operands))  # XLA has all of its own threads from here on
comm, other = make(), make()
program, program_of_other = compiled(comm), compiled(other)
process = ctypes.CDLL(None)
process.refuse_threads(1)
text = "no thread could be started"
remedy = "aise the limit on processes and threads (ulimit -u"
for _ in range(2):
    error = error_of(lambda: fetch(program(*operands)))
    assert text in error and remedy in error, error
error = error_of(comm.check)
assert error.startswith("CommunicatorError") and text in error and remedy in error, error
error = error_of(make)
assert text in error and remedy in error, error
fallback = make("auto")
assert fallback.implementation == "xla" and text in fallback.describe()
process.refuse_threads(0)
np.testing.assert_array_equal(fetch(program_of_other(*operands)), x)
other.check()
comm.close()
print("done")
"""


def test_no_thread_is_an_error_of_the_op(tmp_path: pathlib.Path) -> None:
    source, library = tmp_path / "no_threads.cc", tmp_path / "no_threads.so"
    source.write_text(NO_THREADS)
    command = ["g++", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stderr
    assert "done" in run_python(PROGRAM, preload=library)
