"""Compiles a layer with its gradients for two GPUs that are described here, on a machine without one.

    python tests/compile_for_gpus.py FOLDER OPTIONS

writes what XLA has before and after its optimisations to a folder. OPTIONS are JSON: `mode` of the
communicator, `num_tokens` of a device, `num_layers` of a loop (0: one layer, no loop), `remat` to
recompute it, and options of `build_config`; or `router` for the choice of experts alone, in a loop. It needs
jax-cuda12-plugin or -cuda13-plugin, the wheel of PJRT with it, and our module `_cuda`; not CUDA's libraries.
"""

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepep as ep
from jax_deepep import jax_compat
from jax_deepep.communicator import backend, communicator, native_module
from jax_deepep.moe import build_config, moe

# What XLA needs to know of an H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 256, 256, 8, 2


def pretend_to_have_gpus() -> None:
    """No process has such devices, and no kernel of ours runs: communicators without their native halves."""
    communicator.agree = lambda *_, **__: backend.Agreement("", None)
    communicator.choose = lambda *_, **__: backend.Backend("native", "compiled for GPUs that are not here")
    jax_compat.platform_of = lambda device: "cuda"


def mesh_of_two() -> Mesh:
    jax.devices()  # finds the plugins
    described = topologies.get_topology_desc("cuda", "cuda", target_config=H200, topology="1x1x2")
    return Mesh(np.array(described.devices), ("expert",), axis_types=(AxisType.Auto,))


def compile_program(program: Any, *operands: Any) -> None:
    """Compile a function of that name, on which its files' names depend."""
    assert program.__name__ == "program"
    try:
        jax.jit(program).lower(*operands).compile()
    except jax.errors.JaxRuntimeError as error:
        # Of the communicator, which is looked for after XLA's passes.
        if "which does not exist" not in str(error):
            raise


def compile_layers(
    *, mode: str = "auto", num_layers: int = 0, remat: bool = False, num_tokens: int = 1024, **layer: Any
) -> None:
    mesh = mesh_of_two()
    comm = ep.Communicator(
        mesh, num_experts=EXPERTS, num_experts_per_tok=TOPK, max_tokens=num_tokens, hidden_size=HIDDEN,
        mode=mode,
    )  # fmt: skip
    config = build_config(EXPERTS, TOPK, HIDDEN, INTERMEDIATE, comm=comm, **layer)

    def shape_of(shape, spec):
        if num_layers:
            shape, spec = (num_layers, *shape), P(None, *spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    parameters = {name: shape_of(shape, config.spec(name)) for name, (shape, _) in config.parameters.items()}
    sharding = NamedSharding(mesh, P("expert"))
    x = jax.ShapeDtypeStruct((mesh.size, num_tokens, HIDDEN), jnp.bfloat16, sharding=sharding)

    def block(x, parameters):
        return x + moe(config, parameters, x)[0], None

    def loss(parameters, x):
        step = jax.checkpoint(block) if remat else block
        out, _ = lax.scan(step, x, parameters) if num_layers else step(x, parameters)
        return jnp.square(out.astype(jnp.float32)).mean()

    def program(parameters, x):
        return jax.value_and_grad(loss, argnums=(0, 1))(parameters, x)

    compile_program(program, parameters, x)


def compile_router(*, num_layers: int, num_tokens: int = 1024) -> None:
    """A loop that uses the chosen experts and saves them."""
    native_module.load("cuda")  # which layers do
    mesh, spec = mesh_of_two(), P(None, "expert")

    def step(total, logits):
        topk_idx, topk_weights = ep.group_limited_topk(logits, num_experts_per_tok=TOPK)
        return total + (topk_idx * topk_weights).sum(), topk_idx

    def routed(logits):
        return lax.scan(step, jnp.zeros(1), logits)

    def program(logits):
        out_specs = (P("expert"), spec)
        return jax.shard_map(routed, mesh=mesh, in_specs=spec, out_specs=out_specs, check_vma=False)(logits)

    shape = (num_layers, mesh.size * num_tokens, EXPERTS)
    compile_program(program, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)))


if __name__ == "__main__":
    pretend_to_have_gpus()
    (compile_router if options.pop("router", False) else compile_layers)(**options)
