"""Programs that would deadlock if an op blocked a thread of XLA, or if ops had to run in one order."""

import pytest
from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes

# Communicators of different shapes over the same eight devices, and a layer of each.
SETUP = """
mesh = mesh_named("data × expert")
rng = np.random.default_rng(0)
NUM_TOKENS, HIDDEN = {num_tokens}, {hidden}
def make(num_experts, num_experts_per_tok):
    return ep.Communicator(mesh, "expert", num_experts=num_experts, num_experts_per_tok=num_experts_per_tok,
                           max_tokens=NUM_TOKENS, hidden_size=HIDDEN, implementation="native")
comms = [make(8, 2), make(16, 4), make(4, 1), make(32, 6), make(8, 8)]
def layer(comm, x, key):
    noise = jax.random.uniform(key, (x.shape[0], comm.num_experts)) + x[:, :1]
    weights, idx = jax.lax.top_k(noise, comm.num_experts_per_tok)
    dispatched, handle = ep.dispatch(x, idx, weights, comm=comm)
    y = jnp.where(dispatched.mask[:, None], jnp.tanh(dispatched.tokens), 0)
    return ep.combine(y, handle, comm=comm, bias=x)
def independent(x, w, key):
    # No data flows from one layer to another: XLA may start them in any order, at once.
    keys = jax.random.split(key, len(comms))
    return sum(layer(comm, jnp.tanh(x @ w), k) for comm, k in zip(comms, keys))
x = rng.normal(size=(8, NUM_TOKENS, HIDDEN)).astype(np.float32) / 4
w = np.broadcast_to(rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN**0.5, (8, HIDDEN, HIDDEN))
keys = np.array([jax.random.key_data(jax.random.key(i)) for i in range(8)])
x, w, keys = put_on_mesh((x, w, keys), mesh, device_axis(mesh, "expert"))
def compiled(function):
    def body(x, w, key):
        return function(x, w, jax.random.wrap_key_data(key))
    return jax.jit(per_device(body, mesh, "expert"))
def finish(result):
    result = fetch(result)
    assert np.isfinite(result).all()
    for comm in comms:
        comm.check()
    print("done")
"""

LARGE = SETUP.format(num_tokens=192, hidden=256)
SMALL = SETUP.format(num_tokens=8, hidden=16)

# Our ops need no minimum size of the thread pool, as long as few programs are in flight.
with_threads = pytest.mark.parametrize("num_threads", [None, 1], ids=["NPROC unset", "NPROC=1"])


@with_threads
def test_large_independent_ops(num_threads: int | None) -> None:
    program = (
        LARGE
        + """
step = compiled(independent)
for _ in range(3):
    out = step(x, w, keys)
finish(out)
"""
    )
    assert "done" in run_python(program, num_threads=num_threads)


@with_threads
def test_independent_ops_under_scan_and_remat_with_gradient(num_threads: int | None) -> None:
    program = (
        SMALL
        + """
def loss(x, w, key):
    @jax.checkpoint
    def body(x, key):
        return jnp.tanh(independent(x, w, key)), None
    return jnp.sum(jax.lax.scan(body, x, jax.random.split(key, 3))[0])
step = compiled(jax.grad(loss, argnums=1))
for _ in range(3):
    out = step(x, w, keys)
finish(out)
"""
    )
    assert "done" in run_python(program, num_threads=num_threads)


def test_500_programs_in_a_row() -> None:
    """Launched without waiting, each with the result of the previous one."""
    program = (
        SMALL
        + """
step = compiled(lambda x, w, key: jnp.tanh(layer(comms[1], x, key)))
out = x
for _ in range(500):
    out = step(out, w, keys)
finish(out)
"""
    )
    assert "done" in run_python(program)


def test_500_programs_of_two_kinds_without_dependence() -> None:
    program = (
        SMALL
        + """
steps = [compiled(lambda x, w, key, comm=comm: layer(comm, x, key)) for comm in comms[:2]]
outs = [steps[i % 2](x, w, keys) for i in range(500)]
for i, out in enumerate(outs):
    assert (fetch(out) == fetch(outs[i % 2])).all(), i
finish(outs[-1])
"""
    )
    assert "done" in run_python(program)


def test_mixed_with_the_collectives_of_xla() -> None:
    program = (
        SMALL
        + """
def mixed(x, w, key):
    total = jax.lax.psum(x @ w, ("data", "expert")) / 8
    swapped = jax.lax.all_to_all(x.reshape(4, -1, HIDDEN), "expert", 0, 0).reshape(x.shape)
    return independent(x, w, key) + independent(swapped, w, key) + total
def loss(x, w, key):
    def body(x, key):
        return jnp.tanh(mixed(x, w, key)), None
    return jnp.sum(jax.lax.scan(body, x, jax.random.split(key, 2))[0])
step = compiled(jax.grad(loss))
for _ in range(20):
    out = step(x, w, keys)
finish(out)
"""
    )
    assert "done" in run_python(program)


def test_native_ops_without_an_enclosing_jit() -> None:
    """shard_map alone, one op at a time, gives the bits of the jitted program."""
    program = (
        SMALL
        + """
def small(x, idx, weights):
    dispatched, handle = ep.dispatch(x, idx, weights, comm=comms[0])
    return ep.combine(dispatched.tokens, handle, comm=comms[0], bias=x)
idx = np.tile(np.array([[0, 5]], np.int32), (8, NUM_TOKENS, 1))
idx, weights = put_on_mesh((idx, np.ones(idx.shape, np.float32)), mesh, device_axis(mesh, "expert"))
eager = per_device(small, mesh, "expert")
assert (fetch(eager(x, idx, weights)) == fetch(jax.jit(eager)(x, idx, weights))).all()
print("done")
"""
    )
    assert "done" in run_python(program)
