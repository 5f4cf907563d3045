"""The two ways to carry rows, behind one interface.

An implementation is a module with three functions on per-device values. `RouteShape` gives the
static sizes; optional operands that are None stay out of the computation. Rows are floats, W = H of them
or fewer; dispatch, and redispatch without weights and y, carry rows of integers too, of at most 4 · H bytes.

    dispatch(shape, x, topk_idx, topk_weights)
        -> (tokens [C, W], Handle)
    redispatch(shape, x, routes, *, weights=None, y=None, zero_rest=False)
        -> (rows [C, W], products float32 [C] or None)
        rows = weights · x[routes.source]; products = ⟨x[routes.source], y⟩ per row; where there is no token,
        zero inside the groups and, with `zero_rest`, after them too.
    combine(shape, y, routes, *, weights=None, bias=None, row_gradients=None)
        -> (out [T, W], gradients float32 [T, K] or None)
        out as in `jax_deepep.combine`; gradients[t, k] is `row_gradients` of that entry's row.
"""

from types import ModuleType

from jax_deepep.communicator import Communicator
from jax_deepep.ops import native, reference


def implementation_of(comm: Communicator) -> ModuleType:
    """Return the module that carries rows for `comm`."""
    return native if comm.implementation == "native" else reference
