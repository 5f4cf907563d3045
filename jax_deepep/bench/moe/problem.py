"""The shape that is measured."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepep.capacity import round_up, worst_case_rows
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

        Rows after the last group are NaN, as a dispatch may leave them.
        """
        random = np.random.default_rng(0)
        num_local = self.experts // self.devices
        live = self.tokens * self.topk
        counts = np.bincount(random.integers(0, num_local, live), minlength=num_local)
        group_sizes = round_up(counts, alignment)
        if self.capacity_factor is None:
            capacity = worst_case_rows(
                layout="expert",
                num_ranks=self.devices,
                num_tokens=self.tokens,
                num_experts_per_tok=self.topk,
                num_local_experts=num_local,
                alignment=alignment,
            )
        else:
            capacity = round_up(int(self.capacity_factor * live) + num_local * (alignment - 1), alignment)
        key = jax.random.key(0)
        rows = jax.random.normal(key, (capacity, self.hidden), jnp.dtype(self.dtype))
        rows = jnp.where(jnp.arange(capacity)[:, None] < group_sizes.sum(), rows, jnp.nan)
        shape = (num_local, self.hidden, self.intermediate)
        shapes = {"wi_0": shape, "wi_1": shape, "wo": (num_local, self.intermediate, self.hidden)}
        weights = {name: of_experts(key, shape, jnp.dtype(self.dtype)) for name, shape in shapes.items()}
        return rows, weights, jnp.asarray(group_sizes, jnp.int32)
