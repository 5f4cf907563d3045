"""What a communicator counts: rows that crossed it, and invalid routing entries."""

import jax
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from meshes import device_axis, fetch, per_device, put_on_mesh
from problems import Problem, inputs_of

import jax_deepep as ep

COUNTED = [
    Problem("random"),
    Problem("token-major, random", layout="token"),
    Problem("capacity", capacity=9, routing="skewed"),
    Problem("expert, some −1", "expert", routing="some_none"),
    Problem("invalid entries", routing="invalid", num_topk=5),
]


def rows_between(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return int [groups, R, R]: rows that a dispatch sends, and sums that a combine sends back.

    A row crosses once per (token, device), however many experts of the device the token goes to.
    """
    there, back = [], []
    for routes in inputs_of(problem).routes:
        pairs = {(token.device, token.number, device) for device, _, token in routes.live_rows()}
        rows = np.zeros((routes.num_devices, routes.num_devices), np.int64)
        for source, _, device in pairs:
            rows[source, device] += 1
        there.append(rows)
        back.append(rows.T)
    return np.stack(there), np.stack(back)


def of_this_process(comm: ep.Communicator) -> np.ndarray:
    """bool [groups, R, 1]: ranks whose traffic this process counts."""
    return np.vectorize(lambda device: device.process_index == jax.process_index())(comm.topology.groups)[
        ..., None
    ]


@pytest.mark.parametrize("problem", COUNTED, ids=lambda problem: problem.name)
def test_stats_count_rows_per_peer(problem: Problem) -> None:
    comm = problem.communicator("native")
    inputs = inputs_of(problem)
    spec = device_axis(problem.mesh, problem.axis_name)
    route = jax.jit(
        per_device(
            lambda x, idx, w: ep.dispatch(x, idx, w, comm=comm, **problem.dispatch_options)[1],
            problem.mesh, problem.axis_name,
        )
    )  # fmt: skip
    combine = jax.jit(
        per_device(lambda y, handle: ep.combine(y, handle, comm=comm), problem.mesh, problem.axis_name)
    )
    carry = jax.jit(
        per_device(
            lambda x, handle: ep.dispatch(x, handle=handle, comm=comm)[0].tokens,
            problem.mesh, problem.axis_name,
        )
    )  # fmt: skip
    x, topk_idx, topk_weights, y = put_on_mesh(
        (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.y), problem.mesh, spec
    )
    there, back = rows_between(problem)
    here = of_this_process(comm)

    def assert_counted(rows: np.ndarray) -> None:
        stats = comm.stats()
        assert isinstance(stats, ep.CommunicatorStats)
        np.testing.assert_array_equal(stats.rows_sent, np.where(here, rows, 0))
        np.testing.assert_array_equal(stats.rows_received, np.where(here, rows.transpose(0, 2, 1), 0))
        assert stats.seconds_waited.shape == rows.shape
        assert (stats.seconds_waited >= 0).all()

    assert_counted(0 * there)
    handle = route(x, topk_idx, topk_weights)
    fetch(handle)  # in every process: a row counts as sent when its receiver has it
    assert_counted(there)
    assert_counted(0 * there)  # since the last call
    fetch([combine(y, handle), combine(y, handle)])
    assert_counted(2 * back)
    fetch(carry(x, handle))
    assert_counted(there)


def test_check_is_silent_where_nothing_is_wrong() -> None:
    problem = COUNTED[0]
    comm = problem.communicator("native")
    inputs = inputs_of(problem)
    run(comm, problem, inputs.topk_idx)
    comm.check()


def run(comm: ep.Communicator, problem: Problem, topk_idx: np.ndarray) -> np.ndarray:
    """Return num_invalid [devices] of one dispatch."""
    inputs = inputs_of(problem)
    program = jax.jit(
        per_device(
            lambda x, idx, w: ep.dispatch(x, idx, w, comm=comm)[1].num_invalid,
            problem.mesh,
            problem.axis_name,
        )
    )
    arrays = (inputs.x, topk_idx, inputs.topk_weights)
    return fetch(program(*put_on_mesh(arrays, problem.mesh, device_axis(problem.mesh, problem.axis_name))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([0, 1, 2], 0),
        ([-1, -1, -1], 0),
        ([8, 1, 2], 1),
        ([-2, 1, 2], 1),
        ([2, 2, 2], 2),
        ([9, 9, -7], 3),
        ([1, -1, 1], 1),
    ],
)
def test_num_invalid_of_each_device(implementation: str, entries: list[int], expected: int) -> None:
    """The last device alone has such a row, twice."""
    problem = COUNTED[0]
    comm = problem.communicator(implementation)
    topk_idx = np.full(inputs_of(problem).topk_idx.shape, -1, np.int32)
    topk_idx[-1, :2] = entries
    num_invalid = run(comm, problem, topk_idx)
    np.testing.assert_array_equal(num_invalid, [0] * (len(num_invalid) - 1) + [2 * expected])


def test_check_raises_for_invalid_entries_every_time() -> None:
    """Natively; the communicator still works, and others are not affected."""
    problem = COUNTED[0]
    comm, other = problem.communicator("native"), problem.communicator("native")
    good = inputs_of(problem).topk_idx
    bad = good.copy()
    bad[:, 0] = [8, 1, 2]
    run(comm, problem, bad)
    words = r"dispatch on rank \d .*ignored 1 entries of topk_idx.*outside \[-1, 8\)"
    with pytest.raises(ep.InvalidRoutingError, match=words):
        comm.check()
    np.testing.assert_array_equal(run(comm, problem, good), 0)
    with pytest.raises(ep.InvalidRoutingError, match=words):
        comm.check()
    other.check()
