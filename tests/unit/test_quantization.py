"""Quantization and its inverse against the oracle in NumPy, bit for bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantization_oracle as oracle
from quantization_cases import (
    BFLOAT16,
    CASES,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FORMATS,
    HIDDEN,
    assert_quantized,
    assert_values,
    below,
    bits,
    from_codes,
    in_all_formats,
    inputs,
    parametrize_dtype,
    parametrize_format,
    quantize,
    random,
)
from quantization_oracle import BLOCK, E2M1, E4M3, Quantized

import jax_deepep as ep


def rows_of(tree: Any, dtype: np.dtype, case: str) -> Any:
    """Return the rows of a case from arrays of all inputs, one case after the other."""
    sizes = [len(x) for x in inputs(dtype).values()]
    place = list(CASES).index(case)
    start = sum(sizes[:place])
    return jax.tree.map(lambda array: array[start : start + sizes[place]], tree)


@functools.cache
def all_quantized(dtype: np.dtype, format: str) -> Any:
    return jax.tree.map(np.asarray, quantize(format)(np.concatenate(list(inputs(dtype).values()))))


@functools.cache
def expected(dtype: np.dtype, format: str, case: str) -> Quantized:
    return oracle.quantize(inputs(dtype)[case], format)


@parametrize_format
@parametrize_dtype
@pytest.mark.parametrize("case", CASES)
def test_quantize(case: str, dtype: np.dtype, format: str) -> None:
    assert_quantized(rows_of(all_quantized(dtype, format), dtype, case), expected(dtype, format, case))


def test_every_maximum_of_bfloat16() -> None:
    """Of a row and of a block. Rows are short, two blocks of nvfp4: longer ones repeat their arithmetic."""
    codes = np.arange(0x7F80)
    x = below(from_codes(codes, BFLOAT16), BFLOAT16, np.random.default_rng(0), hidden=18)
    np.testing.assert_array_equal(bits(np.abs(x).max(axis=-1)), codes)
    for format, got in jax.jit(in_all_formats)(x).items():
        assert_quantized(got, oracle.quantize(x, format))


@parametrize_dtype
@parametrize_format
def test_ties_go_to_the_even_code(format: str, dtype: np.dtype) -> None:
    """Whatever the oracle says: elements that are exactly between two codes."""
    small, case = (E2M1, "ties of e2m1") if format == "nvfp4" else (E4M3, "ties of e4m3")
    got = rows_of(all_quantized(dtype, format), dtype, case)
    got = Quantized(got.data, got.scales, got.row_scale)
    scale = oracle.scales(got, format).astype(np.float64)
    if got.row_scale is not None:
        scale *= got.row_scale[:, None]
    # Quotients by a power of two are exact; with nvfp4, only the first block of a row has another scale.
    scale[np.frexp(scale)[0] != 0.5] = np.nan
    assert np.isnan(scale).sum() == (len(scale) if format == "nvfp4" else 0)
    x = inputs(dtype)[case].astype(np.float64)
    quotient = np.abs(oracle.from_blocks(oracle.to_blocks(x, BLOCK[format]) / scale[..., None], HIDDEN))
    ties = np.isin(quotient, small.midpoints)
    assert set(quotient[ties]) == set(small.midpoints)
    rounded = np.abs(oracle.values(got, format))
    assert (np.searchsorted(small.magnitudes, rounded[ties]) % 2 == 0).all()


def test_by_hand() -> None:
    x = np.float32([[448, 1, -0.5, -0.0]])
    for format, scale in (("fp8", np.float32(1)), ("fp8_ue8m0", np.uint8(127)), ("mxfp8", np.uint8(127))):
        by_hand = Quantized(np.uint8([[0x7E, 0x38, 0xB0, 0x80]]), np.array([[scale]]))
        assert_quantized(quantize(format)(x), by_hand)
        assert_quantized(oracle.quantize(x, format), by_hand)
    # The second block has a scale of 1, and the row, too.
    x = np.float32([[2688, *[0] * 15, 6, -3, 1, -0.0]])
    by_hand = Quantized(
        np.uint8([[0x07, *[0] * 7, 0xD7, 0x82]]), np.uint8([[0x7E, 0x38]]), row_scale=np.float32([1])
    )
    assert_quantized(quantize("nvfp4")(x), by_hand)
    assert_quantized(oracle.quantize(x, "nvfp4"), by_hand)


def test_a_scale_is_rounded_up_to_a_power_of_two() -> None:
    """448 needs a scale of 1, the next float32 already 2; a power of two is not doubled."""
    x = np.float32([[448], [np.nextafter(np.float32(448), np.float32(500))], [224], [1]])
    for format in ("fp8_ue8m0", "mxfp8"):
        np.testing.assert_array_equal(quantize(format)(x).scales, [[127], [128], [126], [119]])


@pytest.mark.parametrize("hidden", [1, 2, 256])
def test_rows_of_any_length(hidden: int) -> None:
    """Data is as long as the row, and not as its blocks."""
    formats = [format for format in FORMATS if format != "nvfp4" or hidden % 2 == 0]
    x = random((6, hidden), BFLOAT16)
    x[4], x[5, -1] = 0, np.inf

    @jax.jit
    def both_ways(x):
        quantized = {format: ep.quantize(x, format) for format in formats}
        return quantized, {format: q.dequantize(jnp.bfloat16) for format, q in quantized.items()}

    quantized, values = both_ways(x)
    for format in formats:
        got = quantized[format]
        by_oracle = oracle.quantize(x, format)
        assert_quantized(got, by_oracle)
        assert got.shape == (6, hidden)
        assert got.ndim == 2
        assert got.scales.shape == (6, -(-hidden // BLOCK[format]))
        assert_values(values[format], oracle.dequantize(by_oracle, format, BFLOAT16))


def test_no_rows() -> None:
    @jax.jit
    def both_ways(x):
        quantized = in_all_formats(x)
        return quantized, {format: q.dequantize(jnp.float16) for format, q in quantized.items()}

    one_row, _ = jax.eval_shape(both_ways, np.ones((1, HIDDEN), np.float32))
    none, values = both_ways(np.ones((0, HIDDEN), np.float32))
    for format in FORMATS:
        shapes = [[leaf.shape[1:] for leaf in jax.tree.leaves(q[format])] for q in (one_row, none)]
        assert shapes[0] == shapes[1]
        assert values[format].shape == none[format].shape == (0, HIDDEN)


# Dequantize: of what the oracle quantized, and of scales and data that no array gives.


def foreign(format: str) -> Quantized:
    """Every code of the data with every scale, and scales of the row of every magnitude, in rows of HIDDEN.

    No product is below the least normal float32: quantize gives none, and XLA makes them zero on CPUs.
    """
    rng = np.random.default_rng(0)
    blocks = -(-HIDDEN // BLOCK[format])
    if format == "nvfp4":
        scale = np.repeat(np.arange(E4M3.num_finite, dtype=np.uint8), 16)
        data = rng.integers(256, size=(len(scale), HIDDEN // 2)).astype(np.uint8)
        data[:, :8] = np.arange(16, dtype=np.uint8)[::2] + 16 * np.arange(16, dtype=np.uint8)[1::2]
        row_scale = np.ldexp(rng.uniform(1, 2, len(scale)), rng.integers(-111, 127, len(scale)))
        scales = np.tile(scale[:, None], blocks)
        return Quantized(data, scales, row_scale.astype(np.float32))
    if format == "fp8":
        scale = np.ldexp(rng.uniform(1, 2, 512), rng.integers(-110, 124, 512)).astype(np.float32)
    else:
        scale = np.repeat(np.array([0, *range(10, 256)], np.uint8), 2)
    data = np.tile(np.arange(256, dtype=np.uint8).reshape(2, 128), (len(scale) // 2, 1))
    data = np.pad(data, [(0, 0), (0, HIDDEN - 128)], mode="wrap")
    if format != "fp8":
        data[scale == 0] %= 127  # zero times NaN is not specified
    return Quantized(data, np.tile(scale[:, None], blocks))


@functools.cache
def to_dequantize(format: str) -> tuple[Quantized, dict[np.dtype, np.ndarray]]:
    """Return arrays of inputs of float32 and foreign ones, and what they are in each dtype."""
    cases = ("codes shuffled", "all magnitudes", "heavy tails", "near the largest", "zeros")
    parts = [*(expected(FLOAT32, format, case) for case in cases), foreign(format)]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("data", "scales", "row_scale")
        if getattr(parts[0], name) is not None
    }
    quantized = Quantized(**arrays)
    return quantized, {dtype: oracle.dequantize(quantized, format, dtype) for dtype in DTYPES}


@parametrize_format
def test_dequantize(format: str) -> None:
    quantized, by_oracle = to_dequantize(format)
    rows = ep.BlockScaled(quantized.data, quantized.scales, quantized.row_scale, format=format)
    got = jax.jit(lambda q: {str(dtype): q.dequantize(dtype) for dtype in DTYPES})(rows)
    for dtype in DTYPES:
        assert_values(got[str(dtype)], by_oracle[dtype])
    tiny = np.abs(by_oracle[FLOAT16].astype(np.float32))
    assert ((tiny > 0) & (tiny < 2.0**-14)).any()  # subnormal numbers of float16


def test_float16_saturates() -> None:
    """65504 has a scale of 256 with powers of two, and rounds to 65536."""
    quantized = quantize("mxfp8")(np.float16([[65504, -65504, 65472, 3]]))
    wide, saturated = jax.jit(lambda q: (q.dequantize(jnp.float32), q.dequantize(jnp.float16)))(quantized)
    np.testing.assert_array_equal(wide[0, :2], [65536, -65536])
    np.testing.assert_array_equal(saturated[0, :2], [65504, -65504])


def test_a_block_with_an_element_that_is_not_finite() -> None:
    """The whole block is NaN, with nvfp4 the whole row."""
    x = random((5, 200))
    x[:4, 150] = np.nan, -np.nan, np.inf, -np.inf

    @jax.jit
    def both_ways(x):
        quantized = in_all_formats(x)
        return quantized, {format: q.dequantize(jnp.float16) for format, q in quantized.items()}

    quantized, values = both_ways(x)
    for format, block in BLOCK.items():
        assert_quantized(quantized[format], oracle.quantize(x, format))
        nan = np.zeros((5, 200), bool)
        nan[:4, 150 // block * block : (150 // block + 1) * block] = True
        if format == "nvfp4":
            nan[:4] = True
            np.testing.assert_array_equal(bits(quantized[format].row_scale)[:4], 0x7FC00000)
        np.testing.assert_array_equal(np.isnan(values[format]), nan)
