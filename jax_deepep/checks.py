"""Checks of arguments that are integers or arrays, with errors that name the argument."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepep.capacity import INT32_MAX

ROW_DTYPES = ("bfloat16", "float16", "float32")


def checked_integer(name: str, value: Any, *, minimum: int) -> int:
    """Return `value` as an int, if it is a static integer of any type, from `minimum` to what int32 holds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        raise TypeError(
            f"{name}: expected a Python integer (static, known when tracing), got {value!r}; pass an int."
        ) from None
    if number < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {number}.")
    if number > INT32_MAX:
        raise ValueError(f"{name}: expected at most {INT32_MAX} (an int32), got {number}.")
    return number


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is static, and True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}; pass a bool.")


def check_is_array(name: str, value: Any) -> None:
    """Raise unless `value` has a dtype and a static shape."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        remedy = f"{name}.dequantize(dtype)" if hasattr(value, "dequantize") else f"jnp.asarray({name})"
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}; pass {remedy}.")
    if not all(isinstance(size, int | np.integer) for size in value.shape):
        raise ValueError(
            f"{name}: expected a static shape, got [{', '.join(map(str, value.shape))}]; trace or export a "
            "program for each size, and pad to these sizes."
        )


def check_array(
    name: str, value: Any, shape: tuple[int | None, ...], *, names: str, dtype: Any = None
) -> None:
    """Raise unless `value` has `dtype` and `shape`; None stands for any size."""
    check_is_array(name, value)
    if dtype is not None and value.dtype != dtype:
        wanted = jnp.dtype(dtype).name
        raise TypeError(
            f"{name}: expected dtype {wanted}, got {value.dtype.name}; cast it: {name}.astype(jnp.{wanted})."
        )
    same = len(value.shape) == len(shape) and all(
        wanted is None or got == wanted for got, wanted in zip(value.shape, shape, strict=True)
    )
    if not same:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape {names} = [{sizes}], got {list(value.shape)}.")


def check_rows_dtype(name: str, value: Any) -> None:
    """Raise unless `value` is an array of a dtype that rows with sums can have."""
    check_is_array(name, value)
    if value.dtype.name not in ROW_DTYPES:
        raise TypeError(
            f"{name}: expected dtype {', '.join(ROW_DTYPES)}, got {value.dtype.name}; "
            f"cast it: {name}.astype(jnp.{nearest_row_dtype(value.dtype)})."
        )


def nearest_row_dtype(dtype: Any) -> str:
    """Return the dtype of rows that loses least of `dtype`."""
    return "float32" if dtype.itemsize >= 4 else "bfloat16"
