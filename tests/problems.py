"""Every problem that an implementation must get right, once, for all suites; each named after its point."""

import functools
import os
import zlib
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import oracle
import routings
from implementations import LOW_LATENCY, ON_GPUS
from jax.sharding import AxisType, Mesh
from meshes import expert_axes, groups_of, mesh_named

import jax_deepep as ep
from jax_deepep import launch_variables

# Of every group that is divided further than a problem says: JAX_DEEPEP_NODES=2 runs all suites on two nodes,
# and JAX_DEEPEP_HOSTS=2 pretends that they are hosts: on GPUs rows go between them by NVSHMEM.
NUM_NODES = int(os.environ.get("JAX_DEEPEP_NODES", "1"))
if (rank := launch_variables.rank_in_job()) is not None and (hosts := os.environ.get("JAX_DEEPEP_HOSTS")):
    os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {rank[0] * int(hosts) // rank[1]}"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Problem:
    """Sizes and routing of one dispatch; `routing` names a function of routings.py."""

    name: str
    mesh_name: str = "data × expert"
    axis_types: AxisType = AxisType.Auto
    num_tokens: int = 6
    max_tokens: int = 6
    hidden_size: int = 8
    num_experts: int = 8
    num_topk: int = 3
    dtype: str = "float32"
    layout: str = "expert"
    capacity: int | None = None
    expert_capacity: int | None = None
    alignment: int = 1
    num_nodes: int = NUM_NODES
    routing: str = "random"

    @property
    def mesh(self) -> Mesh:
        return mesh_named(self.mesh_name, self.axis_types)

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        return expert_axes(self.mesh_name)

    @property
    def ranks_per_node(self) -> int | None:
        """None for one node; groups of fewer ranks than `num_nodes` have a node for each."""
        if self.num_nodes == 1:
            return None
        return max(1, groups_of(self.mesh, self.axis_name)[1] // self.num_nodes)

    @property
    def dispatch_options(self) -> dict:
        return {
            "layout": self.layout,
            "capacity": self.capacity,
            "expert_capacity": self.expert_capacity,
            "alignment": self.alignment,
        }

    @property
    def shape(self) -> "Problem":
        """The problem without its data: problems that are equal in it run the same program."""
        return replace(self, name="", routing="")

    def as_run_by(self, implementation: str) -> "Problem":
        """The problem with rows that the implementation supports."""
        if implementation == LOW_LATENCY and self.dtype == "float32":
            return replace(self, dtype="bfloat16")
        return self

    def communicator(self, implementation: str, **options) -> ep.Communicator:
        if implementation == LOW_LATENCY:
            implementation, options = "native", {"mode": "low_latency", **options}
        elif implementation == "native":
            options = {"mode": "throughput", **options}
        return ep.Communicator(
            self.mesh,
            self.axis_name,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_topk,
            max_tokens=self.max_tokens,
            hidden_size=self.hidden_size,
            implementation=implementation,
            ranks_per_node=self.ranks_per_node,
            **options,
        )


@dataclass(frozen=True)
class Inputs:
    """NumPy arrays [devices, ...] in the order (group, rank), and the routes that follow, by group."""

    x: np.ndarray
    x2: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    y: np.ndarray
    bias: np.ndarray
    routes: tuple[oracle.Routes, ...]

    def by_group(self, array: np.ndarray) -> np.ndarray:
        """Split [devices, ...] into [groups, R, ...]."""
        return array.reshape(len(self.routes), len(array) // len(self.routes), *array.shape[1:])

    def from_oracle(self, function) -> np.ndarray:
        """Join function(routes, group) of all groups to [devices, ...]."""
        return np.concatenate([function(routes, group) for group, routes in enumerate(self.routes)])


@functools.cache
def inputs_of(problem: Problem) -> Inputs:
    """Return the same random inputs for a problem every time, in every process."""
    rng = np.random.default_rng(zlib.crc32(problem.name.encode()))
    num_groups, size = groups_of(problem.mesh, problem.axis_name)
    tokens = (num_groups * size, problem.num_tokens)
    dtype = DTYPES[problem.dtype]
    topk_idx = getattr(routings, problem.routing)(rng, problem, size, tokens)
    topk_idx = topk_idx.astype(np.int32)
    topk_weights = rng.uniform(0.1, 1.0, topk_idx.shape).astype(np.float32)
    routes = tuple(
        oracle.route(
            idx,
            weights,
            num_experts=problem.num_experts,
            max_tokens=problem.max_tokens,
            ranks_per_node=problem.ranks_per_node,
            **problem.dispatch_options,
        )
        for idx, weights in zip(
            topk_idx.reshape(num_groups, size, *topk_idx.shape[1:]),
            topk_weights.reshape(num_groups, size, *topk_idx.shape[1:]),
            strict=True,
        )
    )
    x, x2, bias = (rng.normal(size=(*tokens, problem.hidden_size)).astype(dtype) for _ in range(3))
    y = rng.normal(size=(tokens[0], routes[0].capacity, problem.hidden_size)).astype(dtype)
    # Rows without a token must not matter.
    y[~np.concatenate([of_group.mask for of_group in routes])] = np.nan
    return Inputs(x, x2, topk_idx, topk_weights, y, bias, routes)


_ROUTINGS = [
    Problem("random"),
    Problem("one token", num_tokens=1, max_tokens=1),
    Problem("top 1", num_topk=1),
    Problem("top all", num_topk=8),
    Problem("all to one device", routing="to_device_1"),
    Problem("one device receives nothing", routing="none_to_device_0"),
    Problem("some −1", routing="some_none"),
    Problem("all −1", routing="all_none"),
    Problem("invalid entries", routing="invalid", num_topk=5),
    Problem("fewer tokens than max_tokens", num_tokens=5, max_tokens=11),
    Problem("one expert per device", "data × expert 2", num_experts=2, num_topk=2),
    Problem("four experts", num_experts=4),  # one per device, where four devices share them
    Problem("many experts per device", num_experts=32, num_topk=6),
]

# No tokens, with rows of padding or without: the last, empty batch of a data set.
_NO_TOKENS = [
    Problem("no tokens", num_tokens=0),
    Problem("no tokens, alignment 4", num_tokens=0, alignment=4),
    Problem("no tokens, one device", "one device", num_tokens=0, capacity=5),
    Problem("no tokens, Explicit", "node × expert", AxisType.Explicit, num_tokens=0, dtype="bfloat16"),
]

_ROWS = [
    Problem("hidden 37, bfloat16", dtype="bfloat16", hidden_size=37, num_topk=6),
    Problem("hidden 37, float16", dtype="float16", hidden_size=37, num_topk=6),
    Problem("hidden 1", hidden_size=1),
    Problem("hidden 640, bfloat16", dtype="bfloat16", hidden_size=640, num_topk=6),
    Problem("hidden 640", hidden_size=640, num_topk=6),
    Problem("hidden 2056, float16", dtype="float16", hidden_size=2056, num_tokens=3, max_tokens=3),
    Problem("hidden 4100", hidden_size=4100, num_tokens=3, max_tokens=3),
]

_LIMITS = [
    Problem("capacity", capacity=9, routing="skewed"),
    Problem("capacity 0", capacity=0),
    Problem("capacity above the worst case", capacity=100),
    Problem("expert capacity", expert_capacity=3, routing="skewed"),
    Problem("expert capacity 0", expert_capacity=0),
    Problem("alignment 8", alignment=8),
    Problem("alignment 128", alignment=128, num_topk=2),
    Problem("capacity, alignment 8", capacity=16, alignment=8, routing="skewed"),
    Problem("expert capacity, alignment 8", expert_capacity=5, alignment=8, routing="skewed"),
    Problem("both capacities", capacity=7, expert_capacity=5, routing="skewed"),
    Problem("both capacities, alignment 4", capacity=12, expert_capacity=5, alignment=4, routing="skewed"),
    Problem("limits and invalid entries", capacity=8, alignment=4, routing="invalid", dtype="bfloat16"),
]

_TOKEN_MAJOR = [
    replace(problem, name=f"token-major, {problem.name}", layout="token", expert_capacity=None)
    for problem in _ROUTINGS + _NO_TOKENS + _ROWS + _LIMITS
    if problem.name
    in {
        "random", "one token", "top all", "all to one device", "one device receives nothing", "some −1",
        "all −1", "invalid entries", "fewer tokens than max_tokens", "hidden 37, bfloat16", "capacity",
        "capacity 0", "capacity, alignment 8", "many experts per device", "no tokens",
        "no tokens, one device",
    }
]  # fmt: skip

_MESHES = [
    Problem(f"{mesh_name}, {layout}, {axis_types.name}", mesh_name, axis_types, layout=layout,
            routing="some_none", num_experts=16, num_topk=4, dtype="bfloat16")
    for mesh_name, layout, axis_types in [
        ("expert", "expert", AxisType.Auto),
        ("expert", "expert", AxisType.Explicit),
        ("expert", "token", AxisType.Explicit),
        ("data × expert", "expert", AxisType.Explicit),
        ("data × expert 2", "expert", AxisType.Auto),
        ("data × expert 2", "token", AxisType.Auto),
        ("expert × data", "expert", AxisType.Explicit),
        ("node × expert", "expert", AxisType.Auto),
        ("node × expert", "expert", AxisType.Explicit),
        ("node × expert", "token", AxisType.Auto),
        ("one device", "expert", AxisType.Auto),
        ("one device", "token", AxisType.Explicit),
    ]
]  # fmt: skip

# Nodes of a group on one mesh or another; a node of one rank has the sums of no nodes at all.
_NODES = [
    Problem(f"{num_nodes} nodes, {name}", mesh_name, num_nodes=num_nodes, num_experts=16, num_topk=6,
            **{"dtype": "bfloat16", "routing": "some_none", **options})
    for num_nodes, name, mesh_name, options in [
        (2, "expert-major", "expert", {"hidden_size": 37}),
        (2, "token-major, capacity", "node × expert", {"layout": "token", "capacity": 20}),
        (4, "skewed, float16, alignment 4", "expert", {"dtype": "float16", "alignment": 4}),
        (8, "a rank each", "expert", {"layout": "token"}),
        (2, "groups", "data × expert", {"dtype": "float32"}),
    ]
]  # fmt: skip

PROBLEMS = _ROUTINGS + _NO_TOKENS + _ROWS + _LIMITS + _TOKEN_MAJOR + _MESHES + _NODES

# A program takes ten times as long to compile with implementation="xla". So that runs a problem of every kind
# that differs in its JAX code, and all others that have the shape of one of them: they run its program.
_KINDS_IN_XLA = {
    "random", "invalid entries", "fewer tokens than max_tokens", "many experts per device", "no tokens",
    "no tokens, one device", "hidden 37, bfloat16", "capacity", "capacity 0", "both capacities, alignment 4",
    "token-major, random", "token-major, invalid entries", "token-major, capacity, alignment 8",
    "token-major, no tokens", "expert × data, expert, Explicit", "node × expert, token, Auto",
    "one device, expert, Auto", "2 nodes, expert-major",
}  # fmt: skip
# The code that those above run, with other sizes, dtypes and kinds of mesh axes.
_NIGHTLY_KINDS_IN_XLA = {
    "top 1", "four experts", "hidden 37, float16", "expert capacity", "alignment 8",
    "token-major, many experts per device", "expert, expert, Explicit", "one device, token, Explicit",
}  # fmt: skip
_SHAPES_IN_XLA, _NIGHTLY_SHAPES_IN_XLA = (
    {problem.shape for problem in PROBLEMS if problem.name in kinds}
    for kinds in (_KINDS_IN_XLA, _NIGHTLY_KINDS_IN_XLA)
)


def is_run_in_xla(problem: Problem) -> bool:
    return problem.shape in _SHAPES_IN_XLA | _NIGHTLY_SHAPES_IN_XLA


def is_nightly(implementation: str, problem: Problem) -> bool:
    return implementation == "xla" and problem.shape not in _SHAPES_IN_XLA


# On CPU the modes differ in their JAX code alone.
_KINDS_IN_LOW_LATENCY = {
    "random", "invalid entries", "no tokens", "both capacities, alignment 4", "token-major, capacity",
    "node × expert, expert, Explicit",
}  # fmt: skip


def is_run_in_low_latency(problem: Problem) -> bool:
    return ON_GPUS or problem.name in _KINDS_IN_LOW_LATENCY
