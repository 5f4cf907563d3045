"""Operands whose gradients are taken in reverse mode only: forward mode ends with an error that says so.

JAX makes reverse mode out of forward mode and a transposition. `custom_vjp` cannot tell one from the other
before a program is lowered, and says then neither which function it was nor what to do.
"""

from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp

from jax_deepep import jax_compat
from jax_deepep.jax_compat import ad, batching, mlir

Operands = TypeVar("Operands")

# The identity of a tangent; transposed, nothing is left of it.
_tangent_p = jax_compat.Primitive("jax_deepep_reverse_mode_only")


def only_in_reverse(op: str, operands: Operands) -> Operands:
    """Return the operands of `op`, a pytree of arrays; forward mode through them is an error."""
    marked: Operands = jax.tree.map(
        lambda value: _identity(op, value) if jnp.issubdtype(value.dtype, jnp.floating) else value, operands
    )
    return marked


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(op: str, value: jax.Array) -> jax.Array:
    return value


@_identity.defjvp
def _differentiate(op: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], _tangent_p.bind(tangents[0], op=op)


def _refuse(*_: Any, op: str) -> NoReturn:
    raise TypeError(
        f"{op}: expected to be differentiated in reverse mode, got forward mode (jvp, jacfwd, linearize); "
        "use jax.grad, jax.vjp or jax.jacrev."
    )


_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda tangent, *, op: tangent)
mlir.register_lowering(_tangent_p, _refuse)
ad.deflinear2(_tangent_p, lambda cotangent, _, *, op: [cotangent])
batching.defvectorized(_tangent_p)
