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
from jax_deepep.moe.grouped_matmul import mosaic, triton
from jax_deepep.moe.grouped_matmul.mosaic import missing_reason, mosaic_matmul
from jax_deepep.moe.grouped_matmul.triton import triton_matmul

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Choice = Literal["auto", "blocks", "ragged_dot", "triton", "mosaic"] | GroupedMatmul

NAMES = ("auto", "blocks", "ragged_dot", "triton", "mosaic")
FOR_NVIDIA_GPUS = ("triton", "mosaic")
LARGEST_BLOCK = 128  # rows
SMALLEST_BLOCK = {"blocks": 8, "triton": 16, "mosaic": 64}


def check_choice(choice: Any, platform: str) -> None:
    """Raise unless `choice` is a function, or a name of NAMES that `platform`, its GPU and this JAX have.

    Raises:
        ValueError: it is not.
    """
    if callable(choice):
        return
    if choice not in NAMES:
        raise ValueError(
            f"grouped_matmul: expected {', '.join(map(repr, NAMES))}, or a function of (rows, matrices, "
            f"group_sizes), got {choice!r}; pass one of them."
        )
    if choice in FOR_NVIDIA_GPUS and platform != "cuda":
        raise ValueError(
            f"grouped_matmul: expected {choice!r} on NVIDIA GPUs only, got it on {platform}; use 'auto' here."
        )
    if choice == "mosaic" and (why := missing_reason(jax.devices()[0])) is not None:
        raise ValueError(why)
    if choice == "triton" and jax_compat.pallas_triton() is None:
        raise ValueError(f"{_without_triton()}.")


def chosen(choice: Any, platform: str, *, dtype: Any = None, mean_rows: float = 0, **sizes: int) -> Any:
    """Return the name or function that `choice` stands for on a platform.

    "auto" on NVIDIA GPUs is "mosaic" where it is supported and experts have at least 64 rows on average, or
    an `alignment` that it can use is given; else "triton" where it is supported; else "ragged_dot".

    With fewer rows most of the rows would be padding: mosaic pads groups to multiples of 64, triton to
    multiples of 16. All that dispatch, activation and combine do with a row costs time in proportion, while
    the matmuls of such groups read every matrix once or twice, with either, and take as long as that.

    Args:
        choice: a name of NAMES, or a function.
        platform: of the devices.
        dtype: of the rows.
        mean_rows: of an expert.
        sizes: `hidden_size`, `intermediate_size` and `alignment` as far as known.

    Raises:
        ValueError: an unknown name, or one that this platform, its GPU or this JAX does not have.
    """
    check_choice(choice, platform)
    if callable(choice) or choice != "auto":
        return choice
    if platform != "cuda":
        return "blocks" if platform == "cpu" else "ragged_dot"
    enough = "alignment" in sizes or mean_rows >= SMALLEST_BLOCK["mosaic"]
    fits = dtype is not None and mosaic.unsupported_reason(dtype, **sizes) is None
    if enough and fits and missing_reason(jax.devices()[0]) is None:
        return "mosaic"
    if jax_compat.pallas_triton() is None:
        warnings.warn(f'{_without_triton()}, as "auto" does now.', stacklevel=1)  # one location: shown once
        return "ragged_dot"
    return "triton" if triton.unsupported_reason(**sizes) is None else "ragged_dot"


def _without_triton() -> str:
    return (
        'grouped_matmul: expected a JAX with the Triton backend of Pallas for "triton", got JAX '
        f'{jax.__version__} without it; use grouped_matmul="ragged_dot"'
    )


def alignment_for(choice: Any, mean_rows: float) -> int:
    """Return the multiple to which row groups of `mean_rows` rows on average should be padded.

    A power of two where rows are multiplied in blocks: a group is padded by half a block on average, but
    small blocks use the processor less well. (By estimate "mosaic" takes 1.5 times as long per row in blocks
    of 64 as in blocks of 128, which costs more than 32 further rows of padding from 128 rows per group.)
    """
    if choice not in SMALLEST_BLOCK:
        return 1
    block = SMALLEST_BLOCK[choice]
    while block < LARGEST_BLOCK and 2 * block <= mean_rows:
        block *= 2
    return block


def grouped_matmul(choice: Any, alignment: int, tiles: mosaic.Tiles | None = None) -> GroupedMatmul:
    """Return the grouped matmul of this name, for groups padded to multiples of `alignment`.

    `tiles` are those of "mosaic"; None = as suits each of its products.
    """
    if choice == "ragged_dot":
        return jax.lax.ragged_dot
    if choice == "mosaic":
        return partial(mosaic_matmul, block=alignment, tiles=tiles)
    return partial(triton_matmul, block=alignment) if choice == "triton" else choice
