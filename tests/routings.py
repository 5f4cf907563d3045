"""Where tokens go: topk_idx [devices, T, K] for `tokens` = (devices, T), and groups of `size` devices."""

from typing import Any

import numpy as np


def random(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Different experts per token, unordered."""
    shuffled = np.argsort(rng.random((*tokens, problem.num_experts)), axis=-1)
    return shuffled[..., : problem.num_topk]


def to_device_1(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Every token of the group goes to device 1 alone; entries without an expert there are −1."""
    local = problem.num_experts // size
    idx = np.full((*tokens, problem.num_topk), -1)
    here = min(local, problem.num_topk)
    idx[..., :here] = local + np.argsort(rng.random((*tokens, local)), axis=-1)[..., :here]
    return idx


def none_to_device_0(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Device 0 of every group receives nothing."""
    local = problem.num_experts // size
    others = np.argsort(rng.random((*tokens, problem.num_experts - local)), axis=-1)
    return local + others[..., : problem.num_topk]


def skewed(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Low experts are popular."""
    noise = rng.random((*tokens, problem.num_experts)) + 0.15 * np.arange(problem.num_experts)
    return np.argsort(noise, axis=-1)[..., : problem.num_topk]


def some_none(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Many entries are −1, whole rows among them."""
    idx = random(rng, problem, size, tokens)
    idx[rng.random(idx.shape) < 0.4] = -1
    idx[:, 1] = -1
    return idx


def all_none(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    return np.full((*tokens, problem.num_topk), -1)


def invalid(rng, problem: Any, size: int, tokens: tuple[int, int]) -> np.ndarray:
    """Entries out of range on both sides, and experts named two and three times."""
    idx = rng.integers(-3, problem.num_experts + 3, (*tokens, problem.num_topk))
    idx[0, 0] = idx[0, 0, 0] = 2
    idx[-1, -1, -1] = np.iinfo(np.int32).max
    idx[-1, -1, 0] = np.iinfo(np.int32).min
    return idx
