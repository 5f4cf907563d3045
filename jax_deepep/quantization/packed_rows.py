"""Block-scaled rows as bytes, as they cross links: `WireRow` of xla_ffi/interface/wire_format.h."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import FORMATS, BlockFormat, Format

_UNIT = 16  # bytes, to whose multiple each part of a row is padded


def _part_sizes(of: BlockFormat, hidden_size: int) -> list[int]:
    """Return the bytes of data, scales and row scale of a row, without padding."""
    leaves = of.leaves(hidden_size).values()
    return [math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in leaves]


def _padded(size: int) -> int:
    """Return the bytes that a part of `size` bytes takes in a row."""
    return -(-size // _UNIT) * _UNIT


def packed_size(format: Format, hidden_size: int) -> int:
    """Return the bytes of a row."""
    return sum(_padded(size) for size in _part_sizes(FORMATS[format], hidden_size))


def _as_bytes(values: jax.Array) -> jax.Array:
    """Return uint8 [C, N] or [C, 4 N] from uint8 or float32 [C, N]."""
    if values.dtype == jnp.uint8:
        return values
    num_rows, width = values.shape
    return lax.bitcast_convert_type(values, jnp.uint8).reshape(num_rows, 4 * width)


def _as_floats(values: jax.Array) -> jax.Array:
    """Return float32 [C, N] from uint8 [C, 4 N]."""
    num_rows, width = values.shape
    return lax.bitcast_convert_type(values.reshape(num_rows, width // 4, 4), jnp.float32)


def pack(rows: BlockScaled) -> jax.Array:
    """Return uint8 [C, B]: in every row its data, its scales and its row scale, each padded with zeros."""
    parts = [rows.data, rows.scales]
    if rows.row_scale is not None:
        parts.append(rows.row_scale[:, None])
    as_bytes = [_as_bytes(part) for part in parts]
    return jnp.concatenate(
        [jnp.pad(part, ((0, 0), (0, _padded(part.shape[1]) - part.shape[1]))) for part in as_bytes], axis=1
    )


def unpack(packed: jax.Array, format: Format, hidden_size: int) -> BlockScaled:
    """Return the rows of which `pack` made uint8 [C, B]."""
    of, at = FORMATS[format], 0
    parts = []
    for size in _part_sizes(of, hidden_size):
        parts.append(packed[:, at : at + size])
        at += _padded(size)
    data, scales, *row_scale = parts
    return BlockScaled(
        data,
        _as_floats(scales) if of.scale_type == "float32" else scales,
        _as_floats(row_scale[0])[:, 0] if row_scale else None,
        format=format,
    )
