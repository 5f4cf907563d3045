"""Converts MoE blocks of Hugging Face `transformers` to our arguments and parameters. Imports no torch."""

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
# The three matrices of a gated network, in our order: the input of the activation, its factor, the output.
GATED = ("wi_0", "wi_1", "wo")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED = ("experts.gate_up_proj", "experts.down_proj")  # of all experts: [E, 2 F, H] and [E, H, F]

Setting = Callable[..., Any]  # of the possible names of an entry of the config


class Block(NamedTuple):
    """The names in a model's config and state dict.

    Attributes:
        num_experts, intermediate_size: names in the config.
        routing: returns arguments of `jax_deepep.group_limited_topk`.
        expert_matrices: names where every expert is a separate module.
        has_shared_experts: whether there may be `n_shared_experts`, each as large as a routed one.
    """

    num_experts: tuple[str, ...]
    intermediate_size: str
    routing: Callable[[Setting], dict[str, Any]]
    expert_matrices: tuple[str, str, str] = PROJECTIONS
    has_shared_experts: bool = False


BLOCKS = {
    "deepseek_v3": Block(
        ("n_routed_experts", "num_local_experts"),
        "moe_intermediate_size",
        lambda setting: {
            "score_function": "sigmoid",
            "num_groups": setting("n_group"),
            "topk_groups": setting("topk_group"),
            "normalize": setting("norm_topk_prob"),
            "scale": setting("routed_scaling_factor"),
            "use_bias_correction": True,
        },
        has_shared_experts=True,
    ),
    "mixtral": Block(
        ("num_local_experts",), "intermediate_size", lambda setting: {}, expert_matrices=("w1", "w3", "w2")
    ),
    "qwen3_moe": Block(
        ("num_experts", "num_local_experts"),
        "moe_intermediate_size",
        lambda setting: {"normalize": setting("norm_topk_prob")},
    ),
}


def from_hugging_face(
    state_dict: Mapping[str, Any], config: Any, *, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return constructor arguments and parameters for the MoE block of a model of `transformers`.

        block = "model.layers.3.mlp."
        arguments, parameters = from_hugging_face(model.state_dict(), model.config, prefix=block)
        moe = jax_deepep.flax.MoE(**arguments, mesh=mesh, max_tokens=4096, rngs=nnx.Rngs(0))
        sharding = jax.tree.map(lambda old: old.sharding, nnx.to_pure_dict(nnx.state(moe)))
        nnx.update(moe, jax.device_put(parameters, sharding))

    For Linen, `parameters` is the collection "params", except `gate_bias`, which DeepSeek-V3 has: it belongs
    to the collection "router".

    Both layouts of state dicts are supported: experts fused into `experts.gate_up_proj` and
    `experts.down_proj`, as in current releases, and one module per expert, as in older releases and in
    checkpoints on disk.

    Args:
        state_dict: tensors of torch or arrays of NumPy, by name. Names that do not begin with `prefix` are
            ignored.
        config: the configuration of the model, or its `to_dict()` or config.json as a dict. Its `model_type`
            is one of "deepseek_v3", "mixtral", "qwen3_moe".
        prefix: the block's name in the state dict, with or without the last dot; "" if the state dict is that
            of the block.

    Returns:
        (arguments of `jax_deepep.flax.MoE` and `jax_deepep.flax.linen.MoE`; their parameters by name, NumPy
        arrays with the dtypes of the tensors). Matrices are views of the tensors where possible.

    Raises:
        ValueError: another kind of model, or tensors that do not fit the config: missing and superfluous ones
            and those of another shape are listed by name.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    model_type = settings.get("model_type")
    if model_type not in BLOCKS:
        raise ValueError(
            f"config: expected a model_type of {', '.join(map(repr, BLOCKS))}, got {model_type!r}; for "
            "another model with the same block, pass {**config.to_dict(), 'model_type': ...}."
        )
    block = BLOCKS[model_type]

    def setting(*names: str) -> Any:
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if value is None:
            raise ValueError(
                f"config: expected {' or '.join(names)} in the config of a {model_type}, got none; add it."
            )
        return value

    activation = setting("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"config: expected a hidden_act of {', '.join(ACTIVATIONS)}, got {activation!r}; pass one "
            "of them, and set activation= of the layer."
        )
    num_experts, hidden, inner = (
        setting(*block.num_experts),
        setting("hidden_size"),
        setting(block.intermediate_size),
    )
    shared = inner * (settings.get("n_shared_experts") or 0) if block.has_shared_experts else 0
    routing = block.routing(setting)

    tensors = _Tensors(state_dict, prefix)
    is_fused = any(name in tensors.of_block for name in FUSED)
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (num_experts, hidden)}
    if routing.get("use_bias_correction"):
        shapes["gate.e_score_correction_bias"] = (num_experts,)
    if is_fused:
        shapes |= dict(
            zip(FUSED, ((num_experts, 2 * inner, hidden), (num_experts, hidden, inner)), strict=True)
        )
    else:
        for expert in range(num_experts):
            shapes |= _linear_layers(f"experts.{expert}.", block.expert_matrices, hidden, inner)
    if shared:
        shapes |= _linear_layers("shared_experts.", PROJECTIONS, hidden, shared)
    tensors.check(shapes, model_type)

    parameters = {"gate": tensors["gate.weight"].T}
    if is_fused:
        wi, wo = (tensors[name].swapaxes(1, 2) for name in FUSED)
        matrices = [*np.split(wi, 2, axis=-1), wo]
    else:
        matrices = [
            np.stack([tensors[f"experts.{expert}.{name}.weight"].T for expert in range(num_experts)])
            for name in block.expert_matrices
        ]
    parameters |= dict(zip(GATED, matrices, strict=True))
    if routing.get("use_bias_correction"):
        parameters["gate_bias"] = tensors["gate.e_score_correction_bias"]
    if shared:
        for name, projection in zip(GATED, PROJECTIONS, strict=True):
            parameters[f"shared_{name}"] = tensors[f"shared_experts.{projection}.weight"].T
    arguments = {
        "num_experts": num_experts,
        "num_experts_per_tok": setting("num_experts_per_tok"),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "activation": ACTIVATIONS[activation],
        "score_function": "softmax",
        **routing,
    }
    if shared:
        arguments["shared_intermediate_size"] = shared
    return arguments, parameters


def _linear_layers(
    prefix: str, names: tuple[str, str, str], hidden: int, inner: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of one expert; a linear layer of torch has [out, in]."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {f"{prefix}{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}


class _Tensors:
    """The tensors of one block."""

    def __init__(self, state_dict: Mapping[str, Any], prefix: str):
        self.prefix = prefix = prefix and prefix.removesuffix(".") + "."
        self.of_block = {
            key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
        }
        if not self.of_block:
            raise ValueError(
                f"prefix: expected the beginning of names in the state dict, got {prefix!r}; they are like "
                f"{next(iter(state_dict), 'nothing: it is empty')!r}."
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]], model_type: str) -> None:
        """Raise unless the block has these tensors and no others, such as biases or quantisation scales."""
        missing = [name for name in shapes if name not in self.of_block]
        superfluous = [name for name in self.of_block if name not in shapes]
        others = [
            f"{self.prefix}{name} {list(self.of_block[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in self.of_block and tuple(self.of_block[name].shape) != shape
        ]
        faults = [
            f"{what} {_some(names)}"
            for what, names in (
                ("no", [self.prefix + name for name in missing]),
                ("superfluous", [self.prefix + name for name in superfluous]),
                ("of another shape", others),
            )
            if names
        ]
        if faults:
            raise ValueError(
                f"state_dict: expected the unquantised tensors of this {model_type} config under "
                f"prefix={self.prefix!r}, got {'; '.join(faults)}; read all files of the checkpoint, and its "
                "own config."
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the tensor `name` as an array."""
        try:
            return _as_numpy(self.of_block[name])
        except TypeError as error:  # NumPy lacks the dtypes of torch for quantised weights
            raise ValueError(
                f"state_dict: expected unquantised weights, got {self.prefix + name!r}, which NumPy cannot "
                f"hold ({error}); dequantise it to bfloat16 first."
            ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _as_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor of torch, or an array, as a NumPy array of its dtype."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # which torch cannot give to NumPy
            return tensor.float().numpy().astype(jnp.bfloat16)
        return tensor.numpy()
    return np.asarray(tensor)
