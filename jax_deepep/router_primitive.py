"""Primitives of the router: plain JAX, and on NVIDIA GPUs kernels of the native module (xla_ffi/router/)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

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
) -> Primitive:
    """Return a primitive of one result, which no gradient passes through.

    Args:
        name: of the primitive and of the custom call, without "jax_deepep_".
        plain: (operands, integers by name) → the result.
        result: (types of the operands, the same integers) → the type of the result.
        kernel_takes: (the native module, and the same) → whether its kernel takes operands of these types. It
            gets the integers as attributes.
        in_place: whether the kernel writes its result over the first operand.
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
        return jax.vmap(partial(plain, **integers), in_axes=axes)(*operands), 0

    primitive.def_impl(partial(jax_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(result)
    mlir.register_lowering(primitive, lower_plain)
    mlir.register_lowering(primitive, lower_for_cuda, platform="cuda")
    batching.primitive_batchers[primitive] = batch
    return primitive
