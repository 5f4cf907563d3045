"""What peers get of a rank whose script ends before the program that it has launched, or that comes late."""

import sys
from pathlib import Path

import pytest
from launcher_runs import launch, program
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

# Rank 1 computes before its first op, so that the script of rank 0 ends long before its own op does.
TEXT = """
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize()
import jax_deepep as ep
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
jax.set_mesh(mesh)  # of both processes' devices
comm = ep.Communicator(
    mesh, num_experts=4, num_experts_per_tok=1, max_tokens=8, hidden_size=64, implementation="native"
)
def layer(x):
    rounds = jnp.where(jax.lax.axis_index("expert") == 0, {rounds}, 8000)
    x = jax.lax.fori_loop(0, rounds, lambda _, x: x + jnp.sin(x @ x) / 2, x)
    dispatched, handle = ep.dispatch(x[:8, :64], jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1)), comm=comm)
    return ep.combine(dispatched.tokens, handle)
layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P(), out_specs=P("expert"), check_vma=False))
x = np.ones((128, 128), np.float32)
layer = layer.lower(x).compile()
out = layer(x)
if jax.process_index() == 1:
    assert np.isfinite(np.asarray(out.addressable_data(0))).all()
    comm.check()
    print("checked")
"""


LATE = """
import time
import jax, jax.numpy as jnp
jax.distributed.initialize()
import jax_deepep as ep
mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
comm = ep.Communicator(
    mesh, num_experts=4, num_experts_per_tok=1, max_tokens=8, hidden_size=64, implementation="native",
    timeout_s=2,
)
def layer(x):
    dispatched, _ = ep.dispatch(x, jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1)), comm=comm)
    return dispatched.tokens
layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("expert"), check_vma=False))
layer = layer.lower(jnp.zeros((8, 64))).compile()
if jax.process_index() == 1:
    time.sleep(6)
try:
    jax.block_until_ready(layer(jnp.zeros((8, 64))))
    comm.check()
except ep.PeerTimeoutError as error:
    print("found:", error)
"""


def test_an_error_says_which_process_has_the_missing_ranks(tmp_path: Path) -> None:
    """Logs are of processes, which may have several ranks."""
    script = program(tmp_path, LATE)
    options = "-n", "2", "--platform", "cpu", "--devices-per-process", "2", "--console", "first"
    status, output = launch(*options, "--", sys.executable, script, cwd=tmp_path)
    assert status == 0, output
    assert "found: dispatch on rank" in output, output
    assert "(communicator #0; ranks 0-1 are in process 0, ranks 2-3 are in process 1)" in output, output


@pytest.mark.parametrize(
    "devices",
    ["--platform cpu", pytest.param("--share-gpu --memory-fraction 0.1", marks=pytest.mark.gpu)],
    ids=["cpu", "cuda"],
)
def test_peers_get_the_rows_of_a_rank_whose_script_has_ended(devices: str, tmp_path: Path) -> None:
    for rounds in (1, 4000):  # the op of rank 0 waits at the end of its script, or has not begun
        script = program(tmp_path, TEXT.format(rounds=rounds))
        status, output = launch("-n", "2", *devices.split(), "--", sys.executable, script, cwd=tmp_path)
        assert status == 0, output
        assert output.count("checked") == 1, output
        assert "Exception ignored" not in output, output
