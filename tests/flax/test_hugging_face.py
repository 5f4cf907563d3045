"""`from_hugging_face` reads both layouts of state dicts, and names what is wrong with others."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from meshes import fetch, mesh_named

from jax_deepep.flax import MoE, from_hugging_face

H, F, S, E = 6, 4, 8, 8  # hidden, an expert's inner size, that of the two shared ones together, experts
CONFIGS = {
    "deepseek_v3": {
        "model_type": "deepseek_v3", "n_routed_experts": E, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
        "hidden_size": H, "moe_intermediate_size": F, "intermediate_size": 99, "n_shared_experts": 2,
    },
    "mixtral": {
        "model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2, "hidden_act": "silu",
        "hidden_size": H, "intermediate_size": F,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": H, "moe_intermediate_size": F,
    },
}  # fmt: skip


def ours(model_type: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """Return parameters by our names."""
    shapes = {"gate": (H, E), "wi_0": (E, H, F), "wi_1": (E, H, F), "wo": (E, F, H)}
    if model_type == "deepseek_v3":
        shapes |= {"gate_bias": (E,), "shared_wi_0": (H, S), "shared_wi_1": (H, S), "shared_wo": (S, H)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def theirs(model_type: str, *, fused: bool, dtype=np.float32) -> dict[str, np.ndarray]:
    """Return the same as a state dict; a linear layer has its matrix as [out, in]."""
    of = ours(model_type, dtype)
    state_dict = {"gate.weight": of["gate"].T}
    if fused:
        wi = np.concatenate([of["wi_0"], of["wi_1"]], axis=-1)
        state_dict |= {
            "experts.gate_up_proj": wi.swapaxes(1, 2), "experts.down_proj": of["wo"].swapaxes(1, 2)
        }  # fmt: skip
    else:
        names = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for name, matrices in zip(names, (of["wi_0"], of["wi_1"], of["wo"]), strict=True):
            state_dict |= {f"experts.{e}.{name}.weight": matrix.T for e, matrix in enumerate(matrices)}
    if model_type == "deepseek_v3":
        state_dict |= {
            "gate.e_score_correction_bias": of["gate_bias"],
            "shared_experts.gate_proj.weight": of["shared_wi_0"].T,
            "shared_experts.up_proj.weight": of["shared_wi_1"].T,
            "shared_experts.down_proj.weight": of["shared_wo"].T,
        }
    return state_dict


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "module per expert"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_parameters(model_type: str, fused: bool, dtype) -> None:
    block = theirs(model_type, fused=fused, dtype=dtype)
    state_dict = {f"model.layers.1.mlp.{name}": value for name, value in block.items()}
    state_dict |= {f"model.layers.11.mlp.{name}": value * 0 for name, value in block.items()}
    config = CONFIGS[model_type]
    for result in (
        from_hugging_face(block, config),
        from_hugging_face(state_dict, config, prefix="model.layers.1.mlp."),
        from_hugging_face(state_dict, config, prefix="model.layers.1.mlp"),
    ):  # fmt: skip
        _, parameters = result
        jax.tree.map(np.testing.assert_array_equal, parameters, ours(model_type, dtype))
        assert {value.dtype for value in parameters.values()} == {np.dtype(dtype)}


def test_arguments() -> None:
    arguments, _ = from_hugging_face(theirs("deepseek_v3", fused=True), CONFIGS["deepseek_v3"])
    assert arguments == {
        "num_experts": 8, "num_experts_per_tok": 3, "hidden_size": 6, "intermediate_size": 4, "num_groups": 4,
        "topk_groups": 2, "score_function": "sigmoid", "normalize": True, "scale": 2.5,
        "use_bias_correction": True, "shared_intermediate_size": 8, "activation": jax.nn.silu,
    }  # fmt: skip
    without_shared = theirs("deepseek_v3", fused=True)
    for name in ("gate_proj", "up_proj", "down_proj"):
        del without_shared[f"shared_experts.{name}.weight"]
    config = {**CONFIGS["deepseek_v3"], "n_shared_experts": None}
    assert "shared_intermediate_size" not in from_hugging_face(without_shared, config)[0]
    arguments, _ = from_hugging_face(theirs("qwen3_moe", fused=True), CONFIGS["qwen3_moe"])
    assert (arguments["score_function"], arguments["normalize"]) == ("softmax", False)
    assert arguments["activation"](jnp.float32(1)) == jax.nn.gelu(jnp.float32(1))


def test_into_a_module() -> None:
    """As in the docstring: the module's values are replaced and keep their sharding."""
    arguments, parameters = from_hugging_face(theirs("deepseek_v3", fused=True), CONFIGS["deepseek_v3"])
    moe = MoE(**arguments, mesh=mesh_named("expert"), max_tokens=4, rngs=nnx.Rngs(0))
    sharding = jax.tree.map(lambda old: old.sharding, nnx.to_pure_dict(nnx.state(moe)))
    assert sharding["wi_0"].spec[0] == "expert"
    nnx.update(moe, jax.device_put(parameters, sharding))
    new = nnx.to_pure_dict(nnx.state(moe))
    jax.tree.map(np.testing.assert_array_equal, fetch(new), ours("deepseek_v3"))
    assert jax.tree.map(lambda value: value.sharding, new) == sharding


ERRORS = [
    ({"model_type": "llama"}, {}, "config: expected a model_type of 'deepseek_v3', .*, got 'llama'"),
    ({"norm_topk_prob": None}, {}, "config: expected norm_topk_prob in the config of a qwen3_moe, got none"),
    ({"num_experts": None}, {}, "config: expected num_experts or num_local_experts in the config"),
    ({"hidden_size": None}, {}, "config: expected hidden_size in the config of a qwen3_moe"),
    ({"num_experts": 4}, {},
     r"of another shape gate\.weight \[8, 6\] instead of \[4, 6\], experts\.gate_up_proj \[8, 8, 6\] ins"),
    ({"moe_intermediate_size": 5}, {}, r"experts\.down_proj \[8, 6, 4\] instead of \[8, 6, 5\]; read all"),
    ({"hidden_act": "elu"}, {}, "config: expected a hidden_act of silu, gelu.*, got 'elu'"),
    ({}, {"gate.weight": None}, r"state_dict: expected the unquantised .*, got no gate\.weight; read all"),
    ({}, {"gate.bias": np.zeros(8)}, r"this qwen3_moe config .*, got superfluous gate\.bias; read"),
]  # fmt: skip


@pytest.mark.parametrize(("in_config", "in_block", "words"), ERRORS, ids=[case[2][:40] for case in ERRORS])
def test_other_blocks(in_config: dict, in_block: dict, words: str) -> None:
    block = {k: v for k, v in {**theirs("qwen3_moe", fused=True), **in_block}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        from_hugging_face(block, {**CONFIGS["qwen3_moe"], **in_config})


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "module per expert"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_tensor_that_is_missing_or_of_another_shape_is_named(model_type: str, fused: bool) -> None:
    """As when only some files of a checkpoint were read, or those of another config."""
    whole = {f"layers.3.mlp.{name}": value for name, value in theirs(model_type, fused=fused).items()}
    for name, value in whole.items():
        block = {**whole, "layers.3.mlp.more": value}
        del block[name]
        with pytest.raises(ValueError, match=r"got no (.*); superfluous layers\.3\.mlp\.more; read") as error:
            from_hugging_face(block, CONFIGS[model_type], prefix="layers.3.mlp")
        assert f"got no {name}; " in str(error.value)
        wrong = f"got of another shape {name} [{value.shape[0] + 1}"
        with pytest.raises(ValueError, match=r"got of another shape") as error:
            from_hugging_face(
                {**whole, name: np.concatenate([value, value[:1]])},
                CONFIGS[model_type],
                prefix="layers.3.mlp",
            )
        assert wrong in str(error.value)


def test_bfloat16_of_torch() -> None:
    """The dtype of most checkpoints, which torch cannot convert to NumPy."""

    class Tensor:
        dtype = "torch.bfloat16"

        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape = array, array.shape

        def detach(self):
            return self

        cpu = detach

        def float(self):
            of_float = Tensor(self.array)
            of_float.numpy = lambda: self.array.astype(np.float32)
            return of_float

        def numpy(self):
            raise TypeError("Got unsupported ScalarType BFloat16")

    block = {name: Tensor(value) for name, value in theirs("mixtral", fused=True, dtype=jnp.bfloat16).items()}
    _, parameters = from_hugging_face(block, CONFIGS["mixtral"])
    jax.tree.map(np.testing.assert_array_equal, parameters, ours("mixtral", jnp.bfloat16))
    assert {value.dtype for value in parameters.values()} == {np.dtype(jnp.bfloat16)}


def test_a_tensor_that_numpy_cannot_hold() -> None:
    """Such as float8 in DeepSeek-V3's checkpoint."""

    class Quantised:
        dtype, shape = "torch.float8_e4m3fn", (F, H)

        def detach(self):
            return self

        cpu = detach

        def numpy(self):
            raise TypeError("Got unsupported ScalarType Float8_e4m3fn")

    block = {**theirs("mixtral", fused=False), "experts.2.w1.weight": Quantised()}
    with pytest.raises(
        ValueError, match=r"expected unquantised weights, got 'experts\.2\.w1\.weight', .*; dequantise"
    ):
        from_hugging_face(block, CONFIGS["mixtral"])


def test_a_prefix_without_tensors() -> None:
    with pytest.raises(ValueError, match=r"prefix: expected .*, got 'model\.'; they are like 'gate\.weight'"):
        from_hugging_face(theirs("mixtral", fused=True), CONFIGS["mixtral"], prefix="model.")
