"""Plain kernels that move, or sum, the rows of an op between the same ranks with the same SMs.

They are given the destination of every row: nothing is counted, and there is one barrier before and one
after. Ops may be faster: `links` measures what the hardware allows. The kernels are in `xla_ffi/bench/`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jax_deepep.bench.baselines import cuda_module
from jax_deepep.bench.op_cases import Dispatched
from jax_deepep.bench.problem import AXIS, Inputs, per_device
from jax_deepep.bench.trials import Case, after_start
from jax_deepep.communicator import native_module
from jax_deepep.ops.custom_call import Site, site_attribute
from jax_deepep.ops.handle import Routes, RouteShape

# Warps, and rows in flight per warp through shared memory; 0: 16-byte loads and stores.
GATHERS = ((16, 0), (16, 1), (8, 2), (6, 2), (5, 3), (4, 4), (3, 4))
MAX_TOPK = 8  # supported by the kernels

DTYPE = jnp.bfloat16  # of their rows
GATHER, ADD, SUM = "gather_rows", "add_rows", "sum_rows"


def kind_of(op: str, layout: str) -> str:
    """Return the beginning of the names of the baselines of an op."""
    if op == "dispatch" or (op == "combine backward" and layout == "token"):
        return GATHER
    return ADD if op == "combine backward" else SUM


def _call(name: str, shape: RouteShape, results: Any, after: Any, *operands: Any, **attributes: Any) -> Any:
    rank = after_start(lax.axis_index(AXIS).astype(jnp.int32), after)
    return jax.ffi.ffi_call(f"jax_deepep_{name}", results)(
        rank,
        *operands,
        layout=np.int64(native_module.numbers().layouts[shape.layout]),
        site=site_attribute(shape, call=0, site=Site()),
        **attributes,
    )


def pair_table(shape: RouteShape, routes: Routes) -> jax.Array:
    """Return the table of this device's pairs, later ranks first, so that ranks read from different peers.

    The first line holds the number of pairs, each other line a source and its rows.
    """
    if shape.layout == "expert":
        assert routes.pairs is not None
        count, lines = routes.pairs[0, 0], routes.pairs[1:]
    else:
        count = jnp.sum(routes.source >= 0, dtype=jnp.int32)
        rows = jnp.arange(shape.capacity, dtype=jnp.int32)
        none = jnp.full_like(rows, -1)
        lines = jnp.stack([routes.source, rows, none, none], axis=1)
    numbers = jnp.arange(len(lines), dtype=jnp.int32)
    inside = numbers < count
    earlier = inside & (lines[:, 0] // shape.comm.max_tokens <= lax.axis_index(AXIS))
    turned = (numbers + jnp.sum(earlier, dtype=jnp.int32)) % jnp.maximum(count, 1)
    lines = lines[jnp.where(inside, turned, numbers)]
    return jnp.concatenate([jnp.full((1, lines.shape[1]), count, jnp.int32), lines])


def sum_inputs(shape: RouteShape, routes: Routes) -> jax.Array:
    """Return the rows that every token of this device sums: [T, K] codes for `SumInput`, then −1."""
    max_rows = shape.comm.size * shape.comm.max_tokens
    destination = routes.destination
    somewhere = destination >= 0
    entries = jnp.arange(destination.shape[1])[None, :]
    # Entries that went nowhere match nothing, not even each other.
    rank = jnp.where(somewhere, destination // shape.capacity, -1 - entries)
    same = rank[:, :, None] == rank[:, None, :]
    leads = somewhere & (jnp.argmax(same, axis=2) == entries)
    summed = (jnp.sum(same, axis=2) > 1) & (shape.layout == "expert")
    tokens = lax.axis_index(AXIS) * shape.comm.max_tokens + jnp.arange(len(destination))
    at = jnp.where(summed, shape.capacity + tokens[:, None], destination % shape.capacity)
    codes = jnp.where(leads, rank * (shape.capacity + max_rows) + at, -1)
    return -jnp.sort(-codes, axis=1).astype(jnp.int32)


def unsupported_reason(inputs: Inputs) -> str:
    """Return why the kernels do not support a problem, or an empty string."""
    problem = inputs.problem
    if problem.dtype == "bfloat16" and problem.topk <= MAX_TOPK and problem.hidden % 8 == 0:
        return ""
    return (
        f"row baselines: expected bfloat16, topk of at most {MAX_TOPK} and hidden a multiple of 8, got "
        f"{problem.name}; compare with other sizes"
    )


def row_baselines(mesh: Mesh, shape: RouteShape, inputs: Inputs, dispatched: Dispatched) -> dict[str, Case]:
    """Return the baselines by name, on the routes of a dispatch."""
    comm, hidden = shape.comm, shape.comm.hidden_size
    module = cuda_module.load()
    module.load([device.local_hardware_id for device in mesh.local_devices])
    lists = per_device(mesh, lambda routes: (pair_table(shape, routes), sum_inputs(shape, routes)))
    table, codes = lists(dispatched.routes)
    rows = jax.ShapeDtypeStruct((shape.capacity, hidden), DTYPE)
    with_sums = shape.layout == "expert" and min(comm.num_experts_per_tok, comm.num_local_experts) > 1

    def gather_with(warps: int, depth: int) -> Case:
        def gather(after, x, table):
            how = {"warps": np.int64(warps), "depth": np.int64(depth)}
            return _call(GATHER, shape, rows, after, x, table, **how)

        return Case(gather, (inputs.x, table))

    def add(after, x, y, table):
        return _call(ADD, shape, rows, after, x, y, table)

    def sum_rows(after, y, table, codes):
        out = jax.ShapeDtypeStruct((shape.num_tokens, hidden), DTYPE)
        sums = jax.ShapeDtypeStruct((comm.size * comm.max_tokens if with_sums else 1, hidden), DTYPE)
        return _call(SUM, shape, [out, sums], after, y, table, codes, with_sums=with_sums)[0]

    row_bytes = inputs.problem.row_bytes
    baselines = {
        f"{GATHER}: " + (f"bulk {warps}×{depth}" if depth else "loads"): gather_with(warps, depth)
        for warps, depth in GATHERS
        if warps * depth * (row_bytes + 8) <= module.in_flight_bytes
    }
    if shape.layout == "expert":
        baselines[f"{ADD}: loads"] = Case(add, (inputs.x, dispatched.tokens, table))
    baselines[f"{SUM}: loads"] = Case(sum_rows, (dispatched.tokens, table, codes))
    return baselines


def check_row_baselines(
    mesh: Mesh, baselines: dict[str, Case], dispatched: Dispatched, dispatch_gradient: jax.Array
) -> None:
    """Raise unless every baseline has moved the right rows on this process.

    Args:
        mesh, baselines, dispatched: as above.
        dispatch_gradient: the gradient of dispatch for the dispatched rows, which is their sum.

    Raises:
        RuntimeError: a baseline has moved wrong rows.
    """

    def agree(source, tokens, gradient, rows, kind):
        if kind == SUM:
            wanted, got, tolerance = gradient.astype(jnp.float32), rows.astype(jnp.float32), 2**-4
            return jnp.all(jnp.abs(got - wanted) <= tolerance + jnp.abs(wanted) * 2**-6)[None]
        wanted = tokens + tokens if kind == ADD else tokens
        return jnp.all((rows == wanted) | (source < 0)[:, None])[None]

    for name, baseline in baselines.items():
        kind = name.split(":")[0]

        def run_and_compare(source, tokens, gradient, operands, baseline=baseline, kind=kind):
            return agree(source, tokens, gradient, baseline.run(None, *operands), kind)

        right = per_device(mesh, run_and_compare)(
            dispatched.routes.source, dispatched.tokens, dispatch_gradient, baseline.operands
        )
        if not all(bool(np.all(shard.data)) for shard in right.addressable_shards):
            raise RuntimeError(f"the baseline {name!r} has moved wrong rows on process {jax.process_index()}")
