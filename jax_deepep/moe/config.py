"""What a MoE layer is made of: sizes, choices, and how they lie on the mesh."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.capacity import bounded_rows, fewest_chunks
from jax_deepep.checks import ROW_DTYPES, check_array, checked_integer
from jax_deepep.communicator import Communicator
from jax_deepep.gating import ScoreFunction
from jax_deepep.moe.experts import Activation, check_activation
from jax_deepep.moe.grouped_matmul import Choice, alignment_for, chosen

# What the integers among the fields are at least.
LEAST = {
    "num_experts": 1, "num_experts_per_tok": 1, "hidden_size": 1, "intermediate_size": 1, "num_chunks": 1,
    "shared_intermediate_size": 0, "alignment": 1, "num_physical_experts": 1, "num_groups": 1,
    "topk_groups": 1, "expert_capacity": 0,
}  # fmt: skip
OPTIONAL = ("alignment", "expert_capacity", "num_chunks", "num_physical_experts")


@dataclass(frozen=True)
class MoEConfig:
    """The static part of a MoE layer. Hashable, free to be closed over or to be a static argument.

    Attributes:
        comm: how rows are carried; its mesh is the layer's. `build_config` makes one.
        num_experts: E.
        num_experts_per_tok: K.
        hidden_size: H.
        intermediate_size: F, the inner size of an expert.
        num_groups, topk_groups, score_function, normalize, scale: as in `jax_deepep.group_limited_topk`.
        use_bias_correction: there is a parameter `gate_bias` [E], which takes part in the choice of experts
            only; it gets no gradient, `jax_deepep.gating.update_bias` moves it.
        shared_intermediate_size: the inner size of all shared experts together, 0 for none.
        activation: of the experts, elementwise.
        gated: experts have a second input product `wi_1`, which their activation is multiplied with.
        capacity_factor: rows that a device takes, in units of its fair share K · T, besides what the padding
            of its experts may need; rows beyond are dropped. None = as many as may ever come,
            R · T · min(K, L): 14 GiB for one array on each of 64 devices with T = 4096, K = 8, E = 256 and
            H = 7168 in bfloat16, unless `num_chunks` divides it.
        expert_capacity: rows that an expert takes at most at once (in each chunk); None = no limit. Under
            either capacity every sender leaves out its share of what is too much, the lowest weights first,
            where this share is of 8 rows or more: see `jax_deepep.moe.fair_drops`.
        alignment: rows of an expert are padded to a multiple of this; None = what suits the grouped matmul.
        grouped_matmul: how the experts are applied: "blocks" (`jax_deepep.moe.blocks`) for CPUs,
            "ragged_dot" (`jax.lax.ragged_dot`), "triton" (`jax_deepep.moe.triton_matmul`) for NVIDIA GPUs,
            or a grouped matmul of one's own (`jax_deepep.moe.grouped_matmul`). "auto" takes blocks on CPU,
            triton on NVIDIA GPUs, if it takes these sizes, and ragged_dot elsewhere.
        num_chunks: a device's tokens pass in so many chunks, one after the other, each recomputed for its
            gradient: only one chunk's rows are in memory. None = chosen for each call, see `chunks_of`.
        dtype: of the computation; None = the common one of x and the parameters. The router computes in
            float32 always.
        num_physical_experts: P, slots for experts on all devices, so that some experts have several copies:
            see `jax_deepep.balancing`. The communicator has P experts then. None = E, without copies.
        fsdp_axis: the mesh axis that also splits the parameters' H; their full rows are gathered when used.
            Ignored if the mesh has none of this name.
        tensor_axis: the mesh axis that splits F; tokens are copied along it. Ignored likewise.
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
    dtype: Any = None
    num_physical_experts: int | None = None
    fsdp_axis: str | None = "fsdp"
    tensor_axis: str | None = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.comm, Communicator):
            raise TypeError(f"comm: got {type(self.comm).__name__}; takes a jax_deepep.Communicator.")
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
                    f"{name}: got {own}, but the communicator has {of_comm}={other}; make both with the same."
                )
        if self.num_experts % self.comm.size or self.num_experts > self.comm.num_experts:
            raise ValueError(
                f"num_experts: got {self.num_experts} with {self.comm.num_experts} slots on {self.comm.size} "
                f"devices; takes a multiple of {self.comm.size}, at most as many."
            )
        chosen(self.grouped_matmul, self.comm.platform)
        for axis, size, names in (
            (self._fsdp, self.hidden_size, "hidden_size"),
            (self._tensor, self.intermediate_size, "intermediate_size"),
            (self._tensor, self.shared_intermediate_size, "shared_intermediate_size"),
        ):
            if axis and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"{names}: got {size}; takes a multiple of {self.mesh.shape[axis]}, the size of the mesh "
                    f"axis {axis!r} that splits it."
                )
        own = [axis for axis in (self._fsdp, self._tensor) if axis]
        if len({*own, *self.comm.axis_names}) < len(own) + len(self.comm.axis_names):
            raise ValueError(
                f"fsdp_axis, tensor_axis: got {self.fsdp_axis!r}, {self.tensor_axis!r}; take two axes, other "
                f"than those of the experts, {self.comm.axis_names}."
            )

    def _check_choices(self) -> None:
        for name in ("scale", "capacity_factor"):
            value = getattr(self, name)
            if value is None and name == "capacity_factor":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: got {value!r}; takes a number of Python or NumPy (a static value).")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor: got {self.capacity_factor!r}; takes a positive, finite number, or None."
            )
        for name in ("use_bias_correction", "gated"):
            if not isinstance(value := getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name}: expected True or False, got {value!r}; pass a bool.")
        gating.check_choices(
            self.num_experts, num_experts_per_tok=self.num_experts_per_tok, num_groups=self.num_groups,
            topk_groups=self.topk_groups, score_function=self.score_function, normalize=self.normalize,
        )  # fmt: skip
        check_activation(self.activation)
        try:
            takes_dtype = self.dtype is None or jnp.dtype(self.dtype).name in ROW_DTYPES
        except TypeError:  # no dtype at all
            takes_dtype = False
        if not takes_dtype:
            raise TypeError(f"dtype: got {self.dtype!r}; takes None, {', '.join(ROW_DTYPES)}.")
        for name in ("fsdp_axis", "tensor_axis"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(f"{name}: got {value!r}; takes the name of one mesh axis, or None.")

    def __copy__(self) -> "MoEConfig":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoEConfig":
        return self  # a copy of `activation` would be another function, and compile everything again

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
        """The mesh axes along which tokens are copied: one or none."""
        return (self._tensor,) if self._tensor else ()

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the tokens: all others, in the order of the mesh."""
        return tuple(name for name in self.mesh.axis_names if name != self._tensor)

    @property
    def num_token_shards(self) -> int:
        """Devices that hold different tokens."""
        return math.prod(self.mesh.shape[name] for name in self.token_axes)

    @property
    def axis_rules(self) -> dict[str, str | tuple[str, ...] | None]:
        """Mesh axes of the logical axes of the parameters."""
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

    def check_placement(self, placement: Any) -> None:
        """Raise unless `placement` is an array of the layer's slots, or None where it has no copies."""
        if self.num_physical_experts is not None:
            if placement is None:
                raise ValueError(
                    f"placement: got None with num_physical_experts={self.num_physical_experts}; takes "
                    "the int32 array that jax_deepep.balancing.plan_experts makes."
                )
            shape = (self.num_physical_experts,)
            check_array("placement", placement, shape, names="[num_physical_experts]", dtype="int32")
        elif placement is not None:
            raise ValueError(
                "placement: got one for a layer without copies of experts; takes None, or build the layer "
                "with num_physical_experts."
            )

    def spec(self, name: str) -> P:
        """Return how the parameter `name` lies on the mesh."""
        _, axes = self.parameters[name]
        return P(*(None if axis is None else self.axis_rules[axis] for axis in axes))

    @property
    def experts_by(self) -> Any:
        """The name or function that `grouped_matmul` stands for here."""
        parts = 1 if self._tensor is None else self.mesh.shape[self._tensor]
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size // parts}
        if self.alignment is not None:
            sizes["alignment"] = self.alignment
        return chosen(self.grouped_matmul, self.comm.platform, **sizes)

    def chunks_of(self, num_tokens: int, dtype: Any) -> int:
        """Return in how many chunks a call of the layer takes the tokens of a device.

        `num_chunks`, if it is set; 1 under a capacity, which bounds the rows already and would mean each
        chunk. Otherwise the smallest n for which the worst case of a chunk, R · T / n · min(K, L) rows of H
        elements, is within the larger of

            1.25 · K · T rows: on average a device receives K · T rows in the whole call;
            2 GiB: below that, chunks would cost more time than their memory is worth;

        but n leaves every chunk at least 128 rows per expert on average (K · T / n / L ≥ 128), with fewer of
        which grouped matmuls become slow. So small calls, those of decoding among them, are never divided.

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

    def may_drop(self, num_tokens: int) -> bool:
        """Return whether a dispatch of `num_tokens` tokens of every device can drop some."""
        return self.rows(num_tokens)[0] is not None or self.expert_capacity is not None

    def rows(self, num_tokens: int) -> tuple[int | None, int]:
        """Return (`capacity`, `alignment`) of a dispatch of `num_tokens` tokens of every device."""
        comm = self.comm
        fair_share = num_tokens * comm.num_experts_per_tok
        alignment = self.alignment
        if alignment is None:
            alignment = alignment_for(self.experts_by, fair_share / comm.num_local_experts)
        if self.capacity_factor is None:
            return None, alignment
        sizes = {"num_tokens": num_tokens, "alignment": alignment, **self._sizes_of_comm}
        return bounded_rows(capacity_factor=self.capacity_factor, **sizes), alignment
