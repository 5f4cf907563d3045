"""The lists and the capacity that the bench computes for its baselines on GPUs, and their module."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from meshes import fetch

from jax_deepep import Communicator, CommunicatorError
from jax_deepep.bench.baselines import cuda_module, rows
from jax_deepep.bench.problem import (
    AXIS,
    Problem,
    devices_of_tokens,
    draw_inputs,
    fitting_capacity,
    per_device,
    rows_of_devices,
)
from jax_deepep.communicator import native_module
from jax_deepep.ops import reference
from jax_deepep.ops.handle import Routes, RouteShape

pytestmark = pytest.mark.collectives
RANKS = jax.device_count()
TOKENS, TOPK, EXPERTS, CAPACITY = 6, 3, 24, 32


@pytest.fixture(params=["expert", "token"])
def routed(request: pytest.FixtureRequest) -> Iterator[tuple[Mesh, RouteShape, np.ndarray, Routes]]:
    """Dispatch a random routing; return the mesh, the shape, the routing and the routes, without pairs."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    random = np.random.default_rng(0)
    topk_idx = np.argsort(random.random((RANKS * TOKENS, EXPERTS)), axis=1)[:, :TOPK].astype(np.int32)
    with Communicator(
        mesh, AXIS, num_experts=EXPERTS, num_experts_per_tok=TOPK, max_tokens=TOKENS + 1, hidden_size=8,
        implementation="xla",
    ) as comm:  # fmt: skip
        shape = RouteShape(comm, request.param, TOKENS, CAPACITY, 1, None)

        def dispatch(topk_idx):
            x, weights = jnp.zeros((TOKENS, 8), jnp.bfloat16), jnp.ones((TOKENS, TOPK), jnp.float32)
            return reference.dispatch(shape, x, topk_idx, weights)[1].routes

        yield mesh, shape, topk_idx, per_device(mesh, dispatch)(topk_idx)


def by_rank(array: jax.Array) -> np.ndarray:
    return fetch(array).reshape(RANKS, -1, *array.shape[1:])


def test_a_sum_has_every_row_of_its_token_once(routed) -> None:
    mesh, shape, _, routes = routed
    codes = by_rank(per_device(mesh, lambda routes: rows.sum_inputs(shape, routes))(routes))
    sources, destinations = by_rank(routes.source), by_rank(routes.destination)
    for rank in range(RANKS):
        for token in range(TOKENS):
            found = []
            for code in codes[rank, token]:
                if code < 0:
                    continue
                owner, at = divmod(code, CAPACITY + RANKS * (TOKENS + 1))
                # A row, or the sum of all rows of a pair.
                summed = [at] if at < CAPACITY else np.flatnonzero(sources[owner] == at - CAPACITY)
                found += [owner * CAPACITY + row for row in summed]
            assert len(found) == len(set(found))
            assert set(found) == set(destinations[rank, token])


def test_a_table_of_pairs_has_every_row_once_and_begins_with_the_next_rank(routed) -> None:
    mesh, shape, _, routes = routed
    sources = by_rank(routes.source)
    if shape.layout == "expert":
        tables = np.full((RANKS, 1 + RANKS * TOKENS, 4), -1, np.int32)
        for table, source in zip(tables, sources, strict=True):
            pairs = np.unique(source[source >= 0])
            table[0, 0] = len(pairs)
            for line, pair in zip(table[1:], pairs, strict=False):
                received = np.flatnonzero(source == pair)
                line[: 1 + len(received)] = [pair, *received]
        routes = routes._replace(pairs=tables.reshape(-1, 4))
    tables = by_rank(per_device(mesh, lambda routes: rows.pair_table(shape, routes))(routes))
    for rank, (table, source) in enumerate(zip(tables, sources, strict=True)):
        lines = table[1 : 1 + table[0, 0]]
        found = [(row, line[0]) for line in lines for row in line[1:] if row >= 0]
        assert sorted(found) == [(row, code) for row, code in enumerate(source) if code >= 0]
        assert lines[0, 0] // (TOKENS + 1) == (rank + 1) % RANKS


def test_rows_of_devices_are_what_a_dispatch_receives(routed) -> None:
    mesh, shape, topk_idx, routes = routed
    problem = Problem(
        TOKENS, 8, TOPK, EXPERTS, RANKS, layout=shape.layout, capacity="fitting", dtype="float32"
    )
    received = np.sum(by_rank(routes.source) >= 0, axis=1)
    np.testing.assert_array_equal(rows_of_devices(topk_idx, problem), received)

    inputs = draw_inputs(problem, mesh)
    everyones = problem.draw_routing(np.random.default_rng(0))[0]
    there = devices_of_tokens(everyones, problem).reshape(RANKS, TOKENS, RANKS)
    remote = there.sum() - sum(there[rank, :, rank].sum() for rank in range(RANKS))
    assert inputs.remote_tokens == round(remote / RANKS)
    assert inputs.rows == rows_of_devices(everyones, problem).sum()  # none dropped
    assert inputs.problem.capacity_rows >= rows_of_devices(everyones, problem).max()


@pytest.mark.parametrize(
    ("most_rows", "expected"), [(0, 0), (1, 8), (1023, 1024), (1024, 1024), (1025, 1152)]
)
def test_fitting_capacity(most_rows: int, expected: int) -> None:
    assert fitting_capacity(most_rows) == expected


def test_the_module_of_the_kernels() -> None:
    """Only the bench registers them; where they are not built, it says so."""
    if native_module.unsupported_reason("cuda"):
        with pytest.raises(ImportError, match=r"is not built|switches native ops off"):
            cuda_module.load()
        return
    assert not [target for target in native_module.load("cuda").targets() if "rows" in target]
    try:
        module = cuda_module.load()
    except ImportError as error:
        assert "the kernels of the bench are not built" in str(error)  # noqa: PT017
        return
    targets = ("gather_rows", "add_rows", "sum_rows")
    assert set(module.handlers()) == {f"jax_deepep_{target}" for target in targets}
    with pytest.raises(RuntimeError, match="num_ranks: expected 2 to 72, got 1"):
        module.LinkRank(ordinal=0, rank=0, num_ranks=1, rows=1, row_bytes=16, copy_bytes=7168)


def test_device_time_is_of_gpus() -> None:
    mesh = Mesh(np.array(jax.local_devices()[:1]), (AXIS,))
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "max_tokens": 1, "hidden_size": 8}
    with (
        Communicator(mesh, AXIS, **sizes, implementation="xla") as comm,
        pytest.raises(CommunicatorError, match="last_ops: expected native ops on GPUs, got xla ones"),
    ):
        comm.last_ops()
