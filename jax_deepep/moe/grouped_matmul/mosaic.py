"""A grouped matmul for Hopper GPUs (H100, H200), made of Pallas Mosaic GPU kernels with wgmma and TMA.

Groups begin at multiples of a block of rows (the `alignment` of the dispatch), so that every tile of the
result belongs to one expert, or, after the last group, to none and is not computed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepep import jax_compat
from jax_deepep.moe.grouped_matmul.mosaic_kernel import SMALLEST_TILE, Tiles
from jax_deepep.moe.grouped_matmul.mosaic_products import Term, outer, times
from jax_deepep.ops.checks import vary_together

HOPPER = "9.0"
DTYPES = ("bfloat16", "float16")
INSTEAD = 'use grouped_matmul="triton"'


def missing_reason(device: jax.Device) -> str | None:
    """Return why this JAX or a device cannot run `mosaic_matmul`, or None."""
    if jax_compat.pallas_mosaic_gpu() is None:
        return (
            'grouped_matmul: expected a JAX with the Mosaic GPU backend of Pallas for "mosaic", got JAX '
            f"{jax.__version__} without it; {INSTEAD}."
        )
    capability = getattr(device, "compute_capability", HOPPER)
    if capability != HOPPER:
        return (
            f'grouped_matmul: expected "mosaic" on GPUs of compute capability {HOPPER} only (H100, H200), '
            f"got it on {device.device_kind} of {capability}; {INSTEAD}."
        )
    return None


def unsupported_reason(dtype: Any, **sizes: int) -> str | None:
    """Return why `dtype`, `hidden_size`, `intermediate_size` or `alignment` is unsupported, or None."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        return (
            f'rows: expected {" or ".join(DTYPES)} with grouped_matmul="mosaic", got {dtype}; {INSTEAD}, or '
            "give the layer one of these as dtype."
        )
    for name, size in sizes.items():
        if size % SMALLEST_TILE or size == 0:
            return (
                f'{name}: expected a multiple of {SMALLEST_TILE} with grouped_matmul="mosaic", got {size}; '
                f"{INSTEAD}."
            )
    return None


def mosaic_matmul(
    rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, block: int, tiles: Tiles | None = None
) -> jax.Array:
    """Multiply the rows of each group with its matrix: see `grouped_matmul`.

    Args:
        rows: [C, H], bfloat16 or float16, C a multiple of `block`.
        matrices: [L, H, F], of the same dtype.
        group_sizes: int32 [L], multiples of `block`.
        block: a multiple of 64, better of 128.
        tiles: how the three products are divided; None = as suits each.

    Returns:
        [C, F], summed in float32; not written after the last group. The gradient of the matrices is zero for
        empty groups.

    Raises:
        ValueError: another dtype, or `block`, H or F is not a multiple of 64.
        TypeError: matrices of another dtype than rows.
    """
    check_operands(rows, [matrices], block)
    return _matmul(block, tiles, *vary_together(frozenset(), rows, matrices, group_sizes))


def check_operands(rows: jax.Array, matrices: Sequence[jax.Array], block: int) -> None:
    """Raise unless rows in blocks can be multiplied with [L, H, F] matrices: see `mosaic_matmul`."""
    hidden_size, intermediate_size = matrices[0].shape[1:]
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "alignment": block}
    if (reason := unsupported_reason(rows.dtype, **sizes)) is not None:
        raise ValueError(reason)
    for matrix in matrices:
        if matrix.dtype != rows.dtype:
            raise TypeError(
                f"matrices: expected the dtype of rows, {rows.dtype}, got {matrix.dtype}; cast one of them."
            )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    block: int, tiles: Tiles | None, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return times(block, [(rows, matrices)], group_sizes, transposed=False, tiles=tiles)


def _forward(block, tiles, rows, matrices, group_sizes):
    return _matmul(block, tiles, rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(block, tiles, residuals, gradient):
    rows, matrices, group_sizes = residuals
    of_rows = times(block, [(gradient, matrices)], group_sizes, transposed=True, tiles=tiles)
    return of_rows, outer([Term(rows, gradient, group_sizes)], tiles=tiles).value, None


_matmul.defvjp(_forward, _backward)
