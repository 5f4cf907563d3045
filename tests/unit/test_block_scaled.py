"""`BlockScaled` as a pytree, in JAX's transformations; gradients; wrong arguments."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantization_oracle as oracle
from jax.sharding import PartitionSpec as P
from meshes import fetch, mesh_named, put_on_mesh
from quantization_cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FORMATS,
    HIDDEN,
    assert_bits,
    assert_quantized,
    assert_values,
    bits,
    in_all_formats,
    inputs,
    parametrize_format,
    quantize,
    random,
)

import jax_deepep as ep


@parametrize_format
def test_pytree(format: str) -> None:
    """Leaves may be anything that has the same leading axes; the format is part of the structure."""
    x = random((5, HIDDEN), BFLOAT16)
    got = quantize(format)(x)
    assert len(jax.tree.leaves(got)) == (3 if format == "nvfp4" else 2)
    part = jax.tree.map(lambda leaf: np.asarray(leaf)[1:3], got)
    assert_quantized(part, oracle.quantize(x[1:3], format))
    assert part.shape == (2, HIDDEN)
    shapes = jax.eval_shape(functools.partial(ep.quantize, format=format), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(got)
    assert shapes.shape == got.shape == (5, HIDDEN)
    of_others = {jax.tree.structure(quantize(other)(x)) for other in FORMATS if other != format}
    assert jax.tree.structure(got) not in of_others


@parametrize_format
def test_typed_views(format: str) -> None:
    x = random((5, HIDDEN), BFLOAT16)
    x[0], x[1] = -0.0, np.nan
    got = quantize(format)(x)
    values, scales = jax.jit(lambda q: (q.values, q.typed_scales))(got)
    by_oracle = oracle.quantize(x, format)
    assert values.dtype == (jnp.float4_e2m1fn if format == "nvfp4" else jnp.float8_e4m3fn)
    assert values.shape == got.shape == (5, HIDDEN)
    assert_bits(np.asarray(values).astype(np.float32), oracle.values(by_oracle, format), "values")
    of_format = {"fp8": jnp.float32, "nvfp4": jnp.float8_e4m3fn}
    assert scales.dtype == of_format.get(format, jnp.float8_e8m0fnu)
    np.testing.assert_array_equal(bits(scales), bits(by_oracle.scales))


def test_scaled_matmul_of_jax() -> None:
    """It takes [batch, rows, contracted] and as many scales as blocks."""
    lhs, rhs = (random(shape, BFLOAT16) for shape in ((2, 8, 64), (2, 16, 64)))

    @jax.jit
    def product(lhs, rhs):
        a, b = ep.quantize(lhs, "mxfp8"), ep.quantize(rhs, "mxfp8")
        return jax.nn.scaled_matmul(a.values, b.values, a.typed_scales, b.typed_scales)

    shape = jax.eval_shape(product, lhs, rhs)
    assert (shape.shape, shape.dtype) == ((2, 8, 16), jnp.float32)
    try:
        out = product(lhs, rhs)
    except NotImplementedError:  # JAX 0.10 has it only for GPUs
        return
    a, b = (oracle.dequantize(oracle.quantize(x, "mxfp8"), "mxfp8", FLOAT32) for x in (lhs, rhs))
    np.testing.assert_allclose(out, np.einsum("bmk,bnk->bmn", a, b), rtol=1e-5, atol=1e-2)


# Straight-through gradients.


def test_quantize_dequantize() -> None:
    """The values of dequantize, and the cotangent as it is, whatever the values."""
    names = ("codes shuffled", "zeros", "near the largest", "near a power of two as scale")
    x = np.concatenate([inputs(FLOAT16)[name] for name in names])
    g = np.random.default_rng(1).normal(size=x.shape).astype(FLOAT16)

    @jax.jit
    def values_and_cotangents(x, g):
        results = {}
        for format in FORMATS:
            out, vjp = jax.vjp(lambda x, format=format: ep.quantize_dequantize(x, format), x)
            results[format] = out, *vjp(g)
        return results

    for format, (out, cotangent) in values_and_cotangents(x, g).items():
        assert_values(out, oracle.dequantize(oracle.quantize(x, format), format, FLOAT16))
        assert_bits(cotangent, g, f"cotangent of {format}")
        for dtype in DTYPES:
            given = jax.ShapeDtypeStruct((3, 32), dtype)
            assert jax.eval_shape(functools.partial(ep.quantize_dequantize, format=format), given) == given


@parametrize_format
def test_quantize_has_no_gradient(format: str) -> None:
    """The message names what has one."""

    def loss(x):
        return ep.quantize(x, format).dequantize(jnp.float32).sum()

    def scanned(x):
        return jax.lax.scan(lambda total, row: (total + loss(row), None), 0.0, x[:, None])[0]

    x = jnp.ones((2, 32))
    differentiated: list[Callable[[], Any]] = [
        lambda: jax.grad(loss)(x),
        lambda: jax.jit(jax.grad(loss))(x),
        lambda: jax.grad(jax.jit(loss))(x),
        lambda: jax.jvp(loss, (x,), (x,)),
        lambda: jax.grad(jax.checkpoint(loss))(x),
        lambda: jax.grad(scanned)(x),
        lambda: jax.grad(lambda x: jax.vmap(loss)(x[:, None]).sum())(x),
    ]
    for differentiate in differentiated:
        with pytest.raises(TypeError, match=r"(?s)quantize\b.*quantize_dequantize"):
            differentiate()


def test_quantize_of_what_is_not_differentiated() -> None:
    """An operand without a gradient, and one whose gradient is stopped, are no error."""
    x = jnp.ones((2, 32))

    def loss(w, x):
        constant, stopped = ep.quantize(x, "fp8"), ep.quantize(jax.lax.stop_gradient(w), "fp8")
        return (w * constant.dequantize(w.dtype) + stopped.dequantize(w.dtype)).sum()

    for gradient in (jax.grad(loss), jax.grad(jax.checkpoint(loss)), jax.grad(jax.jit(loss))):
        np.testing.assert_array_equal(jax.jit(gradient)(x, x), x)


# Transformations.


def dequantized(quantized: dict[str, Any]) -> dict[str, jax.Array]:
    return {format: q.dequantize(jnp.bfloat16) for format, q in quantized.items()}


def check_all_formats(x: np.ndarray, quantized: dict[str, Any], values: dict[str, Any]) -> None:
    for format in FORMATS:
        by_oracle = oracle.quantize(x, format)
        assert_quantized(quantized[format], by_oracle)
        assert_values(values[format], oracle.dequantize(by_oracle, format, BFLOAT16))


def test_without_jit() -> None:
    x = random((5, HIDDEN), BFLOAT16)
    by_oracle = oracle.quantize(x, "mxfp8")
    for given in (x, jnp.asarray(x)):
        got = ep.quantize(given, "mxfp8")
        assert_quantized(got, by_oracle)
        assert_values(got.dequantize(jnp.bfloat16), oracle.dequantize(by_oracle, "mxfp8", BFLOAT16))


def test_leading_axes() -> None:
    x = random((2, 3, 4, HIDDEN), BFLOAT16)
    quantized = jax.jit(in_all_formats)(x)
    check_all_formats(x, quantized, jax.jit(dequantized)(quantized))
    for q in quantized.values():
        assert q.shape == x.shape
        assert {leaf.shape[:3] for leaf in jax.tree.leaves(q)} == {x.shape[:3]}


def test_vmap() -> None:
    """Of one row, whose scale is a scalar there, and along another axis than the first."""
    x = random((3, 5, HIDDEN), BFLOAT16)

    @jax.jit
    def mapped(x):
        quantized = jax.vmap(jax.vmap(in_all_formats), in_axes=1, out_axes=1)(x)
        return quantized, jax.vmap(jax.vmap(dequantized))(quantized)

    check_all_formats(x, *mapped(x))


def test_scan() -> None:
    """As what goes in, as what comes out, and as what is carried."""
    x = random((3, 5, HIDDEN), BFLOAT16)

    @jax.jit
    def scanned(x):
        _, quantized = jax.lax.scan(lambda _, x: (None, in_all_formats(x)), None, x)
        _, values = jax.lax.scan(lambda _, q: (None, dequantized(q)), None, quantized)
        first = jax.tree.map(lambda array: array[0], quantized)
        last, before = jax.lax.scan(lambda q, x: (in_all_formats(x), dequantized(q)), first, x)
        return quantized, values, last, before

    quantized, values, last, before = scanned(x)
    check_all_formats(x, quantized, values)
    check_all_formats(x[-1], last, jax.tree.map(lambda array: array[-1], values))
    for format in FORMATS:
        np.testing.assert_array_equal(before[format], np.asarray(values[format])[[0, 0, 1]])


def test_checkpoint() -> None:
    """Computed again in the backward pass, to the same bits."""
    x, w = random((5, HIDDEN), BFLOAT16), random((5, HIDDEN), BFLOAT16)[::-1]

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(x, w, format):
        @jax.checkpoint
        def loss(x, w):
            return (ep.quantize_dequantize(x, format) * w).sum()

        return jax.grad(loss, argnums=(0, 1))(x, w)

    for format in ("fp8", "nvfp4"):
        of_x, of_w = gradients(x, w, format)
        assert_bits(of_x, w, "gradient of x")
        assert_values(of_w, oracle.dequantize(oracle.quantize(x, format), format, BFLOAT16))


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no vma"])
def test_shard_map(check_vma: bool) -> None:
    """One PartitionSpec says how all arrays of a BlockScaled are sharded."""
    mesh = mesh_named("expert")
    spec = P("expert")
    shard_map = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    x = random((2 * mesh.size, HIDDEN), BFLOAT16)

    def straight_through(x):
        return {format: ep.quantize_dequantize(x, format) for format in FORMATS}

    def gradient(x):
        return jax.vjp(straight_through, x)[1](dict.fromkeys(FORMATS, x))[0]

    @jax.jit
    def program(x):
        quantized = shard_map(in_all_formats)(x)
        return quantized, shard_map(dequantized)(quantized), shard_map(gradient)(x)

    quantized, values, cotangent = fetch(program(put_on_mesh(x, mesh, spec)))
    check_all_formats(x, quantized, values)
    assert_bits(cotangent, (4 * x.astype(np.float32)).astype(x.dtype), "gradient")


def test_x64_changes_nothing() -> None:
    x = random((5, HIDDEN), BFLOAT16)
    with jax.enable_x64(True):
        quantized = jax.jit(in_all_formats)(x)
        values = jax.jit(dequantized)(quantized)
    check_all_formats(x, quantized, values)


ERRORS = [
    ({"format": "int8"}, ValueError, r"^format: .*'int8'"),
    *(({"format": "int8"}, ValueError, rf"\b{name}\b") for name in FORMATS),
    ({"x": np.zeros((2, 32), np.int32)}, TypeError, "^x: expected .*int32"),
    ({"x": np.zeros((2, 32), bool)}, TypeError, "^x: expected .*bool"),
    ({"x": np.zeros((2, 32), ml_dtypes.float8_e4m3fn)}, TypeError, "^x: expected .*float8_e4m3fn"),
    ({"x": [1.0, 2.0]}, TypeError, "^x: expected an array, got list"),
    ({"x": np.zeros((2, 37), np.float32), "format": "nvfp4"}, ValueError, "^x: .*nvfp4"),
    *(
        (
            {"x": np.zeros(shape, np.float32)},
            ValueError,
            r"^x: expected shape \[C, H\] with H of at least 1, got " + re.escape(str(shape)),
        )
        for shape in ([], [2, 0])
    ),
]


@pytest.mark.parametrize("function", ["quantize", "quantize_dequantize"])
@pytest.mark.parametrize(("wrong", "error", "words"), ERRORS, ids=[case[2] for case in ERRORS])
def test_a_wrong_argument(wrong: dict, error: type[Exception], words: str, function: str) -> None:
    arguments = {"x": np.zeros((2, 32), np.float32), "format": "fp8", **wrong}
    with pytest.raises(error, match=words):
        getattr(ep, function)(**arguments)
