"""A model: how long a layer takes with and without ops in flight, on more GPUs than were measured.

An op takes as long as the longer one of two: its bytes over the link, and the expert-major rows that its SMs
read or write in local memory. An op of o seconds beside a computation of c takes

    max(o, c + o · n / S)

because the computation has S − n of S SMs for o seconds. The rest follows from the order in
`jax_deepep.moe.overlapped`. Imbalance, top-k and launches are left out, as is what grouped matmuls lose with
half the rows. A second batch costs the sum of two gradients of all weights: read twice, written once.
"""

import dataclasses
from dataclasses import dataclass

from jax_deepep.bench.problem import Problem


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU; the defaults are those measured on two H200 with NVLink (RESULTS.md).

    Attributes:
        num_sms: S.
        op_sms: n, of an op in flight.
        link: bytes per second from all peers together.
        rows: bytes per second of expert-major rows of a whole op, the mean of both ops and their gradients.
        rows_in_flight: that of an op in flight.
        memory: bytes per second of elementwise kernels.
        matmul: FLOP per second of grouped matmuls.
        router: that of the router's, in float32.
    """

    num_sms: int = 132
    op_sms: int = 24
    link: float = 335e9
    rows: float = 1.4e12
    rows_in_flight: float = 0.95e12
    memory: float = 4e12
    matmul: float = 540e12
    router: float = 30e12


@dataclass(frozen=True)
class Times:
    """Seconds of a layer.

    Attributes:
        plain: nothing in flight.
        in_flight: with ops in flight, as by default.
        two_batches: with `two_batch_overlap`.
    """

    plain: float
    in_flight: float
    two_batches: float


def modelled(problem: Problem, shared: int = 0, gpu: Gpu | None = None, *, backward: bool = True) -> Times:
    """Return the times of a layer, forward, or forward and backward.

    Args:
        problem: the layer's shape, with `intermediate`.
        shared: the inner size of shared experts.
        gpu: None = an H200.
        backward: whether with gradients.
    """
    gpu = gpu or Gpu()
    assert problem.intermediate is not None
    flop = 2 * problem.tokens * problem.hidden  # of one token's row and one column
    product = flop * problem.topk * problem.intermediate / gpu.matmul  # with one of wi_0, wi_1, wo
    of_shared = 3 * flop * shared / gpu.matmul
    router = flop * problem.experts / gpu.router
    rows = problem.mean_rows * problem.row_bytes  # bytes
    inner = problem.mean_rows * problem.intermediate * problem.row_bytes / problem.hidden
    experts = 3 * product + 3 * inner / gpu.memory

    # Rows cross links once per (token, other device).
    received = dataclasses.replace(problem, layout="token").mean_rows * problem.row_bytes
    link = received * (1 - 1 / problem.devices) / gpu.link
    whole = max(link, rows / gpu.rows)

    def beside(computation: float, part: float = 1) -> float:
        """Return the seconds of a part of an op, and of a computation in which it is in flight."""
        if not computation:
            return part * whole
        op = part * max(link, rows / gpu.rows_in_flight)
        return max(op, computation + op * gpu.op_sms / gpu.num_sms)

    plain = router + 2 * whole + experts + of_shared
    in_flight = router + beside(of_shared) + experts + whole
    two = router + beside(of_shared, 0.5) + 2 * beside(experts / 2, 0.5) + whole / 2
    if backward:
        # The gradients of wi_0 and wi_1 are beside that of dispatch.
        later = 2 * product
        earlier = 4 * product + (5 * inner + 3 * rows) / gpu.memory
        plain += 2 * router + 2 * whole + earlier + later + 2 * of_shared
        in_flight += 2 * router + beside(2 * of_shared) + earlier + beside(later)
        two += 2 * router + beside(2 * of_shared, 0.5) + beside(earlier / 2, 0.5)
        two += beside((later + earlier) / 2, 0.5) + beside(later / 2, 0.5)
        weights = 3 * problem.num_local_experts * problem.intermediate * problem.row_bytes
        two += 3 * weights / gpu.memory
    return Times(plain, in_flight, two)
