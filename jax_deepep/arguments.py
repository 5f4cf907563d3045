"""The arguments of a communicator: what each one takes, and which implementation they lead to."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jax_deepep.capacity import INT32_MAX


def check_mesh(mesh: Any) -> None:
    """Raise unless `mesh` is a mesh of devices."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh: got {type(mesh).__name__}; takes a jax.sharding.Mesh of devices, for example "
            'jax.make_mesh((8,), ("expert",)).'
        )


def checked_axis_names(mesh: Mesh, axis_name: Any) -> tuple[str, ...]:
    """Return the expert-parallel axes, outermost first, if `mesh` has them."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"axis_name: got {axis_name!r}; takes a mesh axis or a tuple of them.")
    for name in names:
        if name not in mesh.axis_names:
            say = " or ".join(f'axis_name="{axis}"' for axis in mesh.axis_names)
            raise ValueError(
                f"axis_name: expected an axis of mesh, {mesh.axis_names}, got {name!r}; say {say}."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name: got {axis_name!r}; takes every axis once.")
    return tuple(names)


def checked_integer(name: str, value: Any, *, minimum: int) -> int:
    """Return `value` as an int, if it is a static integer of any type, from `minimum` to what int32 holds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        raise TypeError(
            f"{name}: got {value!r}; takes a Python integer (a static value, known when tracing)."
        ) from None
    if number < minimum:
        raise ValueError(f"{name}: got {number}; takes an integer of at least {minimum}.")
    if number > INT32_MAX:
        raise ValueError(f"{name}: got {number}; takes at most {INT32_MAX} (an int32).")
    return number


SIZES = ("num_experts", "num_experts_per_tok", "max_tokens", "hidden_size", "num_sms")


def plain_int(value: Any) -> Any:
    """Return an integer of any type, NumPy's for example, as an int; anything else as it is."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def check_sizes(comm: Any, num_ranks: int) -> None:
    """Raise unless the sizes, the timeout and the mode of `comm` are ones that it can have."""
    for name in SIZES:
        if name != "num_sms" or comm.num_sms is not None:
            checked_integer(name, getattr(comm, name), minimum=1)
    if comm.num_experts % num_ranks:
        below = comm.num_experts - comm.num_experts % num_ranks
        raise ValueError(
            f"num_experts: got {comm.num_experts} for {num_ranks} devices along {comm.axis_name!r};"
            f" takes a multiple of {num_ranks}, for example {below + num_ranks}."
        )
    if comm.num_experts_per_tok > comm.num_experts:
        raise ValueError(
            f"num_experts_per_tok: got {comm.num_experts_per_tok}; takes at most num_experts="
            f"{comm.num_experts}, because a token goes to an expert once."
        )
    most_tokens = INT32_MAX // (num_ranks * comm.num_experts_per_tok)
    if comm.max_tokens > most_tokens:
        raise ValueError(
            f"max_tokens: got {comm.max_tokens} on each of {num_ranks} devices; takes at most "
            f"{most_tokens} (the entries of all tokens are numbered in int32)."
        )
    timeout_s: Any = comm.timeout_s
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise TypeError(f"timeout_s: got {timeout_s!r}; takes seconds, a positive number.")
    if not is_timeout(timeout_s):
        raise ValueError(f"timeout_s: got {timeout_s!r}; takes seconds, a positive finite number.")
    if comm.mode not in ("auto", "throughput", "low_latency"):
        raise ValueError(f'mode: got {comm.mode!r}; takes "auto", "throughput" or "low_latency".')
    if comm.mode == "low_latency":
        raise ValueError(
            'mode: got "low_latency", which is not in this version; takes "auto" or "throughput".'
        )


def is_timeout(value: Any) -> bool:
    """Return whether `value` is a number of seconds that a wait can last."""
    return isinstance(value, (int, float)) and value > 0 and math.isfinite(value)


def chosen_implementation(requested: Any, obstacle: str) -> tuple[str, str]:
    """Return "native" or "xla", and why; `obstacle` is what keeps a process from native ops, or nothing."""
    if requested not in ("auto", "native", "xla"):
        raise ValueError(f'implementation: got {requested!r}; takes "auto", "native" or "xla".')
    if requested == "xla":
        return "xla", "as asked"
    if not obstacle:
        return "native", "as asked" if requested == "native" else "auto: available here"
    return without_native(requested, obstacle)


def without_native(requested: Any, obstacle: str) -> tuple[str, str]:
    """Return "xla" and why, because of `obstacle`.

    Raises:
        ValueError: native ops were demanded.
    """
    if requested == "native":
        raise ValueError(f'implementation: got "native", but {obstacle}; takes "xla" here, or "auto".')
    return "xla", f"auto: {obstacle}"
