"""A device that is late by more than timeout_s: all ops end with NaN, and the error names it.

Every test runs in a separate process: mesh (data 2 × expert 4), where rank 2 of group 0 arrives too late.
"""

from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes

SETUP = """
TIMEOUT_S, LATE_BY_S, LATE_DEVICE = 1.0, 2.5, 2
mesh = mesh_named("data × expert")
spec = device_axis(mesh, "expert")
def make(timeout_s=TIMEOUT_S):
    return ep.Communicator(mesh, "expert", num_experts=8, num_experts_per_tok=2, max_tokens=4, hidden_size=8,
                           implementation="native", timeout_s=timeout_s)
rng = np.random.default_rng(0)
x = rng.normal(size=(8, 4, 8)).astype(np.float32)
idx = np.argsort(rng.random((8, 4, 8)), axis=-1)[..., :2].astype(np.int32)
weights = rng.random((8, 4, 2), np.float32)
late = np.arange(8) == LATE_DEVICE
group_0 = np.arange(8) < 4
def wait(values):
    time.sleep(LATE_BY_S)
    return values
def come_late(here, values):
    # On the late device alone, in the middle of the program.
    absent = lambda values: jax.pure_callback(wait, jax.ShapeDtypeStruct(values.shape, values.dtype), values)
    return jax.lax.cond(here, absent, lambda values: values, values)
def compiled(function):
    return jax.jit(per_device(function, mesh, "expert", check_vma=False))
def layer(comm, x, idx, weights):
    dispatched, handle = ep.dispatch(x, idx, weights, comm=comm)
    return ep.combine(dispatched.tokens, handle, comm=comm)
def expect(error, function, *words):
    try:
        function()
    except error as caught:
        for word in words:
            assert word in str(caught), (word, str(caught))
        return
    raise AssertionError(f"did not raise {error.__name__}")
def assert_works(comm):
    out = fetch(compiled(lambda *args: layer(comm, *args))(*put_on_mesh((x, idx, weights), mesh, spec)))
    np.testing.assert_allclose(out, x * weights.sum(-1, keepdims=True), rtol=1e-5)
    comm.check()
operands = put_on_mesh((late, x, idx, weights), mesh, spec)
comm, bystander = make(), make(timeout_s=100.0)
assert_works(bystander)
"""


def test_everyone_ends_with_nan_and_the_error_says_who_was_missing() -> None:
    """On the devices that waited and on the late one: training does not continue silently.

    The error has op, rank, missing peers, expected and seen step, on every call; and other
    communicators of the process and its devices are not affected.
    """
    run_python(SETUP + """
@compiled
def program(late, x, idx, weights):
    dispatched, handle = ep.dispatch(come_late(late, x), idx, weights, comm=comm)
    return dispatched, handle, ep.combine(dispatched.tokens, handle, comm=comm)
dispatched, handle, out = fetch(program(*operands))
assert np.isnan(dispatched.tokens[group_0]).all()
assert np.isnan(dispatched.weights[group_0]).all()
assert np.isnan(out[group_0]).all()
assert not dispatched.mask[group_0].any()
assert (handle.source[group_0] == -1).all()
for counts in (dispatched.group_sizes, dispatched.num_rows, handle.num_received, handle.num_dropped,
               handle.num_invalid):
    assert (counts[group_0] == 0).all()
words = ("dispatch on rank", "group 0", "waited 1 s", "for rank 2", "expected at step 1", "seen at step 0")
for _ in range(2):
    expect(ep.PeerTimeoutError, comm.check, *words)
expect(ep.CommunicatorError, lambda: compiled(lambda *args: layer(comm, *args)).trace(*operands[1:]), *words)
assert "waited 1 s" in comm.describe() and "ready" not in comm.describe()
assert_works(bystander)
assert_works(make())
comm.close()
assert_works(bystander)
""", timeout_s=90)  # fmt: skip


def test_a_rank_that_waits_in_another_op_is_named_with_it() -> None:
    """It might still arrive: XLA runs ops in any order. Stderr has one line for all eight devices."""
    run_python(SETUP + """
import tempfile
log = tempfile.TemporaryFile()
os.dup2(log.fileno(), 2)
@compiled
def program(late, x, idx, weights):
    usual = lambda x: layer(comm, x, idx, weights)
    other = lambda x: layer(comm, x[:2], idx[:2], weights[:2]).repeat(2, axis=0)
    return jax.lax.cond(late, other, usual, x)
out = fetch(program(*operands))
assert np.isnan(out[group_0]).all()
expect(ep.PeerTimeoutError, comm.check, "waited 1 s", "where it waits in another op: ", "num_tokens is ",
       "Run the same program on all ranks")
log.seek(0)
lines = [line for line in log.read().decode().splitlines() if line.startswith("jax_deepep: ")]
assert lines == ["jax_deepep: " + comm._native.broken], lines
""", timeout_s=90)  # fmt: skip


# Each of the following breaks a separate communicator.
LATER_OP = """
comm = make()
@compiled
def program(late, x, idx, weights):
    dispatched, handle = ep.dispatch(x, idx, weights, comm=comm)
    return handle, {body}
handle, out = fetch(program(*operands))
assert np.isnan(out[group_0]).all()
assert (handle.num_received[group_0].sum() == 32), "the dispatch before it was in order"
expect(ep.PeerTimeoutError, comm.check, "{op} on rank", "for rank 2", "expected at step {step}",
       "seen at step {before}")
"""


def test_every_op_ends_the_same_way() -> None:
    """Rows of floats and of integers, gradients, and later ops, which are named with their step.

    Integers have all their bits set: −1 or the largest number, and NaN if read as 8-bit floats.
    """
    run_python(SETUP + """
@compiled
def program(late, x, idx, weights):
    dispatched, handle = ep.dispatch(come_late(late, x), idx, weights, comm=comm, layout="token")
    return dispatched, ep.combine(dispatched.tokens, handle, comm=comm)
dispatched, out = fetch(program(*operands))
assert np.isnan(dispatched.tokens[group_0]).all()
assert np.isnan(dispatched.topk_weights[group_0]).all()
assert (dispatched.topk_idx[group_0] == -1).all()
assert (dispatched.num_tokens[group_0] == 0).all()
assert np.isnan(out[group_0]).all()
comm = make()
@compiled
def program(late, x, idx, weights):
    integers = x[:, :5].astype(jnp.uint8)
    dispatched, handle = ep.dispatch(come_late(late, integers), idx, weights, comm=comm)
    again, _ = ep.dispatch(integers.astype(jnp.int16), handle=handle, comm=comm)
    return dispatched.tokens, again.tokens, dispatched.weights, handle.num_received
tokens, again, weights, num_received = fetch(program(*operands))
assert tokens.dtype == np.uint8 and (tokens[group_0] == 255).all()
assert again.dtype == np.int16 and (again[group_0] == -1).all()
assert np.isnan(weights[group_0]).all()
assert (num_received[group_0] == 0).all()
comm = make()
@compiled
def program(late, x, idx, weights):
    zero = come_late(late, x) - x  # a callback has no gradient; this only delays
    out, backward = jax.vjp(lambda x, weights: layer(comm, x + zero, idx, weights), x, weights)
    return out, *backward(jnp.ones_like(out))
for values in fetch(program(*operands)):
    assert np.isnan(values[group_0]).all()
""" + LATER_OP.format(
        op="combine", step=2, before=1,
        body="ep.combine(come_late(late, dispatched.tokens), handle, comm=comm)",
    ) + LATER_OP.format(
        op="cached_dispatch", step=2, before=1,
        body="ep.dispatch(come_late(late, x), handle=handle, comm=comm)[0].tokens",
    ), timeout_s=90)  # fmt: skip


def test_a_broken_communicator_ends_later_runs_at_once() -> None:
    """A hundred runs of a program compiled before: if each waited again, the test would time out."""
    run_python(SETUP + """
in_time = compiled(lambda _, *args: layer(comm, *args))
assert np.isfinite(fetch(in_time(*operands))).all()
fetch(compiled(lambda late, x, *args: layer(comm, come_late(late, x), *args))(*operands))
for _ in range(100):
    assert np.isnan(fetch(in_time(*operands))).all()
""", timeout_s=60)  # fmt: skip


def test_a_bystander_in_the_same_program() -> None:
    """Its ops wait for the late device, too, within a longer timeout: only the other communicator breaks."""
    run_python(SETUP + """
@compiled
def program(late, x, idx, weights):
    x = come_late(late, x)
    return layer(comm, x, idx, weights), layer(bystander, x, idx, weights)
broken, whole = fetch(program(*operands))
assert np.isnan(broken[group_0]).all()
np.testing.assert_allclose(whole, x * weights.sum(-1, keepdims=True), rtol=1e-5)
bystander.check()
expect(ep.PeerTimeoutError, comm.check)
""", timeout_s=90)  # fmt: skip


def test_a_device_that_is_slow_but_in_time_breaks_nothing() -> None:
    run_python(SETUP + """
@compiled
def program(late, x, idx, weights):
    return layer(bystander, come_late(late, x), idx, weights)
out = fetch(program(*operands))
np.testing.assert_allclose(out, x * weights.sum(-1, keepdims=True), rtol=1e-5)
bystander.check()
waited = bystander.stats().seconds_waited
assert (waited[0, [0, 1, 3], 2] > 0.5).all(), waited  # the others waited for rank 2
assert (waited[0, 2] < waited[0, 0, 2]).all(), waited
""", timeout_s=90)  # fmt: skip
