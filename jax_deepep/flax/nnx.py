"""The MoE layer as an NNX module around `jax_deepep.moe`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax.sharding import Mesh

from jax_deepep import jax_compat
from jax_deepep.communicator import Communicator
from jax_deepep.deprecation import renamed_arguments
from jax_deepep.gating import ScoreFunction
from jax_deepep.moe.aux import MoEAux, Scope
from jax_deepep.moe.build import build_config
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.grouped_matmul import Choice
from jax_deepep.moe.halves import Activation
from jax_deepep.moe.layer import Router, moe, with_sharding
from jax_deepep.moe.parameters import Initializer, initializer_of
from jax_deepep.moe.replicas import physical_parameters
from jax_deepep.ops.wire import Wire
from jax_deepep.quantization.formats import Format


class GateBias(nnx.Variable):
    """The bias of the router, float32 [E]; it has no gradient, `jax_deepep.gating.update_bias` updates it."""


class MoE(nnx.Module):
    """A mixture of experts sharded over devices, as a layer on global arrays.

    Parameters, each with its logical axes: `gate` [H, E] (embed, –), `wi_0` and, if gated, `wi_1` [E, H, F]
    (exp, embed, mlp), `wo` [E, F, H] (exp, mlp, embed); with shared experts `shared_wi_0`, `shared_wi_1`
    [H, S] (embed, mlp) and `shared_wo` [S, H] (mlp, embed); with bias correction `gate_bias` [E], a
    `GateBias`. They are initialised with the layer's sharding: exp over the expert axes, embed over
    `fsdp_axis`, mlp over `tensor_axis`; logical axis rules that are set when the module is built take
    precedence. Built outside of `nnx.jit`, each parameter is first made in full on one device: build large
    layers inside, under `jax.set_mesh(mesh)`.

    **Collective** without `comm`: see `jax_deepep.Communicator`.

    Args:
        num_experts, num_experts_per_tok, hidden_size, intermediate_size: E, K, H, F.
        rngs: `params` is used.
        comm, mesh, axis_name, max_tokens: see `jax_deepep.moe.build_config`.
        param_dtype: of all parameters but `gate_bias`.
        gate_init, kernel_init: first values of `gate` and of the other matrices; None = LeCun's normal.
        others: see `jax_deepep.moe.MoEConfig`.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        rngs: nnx.Rngs,
        comm: Communicator | None = None,
        mesh: Mesh | None = None,
        axis_name: str | tuple[str, ...] = "expert",
        max_tokens: int | None = None,
        num_groups: int = MoEConfig.num_groups,
        topk_groups: int = MoEConfig.topk_groups,
        score_function: ScoreFunction = MoEConfig.score_function,
        normalize: bool = MoEConfig.normalize,
        scale: float = MoEConfig.scale,
        use_bias_correction: bool = MoEConfig.use_bias_correction,
        shared_intermediate_size: int = MoEConfig.shared_intermediate_size,
        activation: Activation = MoEConfig.activation,
        gated: bool = MoEConfig.gated,
        capacity_factor: float | None = MoEConfig.capacity_factor,
        expert_capacity: int | None = MoEConfig.expert_capacity,
        alignment: int | None = MoEConfig.alignment,
        grouped_matmul: Choice = MoEConfig.grouped_matmul,
        num_chunks: int | None = MoEConfig.num_chunks,
        two_batch_overlap: bool = MoEConfig.two_batch_overlap,
        wire: Wire | Format | None = MoEConfig.wire,
        combine_wire: Wire | Format | None = MoEConfig.combine_wire,
        dtype: Any = MoEConfig.dtype,
        num_physical_experts: int | None = MoEConfig.num_physical_experts,
        fsdp_axis: str | None = MoEConfig.fsdp_axis,
        tensor_axis: str | None = MoEConfig.tensor_axis,
        param_dtype: Any = jnp.float32,
        gate_init: Initializer | None = None,
        kernel_init: Initializer | None = None,
    ):
        config = build_config(
            num_experts,
            num_experts_per_tok,
            hidden_size,
            intermediate_size,
            comm=comm,
            mesh=mesh,
            axis_name=axis_name,
            max_tokens=max_tokens,
            num_groups=num_groups,
            topk_groups=topk_groups,
            score_function=score_function,
            normalize=normalize,
            scale=scale,
            use_bias_correction=use_bias_correction,
            shared_intermediate_size=shared_intermediate_size,
            activation=activation,
            gated=gated,
            capacity_factor=capacity_factor,
            expert_capacity=expert_capacity,
            alignment=alignment,
            grouped_matmul=grouped_matmul,
            num_chunks=num_chunks,
            two_batch_overlap=two_batch_overlap,
            wire=wire,
            combine_wire=combine_wire,
            dtype=dtype,
            num_physical_experts=num_physical_experts,
            fsdp_axis=fsdp_axis,
            tensor_axis=tensor_axis,
        )
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: expected flax.nnx.Rngs, got {type(rngs).__name__}; pass nnx.Rngs(seed).")
        self.config = config
        outer = dict(spmd.get_logical_axis_rules())
        rules = tuple((name, axis) for name, axis in config.axis_rules.items() if name not in outer)
        for name, (shape, logical_axes) in config.parameters.items():
            kind, dtype = (GateBias, jnp.float32) if name == "gate_bias" else (nnx.Param, param_dtype)
            init = functools.partial(initializer_of(name, gate_init, kernel_init), shape=shape, dtype=dtype)
            key = rngs.params()
            # Typed as replicated on a mesh of Explicit axes, it would be made in full on every device.
            value = (
                with_sharding(config, key, config.spec(name), init) if jax_compat.is_tracing() else init(key)
            )
            parameter = kind(value, out_sharding=logical_axes, mesh=config.mesh, sharding_rules=rules)
            setattr(self, name, parameter)

    @renamed_arguments(placement="expert_map")
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
        parameters = {name: getattr(self, name)[...] for name in self.config.parameters}
        parameters = physical_parameters(self.config, parameters, expert_map)
        return moe(
            self.config, parameters, x, expert_map, mask=mask, router=router, topk_idx=topk_idx,
            topk_weights=topk_weights, aux=aux, router_logits=router_logits, sequence_loss=sequence_loss,
        )  # fmt: skip
