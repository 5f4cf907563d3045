"""Order between our ops and a collective of XLA, by data dependence.

XLA waits for peers without our bound, and without naming them. Where both wait for the same peer, our op must
come first: the operand of XLA's collective must depend on the result of our op in a way that no pass of XLA
removes (`optimization_barrier` is gone before XLA:CPU makes its schedule).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.jax_compat import ad, batching, mlir
from jax_deepep.ops.checks import vary_together

_zero_after_p = jax_compat.Primitive("jax_deepep_zero_after")
_zero_after_p.multiple_results = True


def zero_after(early: jax.Array, late: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (0, late), where the 0 depends on both operands.

    Where the returned `late` is not used, the 0 depends on `early` alone, so that a layer that
    `jax.checkpoint` recomputes for the gradient of its balance loss need not recompute its output.

    Args:
        early: a non-negative integer [], a result of one of our ops.
        late: float array with elements, a result of a later one. Differentiable.

    Returns:
        (int32 [], `late`).
    """
    zero, late = _zero_after_p.bind(*vary_together(frozenset(), early, late))
    return zero, late


def _implementation(early: jax.Array, *late: jax.Array) -> list[jax.Array]:
    # No pass of XLA knows that a count is not negative, nor that the upper bits of a shifted word are 0.
    zero = lax.min(early.reshape(-1)[0], jnp.int32(0))
    for value in late:
        word = lax.bitcast_convert_type(value.reshape(-1)[0], f"uint{8 * value.dtype.itemsize}")
        zero += lax.min((word >> jnp.ones_like(word)).astype(jnp.int32), jnp.int32(0))
    return [zero, *late]


def _types(early: Any, *late: Any) -> list[Any]:
    return [jax_compat.array_like(early, (), jnp.int32), *late]


def _differentiate(primals: Any, tangents: Any) -> tuple[Any, Any]:
    zero, late = _zero_after_p.bind(*primals)
    return [zero, late], [ad.Zero(jax.typeof(zero).to_tangent_aval()), tangents[1]]


def _batch(operands: Any, dims: Any) -> tuple[Any, Any]:
    # One element of the batch is enough: the op that computed it has computed the others too.
    return _zero_after_p.bind(*operands), [None, *dims[1:]]


def _without_unused(used_outputs: list[bool], equation: Any) -> tuple[list[bool], Any]:
    if any(used_outputs[1:]):
        return [True] * len(equation.invars), equation
    if not used_outputs[0]:
        return [False] * len(equation.invars), None
    alone = equation.replace(invars=equation.invars[:1], outvars=equation.outvars[:1])
    return [True, *used_outputs[1:]], alone


_zero_after_p.def_impl(lambda *operands: jax_compat.apply_primitive(_zero_after_p, *operands))
_zero_after_p.def_abstract_eval(_types)
mlir.register_lowering(_zero_after_p, mlir.lower_fun(_implementation, multiple_results=True))
ad.primitive_jvps[_zero_after_p] = _differentiate
batching.primitive_batchers[_zero_after_p] = _batch
jax_compat.register_dce_rule(_zero_after_p, _without_unused)
