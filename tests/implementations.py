"""The implementations under test: a new one is added here and runs every suite."""

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

# Test ids contain these names, for -k.
_MARKS = {"native": (), "xla": (pytest.mark.collectives,)}
IMPLEMENTATIONS = [pytest.param(name, marks=marks) for name, marks in _MARKS.items()]
# The suite's own default is "cpu" (conftest.py); ranks that share a GPU have no JAX_PLATFORMS.
ON_GPUS = os.environ.get("JAX_PLATFORMS", "") != "cpu"
# Of cases on CPUs that others nearly cover; runs on GPUs are rare.
NIGHTLY = () if ON_GPUS else (pytest.mark.nightly,)
# What JAX does with functions is known of JAX's own ops, of which "xla" consists.
XLA_NIGHTLY = [
    pytest.param(name, marks=(*marks, *(NIGHTLY if name == "xla" else ()))) for name, marks in _MARKS.items()
]
LOW_LATENCY = "low_latency"  # native, in that mode
EXACT = {"native", LOW_LATENCY}  # gives the contract's bits; the others give them up to float32 rounding

# Makes XLA capture all ops in CUDA graphs, on GPUs. By default, it captures sequences of five operations or
# more that support it.
CAPTURE_ALL_OPS = "--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
OPS_ARE_CAPTURED = set(CAPTURE_ALL_OPS.split()) <= set(os.environ.get("XLA_FLAGS", "").split())


def cases(
    names: str,
    *values: Iterable,
    in_xla: Callable[..., bool],
    in_low_latency: Callable[..., bool] = lambda *_: False,
    nightly: Callable[..., bool] = lambda implementation, *_: False,
) -> pytest.MarkDecorator:
    """Parametrize a test by the product of `values`, named in `names`, and by its implementation.

    A program takes ten times as long to compile with "xla", which runs only the cases that `in_xla` selects.
    Low-latency mode counts as an implementation, and runs the cases of `in_low_latency`. Cases of an
    implementation that `nightly` selects run nightly only, but for runs on GPUs.
    """

    def runs(implementation: str, case: tuple) -> bool:
        wants = {"xla": in_xla, LOW_LATENCY: in_low_latency}.get(implementation)
        return wants is None or wants(*case)

    def named(value: Any) -> str:
        return getattr(value, "name", str(value))

    return pytest.mark.parametrize(
        (*names.split(), "implementation"),
        [
            pytest.param(
                *case,
                implementation,
                marks=(*marks, *NIGHTLY) if nightly(implementation, *case) else marks,
                id="-".join([*map(named, case), implementation]),
            )
            for case in itertools.product(*values)
            for implementation, marks in {**_MARKS, LOW_LATENCY: ()}.items()
            if runs(implementation, case)
        ],
    )


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    as_bits = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(as_bits), expected.view(as_bits))


def assert_same_sums(got: np.ndarray, expected: np.ndarray, implementation: str) -> None:
    """Compare results of combine as exactly as the implementation promises."""
    if implementation in EXACT:
        assert_same_bits(got, expected)
        return
    assert got.dtype == expected.dtype
    # One unit of rounding in float32 may tip the rounding to the dtype of y, once per device.
    unit = {"float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=unit, atol=4 * unit)
