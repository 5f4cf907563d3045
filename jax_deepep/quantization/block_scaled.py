"""Rows as blocks of low precision with scales: `quantize`, `BlockScaled` and `quantize_dequantize`.

All arithmetic is in float32, every operation rounded by itself. f32(c) is the float32 nearest to c.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep.checks import check_rows_dtype
from jax_deepep.quantization import rounding
from jax_deepep.quantization.formats import FORMATS, BlockFormat, Format, check_width, checked_format

# A smaller |x| counts as 0, so that no step has subnormals, which XLA flushes on CPUs.
_SMALLEST = 2.0**-100
# The least |x|max of a block of fp8 and fp8_ue8m0, as in DeepEP.
_FLOOR = 1e-4
_NAN_BITS = 0x7FC00000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockScaled:
    """Rows [C, H] in a block-scaled format, from `quantize` or from a dispatch with `keep_quantized`.

    A pytree of arrays [C, ...]: one PartitionSpec, a scan or a slice fits all of them. Its leaves have no
    gradient; `quantize_dequantize` and dispatch with `wire=` have.

    Attributes:
        data: uint8 [C, H], the bits of float8_e4m3fn; nvfp4: [C, H/2], the bits of two float4_e2m1fn, the
            lower nibble first.
        scales: [C, ⌈H / block⌉], one for each block of elements: fp8 float32, blocks of 128; fp8_ue8m0 uint8,
            the bits of float8_e8m0fnu, blocks of 128; mxfp8 the same, blocks of 32; nvfp4 uint8, the bits of
            float8_e4m3fn, blocks of 16.
        row_scale: nvfp4 float32 [C]; None otherwise.
        format: static, one of "fp8", "fp8_ue8m0", "mxfp8", "nvfp4".
    """

    data: jax.Array
    scales: jax.Array
    row_scale: jax.Array | None = None
    format: Format = field(kw_only=True, metadata={"static": True})

    def __post_init__(self) -> None:
        checked_format("format", self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H), that of the rows."""
        *leading, width = self.data.shape
        return (*leading, width * FORMATS[self.format].values_per_byte)

    @property
    def ndim(self) -> int:
        """2, that of the rows."""
        return self.data.ndim

    @property
    def values(self) -> jax.Array:
        """`data` as float8_e4m3fn [C, H]; nvfp4 as float4_e2m1fn."""
        if FORMATS[self.format].values_per_byte == 1:
            return lax.bitcast_convert_type(self.data, jnp.float8_e4m3fn)
        return lax.bitcast_convert_type(_nibbles(self.data).astype(jnp.uint4), jnp.float4_e2m1fn)

    @property
    def typed_scales(self) -> jax.Array:
        """`scales` as float32, float8_e8m0fnu or float8_e4m3fn."""
        types = {"float32": jnp.float32, "e8m0": jnp.float8_e8m0fnu, "e4m3": jnp.float8_e4m3fn}
        dtype = types[FORMATS[self.format].scale_type]
        return self.scales if self.scales.dtype == dtype else lax.bitcast_convert_type(self.scales, dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """Return the rows.

        value · scale in float32, nvfp4 (value · scale) · row_scale; rounded to nearest even, saturating at
        the largest finite value of `dtype`. A block that had NaN or infinity is NaN (nvfp4: the row).

        Args:
            dtype: bfloat16, float16 or float32.

        Raises:
            TypeError: another dtype; or the result is differentiated, see `quantize_dequantize`.
        """
        check_rows_dtype("dtype", jax.ShapeDtypeStruct((), dtype))
        return _dequantize(jnp.dtype(dtype), self)


def quantize(x: jax.Array, format: Format) -> BlockScaled:
    """Return rows in a block-scaled format.

    Values are rounded to nearest even, saturating, with the sign of x; an |x| below 2^−100 counts as 0.
    |x|max is that of a block. NaN or infinity makes its block NaN: the scale is NaN (E8M0: 255), data is 0;
    nvfp4: row_scale is NaN, scales and data of the row are 0. The same bits on all platforms.

    * fp8 (DeepSeek-V3, https://arxiv.org/abs/2412.19437, with DeepEP's floor): s = max(|x|max, 1e-4),
      scale = s · f32(1/448), data = e4m3(x · (448 / s)).
    * fp8_ue8m0: the same scale rounded up to a power of two 2^e, data = e4m3(x · 2^−e).
    * mxfp8 (OCP MX, with the scale rounded up as in https://arxiv.org/abs/2506.08027): 2^e = |x|max ·
      f32(1/448) rounded up to a power of two, data = e4m3(x · 2^−e); a block of zeros has byte 0.
    * nvfp4, with a scale per row instead of one per tensor: row_scale = |x|max of the row · f32(1/2688),
      scale = e4m3((|x|max · f32(1/6)) · (1 / row_scale)), data = e2m1(x · (1 / (scale · row_scale))), 0 where
      scale is 0.

    Args:
        x: [C, H] bfloat16, float16 or float32; nvfp4: H even.
        format: "fp8", "fp8_ue8m0", "mxfp8" or "nvfp4".

    Returns:
        `BlockScaled` of shape (C, H).

    Raises:
        ValueError: an unknown format, or an odd H for nvfp4.
        TypeError: x is not an array of those dtypes; or the result is differentiated: see
            `quantize_dequantize`.
    """
    of = checked_format("format", format)
    check_rows_dtype("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [C, H] with H of at least 1, got {list(x.shape)}.")
    check_width("x", x.shape[-1], of)
    return _quantize(of, jnp.asarray(x))


@jax.custom_jvp
def without_gradient(x: jax.Array) -> jax.Array:
    """Return x; it raises what `quantize` does if the result is differentiated."""
    return x


@without_gradient.defjvp
def _without_gradient_jvp(primals: Any, tangents: Any) -> NoReturn:
    _no_gradient("quantize")


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def quantize_dequantize(x: jax.Array, format: Format) -> jax.Array:
    """Return `quantize(x, format).dequantize(x.dtype)`, with the gradient of the identity (straight-through).

    Args:
        x, format: as `quantize`.

    Returns:
        An array like x.

    Raises:
        ValueError, TypeError: as `quantize`.
    """
    return quantize(x, format).dequantize(x.dtype)


@quantize_dequantize.defjvp
def _straight_through(format: Format, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return quantize_dequantize(primals[0], format), tangents[0]


def _no_gradient(op: str) -> NoReturn:
    raise TypeError(
        f"{op}: expected not to be differentiated, because rounding has no gradient; take "
        "quantize_dequantize(x, format), or dispatch(..., wire=format), which pass gradients straight "
        "through, or stop_gradient(x)."
    )


def _nibbles(data: jax.Array) -> jax.Array:
    """Return uint8 [..., 2 N] of 4 bits from [..., N]."""
    both = jnp.stack([data & 15, data >> 4], axis=-1)
    return both.reshape(*data.shape[:-1], 2 * data.shape[-1])


def _in_blocks(values: jax.Array, block: int) -> jax.Array:
    """Return [..., N, block] from [..., H], with zeros at the end."""
    missing = -values.shape[-1] % block
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return padded.reshape(*values.shape[:-1], padded.shape[-1] // block, block)


def _per_element(scales: jax.Array, block: int, hidden_size: int) -> jax.Array:
    """Return [..., H], the scale of each element, from [..., N]."""
    return jnp.repeat(scales, block, axis=-1)[..., :hidden_size]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _quantize(of: BlockFormat, x: jax.Array) -> BlockScaled:
    x = x.astype(jnp.float32)
    smallest = rounding.bits_of(jnp.float32(_SMALLEST))
    zero = rounding.magnitude(x) < smallest
    x = jnp.where(zero, rounding.from_bits(rounding.bits_of(x) & ~0x7FFFFFFF), x)
    largest_bits = jnp.max(_in_blocks(rounding.magnitude(x), of.block), axis=-1)
    if of.has_row_scale:
        return _with_row_scale(of, x, largest_bits)
    finite = rounding.is_finite_magnitude(largest_bits)
    largest = rounding.from_bits(jnp.where(finite, largest_bits, 0))
    if of.name != "mxfp8":
        largest = jnp.maximum(largest, jnp.float32(_FLOOR))
    scale = rounding.multiple(largest, 1 / rounding.E4M3_MAX)
    if of.scale_type == "float32":
        factor = rounding.quotient(rounding.E4M3_MAX, largest)
        scales = jnp.where(finite, scale, rounding.from_bits(jnp.int32(_NAN_BITS)))
    else:
        exponent = jnp.where(largest > 0, rounding.exponent_rounded_up(scale), 0)
        factor = rounding.power_of_two(254 - exponent)
        scales = jnp.where(finite, exponent, 255).astype(jnp.uint8)
    data = rounding.to_e4m3(x * _per_element(factor, of.block, x.shape[-1]))
    return BlockScaled(
        jnp.where(_per_element(finite, of.block, x.shape[-1]), data, 0), scales, format=of.name
    )


def _with_row_scale(of: BlockFormat, x: jax.Array, largest_bits: jax.Array) -> BlockScaled:
    """Return nvfp4. `largest_bits` are those of |x|max of every block."""
    row_bits = jnp.max(largest_bits, axis=-1, keepdims=True)
    # Where the row is not finite or 0, any number is right in between.
    finite, usable = rounding.is_finite_magnitude(row_bits), row_bits > 0
    largest = rounding.from_bits(jnp.where(finite, largest_bits, 0))
    row_scale = rounding.multiple(rounding.from_bits(jnp.where(finite, row_bits, 0)), 1 / 2688)
    inverse = rounding.quotient(1.0, jnp.where(usable & finite, row_scale, 1.0))
    scales = rounding.to_e4m3(rounding.multiple(largest, 1 / rounding.E2M1_MAX) * inverse)
    both = rounding.from_e4m3(scales) * row_scale
    factor = jnp.where(both > 0, rounding.quotient(1.0, jnp.where(both > 0, both, 1.0)), 0.0)
    scaled = jnp.where(finite, x, 0.0) * _per_element(factor, of.block, x.shape[-1])
    codes = rounding.to_e2m1(scaled)
    data = codes[..., 0::2] | (codes[..., 1::2] << 4)
    row_scale = jnp.where(finite, row_scale, rounding.from_bits(jnp.int32(_NAN_BITS)))
    return BlockScaled(data, scales, row_scale[..., 0], format=of.name)


@_quantize.defjvp
def _differentiate_quantize(of: BlockFormat, primals: Any, tangents: Any) -> NoReturn:
    _no_gradient("quantize")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dequantize(dtype: Any, rows: BlockScaled) -> jax.Array:
    of, hidden_size = FORMATS[rows.format], rows.shape[-1]
    if of.values_per_byte == 2:
        values = rounding.from_e2m1(_nibbles(rows.data))
    else:
        values = rounding.from_e4m3(rows.data)
    if of.scale_type == "e8m0":
        exponent = rows.scales.astype(jnp.int32)
        scales = jnp.where(exponent == 255, jnp.nan, rounding.power_of_two(exponent))
    elif of.scale_type == "e4m3":
        scales = rounding.from_e4m3(rows.scales)
    else:
        scales = rows.scales
    values = values * _per_element(scales, of.block, hidden_size)
    if rows.row_scale is not None:
        values = values * rows.row_scale[..., None]
    return rounding.to_row_dtype(values, dtype)


@_dequantize.defjvp
def _differentiate_dequantize(dtype: Any, primals: Any, tangents: Any) -> NoReturn:
    _no_gradient("dequantize")
