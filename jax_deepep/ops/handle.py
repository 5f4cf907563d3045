"""What passes between the ops: the routes of a dispatch, and the arrays that it returns."""

from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.capacity import Layout
from jax_deepep.communicator import Communicator
from jax_deepep.communicator.config import OpMode

# What a dispatch returned with a handle, and what a dispatch along it returns.
Received = TypeVar("Received", bound="ExpertMajor | TokenMajor")


def _static() -> dict[str, bool]:
    return {"static": True}


@dataclass(frozen=True)
class RouteShape:
    """The static part of a dispatch.

    Attributes:
        comm: the communicator.
        layout: "expert" or "token".
        num_tokens: T, tokens of this device.
        capacity: C, rows of the received arrays.
        alignment: rows of a group are padded to a multiple of this.
        expert_capacity: most rows of each expert, or None.
        mode: "throughput" or "low_latency".
    """

    comm: Communicator
    layout: Layout
    num_tokens: int
    capacity: int
    alignment: int
    expert_capacity: int | None
    mode: OpMode = "throughput"

    def rank(self) -> jax.Array:
        """Return this device's rank in its group, int32 []."""
        return jnp.int32(0) if self.comm.size == 1 else lax.axis_index(self.comm.axis_names)


class Routes(NamedTuple):
    """The leaves of a handle that determine where rows go; see `Handle`."""

    source: jax.Array
    destination: jax.Array
    group_sizes: jax.Array
    pairs: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Handle(Generic[Received]):
    """The routes of one dispatch: a pytree of device arrays with static metadata.

    It passes through jit, scan, checkpoint and donation unchanged. What leaves a `shard_map` needs an axis
    that the mesh can split, and some leaves have none (`num_dropped`): add a leading device axis, and remove
    it where the handle enters the next `shard_map`,

        handle = jax.tree.map(lambda leaf: leaf[None], handle)  # in the first; out_specs=P(axes of the mesh)
        handle = jax.tree.map(lambda leaf: leaf[0], handle)  # in the next; in_specs likewise

    and likewise for `ExpertMajor` and `TokenMajor`.

    Rows are *sent* from a token's device and *received* on an expert's device, so a device holds
    both ends: `source` for the rows that it received, `destination` for the tokens that it sent.

    Attributes:
        source: int32 [C], for each received row source device · `max_tokens` + token, −1 in rows
            without a token.
        destination: int32 [T, K], for each entry of `topk_idx` the device · C + row that it went
            to, −1 where it went nowhere. In low-latency mode, native on GPUs, the device alone, also of
            rows that it dropped.
        weights: float32, router weights on the receiving side: [C] expert-major, [C, K]
            token-major. The gradient of `topk_weights` flows through it.
        local_experts: int32 [C, K] token-major: local expert of each k or −1; None expert-major, not an
            array without elements: see `no_rows` for what JAX does with one that enters a shard_map.
        pairs: int32 [1 + R · T, ...], where native GPU ops need it, expert-major or in low-latency mode:
            which tokens this device received, and the rows of each (`PairTable` in
            `xla_ffi/interface/geometry.h`); None elsewhere.
        group_sizes: int32 [G], rows of each group, padding included (G = L expert-major, else 1).
        num_rows: int32 [G], rows of each group without the padding.
        num_received: int32 [], rows sent to this device, before dropping.
        num_dropped: int32 [], those of them that did not fit.
        num_invalid: int32 [], entries of this device's `topk_idx` that were ignored: outside
            [−1, E), or an expert named before in the same row (the lowest k is kept).
        route_shape: static; it holds `comm`, `layout`, `capacity` and `mode`.
    """

    source: jax.Array
    destination: jax.Array
    weights: jax.Array
    local_experts: jax.Array | None
    pairs: jax.Array | None
    group_sizes: jax.Array
    num_rows: jax.Array
    num_received: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    route_shape: RouteShape = field(metadata=_static())

    @property
    def comm(self) -> Communicator:
        """The communicator of the dispatch."""
        return self.route_shape.comm

    @property
    def layout(self) -> Layout:
        """The layout of the dispatch: "expert" or "token"."""
        return self.route_shape.layout

    @property
    def capacity(self) -> int:
        """C, rows of the received arrays."""
        return self.route_shape.capacity

    @property
    def mode(self) -> OpMode:
        """The mode of the dispatch, in which its combine and its backward run too."""
        return self.route_shape.mode

    @property
    def routes(self) -> Routes:
        """Where rows go."""
        return Routes(self.source, self.destination, self.group_sizes, self.pairs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertMajor:
    """Received rows grouped by local expert; inside an expert by (source device, source token).

    Attributes:
        tokens: [C, H], [C, W] of integers, or `BlockScaled`, one row per (token, local expert).
            Rows that fill a group up to `alignment` are zero; rows after the last group are not written and
            may hold NaN.
        group_sizes: int32 [L], rows of each expert, rounded up to `alignment`.
        num_rows: int32 [L], the same without the padding.
        weights: float32 [C], the router weight of each row, 0 where there is none.
        mask: bool [C], true in rows of a token.
    """

    tokens: Any
    group_sizes: jax.Array
    num_rows: jax.Array
    weights: jax.Array
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenMajor:
    """Received rows, one per (token, device), ordered by (source device, source token).

    Attributes:
        tokens: [C, H], [C, W] of integers, or `BlockScaled`; rows after the last one are not written and
            may hold NaN.
        topk_idx: int32 [C, K], local expert or −1, every k in its own column.
        topk_weights: float32 [C, K], 0 where `topk_idx` is −1.
        num_tokens: int32 [], how many rows there are.
        mask: bool [C], true in rows of a token.
    """

    tokens: Any
    topk_idx: jax.Array
    topk_weights: jax.Array
    num_tokens: jax.Array
    mask: jax.Array
