"""Numbers on the command lines of the bench; argparse puts the option before these errors."""

import math
from argparse import ArgumentTypeError


def positive_int(text: str) -> int:
    """Return an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """Return a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number
