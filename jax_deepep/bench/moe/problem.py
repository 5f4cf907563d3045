"""The shape that is measured."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepep.capacity import bounded_rows, round_up, worst_case_rows
from jax_deepep.checks import checked_integer
from jax_deepep.moe.parameters import of_experts


@dataclass(frozen=True)
class MoEProblem:
    """A MoE layer and its batch.

    Attributes:
        tokens: T, per device.
        hidden, intermediate: H, F.
        topk, experts: K, E.
        devices: R, all on the expert axis.
        dtype: of tokens and parameters.
        capacity_factor: see `jax_deepep.moe.MoEConfig`; None = the worst case.
    """

    tokens: int
    hidden: int
    intermediate: int
    topk: int
    experts: int
    devices: int
    dtype: str
    capacity_factor: float | None

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "intermediate", "topk", "experts", "devices"):
            checked_integer(name, getattr(self, name), minimum=1)
        if self.experts % self.devices or self.topk > self.experts:
            raise ValueError(
                f"experts: got {self.experts}; takes a multiple of devices={self.devices}, at least "
                f"topk={self.topk}."
            )

    @property
    def name(self) -> str:
        """The shape in one line."""
        capacity = "worst" if self.capacity_factor is None else f"{self.capacity_factor:g}x"
        return (
            f"T={self.tokens} H={self.hidden} F={self.intermediate} K={self.topk} E={self.experts} "
            f"R={self.devices} {self.dtype} C={capacity}"
        )

    def rows_of_one_device(self, alignment: int) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """Return rows [C, H], the experts' weights and group sizes [L] of uniform routing.

        Rows between the groups are zero and those after the last one NaN, as a dispatch may leave them.
        """
        random = np.random.default_rng(0)
        num_local = self.experts // self.devices
        live = self.tokens * self.topk
        counts = np.bincount(random.integers(0, num_local, live), minlength=num_local)
        group_sizes = round_up(counts, alignment)
        sizes = {
            "num_ranks": self.devices,
            "num_tokens": self.tokens,
            "num_experts_per_tok": self.topk,
            "num_local_experts": num_local,
            "alignment": alignment,
        }
        if self.capacity_factor is None:
            capacity = worst_case_rows(layout="expert", **sizes)
        else:
            capacity = bounded_rows(capacity_factor=self.capacity_factor, **sizes)
        first = np.cumsum(group_sizes) - group_sizes
        place = np.concatenate([start + np.arange(count) for start, count in zip(first, counts, strict=True)])
        key, dtype = jax.random.key(0), jnp.dtype(self.dtype)
        rows = jnp.full((capacity, self.hidden), jnp.nan, dtype).at[: group_sizes.sum()].set(0)
        rows = rows.at[place].set(jax.random.normal(key, (live, self.hidden), dtype))
        shape = (num_local, self.hidden, self.intermediate)
        shapes = {"wi_0": shape, "wi_1": shape, "wo": (num_local, self.intermediate, self.hidden)}
        weights = {name: of_experts(key, shape, dtype) for name, shape in shapes.items()}
        return rows, weights, jnp.asarray(group_sizes, jnp.int32)
