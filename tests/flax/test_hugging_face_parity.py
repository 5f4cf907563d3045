"""The MoE blocks of `transformers` and ours agree on routing, outputs and gradients for equal weights.

`pip install -e '.[test]'` brings torch and `transformers` for Python 3.11 only: see pyproject.toml.
"""

import functools
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import expert_axes, fetch, mesh_named, put_on_mesh

import jax_deepep as ep
from jax_deepep import flax as ep_flax
from jax_deepep.flax import linen

if sys.version_info >= (3, 12):
    pytest.importorskip("torch", reason="torch is installed for tests on Python 3.11 only")
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

BATCH, SEQUENCE, H = 8, 8, 32
SIZES = {"hidden_size": H, "moe_intermediate_size": 16, "num_experts_per_tok": 4}
# One device, groups of 4, groups of 8.
MESHES = ("one device", "data × expert", "expert")


class Reference(NamedTuple):
    """What a block of `transformers` computes, by our names."""

    arguments: dict[str, Any]
    parameters: dict[str, np.ndarray]
    x: np.ndarray  # [BATCH, SEQUENCE, H]
    cotangent: np.ndarray
    topk_idx: np.ndarray  # [BATCH · SEQUENCE, K], each row sorted
    topk_weights: np.ndarray  # in the order of topk_idx
    out: np.ndarray
    gradients: tuple[dict[str, np.ndarray], np.ndarray]  # of the parameters and of x


def block_of(model: str) -> tuple[torch.nn.Module, Any]:
    """Return a block in float32 and its config."""
    if model == "DeepSeek-V3":
        config = DeepseekV3Config(n_routed_experts=32, n_group=8, topk_group=4, n_shared_experts=2, **SIZES)
        return DeepseekV3MoE(config), config
    if model == "Mixtral":
        config = MixtralConfig(hidden_size=H, intermediate_size=16, num_local_experts=8)
        return MixtralSparseMoeBlock(config), config
    config = Qwen3MoeConfig(num_experts=16, norm_topk_prob=model == "Qwen3-MoE", **SIZES)
    return Qwen3MoeSparseMoeBlock(config), config


@functools.cache
def reference(model: str) -> Reference:
    """Run a block of `transformers` with random weights, forward and backward."""
    block, config = block_of(model)
    rng = np.random.default_rng(0)
    draw = lambda shape, scale: torch.from_numpy(rng.normal(scale=scale, size=shape).astype(np.float32))  # noqa: E731
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(parameter.shape, 0.3))
        for buffer in block.buffers():
            buffer.copy_(draw(buffer.shape, 0.1))
    x = draw((BATCH, SEQUENCE, H), 1.0).requires_grad_()
    cotangent = draw(x.shape, 1.0)
    out = block(x)
    (out * cotangent).sum().backward()

    state_dict = block.state_dict()
    gradients = {name: torch.zeros_like(value) for name, value in state_dict.items()}
    gradients |= {name: parameter.grad for name, parameter in block.named_parameters()}
    arguments, parameters = ep_flax.from_hugging_face(state_dict, config)
    _, of_parameters = ep_flax.from_hugging_face(gradients, config.to_dict())
    _, topk_weights, topk_idx = block.gate(x.reshape(-1, H))
    topk_idx, order = topk_idx.sort(dim=-1)
    arrays = (x, cotangent, topk_idx, topk_weights.gather(1, order), out)
    arrays = tuple(array.detach().numpy() for array in arrays)
    return Reference(arguments, parameters, *arrays, gradients=(of_parameters, x.grad.numpy()))


MODELS = ("DeepSeek-V3", "Mixtral", "Qwen3-MoE", "Qwen3-MoE, not normalised")


def assert_close(actual: Any, expected: Any) -> None:
    """Compare arrays up to rounding in float32, of sums with terms as large as the largest element."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-6 * np.abs(e).max()),
        actual,
        expected,
    )


@pytest.mark.parametrize("model", MODELS)
def test_routing_is_the_same(model: str) -> None:
    of = reference(model)
    names = ("num_experts_per_tok", "num_groups", "topk_groups", "score_function", "normalize", "scale")
    options = {name: of.arguments[name] for name in names if name in of.arguments}
    route = jax.jit(functools.partial(ep.group_limited_topk, **options))
    idx, weights = route(of.x.reshape(-1, H) @ of.parameters["gate"], bias=of.parameters.get("gate_bias"))
    order = np.argsort(idx, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(idx), order, axis=-1), of.topk_idx)
    assert_close(np.take_along_axis(np.asarray(weights), order, axis=-1), of.topk_weights)
    assert len(set(of.topk_idx.ravel())) > of.arguments["num_experts_per_tok"]


@pytest.mark.parametrize(
    ("model", "kind", "mesh_name"),
    [
        *(("DeepSeek-V3", "nnx", name) for name in MESHES),
        ("DeepSeek-V3", "linen", "expert"),
        *((model, "nnx", "data × expert") for model in MODELS[1:]),
        ("Mixtral", "linen", "expert"),
    ],
)
def test_outputs_and_gradients_are_the_same(model: str, kind: str, mesh_name: str) -> None:
    of = reference(model)
    mesh = mesh_named(mesh_name)
    sizes = {"mesh": mesh, "axis_name": expert_axes(mesh_name), "max_tokens": BATCH * SEQUENCE}
    if kind == "nnx":
        graph, _ = nnx.split(ep_flax.MoE(**of.arguments, **sizes, rngs=nnx.Rngs(0)))
        apply = lambda parameters, x: nnx.merge(graph, parameters)(x)  # noqa: E731
    else:
        layer = linen.MoE(**of.arguments, **sizes)

        def apply(parameters, x):
            of_router = {name: parameters[name] for name in ("gate_bias",) if name in parameters}
            of_layer = {name: value for name, value in parameters.items() if name not in of_router}
            return layer.apply({"params": of_layer, linen.ROUTER: of_router}, x)

    def loss(parameters, x):
        out, aux = apply(parameters, x)
        return (out * of.cotangent).sum(), (out, aux.expert_load)

    x = put_on_mesh(of.x, mesh, P(mesh.axis_names))
    parameters = put_on_mesh(of.parameters, mesh, P())
    gradients, (out, load) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
    np.testing.assert_array_equal(fetch(load), np.bincount(of.topk_idx.ravel(), minlength=len(load)))
    assert_close(fetch(out), of.out)
    assert_close(fetch(gradients), of.gradients)
