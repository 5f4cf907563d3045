"""Ops in two parts give the bits of whole ops, forward and backward, and cannot be used wrongly."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, LOW_LATENCY, assert_same_bits, cases
from jax import lax
from meshes import per_device, run_per_device
from moe_layer import LAYER, LAYERS, communicator, layer_inputs
from problems import Problem

import jax_deepep as ep

TOKEN_MAJOR = Problem("layer, token-major", layout="token", routing="invalid", capacity=12)
PROBLEMS = [*LAYERS, TOKEN_MAJOR]
native = pytest.param("native", id="native")


# What the tests compute beside ops is exact: XLA rounds differently where it fuses operations differently.
def doubled(rows):
    return 2 * jnp.maximum(rows, 0)


def experts(dispatched):
    return jnp.where(dispatched.mask[:, None], doubled(dispatched.tokens), 0)


def whole(comm, problem: Problem, x, topk_weights, bias, topk_idx):
    """Apply a layer with a shared expert, whose results go along the routes as well."""
    shared = doubled(x)
    dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
    again, _ = ep.dispatch(shared, handle=handle)
    rows = experts(dispatched) + jnp.where(dispatched.mask[:, None], again.tokens, 0)
    return ep.combine(rows, handle, bias=bias), jnp.abs(shared)


def in_parts(comm, problem: Problem, x, topk_weights, bias, topk_idx):
    """Do the same, and compute while ops are in flight."""
    sent = ep.dispatch_start(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
    shared = sent.meanwhile(doubled, x)
    dispatched, handle = ep.dispatch_done(sent)
    sent = ep.dispatch_start(shared, handle=handle)
    rows = sent.meanwhile(experts, dispatched)
    again, _ = ep.dispatch_done(sent)
    rows = rows + jnp.where(dispatched.mask[:, None], again.tokens, 0)
    returned = ep.combine_start(rows, handle, bias=bias)
    beside = returned.meanwhile(jnp.abs, shared)
    return ep.combine_done(returned), beside


def gradients_of(layer, comm, problem: Problem, *, remat: bool = False):
    """Return the layer with its gradients, on per-device values."""

    def step(*args):
        *operands, topk_idx, g = args
        bound = functools.partial(layer, comm, problem, topk_idx=topk_idx)
        out, backward = jax.vjp(jax.checkpoint(bound) if remat else bound, *operands)
        return out, backward((g, 2 * g))

    return step


def operands_of(implementation: str, problem: Problem = LAYER) -> tuple[np.ndarray, ...]:
    inputs = layer_inputs(problem)
    # The widest rows of low-latency mode.
    dtype = jnp.bfloat16 if implementation == LOW_LATENCY else jnp.float32
    x, bias, g = (array.astype(dtype) for array in (inputs.x, inputs.bias, inputs.g))
    return x, inputs.topk_weights, bias, inputs.topk_idx, g


@cases(
    "problem check_vma remat", PROBLEMS, [True, False], [True, False],
    in_xla=lambda problem, vma, remat: problem is LAYER and vma,
    in_low_latency=lambda problem, vma, remat: vma,
    # By pairs: every problem with both values of either; one problem with all of both.
    nightly=lambda implementation, problem, vma, remat: (
        vma != remat and not (problem is LAYER and implementation != "xla")
    ),
)  # fmt: skip
def test_the_bits_of_whole_ops(problem: Problem, check_vma: bool, remat: bool, implementation: str) -> None:
    comm = communicator(implementation, problem)
    results = [
        run_per_device(
            gradients_of(layer, comm, problem, remat=remat),
            problem.mesh,
            problem.axis_name,
            *operands_of(implementation, problem),
            check_vma=check_vma,
        )
        for layer in (whole, in_parts)
    ]
    jax.tree.map(assert_same_bits, *reversed(results))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_ops_in_flight(implementation: str) -> None:
    """Their parts interleave, and whole ops run beside one of them."""
    comm = communicator(implementation)
    inputs = layer_inputs()

    def program(x, topk_weights, topk_idx):
        first = ep.dispatch_start(x, topk_idx, topk_weights, comm=comm)
        beside, along = ep.dispatch(2 * x, topk_idx, topk_weights, comm=comm)
        second = ep.combine_start(beside.tokens, along)
        received, handle = ep.dispatch_done(first)
        third = ep.dispatch_start(3 * x, topk_idx, topk_weights, comm=comm, after=received.tokens)
        return ep.combine_done(second), ep.combine(received.tokens, handle), ep.dispatch_done(third)

    def plain(x, topk_weights, topk_idx):
        (one, h1), (two, h2), three = (
            ep.dispatch(k * x, topk_idx, topk_weights, comm=comm) for k in (1, 2, 3)
        )
        return ep.combine(two.tokens, h2), ep.combine(one.tokens, h1), three

    def live(of_two, of_one, three):
        dispatched, _ = three
        return of_two, of_one, jnp.where(dispatched.mask[:, None], dispatched.tokens, 0)

    arrays = (inputs.x, inputs.topk_weights, inputs.topk_idx)
    results = [
        run_per_device(lambda *a, run=run: live(*run(*a)), LAYER.mesh, LAYER.axis_name, *arrays)
        for run in (program, plain)
    ]
    jax.tree.map(assert_same_bits, *results)


@pytest.mark.parametrize("implementation", [native])
def test_vmap(implementation: str) -> None:
    comm = communicator(implementation)

    def body(layer, *args):
        *floats, topk_idx, g = args
        step = gradients_of(layer, comm, LAYER)
        batch = [jnp.stack([a, 2 * a]) for a in (*floats, g)]
        return jax.vmap(lambda *operands: step(*operands[:-1], topk_idx, operands[-1]))(*batch)

    results = [
        run_per_device(
            functools.partial(body, layer), LAYER.mesh, LAYER.axis_name, *operands_of(implementation)
        )
        for layer in (whole, in_parts)
    ]
    jax.tree.map(assert_same_bits, *results)


@pytest.mark.parametrize("implementation", [native])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_rows_of_integers(implementation: str, dtype: type) -> None:
    """Their weights have gradients."""
    comm = communicator(implementation)
    inputs = layer_inputs()
    payload = np.random.default_rng(1).integers(0, 100, (*inputs.x.shape[:2], 7)).astype(dtype)

    def step(in_two: bool, x, topk_weights, topk_idx):
        def weights_of(topk_weights):
            if in_two:
                dispatched, _ = ep.dispatch_done(ep.dispatch_start(x, topk_idx, topk_weights, comm=comm))
            else:
                dispatched, _ = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
            rows = jnp.where(dispatched.mask[:, None], dispatched.tokens, 0)
            return jnp.sum(dispatched.weights**2), rows

        gradient, rows = jax.grad(weights_of, has_aux=True)(topk_weights)
        return gradient, rows

    arrays = (payload, inputs.topk_weights, inputs.topk_idx)
    results = [
        run_per_device(functools.partial(step, in_two), LAYER.mesh, LAYER.axis_name, *arrays)
        for in_two in (False, True)
    ]
    jax.tree.map(assert_same_bits, *results)


def trace(function) -> None:
    """Trace a function of the operands of a dispatch."""
    inputs = layer_inputs()
    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights)
    jax.eval_shape(per_device(function, LAYER.mesh, LAYER.axis_name), *arrays)


def start(*operands) -> ep.InFlight:
    return ep.dispatch_start(*operands, comm=communicator("native"))


def done(in_flight):
    return ep.dispatch_done(in_flight)[0].tokens


def test_done_takes_an_op_once() -> None:
    def twice(*operands):
        in_flight = start(*operands)
        return done(in_flight), done(in_flight)

    with pytest.raises(ValueError, match="dispatch_done: expected an op in flight, got one that has ended"):
        trace(twice)

    def too_late(*operands):
        in_flight = start(*operands)
        tokens = done(in_flight)
        return in_flight.meanwhile(jnp.sin, tokens)

    with pytest.raises(ValueError, match="meanwhile: expected an op in flight, got one that has ended"):
        trace(too_late)


def test_done_takes_its_own_kind() -> None:
    with pytest.raises(TypeError, match="expected one of combine_start, got one of dispatch_start"):
        trace(lambda *operands: ep.combine_done(start(*operands)))
    with pytest.raises(TypeError, match="in_flight: expected what dispatch_start returned, got"):
        trace(lambda x, *_: ep.dispatch_done(x))


def test_an_op_in_flight_stays_in_its_function() -> None:
    def into_a_scan(*operands):
        in_flight = start(*operands)
        return lax.scan(lambda carry, _: (carry, done(in_flight)), 0.0, None, length=1)

    with pytest.raises(ValueError, match="expected an op that was started in this function"):
        trace(into_a_scan)
    with pytest.raises(TypeError, match="InFlight"):
        trace(lambda *operands: jax.jit(start)(*operands))


def test_two_ops_at_most() -> None:
    def three(*operands):
        ops = [start(*operands) for _ in range(3)]
        return [done(in_flight) for in_flight in ops]

    with pytest.raises(
        ValueError, match="dispatch_start: expected at most 2 ops of a communicator in flight"
    ):
        trace(three)

    def one_after_the_other(*operands):
        return [done(start(*operands)) for _ in range(5)]

    trace(one_after_the_other)


def test_arguments_are_checked_as_those_of_whole_ops() -> None:
    comm = communicator("native")
    with pytest.raises(TypeError, match="topk_idx, topk_weights: expected arrays, got None"):
        trace(lambda x, *_: ep.dispatch_start(x, comm=comm))
    with pytest.raises(TypeError, match=r"handle: expected a jax_deepep\.Handle"):
        trace(lambda x, *_: ep.combine_start(x, None))


def test_an_op_that_is_never_ended_is_not_run() -> None:
    """Its channel is free again."""
    inputs = layer_inputs()

    def program(*operands):
        for _ in range(3):
            start(*operands)
        return done(start(*operands))

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights)
    assert calls_of(program, *arrays) == calls_of(lambda *operands: done(start(*operands)), *arrays)


def calls_of(function, *arrays) -> Counter:
    """Return how often a program of per-device values has each custom call."""
    text = jax.jit(per_device(function, LAYER.mesh, LAYER.axis_name)).lower(*arrays).as_text()
    return Counter(re.findall(r"custom_call @(jax_deepep_\w+)", text))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere start and done are two calls")
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_as_many_ops_as_whole_ones(remat: bool) -> None:
    """A start that is recomputed for its token alone is no op."""
    comm = communicator("native")
    whole_calls, calls = (
        calls_of(gradients_of(layer, comm, LAYER, remat=remat), *operands_of("native"))
        for layer in (whole, in_parts)
    )
    assert calls == whole_calls


@pytest.mark.collectives
@pytest.mark.parametrize("implementation", [native, LOW_LATENCY])
def test_beside_collectives_of_xla(implementation: str) -> None:
    """Both need peers and, on GPUs, SMs."""
    comm = communicator(implementation)
    axis, size = LAYER.axis_name, comm.size

    def program(exchanged: bool, x, topk_weights, bias, topk_idx, g):
        layer = in_parts if exchanged else whole

        def body(x, _):
            first = ep.dispatch_start(x, topk_idx, topk_weights, comm=comm) if exchanged else None
            total = lax.psum(jnp.max(jnp.abs(x)), axis)
            blocks = lax.all_to_all(jnp.stack([x] * size), axis, 0, 0)
            if first is None:
                dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
            else:
                dispatched, handle = ep.dispatch_done(first)
            out, beside = layer(comm, LAYER, x, topk_weights, bias, topk_idx)
            back = ep.combine(experts(dispatched), handle)
            return jnp.maximum(out, back), (total, jnp.max(blocks, axis=0), beside)

        return lax.scan(body, x, None, length=5)

    results = [
        run_per_device(
            functools.partial(program, exchanged), LAYER.mesh, LAYER.axis_name, *operands_of(implementation)
        )
        for exchanged in (False, True)
    ]
    jax.tree.map(assert_same_bits, *results)
