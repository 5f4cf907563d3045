"""The oracle of the block-scaled formats and the inputs of their tests."""

import ml_dtypes
import numpy as np
import quantization_oracle as oracle
from quantization_cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    assert_bits,
    bits,
    from_codes,
    inputs,
    with_neighbours,
)
from quantization_oracle import E2M1, E4M3


def test_inputs_hold_what_they_are_named_after() -> None:
    def set_of(dtype: np.dtype, case: str) -> set[int]:
        return set(bits(inputs(dtype)[case]).ravel().tolist())

    for dtype in (BFLOAT16, FLOAT16):
        assert set_of(dtype, "codes in order") == set_of(dtype, "codes shuffled") == set(range(1 << 16))
    largest = np.abs(inputs(BFLOAT16)["maxima"].astype(np.float32)).max(axis=-1)
    np.testing.assert_array_equal(bits(largest) >> 16, np.arange(0, 0x7F80, 10))
    for dtype in DTYPES:
        finite = np.isfinite(inputs(dtype)["codes shuffled"].astype(np.float32))
        of_blocks = oracle.to_blocks(finite, 128)[:, 0].all(axis=-1)
        assert of_blocks.any()
        assert not of_blocks.all()


def test_the_oracle_rounds_as_ml_dtypes() -> None:
    """Its search and the casts: every bfloat16, and every midpoint, which is exact, with its neighbours."""
    finite = from_codes(np.arange(0x7F80), BFLOAT16).astype(np.float32)
    for small, dtype in (
        (E4M3, ml_dtypes.float8_e4m3fn), (E2M1, ml_dtypes.float4_e2m1fn), (oracle.BFLOAT16, BFLOAT16),
        (oracle.FLOAT16, FLOAT16),
    ):  # fmt: skip
        exact = (small.magnitudes[:-1] + small.magnitudes[1:]) / 2
        np.testing.assert_array_equal(small.midpoints.astype(np.float64), exact)
        x = np.concatenate([with_neighbours(small.midpoints, FLOAT32), finite, -finite])
        saturated = np.clip(x, -small.magnitudes[-1], small.magnitudes[-1])
        assert_bits(
            small.encode(x).astype(f"u{np.dtype(dtype).itemsize}"), bits(saturated.astype(dtype)), dtype
        )
        if len(small.magnitudes) < 200:  # a third opinion: the nearest of all values
            distance = np.abs(np.abs(x.astype(np.float64))[:, None] - small.magnitudes)
            nearest = distance == distance.min(axis=-1, keepdims=True)
            code = small.encode(np.abs(x))
            assert nearest[np.arange(len(x)), code].all()
            assert (code[nearest.sum(axis=-1) == 2] % 2 == 0).all()
