"""Beyond single problems: many routings of one program, and several communicators in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import IMPLEMENTATIONS, OPS_ARE_CAPTURED, assert_same_bits, assert_same_sums
from meshes import device_axis, fetch, per_device, put_on_mesh, run_per_device
from problems import Problem, inputs_of

import jax_deepep as ep

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_many_random_routings(layout: str, implementation: str) -> None:
    """One compiled program against the oracle, from sparse to skewed to mostly invalid routings."""
    problem = Problem("many routings", num_topk=4, layout=layout, capacity=16, alignment=4)
    comm = problem.communicator(implementation)
    inputs = inputs_of(problem)

    def body(x, topk_idx, topk_weights, y):
        dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
        out = ep.combine(y, handle, comm=comm)
        counts = (handle.num_received, handle.num_dropped, handle.num_invalid)
        return dispatched.tokens, handle.source, counts, out

    program = jax.jit(per_device(body, problem.mesh, problem.axis_name))
    rng = np.random.default_rng(3)
    spec = device_axis(problem.mesh, problem.axis_name)
    x, topk_weights, y = inputs.x, inputs.topk_weights, np.nan_to_num(inputs.y, nan=3.5)
    for _ in range(25):
        lowest, highest = rng.integers(-6, 1), rng.integers(1, 14)
        topk_idx = rng.integers(lowest, highest, inputs.topk_idx.shape).astype(np.int32)
        tokens, source, counts, out = fetch(
            program(*put_on_mesh((x, topk_idx, topk_weights, y), problem.mesh, spec))
        )
        for group in range(len(inputs.routes)):
            of_group = slice(comm.size * group, comm.size * (group + 1))
            routes = oracle.route(
                topk_idx[of_group],
                topk_weights[of_group],
                num_experts=problem.num_experts,
                max_tokens=problem.max_tokens,
                ranks_per_node=problem.ranks_per_node,
                **problem.dispatch_options,
            )
            np.testing.assert_array_equal(source[of_group], routes.source)
            expected = oracle.copy_rows(routes, x[of_group])
            assert_same_bits(tokens[of_group][routes.mask], expected[routes.mask])
            for count, name in zip(counts, ("num_received", "num_dropped", "num_invalid"), strict=True):
                np.testing.assert_array_equal(count[of_group], getattr(routes, name))
            expected = oracle.combine(routes, y[of_group], weighted=layout == "expert")
            assert_same_sums(out[of_group], expected, implementation)


def test_communicators_of_different_shapes_in_one_program(implementation: str) -> None:
    """Three on one mesh, one of them with other axes; the results of each feed the next."""
    first = Problem("first", num_experts=8, num_topk=2, max_tokens=9)
    second = Problem("second", num_experts=32, num_topk=6, layout="token")
    third = Problem("third", num_experts=4, num_topk=1, alignment=8, capacity=16)
    problems = (first, second, third)
    comms = [problem.communicator(implementation) for problem in problems]
    inputs = [inputs_of(problem) for problem in problems]

    def program(x, *routings):
        outs = []
        for problem, comm, routing in zip(problems, comms, routings, strict=True):
            dispatched, handle = ep.dispatch(x, *routing, comm=comm, **problem.dispatch_options)
            x = ep.combine(dispatched.tokens, handle, comm=comm, weighted=False, bias=x)
            outs.append(x)
        return outs

    routings = [(each.topk_idx, each.topk_weights) for each in inputs]
    outs = run_per_device(program, first.mesh, first.axis_name, inputs[0].x, *routings)
    x = inputs[0].x
    for out, each in zip(outs, inputs, strict=True):
        of_group = each.by_group(x)
        x = each.from_oracle(
            lambda routes, group, of_group=of_group: oracle.combine(
                routes, oracle.copy_rows(routes, of_group[group]), weighted=False, bias=of_group[group]
            )
        )
        assert_same_sums(out, x, implementation)
        x = out  # the next one starts from the same bits


def test_communicators_along_different_axes_in_one_program(implementation: str) -> None:
    """Groups along one axis, along the other, and of all devices along both, in either order."""
    along_both = Problem("along both axes", "node × expert", num_topk=2)
    mesh = along_both.mesh
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "max_tokens": 6, "hidden_size": 8}
    axes = ["expert", "node", ("node", "expert"), ("expert", "node")]
    comms = [ep.Communicator(mesh, axis, **sizes, implementation=implementation) for axis in axes]
    inputs = inputs_of(along_both)

    def program(x, topk_idx, topk_weights):
        sources = []
        for comm in comms:
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm)
            sources.append((handle.source, dispatched.num_rows))
        return sources

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights)
    results = run_per_device(program, mesh, ("node", "expert"), *arrays)
    in_mesh = np.arange(mesh.size).reshape(mesh.devices.shape)
    groups_along = [in_mesh, in_mesh.T, in_mesh.reshape(1, -1), in_mesh.T.reshape(1, -1)]
    for groups, (source, num_rows) in zip(groups_along, results, strict=True):
        for group in groups:
            routes = oracle.route(
                inputs.topk_idx[group], inputs.topk_weights[group], num_experts=8, max_tokens=6
            )
            np.testing.assert_array_equal(source[group], routes.source)
            np.testing.assert_array_equal(num_rows[group], routes.num_rows)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_operands_that_are_constants(layout: str, implementation: str) -> None:
    """XLA keeps constants elsewhere than arguments; peers read x and y, and the cotangents of all results.

    In an op that is captured in a CUDA graph they are an error.
    """
    problem = Problem(f"constants, {layout}", layout=layout)
    comm = problem.communicator(implementation)
    inputs = inputs_of(problem)
    y = np.nan_to_num(inputs.y[0], nan=3.5)
    weights = np.linspace(1, 2, len(y), dtype=np.float32)
    if layout == "token":
        weights = np.stack([weights] * problem.num_topk, axis=1)
    constants = (inputs.x[0], y, y[::-1] / 2, weights, inputs.bias[0])  # the same on every device

    def program(topk_idx, topk_weights, x, y, *cotangents):
        def ops(x, topk_weights, y):
            dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            return dispatched.tokens, handle.weights, ep.combine(y, handle, comm=comm)

        (tokens, _, out), backward = jax.vjp(ops, x, topk_weights, y)
        return tokens, out, backward(cotangents)

    def with_constants(topk_idx, topk_weights):
        return program(topk_idx, topk_weights, *map(jnp.asarray, constants))

    routing = (inputs.topk_idx, inputs.topk_weights)
    as_arguments = [np.stack([constant] * len(inputs.x)) for constant in constants]
    # With check_vma, gradients for constants, which do not vary over devices, would be summed over them.
    expected_tokens, *expected = run_per_device(
        program, problem.mesh, problem.axis_name, *routing, *as_arguments, check_vma=False
    )
    if OPS_ARE_CAPTURED and comm.topology.platform == "cuda" and implementation == "native":
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"constant of the program.*an argument"):
            run_per_device(with_constants, problem.mesh, problem.axis_name, *routing, check_vma=False)
        return
    tokens, *results = run_per_device(
        with_constants, problem.mesh, problem.axis_name, *routing, check_vma=False
    )
    mask = np.concatenate([routes.mask for routes in inputs.routes])
    assert_same_bits(tokens[mask], expected_tokens[mask])
    jax.tree.map(lambda got, expected: assert_same_sums(got, expected, implementation), results, expected)
