"""Rows that the formats of low precision are tested with, and comparisons bit for bit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from quantization_oracle import BLOCK, E2M1, E4M3, Quantized

import jax_deepep as ep

FORMATS = tuple(BLOCK)
BFLOAT16, FLOAT16, FLOAT32 = (np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32))
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)
HIDDEN = 136  # ends with a shorter block in every format

parametrize_format = pytest.mark.parametrize("format", FORMATS)
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def assert_bits(got: Any, expected: np.ndarray, name: str) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    np.testing.assert_array_equal(bits(got), bits(expected), name)


def assert_quantized(got: Any, expected: Quantized) -> None:
    assert_bits(got.scales, expected.scales, "scales")
    if expected.row_scale is None:
        assert got.row_scale is None
    else:
        assert_bits(got.row_scale, expected.row_scale, "row_scale")
    assert_bits(got.data, expected.data, "data")


def assert_values(got: Any, expected: np.ndarray) -> None:
    """The bits of all numbers; of NaN, only where they are."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(np.asarray(got)), nan)
    np.testing.assert_array_equal(np.where(nan, 0, bits(got)), np.where(nan, 0, bits(expected)))


@functools.cache
def quantize(format: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(ep.quantize, format=format))


def in_all_formats(x: jax.Array) -> dict[str, Any]:
    """Quantize in the four formats, which share a program."""
    return {format: ep.quantize(x, format) for format in FORMATS}


def random(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """Rows of different magnitudes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-8, 8, (*shape[:-1], 1)))
    return x.astype(dtype)


# Inputs: rows of HIDDEN elements of a dtype, by case. All go through one program of their format and dtype.


def from_codes(codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return codes.astype(f"u{dtype.itemsize}").view(dtype)


def in_rows(values: np.ndarray) -> np.ndarray:
    """Return all values in rows, the last one filled from the front."""
    rows = -(-values.size // HIDDEN)
    return np.resize(values, (rows, HIDDEN))


def codes_of(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    return np.arange(1 << 16) if dtype.itemsize == 2 else rng.integers(1 << 32, size=1 << 16)


def codes_in_order(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    return in_rows(from_codes(np.sort(codes_of(dtype, rng)), dtype))


def codes_shuffled(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    return in_rows(from_codes(rng.permutation(codes_of(dtype, rng)), dtype))


def finite_codes_shuffled(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    values = from_codes(rng.permutation(codes_of(dtype, rng)), dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return in_rows(values[np.isfinite(values)])


def maxima(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Each tenth of the finite values as the maximum of a row; float32: of bfloat16's, with more mantissa."""
    codes = {
        BFLOAT16: np.arange(0, 0x7F80, 10),
        FLOAT16: np.arange(0, 0x7C00, 10),
        FLOAT32: np.arange(0, 0x7F80, 10) << 16 | rng.integers(1 << 16, size=0x7F80 // 10),
    }[dtype]
    return below(from_codes(codes, dtype), dtype, rng)


def below(largest: np.ndarray, dtype: np.dtype, rng: np.random.Generator, hidden: int = HIDDEN) -> np.ndarray:
    """Return a row for each `largest`, which it has somewhere; the others are not larger."""
    shape = (len(largest), hidden)
    factor = rng.uniform(-1, 1, shape).astype(np.float32)
    factor *= np.exp2(-rng.integers(0, 12, (len(largest), 1), np.int32) * rng.integers(0, 2, shape, np.int32))
    x = (largest[:, None].astype(np.float64) * factor).astype(dtype)
    row = np.arange(len(largest))
    x[row, rng.integers(hidden, size=len(row))] = largest * rng.choice([-1, 1], len(row)).astype(dtype)
    return x


def all_magnitudes(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    exponent = rng.integers(int(info.minexp), int(info.maxexp) - 3, (500, 1))
    return np.ldexp(rng.normal(size=(500, HIDDEN)), exponent).astype(dtype)


def heavy_tails(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    x = np.exp(5 * rng.normal(size=(500, HIDDEN))) * rng.choice([-1, 1], (500, HIDDEN))
    return np.clip(x, -6e4, 6e4).astype(dtype)


def near_the_largest(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    largest = int(bits(ml_dtypes.finfo(dtype).max.astype(dtype)))
    sign = rng.integers(2, size=(200, HIDDEN)) << (8 * dtype.itemsize - 1)
    return from_codes(
        sign | largest - rng.integers(1 << rng.integers(3, 10, (200, 1)), size=sign.shape), dtype
    )


def near_the_smallest(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Around 2^-100: some rows are zeros, and some blocks of others."""
    steps = rng.integers(-40, rng.integers(-30, 30, (200, 1)), (200, HIDDEN))
    epsilon = 2.0**-23 if dtype == FLOAT32 else 2.0**-7
    sign = rng.choice([-1, 1], steps.shape)
    return (sign * 2.0**-100 * (1 + epsilon * steps)).astype(dtype)


def zeros(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Zeros of both signs and what counts as zero: whole rows, blocks of a row, and all but one element."""
    x = rng.choice([0.0, 2.0**-101, 2.0**-126, 2.0**-133, 2.0**-149], (90, HIDDEN))
    x[1] = 0
    x[3:30, :32] = rng.normal(size=(27, 32))
    x[30:60, 32:48] = 1000
    x[np.arange(60, 90), rng.integers(HIDDEN, size=30)] = np.exp2(rng.integers(-30, 10, 30))
    x *= rng.choice([-1, 1], x.shape)
    x[0], x[2] = 0, -0.0
    return x.astype(dtype)


def near_a_power_of_two_as_scale(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Also near the least scale of fp8."""
    exponents = np.arange(-90, 110, 3) if dtype != FLOAT16 else np.arange(-12, 5)
    largest = np.ldexp(np.array([[448], [6], [2688], [1], [1e-4 * 2.0**12]]), exponents).ravel().astype(dtype)
    largest = np.append(largest, [1e-4, 6e-5]).astype(dtype)
    codes = bits(largest)[:, None].astype(np.int64) + np.arange(-3, 4)
    return below(from_codes(codes.ravel(), dtype), dtype, rng)


def with_neighbours(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return ± values and, of each, the next smaller and larger value of the dtype."""
    codes = bits(values.astype(dtype))[:, None].astype(np.int64) + np.array([0, 0, 0, -1, 1])
    magnitudes = from_codes(codes.ravel(), dtype)
    return np.concatenate([magnitudes, -magnitudes])


def tie_exponents(dtype: np.dtype) -> np.ndarray:
    return np.arange(-6, 5) if dtype == FLOAT16 else np.arange(-12, 40, 4)


def ties_of_e4m3(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Halfway between two codes, in units of a scale that is a power of two."""
    elements = with_neighbours(E4M3.midpoints, dtype)
    x = np.stack([in_rows(rng.permutation(elements)) for _ in tie_exponents(dtype)]).astype(np.float64)
    x[..., ::8] = E4M3.magnitudes[-1]  # blocks have eight elements or more
    return np.ldexp(x, tie_exponents(dtype)[:, None, None]).reshape(-1, HIDDEN).astype(dtype)


def ties_of_e2m1(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """As above, with other powers of two as scales of the blocks of a row."""
    elements = with_neighbours(E2M1.midpoints, dtype).astype(np.float64)
    x = rng.choice(elements, (20, len(tie_exponents(dtype)), HIDDEN))
    x[..., ::8] = E2M1.magnitudes[-1]
    blocks = rng.integers(-5, 9, (*x.shape[:-1], -(-HIDDEN // 16)))
    x = np.ldexp(x, np.repeat(blocks, 16, axis=-1)[..., :HIDDEN])
    x[..., 0] = E2M1.magnitudes[-1] * E4M3.magnitudes[-1]
    return np.ldexp(x, tie_exponents(dtype)[:, None]).reshape(-1, HIDDEN).astype(dtype)


CASES = {
    case.__name__.replace("_", " "): case
    for case in (
        maxima, codes_in_order, codes_shuffled, finite_codes_shuffled, all_magnitudes, heavy_tails,
        near_the_largest, near_the_smallest, zeros, near_a_power_of_two_as_scale, ties_of_e4m3, ties_of_e2m1,
    )
}  # fmt: skip


@functools.cache
def inputs(dtype: np.dtype) -> dict[str, np.ndarray]:
    return {name: case(dtype, np.random.default_rng(0)) for name, case in CASES.items()}
