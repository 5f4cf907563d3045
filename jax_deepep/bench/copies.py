"""On how many ranks and nodes a token has experts: exactly, or drawn with the library's router."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jax_deepep import gating
from jax_deepep.bench.problem import Problem, devices_of_tokens
from jax_deepep.bench.routing import popular_logits

Routing = Literal["uniform", "group_limited", "skewed"]


@dataclass(frozen=True)
class Copies:
    """Where a token goes.

    Attributes:
        nodes, ranks: how many different ones have an expert of it, on average, its own included.
        busiest_node, busiest_rank: tokens that reach the most popular one over the mean.
    """

    nodes: float
    ranks: float
    busiest_node: float = 1.0
    busiest_rank: float = 1.0


def uniform_copies(problem: Problem, nodes: int) -> Copies:
    """Return the exact expectations for K different experts, all sets equally likely."""

    def distinct(devices: int) -> float:
        of = dataclasses.replace(problem, devices=devices, layout="token")
        return of.mean_rows / of.tokens

    return Copies(distinct(nodes), distinct(problem.devices))


def drawn_copies(
    problem: Problem, nodes: int, routing: Routing, *, num_groups: int = 8, topk_groups: int = 4,
    skew: float = 1.0, samples: int = 1 << 14, seed: int = 0,
) -> Copies:  # fmt: skip
    """Return averages over tokens drawn with the library's router.

    Args:
        problem, nodes: R of the problem is that of all nodes.
        routing: "uniform"; "group_limited", scores alike for all experts, of which the best `topk_groups` of
            `num_groups` groups compete, as in DeepSeek-V3; or "skewed", the popularities of `bench routing`.
        num_groups, topk_groups: of "group_limited".
        skew: s in the popularities 1 / n^s of "skewed".
        samples: tokens.
        seed: of the scores.
    """
    if routing == "skewed":
        logits = popular_logits(problem.experts, samples, skew, step=0, seed=seed)
    else:
        scores = np.random.default_rng(seed).normal(size=(samples, problem.experts))
        logits = jnp.asarray(scores, jnp.float32)
    if routing != "group_limited":
        num_groups = topk_groups = 1
    topk_idx, _ = gating.group_limited_topk(
        logits, num_experts_per_tok=problem.topk, num_groups=num_groups, topk_groups=topk_groups
    )

    def counted(devices: int) -> tuple[float, float]:
        of = dataclasses.replace(problem, devices=devices)
        loads = devices_of_tokens(np.asarray(topk_idx), of).sum(axis=0)
        # Where all experts are alike, a largest load above the mean is chance, which more samples remove.
        return float(loads.sum() / samples), float(loads.max() / loads.mean()) if routing == "skewed" else 1.0

    (on_nodes, busiest_node), (on_ranks, busiest_rank) = counted(nodes), counted(problem.devices)
    return Copies(on_nodes, on_ranks, busiest_node, busiest_rank)
