"""One MoE layer with linear experts, and its gradients in closed form: for the tests of transformations."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from meshes import device_axis, per_device, put_on_mesh
from problems import Problem, inputs_of

import jax_deepep as ep

LAYER = Problem("layer", num_tokens=5, max_tokens=6, hidden_size=8, num_experts=8, routing="some_none")

# What holds for the layer must also hold where rows are dropped, padded and ignored.
LAYERS = [
    LAYER,
    Problem("layer, capacity", capacity=10, routing="skewed"),
    Problem("layer, expert capacity, alignment 4", expert_capacity=5, alignment=4, routing="skewed"),
    Problem("layer, invalid entries", routing="invalid", num_topk=4, capacity=12, alignment=2),
]

PARAMETERS = ("x", "topk_weights", "matrices", "bias")


@functools.cache
def communicator(implementation: str, problem: Problem = LAYER) -> ep.Communicator:
    return problem.communicator(implementation)


def grouped_experts(dispatched, matrices):
    return jax.lax.ragged_dot(dispatched.tokens, matrices, dispatched.group_sizes)


def masked_experts(dispatched, matrices):
    """Do the same without ragged_dot, which vmap does not support with batched group sizes."""
    rows, ends = jnp.arange(dispatched.mask.size), jnp.cumsum(dispatched.group_sizes)
    expert = jnp.sum(rows[:, None] >= ends[None, :], axis=1)
    tokens = jnp.where(dispatched.mask[:, None], dispatched.tokens, 0)
    return jnp.einsum("ch,chj->cj", tokens, matrices[expert])


def moe(comm, x, topk_weights, matrices, bias, topk_idx, experts=grouped_experts, **options):
    """Apply the layer to per-device values; `matrices` [L, H, H] are those of this device's experts."""
    dispatched, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **options)
    return ep.combine(experts(dispatched, matrices), handle, comm=comm, bias=bias)


@dataclass(frozen=True)
class LayerInputs:
    """NumPy arrays [devices, ...]: operands of `moe`, a cotangent g of its result, expected results."""

    x: np.ndarray
    topk_weights: np.ndarray
    matrices: np.ndarray
    bias: np.ndarray
    topk_idx: np.ndarray
    g: np.ndarray
    out: np.ndarray
    gradients: dict[str, np.ndarray]
    y_gradient: np.ndarray
    mask: np.ndarray

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        return (self.x, self.topk_weights, self.matrices, self.bias, self.topk_idx)

    @property
    def expected(self) -> tuple[np.ndarray, ...]:
        """Gradients of the differentiable operands, in order."""
        return tuple(self.gradients[name] for name in PARAMETERS)


@functools.cache
def layer_inputs(problem: Problem = LAYER) -> LayerInputs:
    """Return the operands of the layer for a problem, and results and gradients in float64."""
    inputs = inputs_of(problem)
    rng = np.random.default_rng(0)
    size = problem.hidden_size
    g = rng.normal(size=inputs.x.shape).astype(np.float32)
    of_all = rng.normal(size=(problem.num_experts, size, size)).astype(np.float32)
    matrices = np.concatenate(
        [of_all.reshape(routes.num_devices, -1, size, size) for routes in inputs.routes]
    )
    x, bias = inputs.by_group(inputs.x), inputs.by_group(inputs.bias)
    results = [
        oracle.moe_gradients(routes, x[group], bias[group], of_all, inputs.by_group(g)[group])
        for group, routes in enumerate(inputs.routes)
    ]
    gradients = {
        "x": np.concatenate([result.x for result in results]),
        "topk_weights": np.concatenate([result.topk_weights for result in results]),
        "matrices": np.concatenate([result.expert_matrices for result in results]).reshape(matrices.shape),
        "bias": np.concatenate([result.bias for result in results]),
    }
    return LayerInputs(
        inputs.x, inputs.topk_weights, matrices, inputs.bias, inputs.topk_idx, g,
        out=np.concatenate([result.out for result in results]),
        gradients=gradients,
        y_gradient=np.concatenate([result.y for result in results]),
        mask=np.concatenate([routes.mask for routes in inputs.routes]),
    )  # fmt: skip


@functools.cache
def training_step(implementation: str, problem: Problem = LAYER, *, check_vma: bool = True):
    """Return the layer with its gradients, jitted and compiled, and its operands on the mesh.

    The gradients are those of per-device values, inside shard_map, where a device's cotangent reaches the
    operands of its peers.
    """
    comm = communicator(implementation, problem)
    inputs = layer_inputs(problem)

    def step(*args):
        *operands, topk_idx, g = args
        layer = functools.partial(moe, comm, topk_idx=topk_idx, **problem.dispatch_options)
        out, backward = jax.vjp(layer, *operands)
        return out, backward(g)

    mesh, axis = problem.mesh, problem.axis_name
    arrays = put_on_mesh((*inputs.operands, inputs.g), mesh, device_axis(mesh, axis))
    jitted = jax.jit(per_device(step, mesh, axis, check_vma=check_vma))
    return jitted, jitted.lower(*arrays).compile(), arrays


def assert_close(got, expected, tolerance: float = 1e-5) -> None:
    """Compare pytrees of arrays, relative to the largest element."""

    def compare(one: np.ndarray, other: np.ndarray) -> None:
        scale = max(1.0, float(np.abs(other).max(initial=0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)

    jax.tree.map(compare, got, expected)
