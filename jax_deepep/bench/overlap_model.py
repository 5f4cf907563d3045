"""A model: the time of a layer with and without ops in flight, and by xla, on more GPUs than were measured.

Ops, and computations beside them, take as long as `link_model` says, on one node. The rest follows from the
order in `jax_deepep.moe.overlapped`, with grouped_matmul="mosaic", whose gradients of weights are sums over
both batches. Imbalance is left out, and so are launches of computations and what grouped matmuls lose with
half the rows.

With `implementation="xla"` every device gathers the tokens of all, and sends everyone a sum per token. Those
bytes are counted, over links as fast as for our ops (assumed), and once in memory where a kernel reads or
writes them; sorting routes is not. So xla takes at least as long as it says.
"""

import dataclasses
from dataclasses import dataclass

from jax_deepep.bench.copies import uniform_copies
from jax_deepep.bench.link_model import NUM_SMS, NVLINK4, START_US, Machine, Op, overlapped_us, phases
from jax_deepep.bench.problem import Problem

# FLOP per us of experts, with what lies between their matmuls, and of the router: forward and backward, the
# means of ds and qwen in "Experts and layers" of results/two_h200_nvlink.md (623 and 565; 42 and 46).
EXPERTS, ROUTER = 594e6, 44e6

# Which op moves rows as each does.
_MOVES: dict[str, Op] = {
    "dispatch": "dispatch", "combine": "combine",
    "combine backward": "dispatch", "dispatch backward": "combine",
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Times of a layer, us.

    Attributes:
        plain: nothing in flight.
        in_flight: with ops in flight, as by default.
        two_batches: with `two_batch_overlap`.
        xla: with `implementation="xla"`, at least.
    """

    plain: float
    in_flight: float
    two_batches: float
    xla: float


def modelled(
    problem: Problem, shared: int = 0, machine: Machine = NVLINK4, *, backward: bool = True
) -> Times:
    """Return the times of a layer, forward, or forward and backward.

    Args:
        problem: the layer's shape, with `intermediate`, expert-major.
        shared: the inner size of shared experts.
        machine: links, memory and SMs.
        backward: whether with gradients.
    """
    assert problem.intermediate is not None
    flop = 2 * problem.tokens * problem.hidden  # of one token's row and one column
    product = flop * problem.topk * problem.intermediate / EXPERTS  # with one of wi_0, wi_1, wo
    of_shared = 3 * flop * shared / EXPERTS
    router = flop * problem.experts / ROUTER
    experts = 3 * product
    copies = uniform_copies(problem, 1)

    def beside(name: str, computation: float = 0, batches: int = 1) -> float:
        """Return the time of an op of one of the batches, and of what is computed while it is in flight."""
        batch = dataclasses.replace(problem, tokens=-(-problem.tokens // batches))
        # A whole op takes up to three quarters of the SMs: xla_ffi/cuda/block_count.cc.
        num_sms = NUM_SMS["throughput"] if computation else machine.num_sms * 3 // 4
        op_us = phases(_MOVES[name], batch, 1, copies, machine, num_sms=num_sms).pipelined
        return overlapped_us(computation, op_us, num_sms, machine)

    computed = router + experts + of_shared
    plain = computed + beside("dispatch") + beside("combine")
    xla = computed + _xla_us("dispatch", problem, machine) + _xla_us("combine", problem, machine)
    in_flight = router + beside("dispatch", of_shared) + experts + beside("combine")
    two = router + beside("dispatch", of_shared, 2) + beside("dispatch", experts / 2, 2)
    two += beside("combine", experts / 2, 2) + beside("combine", 0, 2)
    if backward:
        # The gradients of wi_0 and wi_1 are beside that of dispatch; with two batches, that of wo of both is
        # beside the first of them.
        later, of_wo = 2 * product, product
        earlier = 4 * product
        computed = 2 * router + 2 * of_shared + earlier + later
        plain += computed + beside("combine backward") + beside("dispatch backward")
        xla += computed
        xla += _xla_us("combine backward", problem, machine) + _xla_us("dispatch backward", problem, machine)
        in_flight += 2 * router + beside("combine backward", 2 * of_shared)
        in_flight += earlier + beside("dispatch backward", later)
        two += 2 * router + beside("combine backward", 2 * of_shared, 2)
        two += beside("combine backward", (earlier - of_wo) / 2, 2)
        two += beside("dispatch backward", (earlier + of_wo) / 2, 2)
        two += beside("dispatch backward", later, 2)
    return Times(plain, in_flight, two, xla)


def _xla_us(name: str, problem: Problem, machine: Machine) -> float:
    """Return the least time in which XLA's collectives and kernels do what an op does."""
    tokens = problem.tokens * problem.row_bytes
    everyones = problem.devices * tokens
    rows, capacity = problem.mean_rows * problem.row_bytes, problem.capacity_rows * problem.row_bytes
    op = _MOVES[name]
    # Dispatch gathers everyone's tokens, and copies rows out of them; combine writes a sum of every token,
    # and adds up what it gets from the others.
    moved = rows + capacity if op == "dispatch" else rows + everyones + everyones + tokens
    link = (problem.devices - 1) * tokens / machine.pulled
    return START_US["throughput", op] + (link + moved / machine.memory) / 1e3
