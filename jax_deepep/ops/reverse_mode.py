"""Operands whose gradients exist in reverse mode only: forward mode is an error with a remedy.

JAX derives reverse mode from forward mode by transposition. `custom_vjp` cannot distinguish them before a
program is lowered, and its error names neither the function nor a remedy.
"""

from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp

from jax_deepep import jax_compat
from jax_deepep.jax_compat import ad, batching, mlir

Operands = TypeVar("Operands")

# The identity of a tangent; its transpose is a no-op.
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


def _reject(*_: Any, op: str) -> NoReturn:
    raise TypeError(
        f"{op}: expected to be differentiated in reverse mode, got forward mode (jvp, jacfwd, linearize); "
        "use jax.grad, jax.vjp or jax.jacrev."
    )


_tangent_p.def_impl(_reject)
_tangent_p.def_abstract_eval(lambda tangent, *, op: tangent)
mlir.register_lowering(_tangent_p, _reject)
ad.deflinear2(_tangent_p, lambda cotangent, _, *, op: [cotangent])
batching.defvectorized(_tangent_p)
