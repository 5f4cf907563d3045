"""Block-scaled rows as plain bytes, which dispatch copies like any rows of integers."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import FORMATS, Format


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
    """Return uint8 [C, B]: in every row its data, its scales and its row scale."""
    parts = [rows.data, rows.scales]
    if rows.row_scale is not None:
        parts.append(rows.row_scale[:, None])
    return jnp.concatenate([_as_bytes(part) for part in parts], axis=1)


def unpack(packed: jax.Array, format: Format, hidden_size: int) -> BlockScaled:
    """Return the rows of which `pack` made uint8 [C, B]."""
    of = FORMATS[format]
    data_bytes, num_blocks = hidden_size // of.values_per_byte, of.num_blocks(hidden_size)
    is_float = of.scale_type == "float32"
    end = data_bytes + num_blocks * (4 if is_float else 1)
    scales = packed[:, data_bytes:end]
    return BlockScaled(
        packed[:, :data_bytes],
        _as_floats(scales) if is_float else scales,
        _as_floats(packed[:, end : end + 4])[:, 0] if of.has_row_scale else None,
        format=format,
    )
