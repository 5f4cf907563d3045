"""Grouped matmuls: rows of expert-major order, each times the matrix of its expert.

A grouped matmul is a function (rows [C, H], matrices [L, H, F], group_sizes int32 [L]) → [C, F]. Group e is
the next group_sizes[e] rows. Rows after the last group may hold NaN: what comes out there is arbitrary, and
nothing of them reaches another row, or the gradient of the matrices.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax

from jax_deepep import jax_compat
from jax_deepep.moe.triton_matmul import refusal, triton_matmul

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Choice = Literal["auto", "blocks", "ragged_dot", "triton"] | GroupedMatmul

NAMES = ("auto", "blocks", "ragged_dot", "triton")
LARGEST_BLOCK = 128  # rows
SMALLEST_BLOCK = {"blocks": 8, "triton": 16}


def chosen(choice: Any, platform: str, **sizes: int) -> Any:
    """Return the name or function that `choice` stands for on a platform.

    Args:
        choice: a name of NAMES, or a function.
        platform: of the devices.
        sizes: what is known of `hidden_size`, `intermediate_size` and `alignment`; "auto" heeds them.

    Raises:
        ValueError: there is none of this name, or not on this platform or with this JAX.
    """
    if not callable(choice) and choice not in NAMES:
        raise ValueError(
            f"grouped_matmul: got {choice!r}; takes {', '.join(map(repr, NAMES))}, or a function of "
            "(rows, matrices, group_sizes)."
        )
    if choice == "triton" and platform != "cuda":
        raise ValueError(
            f"grouped_matmul: got 'triton' on {platform}; takes it on NVIDIA GPUs only. Use 'auto' here."
        )
    needs_triton = choice == "triton" or (choice == "auto" and platform == "cuda")
    if needs_triton and jax_compat.pallas_triton() is None:
        reason = (
            'grouped_matmul: expected a JAX with the Triton backend of Pallas for "triton", got JAX '
            f'{jax.__version__}, which has none; use grouped_matmul="ragged_dot"'
        )
        if choice == "triton":
            raise ValueError(f"{reason}.")
        warnings.warn(f'{reason}, as "auto" does now.', stacklevel=1)  # one place: shown once
        return "ragged_dot"
    if choice == "auto" and platform == "cuda":
        return "triton" if refusal(**sizes) is None else "ragged_dot"
    if choice == "auto":
        return "blocks" if platform == "cpu" else "ragged_dot"
    return choice


def alignment_for(choice: Any, mean_rows: float) -> int:
    """Return what the sizes of groups of `mean_rows` rows on average should be multiples of.

    A power of two where rows are multiplied in blocks: a group is padded to whole blocks, by half a block
    on average, but small blocks use the units of the processor less well.
    """
    if choice not in SMALLEST_BLOCK:
        return 1
    block = SMALLEST_BLOCK[choice]
    while block < LARGEST_BLOCK and 2 * block <= mean_rows:
        block *= 2
    return block


def grouped_matmul(choice: Any, alignment: int) -> GroupedMatmul:
    """Return the grouped matmul of this name, for groups of multiples of `alignment`."""
    if choice == "ragged_dot":
        return jax.lax.ragged_dot
    return partial(triton_matmul, block=alignment) if choice == "triton" else choice
