"""Parameters that are sharded over axes of the mesh: how they are made, and gathered where they are used."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import E, H, K, config_of, loss_of, numbers, on_mesh, parameters_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh

from jax_deepep.moe import MoEConfig, build_config, init_parameters, moe

FSDP = "fsdp × expert × tensor" if jax.device_count() == 8 else "data × fsdp"  # two devices along fsdp


def test_initial_parameters_are_sharded() -> None:
    config = config_of("fsdp × expert × tensor", shared_intermediate_size=8, use_bias_correction=True)
    parameters = init_parameters(config, jax.random.key(0), jnp.bfloat16)
    for name, value in parameters.items():
        assert value.sharding.is_equivalent_to(jax.NamedSharding(config.mesh, config.spec(name)), value.ndim)
        assert value.dtype == (jnp.float32 if name == "gate_bias" else jnp.bfloat16)
    assert config.spec("wo") == P(("expert",), "tensor", "fsdp")
    assert config.spec("gate") == P("fsdp", None)
    # LeCun's variance 1 / H for each expert by itself.
    assert 0.8 < np.std(fetch(parameters)["wi_0"].astype(np.float32)) * H**0.5 < 1.2


def test_initial_parameters_are_made_sharded() -> None:
    """On a mesh of Explicit axes, the default of `jax.make_mesh`, with no more memory than on one of Auto."""
    temporary, values = [], []
    for axis_types in (AxisType.Auto, AxisType.Explicit):
        config = build_config(E, K, 64, 256, mesh=mesh_named("expert", axis_types), max_tokens=4)
        make = jax.jit(lambda key, config=config: init_parameters(config, key))
        with jax.set_mesh(config.mesh):
            program = make.lower(jax.random.key(0)).compile()
            values.append(fetch(program(jax.random.key(0))))
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[1] <= temporary[0] < 2 * (3 * E * 64 * 256 * 4) / config.comm.size
    jax.tree.map(np.testing.assert_array_equal, *values)


def step_of(dtype: Any, param_dtype: Any, **choices: Any) -> tuple[MoEConfig, Any, tuple[Any, ...]]:
    """Return a layer, a training step of it, jitted, and the operands of that."""
    config = config_of(FSDP, dtype=dtype, **choices)

    def loss(parameters, x):
        out, _ = moe(config, parameters, x)
        return loss_of(out.astype(jnp.float32)), out

    parameters = {name: value.astype(param_dtype) for name, value in parameters_of(config).items()}
    x = put_on_mesh(numbers(8, 6, H).astype(jnp.bfloat16), config.mesh, P(config.token_axes))
    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return config, step, (on_mesh(config, parameters), x)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "gathered", "scattered"),
    [
        ("bfloat16", "float32", "bf16", "f32"),
        ("float32", "float32", "f32", "f32"),
        ("float32", "bfloat16", "bf16", "bf16"),
    ],
)
def test_weights_are_gathered_in_the_narrower_dtype(
    dtype: str, param_dtype: str, gathered: str, scattered: str
) -> None:
    """And their gradients are summed in that of the parameters."""
    _, step, operands = step_of(dtype, param_dtype, shared_intermediate_size=8)
    program = step.lower(*operands).as_text()
    kinds = {
        kind: re.findall(rf'"stablehlo.{kind}".*?-> tensor<(?:\d+x)*(\w+)>', program, re.DOTALL)
        for kind in ("all_gather", "reduce_scatter")
    }
    num_weights = 6  # of routed and shared experts
    assert kinds == {"all_gather": [gathered] * num_weights, "reduce_scatter": [scattered] * num_weights}


@pytest.mark.skipif(jax.device_count() == 4, reason="sums over four devices have no fixed order")
@pytest.mark.collectives
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_gathering_changes_no_bit(num_chunks: int) -> None:
    """Nor do two addends have another sum than where all devices have the weights."""
    results = []
    for choices in ({}, {"fsdp_axis": None}):
        _, step, operands = step_of("bfloat16", "float32", num_chunks=num_chunks, **choices)
        results.append(fetch(step(*operands)))
    jax.tree.map(np.testing.assert_array_equal, *results)
