"""Grouped matmuls: expert-major rows, each multiplied with the matrix of its expert.

A grouped matmul is a function (rows [C, H], matrices [L, H, F], group_sizes int32 [L]) → [C, F]. Group e is
the next group_sizes[e] rows. Rows after the last group may hold NaN: their results are arbitrary, and they
must affect neither other rows nor the gradient of the matrices.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic import missing_reason, mosaic_matmul
from jax_deepep.moe.grouped_matmul.triton import triton_matmul, unsupported_reason

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Choice = Literal["auto", "blocks", "ragged_dot", "triton", "mosaic"] | GroupedMatmul

NAMES = ("auto", "blocks", "ragged_dot", "triton", "mosaic")
FOR_NVIDIA_GPUS = ("triton", "mosaic")
LARGEST_BLOCK = 128  # rows
SMALLEST_BLOCK = {"blocks": 8, "triton": 16, "mosaic": 64}


def chosen(choice: Any, platform: str, **sizes: int) -> Any:
    """Return the name or function that `choice` stands for on a platform.

    Args:
        choice: a name of NAMES, or a function.
        platform: of the devices.
        sizes: `hidden_size`, `intermediate_size` and `alignment` as far as known; "auto" depends on them.

    Raises:
        ValueError: an unknown name, or one that this platform, its GPU or this JAX does not have.
    """
    if not callable(choice) and choice not in NAMES:
        raise ValueError(
            f"grouped_matmul: expected {', '.join(map(repr, NAMES))}, or a function of (rows, matrices, "
            f"group_sizes), got {choice!r}; pass one of them."
        )
    if not callable(choice) and choice in FOR_NVIDIA_GPUS and platform != "cuda":
        raise ValueError(
            f"grouped_matmul: expected {choice!r} on NVIDIA GPUs only, got it on {platform}; use 'auto' here."
        )
    if choice == "mosaic" and (why := missing_reason(jax.devices()[0])) is not None:
        raise ValueError(why)
    needs_triton = choice == "triton" or (choice == "auto" and platform == "cuda")
    if needs_triton and jax_compat.pallas_triton() is None:
        reason = (
            'grouped_matmul: expected a JAX with the Triton backend of Pallas for "triton", got JAX '
            f'{jax.__version__} without it; use grouped_matmul="ragged_dot"'
        )
        if choice == "triton":
            raise ValueError(f"{reason}.")
        warnings.warn(f'{reason}, as "auto" does now.', stacklevel=1)  # one location: shown once
        return "ragged_dot"
    if choice == "auto" and platform == "cuda":
        return "triton" if unsupported_reason(**sizes) is None else "ragged_dot"
    if choice == "auto":
        return "blocks" if platform == "cpu" else "ragged_dot"
    return choice


def alignment_for(choice: Any, mean_rows: float) -> int:
    """Return the multiple to which row groups of `mean_rows` rows on average should be padded.

    A power of two where rows are multiplied in blocks: a group is padded by half a block on average, but
    small blocks use the processor less well.
    """
    if choice not in SMALLEST_BLOCK:
        return 1
    block = SMALLEST_BLOCK[choice]
    while block < LARGEST_BLOCK and 2 * block <= mean_rows:
        block *= 2
    return block


def grouped_matmul(choice: Any, alignment: int) -> GroupedMatmul:
    """Return the grouped matmul of this name, for groups padded to multiples of `alignment`."""
    if choice == "ragged_dot":
        return jax.lax.ragged_dot
    if choice == "mosaic":
        return partial(mosaic_matmul, block=alignment)
    return partial(triton_matmul, block=alignment) if choice == "triton" else choice
