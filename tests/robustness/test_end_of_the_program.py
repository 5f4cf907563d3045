"""A script may end before the programs that it has launched: they end as they would have otherwise.

One EP group is slow, so that its ops begin after the end of the script. The devices of the other group wait
for it in a collective of XLA, which aborts the process after a minute.
"""

import pytest
from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes

SETUP = """
mesh = mesh_named("data × expert")
comm = ep.Communicator(mesh, "expert", num_experts=8, num_experts_per_tok=1, max_tokens=8, hidden_size=64,
                       implementation="native")
def program(x):
    rounds = jnp.where(jax.lax.axis_index("data") == 0, 1, 8000)
    x = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.sin(x @ x), x)
    idx, weights = jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1))
    dispatched, handle = ep.dispatch(x[:8, :64], idx, weights, comm=comm)
    out = ep.combine(dispatched.tokens, handle, comm=comm)
    out += jax.lax.psum(out, ("data", "expert"))
    jax.debug.callback(lambda out: os.write(1, b"ended\\n" if np.isfinite(out).all() else b"failed\\n"), out)
    return out
everyone = P(("data", "expert"))
program = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=everyone, check_vma=False))
x = np.ones((128, 128), np.float32)
program = program.lower(x).compile()
"""


@pytest.mark.parametrize(
    ("last_line", "exit_status"),
    [("out = program(x)", 0), ("program(x)", 0), ("out = program(x); raise ValueError", 1)],
    ids=["result kept", "result dropped", "uncaught exception"],
)
def test_programs_end_after_the_script(last_line: str, exit_status: int) -> None:
    printed = run_python(SETUP + last_line, exit_status=exit_status)
    assert printed == "ended\n" * 8
