"""The block-scaled formats in NumPy, written from their specification alone, to be read as the specification.

Every product and quotient is one float32 operation of NumPy, and every rounding to fewer bits a search for
the nearest value in a table: no cast of ml_dtypes is trusted. Arrays are x [..., H]; blocks lie along the
last axis, and the last one may be shorter.
"""

from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

BLOCK = {"fp8": 128, "fp8_ue8m0": 128, "mxfp8": 32, "nvfp4": 16}
SMALLEST = np.float32(2.0**-100)  # a magnitude below counts as zero
FP8_FLOOR = np.float32(1e-4)
NAN = np.uint32(0x7FC00000).view(np.float32)
F32 = np.float32


@dataclass(frozen=True)
class SmallFloat:
    """A binary float with a sign bit: the codes of its magnitudes are 0 … num_finite − 1, in order."""

    exponent_bits: int
    mantissa_bits: int
    num_finite: int

    @property
    def sign_bit(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """float64 [num_finite], the values of the codes."""
        codes = np.arange(self.num_finite)
        exponent, fraction = codes >> self.mantissa_bits, codes % (1 << self.mantissa_bits)
        significand = fraction + np.where(exponent > 0, 1 << self.mantissa_bits, 0)
        bias = (1 << (self.exponent_bits - 1)) - 1
        return np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - self.mantissa_bits)

    @cached_property
    def midpoints(self) -> np.ndarray:
        """float32 [num_finite − 1], exact: the values halfway from each code to the next."""
        return ((self.magnitudes[:-1] + self.magnitudes[1:]) / 2).astype(F32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return the codes of the nearest values, ties to the even code, saturating; x is not NaN."""
        magnitude = np.abs(x)
        # The number of midpoints passed. They differ where x is a midpoint, and one of them is even.
        down, up = (np.searchsorted(self.midpoints, magnitude, side) for side in ("left", "right"))
        code = np.where(down % 2 == 0, down, up)
        return np.where(np.signbit(x), code | self.sign_bit, code)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return float32 values; NaN for codes that are not finite."""
        magnitudes = np.full(self.sign_bit, np.nan, F32)
        magnitudes[: self.num_finite] = self.magnitudes
        value = magnitudes[codes % self.sign_bit]
        return np.where(codes & self.sign_bit, -value, value)


E4M3 = SmallFloat(4, 3, num_finite=0x7F)  # no infinity: only the code of all ones is not finite
E2M1 = SmallFloat(2, 1, num_finite=8)
BFLOAT16 = SmallFloat(8, 7, num_finite=0x7F80)
FLOAT16 = SmallFloat(5, 10, num_finite=0x7C00)


@dataclass(frozen=True)
class Quantized:
    """What a quantized array holds, as the library lays it out.

    Attributes:
        data: uint8 [..., H], nvfp4: [..., H/2].
        scales: [..., ceil(H/block)], fp8: float32, otherwise uint8.
        row_scale: float32 [...], only nvfp4.
    """

    data: np.ndarray
    scales: np.ndarray
    row_scale: np.ndarray | None = None


def to_blocks(x: np.ndarray, block: int) -> np.ndarray:
    """Return [..., blocks, block], the last block filled with zeros."""
    padding = -x.shape[-1] % block
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def from_blocks(blocks: np.ndarray, hidden: int) -> np.ndarray:
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])[..., :hidden]


def exponent_above(x: np.ndarray) -> np.ndarray:
    """Return the least e with 2^e ≥ x, for x > 0."""
    significand, exponent = np.frexp(x)  # x = significand · 2^exponent, ½ ≤ significand < 1
    return np.where(significand == 0.5, exponent - 1, exponent)


def quantize(x: np.ndarray, format: str) -> Quantized:
    x = x.astype(F32)  # exact
    x = np.where(np.abs(x) < SMALLEST, np.copysign(F32(0), x), x)
    blocks = to_blocks(x, BLOCK[format])
    finite = np.isfinite(blocks).all(axis=-1)
    if format == "nvfp4":
        finite = np.broadcast_to(finite.all(axis=-1, keepdims=True), finite.shape)
    blocks = np.where(finite[..., None], blocks, F32(0))
    largest = np.abs(blocks).max(axis=-1)

    row_scale = None
    if format == "nvfp4":
        codes, scales, row_scale = _nvfp4(blocks, largest)
        row_scale = np.where(finite.all(axis=-1), row_scale, NAN)
        not_a_number: np.generic = np.uint8(0)
    elif format == "fp8":
        s = np.maximum(largest, FP8_FLOOR)
        scales = s * (F32(1) / F32(448))
        codes = E4M3.encode(blocks * (F32(448) / s)[..., None])
        not_a_number = NAN
    else:
        s = np.maximum(largest, FP8_FLOOR) if format == "fp8_ue8m0" else largest
        exponent = np.where(s > 0, exponent_above(s * (F32(1) / F32(448))), 0)
        scales = np.where(s > 0, exponent + 127, 0).astype(np.uint8)
        codes = E4M3.encode(blocks * np.ldexp(F32(1), -exponent)[..., None])
        not_a_number = np.uint8(255)

    codes = from_blocks(np.where(finite[..., None], codes, 0), x.shape[-1]).astype(np.uint8)
    data = codes[..., 0::2] | codes[..., 1::2] << 4 if format == "nvfp4" else codes
    return Quantized(data, np.where(finite, scales, not_a_number), row_scale)


def _nvfp4(blocks: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (codes [..., blocks, block], scales [..., blocks], row_scale [...])."""
    row_scale = largest.max(axis=-1) * (F32(1) / F32(2688))
    r = F32(1) / np.where(row_scale > 0, row_scale, F32(1))  # in a row of zeros, all products with r are 0
    scales = E4M3.encode((largest * (F32(1) / F32(6))) * r[..., None]).astype(np.uint8)
    product = E4M3.decode(scales) * row_scale[..., None]
    inverse = np.where(product > 0, F32(1) / np.where(product > 0, product, F32(1)), F32(0))
    return E2M1.encode(blocks * inverse[..., None]), scales, row_scale


def values(quantized: Quantized, format: str) -> np.ndarray:
    """Return float32 [..., H], the values of the data without scales."""
    data = quantized.data
    if format != "nvfp4":
        return E4M3.decode(data)
    return E2M1.decode(np.stack([data % 16, data >> 4], axis=-1).reshape(*data.shape[:-1], -1))


def scales(quantized: Quantized, format: str) -> np.ndarray:
    """Return float32 [..., ceil(H/block)], the values of the scales without that of the row."""
    if format == "fp8":
        return quantized.scales
    if format == "nvfp4":
        return E4M3.decode(quantized.scales)
    byte = quantized.scales.astype(np.int32)
    power = np.ldexp(F32(1), byte - 127)
    return np.where(byte == 255, NAN, np.where(byte == 0, F32(0), power))


def dequantize(quantized: Quantized, format: str, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return [..., H]; whether a NaN has a sign, and which bits, is not specified."""
    value = values(quantized, format)
    hidden = value.shape[-1]
    with np.errstate(over="ignore"):  # saturates below
        product = to_blocks(value, BLOCK[format]) * scales(quantized, format)[..., None]
        if quantized.row_scale is not None:
            product = product * quantized.row_scale[..., None, None]
    return round_to(from_blocks(product, hidden), dtype)


def round_to(x: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Round float32 to the nearest of a dtype, saturating; NaN stays NaN."""
    largest = np.finfo(F32).max
    x = np.clip(x, -largest, largest)
    if np.dtype(dtype) == F32:
        return x
    small = {np.dtype(ml_dtypes.bfloat16): BFLOAT16, np.dtype(np.float16): FLOAT16}[np.dtype(dtype)]
    codes = small.encode(np.where(np.isnan(x), F32(0), x)).astype(np.uint16)
    return np.where(np.isnan(x), np.full_like(x, np.nan, dtype), codes.view(dtype))
