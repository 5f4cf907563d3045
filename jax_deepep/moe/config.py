"""The configuration of a MoE layer: sizes, choices, and how its parameters are sharded."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.capacity import bounded_rows, fewest_chunks
from jax_deepep.checks import ROW_DTYPES, check_array, check_bool, checked_integer
from jax_deepep.communicator import Communicator
from jax_deepep.deprecation import renamed_function
from jax_deepep.gating import ScoreFunction
from jax_deepep.moe.experts import check_activation
from jax_deepep.moe.grouped_matmul import Choice, alignment_for, check_choice, chosen
from jax_deepep.moe.halves import Activation
from jax_deepep.ops.wire import Wire, checked_wire
from jax_deepep.quantization.formats import Format

# The minimum of each integer field.
LEAST = {
    "num_experts": 1, "num_experts_per_tok": 1, "hidden_size": 1, "intermediate_size": 1, "num_chunks": 1,
    "shared_intermediate_size": 0, "alignment": 1, "num_physical_experts": 1, "num_groups": 1,
    "topk_groups": 1, "expert_capacity": 0,
}  # fmt: skip
OPTIONAL = ("alignment", "expert_capacity", "num_chunks", "num_physical_experts")


@dataclass(frozen=True)
class MoEConfig:
    """The static part of a MoE layer. Hashable: jitted functions can take it as static or close over it.

    Attributes:
        comm: the communicator, whose mesh is the layer's. `build_config` makes one.
        num_experts: E.
        num_experts_per_tok: K.
        hidden_size: H.
        intermediate_size: F, the inner size of an expert.
        num_groups, topk_groups, score_function, normalize, scale: as in `jax_deepep.group_limited_topk`.
        use_bias_correction: there is a parameter `gate_bias` [E], which affects the choice of experts only;
            it gets no gradient, `jax_deepep.gating.update_bias` updates it.
        shared_intermediate_size: the inner size of all shared experts together, 0 for none.
        activation: of the experts, elementwise.
        gated: experts have a second input projection `wi_1`, whose product is multiplied with the activation.
        capacity_factor: rows that a device can receive, in units of its fair share K · T, in addition to
            padding; rows beyond it are dropped. None = the worst case, R · T · min(K, L): 14 GiB for one
            array on each of 64 devices with T = 4096, K = 8, E = 256 and H = 7168 in bfloat16, unless
            `num_chunks` divides it.
        expert_capacity: the most rows of an expert in one dispatch (of each chunk); None = no limit. Under
            either capacity every sender omits its share of the excess, the lowest weights first, where its
            share of the capacity is at least 8 rows: see `jax_deepep.moe.fair_drops`.
        alignment: rows of an expert are padded to a multiple of this; None = what suits the grouped matmul.
        grouped_matmul: how the experts are applied: "blocks" (`jax_deepep.moe.blocks`) for CPUs,
            "ragged_dot" (`jax.lax.ragged_dot`), "triton" (`jax_deepep.moe.grouped_matmul.triton`) for NVIDIA
            GPUs, "mosaic" (`jax_deepep.moe.grouped_matmul.mosaic`) for H100 and H200, or your own grouped
            matmul (`jax_deepep.moe.grouped_matmul`). "auto" is blocks on CPUs; on NVIDIA GPUs mosaic, triton
            or ragged_dot, the first that supports GPU, dtype and sizes (mosaic from 64 rows per expert on
            average, or with an `alignment` that is a multiple of 64); and ragged_dot elsewhere.
        num_chunks: a device's tokens are processed in this many chunks, one after the other, each recomputed
            for its gradient: only one chunk's rows are in memory. None = chosen per call, see `chunks_of`.
        two_batch_overlap: a device's tokens (of each chunk) are processed in two halves, of which one
            communicates while the other computes, forward and backward: for training and prefill on GPUs,
            where dispatch and combine take a large part of the time. Tokens are routed at once; what follows
            is that of two calls, one after the other, with the same bits: capacities and drops are those of
            each half, and `MoEAux` covers both. The gradients of weights are summed over the halves first,
            then over devices. Each half has a dispatch and a combine of its own, and grouped matmuls of half
            the rows.
        wire: the format in which rows cross links in dispatch, as in `jax_deepep.dispatch`: experts compute
            on quantised rows, in `dtype`. "fp8", for example, or a `Wire` without `keep_quantized`.
        combine_wire: that of combine, as in `jax_deepep.combine`. With wire="fp8" and
            combine_wire=Wire(None, backward="fp8"), rows cross links as in DeepSeek-V3.
        dtype: of the computation; None = the common dtype of x and the parameters. The router always computes
            in float32.
        num_physical_experts: P, physical experts on all devices, with replicas of some experts: see
            `jax_deepep.balancing`. The communicator then has P experts. None = E, without replicas.
        fsdp_axis: the mesh axis that also shards the parameters' H; they are gathered along it when used, in
            `dtype` where that is narrower than theirs; their gradients are summed in their own dtype.
            "fsdp" is ignored if the mesh has no such axis; None = none.
        tensor_axis: the mesh axis that shards F; tokens are replicated along it. "tensor" is ignored
            likewise.
    """

    comm: Communicator
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_groups: int = 1
    topk_groups: int = 1
    score_function: ScoreFunction = "softmax"
    normalize: bool = True
    scale: float = 1.0
    use_bias_correction: bool = False
    shared_intermediate_size: int = 0
    activation: Activation = jax.nn.silu
    gated: bool = True
    capacity_factor: float | None = None
    expert_capacity: int | None = None
    alignment: int | None = None
    grouped_matmul: Choice = "auto"
    num_chunks: int | None = None
    two_batch_overlap: bool = False
    wire: Wire | Format | None = None
    combine_wire: Wire | Format | None = None
    dtype: Any = None
    num_physical_experts: int | None = None
    fsdp_axis: str | None = "fsdp"
    tensor_axis: str | None = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.comm, Communicator):
            raise TypeError(
                f"comm: expected a jax_deepep.Communicator, got {type(self.comm).__name__}; pass one."
            )
        for name, minimum in LEAST.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                object.__setattr__(self, name, checked_integer(name, value, minimum=minimum))
        self._check_choices()
        for name, of_comm in (
            ("num_experts" if self.num_physical_experts is None else "num_physical_experts", "num_experts"),
            ("num_experts_per_tok", "num_experts_per_tok"),
            ("hidden_size", "hidden_size"),
        ):
            if (own := getattr(self, name)) != (other := getattr(self.comm, of_comm)):
                raise ValueError(
                    f"{name}: expected {of_comm}={other} of the communicator, got {own}; make them equal."
                )
        if self.num_experts % self.comm.size or self.num_experts > self.comm.num_experts:
            raise ValueError(
                f"num_experts: expected a multiple of the {self.comm.size} devices, at most the "
                f"{self.comm.num_experts} physical experts, got {self.num_experts}; change one of them."
            )
        check_choice(self.grouped_matmul, self.comm.platform)
        for axis, size, names in (
            (self._fsdp, self.hidden_size, "hidden_size"),
            (self._tensor, self.intermediate_size, "intermediate_size"),
            (self._tensor, self.shared_intermediate_size, "shared_intermediate_size"),
        ):
            if axis and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"{names}: expected a multiple of {self.mesh.shape[axis]}, the size of the mesh axis "
                    f"{axis!r} that shards it, got {size}; change one of them."
                )
        for name in ("fsdp_axis", "tensor_axis"):
            axis = getattr(self, name)
            if axis not in (None, getattr(MoEConfig, name), *self.mesh.axis_names):
                raise ValueError(
                    f"{name}: expected an axis of the mesh, {self.mesh.axis_names}, or None, got {axis!r}; "
                    "parameters are not sharded along an axis that is not there."
                )
        own = [axis for axis in (self._fsdp, self._tensor) if axis]
        if len({*own, *self.comm.axis_names}) < len(own) + len(self.comm.axis_names):
            raise ValueError(
                f"fsdp_axis, tensor_axis: expected two axes other than those of the experts, "
                f"{self.comm.axis_names}, got {self.fsdp_axis!r}, {self.tensor_axis!r}; name others, or None."
            )

    def _check_choices(self) -> None:
        for name in ("scale", "capacity_factor"):
            value = getattr(self, name)
            if value is None and name == "capacity_factor":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(
                    f"{name}: expected a number of Python or NumPy (static), got {value!r}; pass a float."
                )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                "capacity_factor: expected a positive, finite number, or None, got "
                f"{self.capacity_factor!r}; 1.25 to 2 is usual."
            )
        for name in ("use_bias_correction", "gated", "two_batch_overlap"):
            check_bool(name, getattr(self, name))
        gating.check_choices(
            self.num_experts, num_experts_per_tok=self.num_experts_per_tok, num_groups=self.num_groups,
            topk_groups=self.topk_groups, score_function=self.score_function, normalize=self.normalize,
        )  # fmt: skip
        check_activation(self.activation)
        try:
            takes_dtype = self.dtype is None or jnp.dtype(self.dtype).name in ROW_DTYPES
        except TypeError:  # not a dtype
            takes_dtype = False
        if not takes_dtype:
            raise TypeError(
                f"dtype: expected None, {', '.join(ROW_DTYPES)}, got {self.dtype!r}; pass one of them."
            )
        self._check_wires()
        for name in ("fsdp_axis", "tensor_axis"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(
                    f"{name}: expected the name of one mesh axis, or None, got {value!r}; pass a string."
                )

    def _check_wires(self) -> None:
        rows = jax.ShapeDtypeStruct((1, self.hidden_size), jnp.float32)
        if checked_wire("dispatch", self.wire, rows).keep_quantized:
            raise ValueError(
                "wire.keep_quantized: expected False in a layer, whose experts compute on rows of floats, "
                "got True; leave it out."
            )
        try:
            checked_wire("combine", self.combine_wire, rows)
        except (ValueError, TypeError) as error:
            raise type(error)(f"combine_{error}") from None

    def __copy__(self) -> "MoEConfig":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoEConfig":
        return self  # a copy of `activation` would be a new function, and everything would be compiled again

    @property
    def mesh(self) -> Mesh:
        """The mesh of the communicator."""
        return self.comm.mesh

    @property
    def _fsdp(self) -> str | None:
        return self.fsdp_axis if self.fsdp_axis in self.mesh.axis_names else None

    @property
    def _tensor(self) -> str | None:
        return self.tensor_axis if self.tensor_axis in self.mesh.axis_names else None

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """The mesh axes along which tokens are replicated: one or none."""
        return (self._tensor,) if self._tensor else ()

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that shard the tokens: all others, in the order of the mesh."""
        return tuple(name for name in self.mesh.axis_names if name != self._tensor)

    @property
    def num_token_shards(self) -> int:
        """How many devices hold different tokens."""
        return math.prod(self.mesh.shape[name] for name in self.token_axes)

    @property
    def axis_rules(self) -> dict[str, str | tuple[str, ...] | None]:
        """The mesh axes of each logical axis of the parameters."""
        return {"exp": self.comm.axis_names or None, "embed": self._fsdp, "mlp": self._tensor}

    @property
    def parameters(self) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """Shape and logical axes of every parameter, by name."""
        num_experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        all_parameters: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
            "gate": ((hidden, num_experts), ("embed", None)),
            "gate_bias": ((num_experts,), (None,)),
            "wi_0": ((num_experts, hidden, inner), ("exp", *inward)),
            "wi_1": ((num_experts, hidden, inner), ("exp", *inward)),
            "wo": ((num_experts, inner, hidden), ("exp", *outward)),
        }
        shared = self.shared_intermediate_size
        all_parameters |= {
            "shared_wi_0": ((hidden, shared), inward),
            "shared_wi_1": ((hidden, shared), inward),
            "shared_wo": ((shared, hidden), outward),
        }
        absent = set() if self.use_bias_correction else {"gate_bias"}
        if not self.gated:
            absent |= {"wi_1", "shared_wi_1"}
        if not shared:
            absent |= {"shared_wi_0", "shared_wi_1", "shared_wo"}
        return {name: value for name, value in all_parameters.items() if name not in absent}

    def check_expert_map(self, expert_map: Any) -> None:
        """Raise unless `expert_map` is [P], or None where the layer has no replicas."""
        if self.num_physical_experts is not None:
            if expert_map is None:
                raise ValueError(
                    f"expert_map: expected int32 [num_physical_experts] = [{self.num_physical_experts}], got "
                    "None; pass the result of jax_deepep.balancing.plan_experts."
                )
            shape = (self.num_physical_experts,)
            check_array("expert_map", expert_map, shape, names="[num_physical_experts]", dtype="int32")
        elif expert_map is not None:
            raise ValueError(
                "expert_map: expected None for a layer without replicas, got an array; build the layer with "
                "num_physical_experts."
            )

    check_placement = renamed_function("check_placement", check_expert_map)

    def spec(self, name: str) -> P:
        """Return how the parameter `name` is sharded."""
        _, axes = self.parameters[name]
        return P(*(None if axis is None else self.axis_rules[axis] for axis in axes))

    def experts_by(self, num_tokens: int, dtype: Any) -> tuple[Any, int]:
        """Return what `grouped_matmul` and `alignment` stand for.

        Args:
            num_tokens: of every device in one dispatch.
            dtype: of the computation.
        """
        parts = 1 if self._tensor is None else self.mesh.shape[self._tensor]
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size // parts}
        if self.alignment is not None:
            sizes["alignment"] = self.alignment
        mean_rows = num_tokens * self.comm.num_experts_per_tok / self.comm.num_local_experts
        known = {"dtype": dtype, "mean_rows": mean_rows, **sizes}
        choice = chosen(self.grouped_matmul, self.comm.platform, **known)
        return choice, self.alignment or alignment_for(choice, mean_rows)

    @property
    def batches_per_chunk(self) -> int:
        """2 with `two_batch_overlap`, otherwise 1."""
        return 2 if self.two_batch_overlap else 1

    def chunks_of(self, num_tokens: int, dtype: Any) -> int:
        """Return into how many chunks a call of the layer splits the tokens of a device.

        `num_chunks`, if it is set; 1 under a capacity, which bounds the rows already and would apply to each
        chunk. Otherwise the smallest n for which the worst case of a chunk, R · T / n · min(K, L) rows of H
        elements, is within the larger of

            1.25 · K · T rows: on average a device receives K · T rows in the whole call;
            2 GiB: below that, the time that chunks cost outweighs the memory that they save;

        but every chunk keeps at least 128 rows per expert on average (K · T / n / L ≥ 128), because grouped
        matmuls are slow with fewer. So small calls, such as those of decoding, are never split.

        Args:
            num_tokens: T, tokens of one device.
            dtype: of the computation.
        """
        bounds = (self.num_chunks, self.capacity_factor, self.expert_capacity)
        if any(bound is not None for bound in bounds):
            return self.num_chunks or 1
        row_bytes = self.hidden_size * jnp.dtype(dtype).itemsize
        return fewest_chunks(num_tokens=num_tokens, row_bytes=row_bytes, **self._sizes_of_comm)

    @property
    def _sizes_of_comm(self) -> dict[str, int]:
        names = ("num_experts_per_tok", "num_local_experts")
        return {"num_ranks": self.comm.size} | {name: getattr(self.comm, name) for name in names}

    @property
    def may_drop(self) -> bool:
        """Whether a dispatch can drop tokens."""
        return self.capacity_factor is not None or self.expert_capacity is not None

    def capacity(self, num_tokens: int, alignment: int) -> int | None:
        """Return `capacity` of a dispatch of `num_tokens` tokens of every device."""
        if self.capacity_factor is None:
            return None
        sizes = {"num_tokens": num_tokens, "alignment": alignment, **self._sizes_of_comm}
        return bounded_rows(capacity_factor=self.capacity_factor, **sizes)
