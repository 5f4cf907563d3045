"""The MoE layer as a Linen module around `jax_deepep.moe`."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from jax_deepep.communicator import Communicator
from jax_deepep.deprecation import renamed_arguments
from jax_deepep.gating import ScoreFunction
from jax_deepep.moe.aux import MoEAux, Scope
from jax_deepep.moe.build import build_config
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.grouped_matmul import Choice
from jax_deepep.moe.halves import Activation
from jax_deepep.moe.layer import Router, moe
from jax_deepep.moe.parameters import Initializer, initializer_of
from jax_deepep.moe.replicas import physical_parameters
from jax_deepep.ops.wire import Wire
from jax_deepep.quantization.formats import Format

ROUTER = "router"  # the collection of `gate_bias`


def _warn_without_rule() -> None:
    if not any(name == "exp" and axis is not None for name, axis in nn.get_logical_axis_rules()):
        warnings.warn(
            'jax_deepep.flax.linen.MoE: no logical axis rule shards "exp", so that all experts are made on '
            "one device, unless out_shardings of a jitted init shard them. Set rules around init and apply: "
            'flax.linen.logical_axis_rules([("exp", "expert"), ...]), under jax.set_mesh(mesh).',
            stacklevel=3,
        )


def _sharded(init: Callable[..., nn.Partitioned]) -> Callable[..., nn.Partitioned]:
    """Return `init` whose values the logical axis rules shard.

    Linen applies rules where a parameter is used: a jitted init would return all experts on every device.
    """

    def sharded(*arguments: Any) -> nn.Partitioned:
        boxed = init(*arguments)
        return boxed.replace_boxed(boxed.unbox())

    return sharded


class MoE(nn.Module):
    """A mixture of experts sharded over devices, as a layer on global arrays.

    Parameters and their logical axes are those of `jax_deepep.flax.MoE`; the logical axis rules of the
    program shard them. `gate_bias` is a variable of the collection "router".

    **Collective** without `comm`: see `jax_deepep.Communicator`. It is then made when the module is built,
    outside of any traced function: pass `comm` to modules that are built inside others.

    Attributes:
        num_experts, num_experts_per_tok, hidden_size, intermediate_size: E, K, H, F.
        comm, mesh, axis_name, max_tokens: see `jax_deepep.moe.build_config`.
        param_dtype: of all parameters but `gate_bias`.
        gate_init, kernel_init: initializers of `gate` and of the other matrices; None = LeCun's normal.
        others: see `jax_deepep.moe.MoEConfig`.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    comm: Communicator | None = None
    mesh: Mesh | None = None
    axis_name: str | tuple[str, ...] = "expert"
    max_tokens: int | None = None
    num_groups: int = MoEConfig.num_groups
    topk_groups: int = MoEConfig.topk_groups
    score_function: ScoreFunction = MoEConfig.score_function
    normalize: bool = MoEConfig.normalize
    scale: float = MoEConfig.scale
    use_bias_correction: bool = MoEConfig.use_bias_correction
    shared_intermediate_size: int = MoEConfig.shared_intermediate_size
    activation: Activation = MoEConfig.activation
    gated: bool = MoEConfig.gated
    capacity_factor: float | None = MoEConfig.capacity_factor
    expert_capacity: int | None = MoEConfig.expert_capacity
    alignment: int | None = MoEConfig.alignment
    grouped_matmul: Choice = MoEConfig.grouped_matmul
    num_chunks: int | None = MoEConfig.num_chunks
    two_batch_overlap: bool = MoEConfig.two_batch_overlap
    wire: Wire | Format | None = MoEConfig.wire
    combine_wire: Wire | Format | None = MoEConfig.combine_wire
    dtype: Any = MoEConfig.dtype
    num_physical_experts: int | None = MoEConfig.num_physical_experts
    fsdp_axis: str | None = MoEConfig.fsdp_axis
    tensor_axis: str | None = MoEConfig.tensor_axis
    param_dtype: Any = jnp.float32
    gate_init: Initializer | None = None
    kernel_init: Initializer | None = None

    def __post_init__(self) -> None:
        if self.comm is None:
            self.comm = self._config().comm  # kept, because Linen copies modules while tracing
        super().__post_init__()

    @nn.nowrap  # or Linen would take it for a method whose result can be an intermediate
    def _config(self) -> MoEConfig:
        not_of_config = ("parent", "name", "param_dtype", "gate_init", "kernel_init")
        return build_config(**{
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in not_of_config
        })  # fmt: skip

    @renamed_arguments(placement="expert_map")
    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        expert_map: Any = None,
        *,
        mask: jax.Array | None = None,
        router: Router | None = None,
        topk_idx: jax.Array | None = None,
        topk_weights: jax.Array | None = None,
        aux: Scope = "global",
        router_logits: bool = False,
        sequence_loss: bool = False,
    ) -> tuple[jax.Array, MoEAux | Any]:
        """Return ([..., H], `MoEAux`) of x [..., H]; all arguments are those of `jax_deepep.moe.moe`.

        With `num_physical_experts`, `expert_map` is an int32 array [P], see `jax_deepep.balancing`, in which
        every device's own experts come first (`keep_home=True`).
        """
        config = self._config()
        if self.is_initializing() and config.comm.size > 1:
            _warn_without_rule()
        parameters: dict[str, Any] = {}
        for name, (shape, logical_axes) in config.parameters.items():
            init = initializer_of(name, self.gate_init, self.kernel_init)
            partitioned = _sharded(nn.with_logical_partitioning(init, logical_axes))
            if name == "gate_bias":
                parameters[name] = self.variable(ROUTER, name, partitioned, None, shape, jnp.float32).value
            else:
                parameters[name] = self.param(name, partitioned, shape, self.param_dtype)
        parameters = physical_parameters(config, parameters, expert_map)
        return moe(
            config, parameters, x, expert_map, mask=mask, router=router, topk_idx=topk_idx,
            topk_weights=topk_weights, aux=aux, router_logits=router_logits, sequence_loss=sequence_loss,
        )  # fmt: skip
