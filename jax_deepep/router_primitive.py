"""Primitives of the router: plain JAX, and on NVIDIA GPUs kernels of the native module (xla_ffi/router/)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepep import jax_compat
from jax_deepep.communicator import native_module
from jax_deepep.jax_compat import Primitive, batching, mlir


def router_primitive(
    name: str,
    plain: Callable[..., jax.Array],
    result: Callable[..., Any],
    *,
    kernel_takes: Callable[..., bool],
    in_place: bool = False,
    leading_axes: bool = False,
) -> Callable[..., jax.Array]:
    """Return a function (operands, integers by name) → one result, which no gradient passes through.

    Args:
        name: of the primitive and of the custom call, without "jax_deepep_".
        plain: (operands, integers by name) → the result.
        result: (types of the operands, the same integers) → the type of the result.
        kernel_takes: (the native module, and the same) → whether its kernel takes operands of these types. It
            gets the integers as attributes.
        in_place: whether the kernel writes its result over the first operand.
        leading_axes: whether it takes more leading axes, the same of all operands; otherwise `jax.vmap` makes
            the plain form of it.
    """
    primitive = Primitive(f"jax_deepep_{name}")
    lower_plain = mlir.lower_fun(plain, multiple_results=False)

    def lower_for_cuda(ctx: Any, *operands: Any, **integers: int) -> Any:
        # What is exported also runs where this package is not loaded. XLA cannot divide a custom call.
        is_plain = jax_compat.is_for_export(ctx) or jax_compat.is_partitioned(ctx)
        if is_plain or not has_kernel(*ctx.avals_in, **integers):
            return lower_plain(ctx, *operands, **integers)
        aliases = {0: 0} if in_place else None
        attributes = {key: np.int64(value) for key, value in integers.items()}
        return jax.ffi.ffi_lowering(primitive.name, operand_output_aliases=aliases)(
            ctx, *operands, **attributes
        )

    def has_kernel(*types: Any, **integers: int) -> bool:
        if native_module.unsupported_reason("cuda"):
            return False
        return kernel_takes(native_module.load("cuda"), *types, **integers)

    def batch(operands: Any, axes: Any, **integers: int) -> tuple[jax.Array, int]:
        if not leading_axes:
            return jax.vmap(partial(plain, **integers), in_axes=axes)(*operands), 0
        pairs = list(zip(operands, axes, strict=True))
        [size] = {value.shape[axis] for value, axis in pairs if axis is not None}
        moved = [
            jnp.broadcast_to(value, (size, *value.shape)) if axis is None else jnp.moveaxis(value, axis, 0)
            for value, axis in pairs
        ]
        return primitive.bind(*moved, **integers), 0

    primitive.def_impl(partial(jax_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(result)
    mlir.register_lowering(primitive, lower_plain)
    mlir.register_lowering(primitive, lower_for_cuda, platform="cuda")
    batching.primitive_batchers[primitive] = batch

    def call(*operands: jax.Array, **integers: int) -> jax.Array:
        # Behind barriers, as ops are: see `ops.custom_call`. Operands only where the result has their memory.
        constants = list(map(lax.stop_gradient, operands))
        if in_place:
            constants = list(map(lax.optimization_barrier, constants))
        out: jax.Array = lax.optimization_barrier(primitive.bind(*constants, **integers))
        return out

    return call
