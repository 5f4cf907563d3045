"""How many rows an op needs: pure arithmetic, used when tracing."""

import math
from typing import Any, Literal, TypeVar

Number = TypeVar("Number", bound=Any)  # an int, or an array of them
Layout = Literal["expert", "token"]
INT32_MAX = 2**31 - 1


def round_up(value: Number, multiple: int) -> Number:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def worst_case_rows(
    *,
    layout: Layout,
    num_ranks: int,
    num_tokens: int,
    num_experts_per_tok: int,
    num_local_experts: int,
    alignment: int,
) -> int:
    """Return the rows that one device can receive at most, so that nothing is ever dropped.

    Expert-major: every token of every rank sends one row to each of min(K, L) experts here, and
    each of the L row groups may be padded by alignment − 1 rows. Token-major: one row per token.
    """
    if layout == "token":
        return round_up(num_ranks * num_tokens, alignment)
    rows = num_ranks * num_tokens * min(num_experts_per_tok, num_local_experts)
    return round_up(rows + num_local_experts * (alignment - 1), alignment)


def bounded_rows(
    *,
    capacity_factor: float,
    num_ranks: int,
    num_tokens: int,
    num_experts_per_tok: int,
    num_local_experts: int,
    alignment: int,
) -> int:
    """Return `capacity_factor` times the rows that an expert-major device receives on average, with padding.

    On average one device receives as many rows as it sends, K · T. At most the worst case.
    """
    average = num_tokens * num_experts_per_tok
    rows = math.ceil(float(capacity_factor) * average) + num_local_experts * (alignment - 1)
    worst_case = worst_case_rows(
        layout="expert",
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        num_experts_per_tok=num_experts_per_tok,
        num_local_experts=num_local_experts,
        alignment=alignment,
    )
    return min(worst_case, round_up(rows, alignment))


# Bytes of received rows up to which a layer does not divide its tokens, and mean rows that a chunk keeps.
MOST_ROW_BYTES, LEAST_ROWS_PER_EXPERT = 2 * 2**30, 128


def fewest_chunks(
    *, num_ranks: int, num_tokens: int, num_experts_per_tok: int, num_local_experts: int, row_bytes: int
) -> int:
    """Return the fewest chunks that `jax_deepep.moe.MoEConfig.chunks_of` describes."""
    live = num_tokens * num_experts_per_tok
    worst_case = num_ranks * num_tokens * min(num_experts_per_tok, num_local_experts)
    wanted = -(-worst_case * row_bytes // max(live * row_bytes * 5 // 4, MOST_ROW_BYTES, 1))
    return max(1, min(wanted, live // (num_local_experts * LEAST_ROWS_PER_EXPERT)))


def num_groups(layout: Layout, num_local_experts: int) -> int:
    """Return the number of row groups of one device: one per local expert, or a single one."""
    return num_local_experts if layout == "expert" else 1
