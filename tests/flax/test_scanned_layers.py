"""Layers in one scan, in NNX and in Linen: rematerialised, with replicas by an expert map per layer.

Outputs and gradients are those of a loop over layers without replicas in plain JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import E, F, H, K, config_of, loss_of, numbers
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import fetch, put_on_mesh
from moe_layer import assert_close

from jax_deepep import flax as ep_flax
from jax_deepep.balancing import plan_experts
from jax_deepep.flax import linen
from jax_deepep.moe import MoEConfig, moe

pytestmark = pytest.mark.filterwarnings("ignore:jax_deepep.flax.linen.MoE. no logical axis rule")

MESH = "fsdp × expert × tensor"
LAYERS = 2
SIZES = (E, K, H, F)
CHOICES: dict[str, Any] = {
    "use_bias_correction": True,
    "shared_intermediate_size": 8,
    "score_function": "sigmoid",
}
NO_AXIS = {nnx.PARTITION_NAME: None}


def of_layers(config: MoEConfig) -> dict[str, np.ndarray]:
    """Return the parameters of all layers, [LAYERS, ...]."""
    return {
        name: numbers(LAYERS, *shape, seed=seed) / np.float32(4)
        for seed, (name, (shape, _)) in enumerate(config.parameters.items())
    }


def results_of(layers: Callable[..., Any], config: MoEConfig, *rest: Any) -> Any:
    """Return (gradients of parameters and x, output, loads) of (parameters, x, *rest) → (output, loads)."""

    def loss(parameters, x, *rest):
        out, loads = layers(parameters, x, *rest)
        return loss_of(out), (out, loads)

    parameters = {
        name: put_on_mesh(value, config.mesh, P(None, *config.spec(name)))
        for name, value in of_layers(config).items()
    }
    x = put_on_mesh(numbers(8, 6, H), config.mesh, P(config.comm.axis_names))
    gradients, (out, loads) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x, *rest)
    return fetch((gradients, out, loads))


@functools.cache
def expected() -> Any:
    config = config_of(MESH, **CHOICES)

    def in_a_loop(parameters, x):
        loads = []
        for layer in range(LAYERS):
            out, aux = moe(config, {name: value[layer] for name, value in parameters.items()}, x)
            x, loads = x + out, [*loads, aux.expert_load]
        return x, jnp.stack(loads)

    return results_of(in_a_loop, config)


def nnx_layers(arguments: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """Return (shapes of stacked parameters, a scan over the layers)."""

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=NO_AXIS)
    def stacked(rngs: nnx.Rngs) -> ep_flax.MoE:
        return ep_flax.MoE(*SIZES, rngs=rngs, **arguments)

    @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0), transform_metadata=NO_AXIS)
    @nnx.remat
    def scan(layer: ep_flax.MoE, x: jax.Array, expert_map: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, aux = layer(x, expert_map)
        return x + out, aux.expert_load

    graph, state = nnx.split(nnx.eval_shape(lambda: stacked(nnx.Rngs(0))))
    return nnx.to_pure_dict(state), lambda parameters, *args: scan(nnx.merge(graph, parameters), *args)


def linen_layers(arguments: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """Return the same as `nnx_layers`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, expert_map):
            out, aux = linen.MoE(*SIZES, name="moe", **arguments)(x, expert_map)
            return x + out, aux.expert_load

    layers = nn.scan(
        nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0, linen.ROUTER: 0},
        split_rngs={"params": True}, length=LAYERS, metadata_params=NO_AXIS,
    )()  # fmt: skip
    expert_map = np.zeros((LAYERS, arguments["num_physical_experts"]), np.int32)
    variables = nn.unbox(jax.eval_shape(layers.init, jax.random.key(0), numbers(8, 6, H), expert_map))

    def scan(parameters, *args):
        of_router = {"gate_bias": parameters["gate_bias"]}
        of_layer = {name: value for name, value in parameters.items() if name not in of_router}
        return layers.apply({"params": {"moe": of_layer}, linen.ROUTER: {"moe": of_router}}, *args)

    return {**variables["params"]["moe"], **variables[linen.ROUTER]["moe"]}, scan


@pytest.mark.parametrize("layers_of", [nnx_layers, linen_layers], ids=["nnx", "linen"])
def test_scanned_layers_with_replicas_are_a_loop_over_layers_without(layers_of: Callable[..., Any]) -> None:
    size = config_of(MESH, **CHOICES).comm.size
    num_physical = min(E + 2 * size, E * size)
    config = config_of(MESH, num_physical_experts=num_physical, **CHOICES)
    load = np.random.default_rng(0).uniform(1, 9, (LAYERS, E))
    expert_map = plan_experts(load, num_physical=num_physical, num_devices=size)
    assert size == 1 or (expert_map[0] != expert_map[1]).any()
    shapes, scan = layers_of({"comm": config.comm, "num_physical_experts": num_physical, **CHOICES})
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        name: value.shape for name, value in of_layers(config).items()
    }
    got = results_of(scan, config, put_on_mesh(expert_map, config.mesh, P()))
    np.testing.assert_array_equal(got[2], expected()[2])
    assert_close(got[:2], expected()[:2])
