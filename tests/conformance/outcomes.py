"""What dispatch, a dispatch along a handle and combine give for a problem, with gradients, in one program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from meshes import compiled, device_axis, fetch, per_device, put_on_mesh
from problems import Inputs, Problem, inputs_of

import jax_deepep as ep


class Outcome(NamedTuple):
    inputs: Inputs
    cotangents: dict[str, np.ndarray]  # by the result that they belong to
    results: dict[str, Any]  # by op
    gradients: dict[str, tuple[np.ndarray, ...]]  # by op, of its operands in order


@functools.cache
def outcome(problem: Problem, implementation: str) -> Outcome:
    """Run everything that the contract says about one problem."""
    problem = problem.as_run_by(implementation)
    inputs = inputs_of(problem)
    cotangents = {"tokens": inputs.y, "weights": _weight_cotangent(inputs), "out": inputs.x2}
    arrays = (inputs.x, inputs.x2, inputs.topk_idx, inputs.topk_weights, inputs.y, inputs.bias, cotangents)
    arrays = put_on_mesh(arrays, problem.mesh, device_axis(problem.mesh, problem.axis_name))
    results, gradients = fetch(_program(problem.shape, implementation)(*arrays))
    return Outcome(inputs, cotangents, results, gradients)


def _weight_cotangent(inputs: Inputs) -> np.ndarray:
    """A cotangent of the router weights of all rows, NaN where there is none."""
    rng = np.random.default_rng(0)
    if inputs.routes[0].layout == "expert":
        here = np.concatenate([routes.mask for routes in inputs.routes])
    else:
        here = np.concatenate([routes.row_topk[0] >= 0 for routes in inputs.routes])
    return np.where(here, rng.normal(size=here.shape), np.nan).astype(np.float32)


@functools.cache
def _program(shape: Problem, implementation: str) -> Callable[..., tuple[dict, dict]]:
    comm = shape.communicator(implementation)
    weights_name = "weights" if shape.layout == "expert" else "topk_weights"

    def program(x, x2, topk_idx, topk_weights, y, bias, cotangents):
        def dispatch(x, topk_weights):
            return ep.dispatch(x, topk_idx, topk_weights, comm=comm, **shape.dispatch_options)

        def sent(x, topk_weights):
            dispatched, _ = dispatch(x, topk_weights)
            return dispatched.tokens, getattr(dispatched, weights_name)

        def combined(y, topk_weights, bias):
            return ep.combine(y, dispatch(x, topk_weights)[1], comm=comm, bias=bias)

        def unweighted(y):
            return ep.combine(y, handle, comm=comm, weighted=False)

        dispatched, handle = dispatch(x, topk_weights)
        results = {
            "dispatched": dispatched,
            "handle": handle,
            "again": ep.dispatch(x2, handle=handle, comm=comm)[0],
            "default": ep.combine(y, handle, comm=comm, bias=bias),
            "unweighted": unweighted(y),
        }
        _, of_dispatch = jax.vjp(sent, x, topk_weights)
        _, of_combine = jax.vjp(combined, y, topk_weights, bias)
        _, of_unweighted = jax.vjp(unweighted, y)
        return results, {
            "dispatch": of_dispatch((cotangents["tokens"], cotangents["weights"])),
            "combine": of_combine(cotangents["out"]),
            "unweighted": of_unweighted(cotangents["out"]),
        }

    return compiled(per_device(program, shape.mesh, shape.axis_name))
