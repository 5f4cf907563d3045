"""`Wire`: how the rows of an op, and of its gradient, cross links."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jax_deepep.checks import ROW_DTYPES
from jax_deepep.quantization.block_scaled import BlockScaled
from jax_deepep.quantization.formats import FORMATS, Format, check_width

OF_DISPATCH: tuple[Format, ...] = ("fp8", "fp8_ue8m0", "mxfp8", "nvfp4")
OF_COMBINE: tuple[Format, ...] = ("fp8", "fp8_ue8m0", "mxfp8")


@dataclass(frozen=True)
class Wire:
    """The format in which rows cross links: static, hashable.

    Attributes:
        format: "fp8", "fp8_ue8m0", "mxfp8", "nvfp4" (dispatch only; see `quantize`), or None: as they are.
        backward: that of the op's gradient. The gradient of a dispatch is a combine, and takes the formats
            of combine; the gradient of a combine is a dispatch.
        keep_quantized: of a dispatch: return `BlockScaled` rows, the bits of `quantize(x, format)`. They
            have no gradient.
    """

    format: Format | None
    backward: Format | None = field(default=None, kw_only=True)
    keep_quantized: bool = field(default=False, kw_only=True)


def checked_wire(op: str, value: Any, x: Any) -> Wire:
    """Return the formats of a "dispatch" of x or a "combine" of it.

    Raises:
        ValueError, TypeError: the op does not take them, or x has not rows that they encode.
    """
    wire = value if isinstance(value, Wire) else Wire(value)
    own, of_gradient = (OF_DISPATCH, OF_COMBINE) if op == "dispatch" else (OF_COMBINE, OF_DISPATCH)
    _check_one("wire", wire.format, own, op)
    _check_one("wire.backward", wire.backward, of_gradient, f"the gradient of {op}")
    if not isinstance(wire.keep_quantized, bool):
        raise TypeError(f"wire.keep_quantized: expected True or False, got {wire.keep_quantized!r}.")
    if wire.keep_quantized and (op == "combine" or wire.format is None):
        reason = "sums are not quantised" if op == "combine" else "rows without a format are not"
        raise ValueError(
            f"wire.keep_quantized: expected False with {op}(wire={wire.format!r}), got True; {reason}."
        )
    if wire == Wire(None):
        return wire
    if isinstance(x, BlockScaled):
        raise ValueError(
            f"wire: expected None with a BlockScaled x, which crosses links as it is, got {value!r}; leave "
            "it out."
        )
    name = "x" if op == "dispatch" else "y"
    if x.dtype.name not in ROW_DTYPES:
        raise TypeError(
            f"{name}: expected dtype {', '.join(ROW_DTYPES)} with wire={value!r}, got {x.dtype.name}; "
            "integers are not quantised: leave wire out."
        )
    for format in (wire.format, wire.backward):
        if format is not None:
            check_width(name, x.shape[1], FORMATS[format])
    return wire


def _check_one(name: str, format: Any, known: Sequence[str], of: str) -> None:
    if format is None or format in known:
        return
    names = ", ".join(f'"{one}"' for one in known)
    raise ValueError(f"{name}: expected None or one of {names} for {of}, got {format!r}.")


def check_block_scaled(x: BlockScaled, hidden_size: int) -> None:
    """Raise unless the leaves of x have the dtypes and shapes of its format, for rows of `hidden_size`."""
    of, (*rows, width) = FORMATS[x.format], x.shape
    if len(rows) != 1 or width != hidden_size:
        raise ValueError(f"x: expected shape [T, hidden_size] = [any, {hidden_size}], got {list(x.shape)}.")
    leaves = {name: (dtype, [*rows, *shape]) for name, (dtype, shape) in of.leaves(hidden_size).items()}
    for name in ("data", "scales", "row_scale"):
        expected = leaves.get(name)
        leaf: jax.Array | None = getattr(x, name)
        got = None if leaf is None else (leaf.dtype.name, list(leaf.shape))
        if got == expected:
            continue
        names = ["None" if each is None else f"{each[0]} {each[1]}" for each in (expected, got)]
        same_type = expected is not None and got is not None and expected[0] == got[0]
        raise (ValueError if same_type else TypeError)(
            f"x.{name}: expected {names[0]} for {x.format} rows of {hidden_size} elements, got {names[1]}; "
            "make x with jax_deepep.quantize."
        )
