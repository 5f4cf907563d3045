"""Programs in JAX's persistent compilation cache."""

import sys
from pathlib import Path

import pytest
from launcher_runs import launch, program
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

JOB = """
import contextlib, sys
import jax, jax.numpy as jnp
import jax_deepep as ep
from jax_deepep import jax_compat

if "as before" in sys.argv:
    jax_compat.without_cached_programs = contextlib.nullcontext

jax.distributed.initialize()
mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
comm = ep.Communicator(mesh, num_experts=4, num_experts_per_tok=1, max_tokens=4, hidden_size=8)

@jax.jit
@jax.shard_map(mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
def step(x):
    topk_idx = jnp.arange(4, dtype=jnp.int32)[:, None]
    dispatched, handle = ep.dispatch(x, topk_idx, jnp.ones((4, 1)), comm=comm)
    return ep.combine(dispatched.tokens * 2, handle)

x = jnp.arange(32.0 * jax.device_count()).reshape(-1, 8)
for _ in range(2):
    out = step(x)
mine = out.addressable_shards[0]
assert (mine.data == 2 * x[mine.index]).all(), mine.data
comm.check()
print("sent and returned")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_job_with_the_same_cache(ranks: int, tmp_path: Path) -> None:
    """Of several processes on CPUs, one would load a program while the others compile it.

    None is kept, nor found where one was kept before.
    """
    variables = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # a device for each rank
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ("-n", str(ranks), "--", sys.executable, program(tmp_path, JOB))
    kept = []
    for arguments in ([], ["as before"], []):
        status, output = launch(*command, *arguments, cwd=tmp_path, **variables)
        assert status == 0, output
        assert output.count("sent and returned") == ranks
        kept.append(len(list((tmp_path / "cache").glob("jit_step-*-cache"))))
    assert kept == ([1, 1, 1] if ranks == 1 else [0, 1, 1])
