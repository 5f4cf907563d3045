"""MoE blocks of Hugging Face `transformers` as arguments and parameters of ours. Imports no torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
# Of the three matrices of a gated network, in our order: what its activation is applied to, what that is
# multiplied with, and the way out.
GATED = ("wi_0", "wi_1", "wo")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Block(NamedTuple):
    """How a model calls what it has. `routing` are arguments of `jax_deepep.group_limited_topk`."""

    num_experts: tuple[str, ...]  # names in the config, of which there is one
    routing: Callable[[Callable[[str], Any]], dict[str, Any]]
    expert_matrices: tuple[str, str, str] = PROJECTIONS  # where every expert is a module of its own


BLOCKS = {
    "deepseek_v3": Block(
        ("n_routed_experts", "num_local_experts"),
        lambda setting: {
            "score_function": "sigmoid",
            "num_groups": setting("n_group"),
            "topk_groups": setting("topk_group"),
            "normalize": setting("norm_topk_prob"),
            "scale": setting("routed_scaling_factor"),
            "use_bias_correction": True,
        },
    ),
    "mixtral": Block(("num_local_experts",), lambda setting: {}, expert_matrices=("w1", "w3", "w2")),
    "qwen3_moe": Block(
        ("num_experts", "num_local_experts"), lambda setting: {"normalize": setting("norm_topk_prob")}
    ),
}


def from_hugging_face(
    state_dict: Mapping[str, Any], config: Any, *, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return constructor arguments and parameters for the MoE block of a model of `transformers`.

        block = "model.layers.3.mlp."
        arguments, parameters = from_hugging_face(model.state_dict(), model.config, prefix=block)
        moe = jax_deepep.flax.MoE(**arguments, mesh=mesh, max_tokens=4096, rngs=nnx.Rngs(0))
        placement = jax.tree.map(lambda old: old.sharding, nnx.to_pure_dict(nnx.state(moe)))
        nnx.update(moe, jax.device_put(parameters, placement))

    For Linen, `parameters` is the collection "params", but `gate_bias`, which DeepSeek-V3 has, is one of the
    collection "router".

    Both layouts of state dicts are understood: experts fused into `experts.gate_up_proj` and
    `experts.down_proj`, as current releases hold them, and one module per expert, as older releases do and
    checkpoints on disk.

    Args:
        state_dict: tensors of torch or arrays of NumPy, by name. Among them, those of the block begin with
            `prefix`; the others are not looked at.
        config: the configuration of the model, or its `to_dict()` or config.json as a dict. Its `model_type`
            is one of "deepseek_v3", "mixtral", "qwen3_moe".
        prefix: what the block is called in the state dict, the last dot may be left out; "" if it is that of
            the block.

    Returns:
        (arguments of `jax_deepep.flax.MoE` and `jax_deepep.flax.linen.MoE`; their parameters by name, NumPy
        arrays of the dtype that they had). Matrices are views of the tensors where they can be.

    Raises:
        ValueError: another kind of model, or tensors of another kind of block; named with what is taken.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    model_type = settings.get("model_type")
    if model_type not in BLOCKS:
        raise ValueError(
            f"config: got model_type={model_type!r}; takes one of {', '.join(map(repr, BLOCKS))}. Another "
            "model with the same block can be called so: {**config.to_dict(), 'model_type': ...}."
        )
    block = BLOCKS[model_type]

    def setting(*names: str) -> Any:
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if value is None:
            raise ValueError(f"config: has no {' or '.join(names)}, which a {model_type} has.")
        return value

    num_experts = setting(*block.num_experts)
    tensors = _Tensors(state_dict, prefix)
    parameters = {"gate": tensors.take("gate.weight").T}
    parameters |= dict(zip(GATED, _experts(tensors, block, num_experts), strict=True))
    routing = block.routing(setting)
    if routing.get("use_bias_correction"):
        parameters["gate_bias"] = tensors.take("gate.e_score_correction_bias")
    if "shared_experts.gate_proj.weight" in tensors:
        for name, projection in zip(GATED, PROJECTIONS, strict=True):
            parameters[f"shared_{name}"] = tensors.take(f"shared_experts.{projection}.weight").T
    tensors.check_none_left(model_type)

    hidden_size, experts_of_gate = parameters["gate"].shape
    if not num_experts == experts_of_gate == len(parameters["wi_0"]):
        raise ValueError(
            f"config: has {num_experts} experts, but gate.weight has {experts_of_gate} and there are "
            f"{len(parameters['wi_0'])} in the state dict; takes the config of the same model."
        )
    activation = setting("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(f"config: got hidden_act={activation!r}; takes one of {', '.join(ACTIVATIONS)}.")
    arguments = {
        "num_experts": num_experts,
        "num_experts_per_tok": setting("num_experts_per_tok"),
        "hidden_size": hidden_size,
        "intermediate_size": parameters["wi_0"].shape[-1],
        "activation": ACTIVATIONS[activation],
        "score_function": "softmax",
        **routing,
    }
    if "shared_wi_0" in parameters:
        arguments["shared_intermediate_size"] = parameters["shared_wi_0"].shape[-1]
    return arguments, parameters


def _experts(tensors: "_Tensors", block: Block, num_experts: int) -> list[np.ndarray]:
    """Return `wi_0`, `wi_1` [E, H, F] and `wo` [E, F, H]; a linear layer of torch has [out, in]."""
    if "experts.gate_up_proj" in tensors:
        wi = tensors.take("experts.gate_up_proj").swapaxes(1, 2)  # [E, H, 2 F]
        wo = tensors.take("experts.down_proj").swapaxes(1, 2)
        return [*np.split(wi, 2, axis=-1), wo]
    return [
        np.stack([tensors.take(f"experts.{expert}.{name}.weight").T for expert in range(num_experts)])
        for name in block.expert_matrices
    ]


class _Tensors:
    """The tensors of one block, each to be taken once."""

    def __init__(self, state_dict: Mapping[str, Any], prefix: str):
        self.prefix = prefix = prefix and prefix.removesuffix(".") + "."
        self.left = {
            key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
        }
        if not self.left:
            raise ValueError(
                f"prefix: got {prefix!r}, but no name in the state dict begins so; they are like "
                f"{next(iter(state_dict), 'nothing: it is empty')!r}."
            )

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> np.ndarray:
        """Return the tensor `name` as an array."""
        if name not in self.left:
            raise ValueError(
                f"state_dict: has no {self.prefix + name!r}; takes the whole MoE block, whose names "
                f"begin with prefix={self.prefix!r}. There are {_some(self.left)}."
            )
        try:
            return _as_numpy(self.left.pop(name))
        except TypeError as error:  # torch has dtypes that NumPy lacks: those of quantised weights
            raise ValueError(
                f"state_dict: {self.prefix + name!r} cannot become an array ({error}); takes weights that "
                "are not quantised: dequantise them to bfloat16 first."
            ) from error

    def check_none_left(self, model_type: str) -> None:
        """Raise if the block has something that would be ignored: scales of quantised weights, biases, …"""
        if self.left:
            raise ValueError(
                f"state_dict: got {_some(self.left)}, which the MoE block of a {model_type} does not have; "
                "takes its tensors alone, not quantised."
            )


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:4]))
    return shown + (", …" if len(names) > 4 else "") if names else "none left"


def _as_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor of torch, or an array, as a NumPy array of its dtype."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # which torch cannot give to NumPy
            return tensor.float().numpy().astype(jnp.bfloat16)
        return tensor.numpy()
    return np.asarray(tensor)
