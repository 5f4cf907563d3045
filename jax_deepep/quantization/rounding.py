"""Numbers of low precision as bits, in integer arithmetic, so that every platform gives the same.

XLA divides to 2 ulp on GPUs, flushes subnormals on CPUs, contracts a product and a sum, and drops pairs of
conversions: none of it can change integers.
"""

import jax
import jax.numpy as jnp
from jax import lax

# The largest finite values.
E4M3_MAX = 448.0
E2M1_MAX = 6.0

_SIGN = -(2**31)
_INFINITY = 0x7F800000


def bits_of(values: jax.Array) -> jax.Array:
    """Return float32 values as int32."""
    return lax.bitcast_convert_type(values, jnp.int32)


def from_bits(bits: jax.Array) -> jax.Array:
    """Return int32 as the float32 values that they encode."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude(values: jax.Array) -> jax.Array:
    """Return the bits of |values|, whose order is that of the values, with infinity and NaN at the end."""
    return bits_of(values) & 0x7FFFFFFF


def is_finite_magnitude(bits: jax.Array) -> jax.Array:
    """Return which results of `magnitude` are of finite values."""
    return bits < _INFINITY


def power_of_two(biased_exponent: jax.Array) -> jax.Array:
    """Return 2^(biased_exponent − 127) of int32, and 0 for 0."""
    return from_bits(biased_exponent << 23)


def exponent_rounded_up(values: jax.Array) -> jax.Array:
    """Return the biased exponents, int32, of positive normal float32 rounded up to powers of two."""
    return (bits_of(values) + 0x7FFFFF) >> 23


def multiple(values: jax.Array, factor: float) -> jax.Array:
    """Return values · f32(factor), rounded, for numbers that are not negative."""
    # The maximum changes nothing, but XLA moves constants from one product into the next, past roundings.
    return jnp.maximum(values * jnp.float32(factor), 0.0)


def quotient(numerator: float, denominator: jax.Array) -> jax.Array:
    """Return numerator / denominator, correctly rounded.

    Args:
        numerator: 1 or 448, whose odd part is below 2^3.
        denominator: float32, positive and normal, as is the quotient.
    """
    bits = bits_of(jnp.float32(numerator) / denominator)  # to a few ulp
    divisor = (bits_of(denominator) & 0x7FFFFF) | 0x800000
    for _ in range(3):
        # numerator − quotient · denominator, in units in which the numerator is a multiple of 2^43. So modulo
        # 2^32 it is 0, and the difference, which is small, follows from the low word of the product.
        digits = (bits & 0x7FFFFF) | 0x800000
        rest = -(digits * divisor)
        # Below a power of two floats are twice as dense. Ties do not exist.
        too_large = (2 * rest < -divisor) | ((digits == 0x800000) & (4 * rest < -divisor))
        too_small = 2 * rest > divisor
        bits = bits + too_small.astype(bits.dtype) - too_large.astype(bits.dtype)
    return from_bits(bits)


def to_e4m3(values: jax.Array) -> jax.Array:
    """Return float32 values rounded to float8_e4m3fn, as uint8: to nearest even, saturating."""
    bits = bits_of(values)
    size = jnp.minimum(bits & 0x7FFFFFFF, bits_of(jnp.float32(E4M3_MAX)))
    # Normal results: round the 20 bits of the mantissa that are dropped, and move the exponent's bias.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6: multiples of 2^-9.
    shift = jnp.clip(141 - (size >> 23), 1, 25)
    digits = (size & 0x7FFFFF) | 0x800000
    subnormal = (digits + (1 << (shift - 1)) - 1 + ((digits >> shift) & 1)) >> shift
    code = jnp.where(size >= bits_of(jnp.float32(2.0**-6)), normal, subnormal)
    return (code | jnp.where(bits < 0, 0x80, 0)).astype(jnp.uint8)


def from_e4m3(codes: jax.Array) -> jax.Array:
    """Return the float32 values of float8_e4m3fn, uint8."""
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


# The middle between each two codes of float4_e2m1fn, and whether it rounds down: it goes to the even one.
_E2M1_MIDDLES = (
    (0.25, True),
    (0.75, False),
    (1.25, True),
    (1.75, False),
    (2.5, True),
    (3.5, False),
    (5.0, True),
)


def to_e2m1(values: jax.Array) -> jax.Array:
    """Return float32 values rounded to float4_e2m1fn, as uint8 of 4 bits: to nearest even, saturating."""
    size = magnitude(values)
    code = jnp.zeros_like(size)
    for middle, rounds_down in _E2M1_MIDDLES:
        limit = bits_of(jnp.float32(middle))
        is_above = size > limit if rounds_down else size >= limit
        code = code + is_above.astype(code.dtype)
    return (code | jnp.where(bits_of(values) < 0, 8, 0)).astype(jnp.uint8)


def from_e2m1(codes: jax.Array) -> jax.Array:
    """Return the float32 values of float4_e2m1fn, uint8 of 4 bits."""
    code = codes.astype(jnp.int32)
    size = code & 7
    normal = (((size >> 1) + 126) << 23) | ((size & 1) << 22)
    half = jnp.where(size == 1, bits_of(jnp.float32(0.5)), 0)
    return from_bits(jnp.where(size >= 2, normal, half) | jnp.where((code & 8) != 0, _SIGN, 0))


def to_row_dtype(values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return float32 values in the dtype of rows: to nearest even, saturating at its largest finite value.

    The conversion at the end is exact, so that XLA may drop it.
    """
    largest = float(jnp.finfo(dtype).max)
    values = jnp.where(jnp.isnan(values), jnp.nan, jnp.clip(values, -largest, largest))
    if dtype == jnp.bfloat16:
        values = jnp.clip(lax.reduce_precision(values, 8, 7), -largest, largest)
    elif dtype == jnp.float16:
        rounded = jnp.clip(lax.reduce_precision(values, 5, 10), -largest, largest)
        subnormal = lax.round(values * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
        values = jnp.where(jnp.abs(values) < 2.0**-14, subnormal, rounded)
    return values.astype(dtype)
