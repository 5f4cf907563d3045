"""Programs with ops in flight, and the same with one after the other."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep.bench.layers import layer_programs
from jax_deepep.bench.problem import AXIS, Inputs, Problem, per_device
from jax_deepep.communicator import Communicator
from jax_deepep.ops import pairs
from jax_deepep.ops.combine import combine
from jax_deepep.ops.dispatch import dispatch
from jax_deepep.ops.overlap import combine_done, combine_start, dispatch_done, dispatch_start

OP, MATMUL = "op", "matmul"
PLAIN, IN_FLIGHT = "plain", "in-flight"
STEPS = 4  # of the scan

Run = Callable[[], Any]


def _few(results: Any) -> Any:
    """Return a few rows of each array, so that results of many calls fit into memory."""
    return jax.tree.map(lambda value: value[:8], results)


def op_runs(comm: Communicator, inputs: Inputs, matmul_size: int) -> dict[str, dict[str, Run]]:
    """Return programs of an op and a matmul: PLAIN, IN_FLIGHT, and of the first also OP and MATMUL alone.

    Args:
        comm: native.
        inputs: of the dispatch.
        matmul_size: N of the matmul [N, N] · [N, N].
    """
    problem, mesh = inputs.problem, comm.mesh
    options: dict[str, Any] = {"comm": comm, "layout": problem.layout, "capacity": problem.capacity_rows}
    make = jax.jit(
        lambda key: jax.random.normal(key, (mesh.size * matmul_size, matmul_size)).astype(problem.dtype),
        out_shardings=NamedSharding(mesh, P(AXIS)),
    )
    a, b = map(make, jax.random.split(jax.random.key(0)))
    operands = (inputs.topk_idx, inputs.topk_weights, inputs.x, a, b)

    def multiply(a, b):
        return (a @ b).astype(a.dtype)

    def send(topk_idx, topk_weights, x, a, b):
        return dispatch(x, topk_idx, topk_weights, **options)[0].tokens

    def send_plain(topk_idx, topk_weights, x, a, b):
        return send(topk_idx, topk_weights, x, a, b), multiply(a, b)

    def send_in_flight(topk_idx, topk_weights, x, a, b):
        sent = dispatch_start(x, topk_idx, topk_weights, **options)
        product = sent.meanwhile(multiply, a, b)
        return dispatch_done(sent)[0].tokens, product

    def return_plain(topk_idx, topk_weights, x, a, b):
        received, handle = dispatch(x, topk_idx, topk_weights, **options)
        return combine(received.tokens, handle), multiply(a, b)

    def return_in_flight(topk_idx, topk_weights, x, a, b):
        received, handle = dispatch(x, topk_idx, topk_weights, **options)
        returned = combine_start(received.tokens, handle)
        product = returned.meanwhile(multiply, a, b)
        return combine_done(returned), product

    def backward(function, *operands):
        out, pull_back = jax.vjp(lambda *floats: function(*operands[:2], *floats), *operands[2:])
        return pull_back(out)

    def scan(function, topk_idx, topk_weights, x, a, b):
        def step(state, _):
            x, a = state
            tokens, product = _few(function(topk_idx, topk_weights, x, a, b))
            # The next step needs the results of this one.
            return (x.at[0, 0].set(tokens[0, 0]), a.at[0, 0].set(product[0, 0])), (tokens, product)

        return lax.scan(step, (x, a), None, length=STEPS)[1]

    def run_of(function):
        program = per_device(mesh, lambda *operands: _few(function(*operands)))
        return lambda: program(*operands)

    pair = {PLAIN: send_plain, IN_FLIGHT: send_in_flight}
    cases: dict[str, dict[str, Any]] = {
        "dispatch": {**pair, OP: send, MATMUL: lambda *operands: multiply(*operands[3:])},
        "dispatch, then combine": {PLAIN: return_plain, IN_FLIGHT: return_in_flight},
        "dispatch with gradients": {name: partial(backward, of) for name, of in pair.items()},
        f"dispatch {STEPS} times, in a scan": {name: partial(scan, of) for name, of in pair.items()},
    }
    return {case: {name: run_of(of) for name, of in functions.items()} for case, functions in cases.items()}


@contextlib.contextmanager
def nothing_in_flight() -> Iterator[None]:
    """Let layers that are traced here compute after whole ops what they would compute beside them."""

    def one_after_the_other(call, channel, function, *operands):
        return call.run(), (None, None) if function is None else pairs.values_of(function(*operands))

    with mock.patch.object(pairs, "run_beside", one_after_the_other):
        yield


LAYERS: dict[str, dict[str, Any]] = {  # choices of `MoEConfig`
    PLAIN: {},
    IN_FLIGHT: {},
    "two-batches": {"two_batch_overlap": True},
    "xla": {},
}


def layer_runs(problem: Problem, mesh: Mesh, comm: Communicator, name: str, shared: int) -> dict[str, Run]:
    """Return a layer of LAYERS with shared experts of the inner size `shared`, by its passes.

    Every layer needs a communicator of its own: JAX keeps what it traced by the layer's configuration.
    """
    programs = layer_programs(problem, mesh, comm, shared_intermediate_size=shared, **LAYERS[name])
    runs: dict[str, Run] = {}
    with nothing_in_flight() if name == PLAIN else contextlib.nullcontext():
        for key, (function, operands) in programs.items():
            runs[key] = partial(jax.jit(function).lower(*operands).compile(), *operands)
    return runs
