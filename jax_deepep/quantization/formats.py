"""The formats: how many bits an element has, and which scale a block of elements shares."""

from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["fp8", "fp8_ue8m0", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class BlockFormat:
    """The sizes of a format.

    Attributes:
        name: of the format.
        block: elements that share a scale.
        values_per_byte: elements in a byte of `BlockScaled.data`.
        scale_type: "float32", "e8m0" (a power of two, its biased exponent) or "e4m3".
        has_row_scale: whether a row has a float32 scale besides.
    """

    name: Format
    block: int
    values_per_byte: int
    scale_type: Literal["float32", "e8m0", "e4m3"]
    has_row_scale: bool = False

    def num_blocks(self, hidden_size: int) -> int:
        """Return the blocks of a row of `hidden_size` elements."""
        return -(-hidden_size // self.block)

    def leaves(self, hidden_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype of each leaf of `BlockScaled`, and its shape for one row of `hidden_size`."""
        scale_dtype = "float32" if self.scale_type == "float32" else "uint8"
        leaves: dict[str, tuple[str, tuple[int, ...]]] = {
            "data": ("uint8", (-(-hidden_size // self.values_per_byte),)),
            "scales": (scale_dtype, (self.num_blocks(hidden_size),)),
        }
        return leaves | {"row_scale": ("float32", ())} if self.has_row_scale else leaves


FORMATS: dict[str, BlockFormat] = {
    of.name: of
    for of in (
        BlockFormat("fp8", 128, 1, "float32"),
        BlockFormat("fp8_ue8m0", 128, 1, "e8m0"),
        BlockFormat("mxfp8", 32, 1, "e8m0"),
        BlockFormat("nvfp4", 16, 2, "e4m3", has_row_scale=True),
    )
}


def checked_format(name: str, value: Any) -> BlockFormat:
    """Return the format named `value`.

    Raises:
        ValueError: there is no such format; `name` is the argument in the message.
    """
    if not isinstance(value, str) or value not in FORMATS:
        names = ", ".join(f'"{known}"' for known in FORMATS)
        raise ValueError(f"{name}: expected one of {names}, got {value!r}.")
    return FORMATS[value]


def check_width(name: str, hidden_size: int, of: BlockFormat) -> None:
    """Raise unless a row of `hidden_size` elements fills whole bytes."""
    if hidden_size % of.values_per_byte != 0:
        raise ValueError(
            f"{name}: expected rows of an even number of elements for {of.name}, which has two in a byte, "
            f"got {hidden_size}; pad the rows by one element, or take mxfp8."
        )
