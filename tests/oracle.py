"""The contract of dispatch and combine in NumPy, for one expert-parallel group.

Written from the contract alone, to be read as the specification. Arrays have a leading
axis of the R devices of the group: x [R, T, H], topk_idx [R, T, K], topk_weights [R, T, K], y [R, C, H].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Token(NamedTuple):
    """A token of the group: its source device, and its index there."""

    device: int
    number: int


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def worst_case_capacity(
    layout: str, num_devices: int, num_tokens: int, num_topk: int, num_local: int, alignment: int
) -> int:
    """Rows with which nothing is ever dropped."""
    if layout == "token":
        return round_up(num_devices * num_tokens, alignment)
    rows = num_devices * num_tokens * min(num_topk, num_local) + num_local * (alignment - 1)
    return round_up(rows, alignment)


def valid_entries(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """Entries that name an expert, for the first time in their row of [..., K]."""
    valid = np.zeros(topk_idx.shape, bool)
    for row in np.ndindex(topk_idx.shape[:-1]):
        seen = set()
        for k, expert in enumerate(topk_idx[row]):
            if 0 <= expert < num_experts and expert not in seen:
                valid[*row, k] = True
                seen.add(expert)
    return valid


@dataclass(frozen=True)
class Routes:
    """Where every token goes: what a dispatch computes before it copies rows.

    Attributes:
        rows: for every device, its rows: the token of each or None in padding rows.
        expert_of_row: for every device, the local expert of each row (0 in the token-major layout).
        row_of: int [R, T, K], the row of each entry on the device of its expert, −1 where it went nowhere.
        ranks_per_node: consecutive devices of a node; a divisor of R.
    """

    layout: str
    num_experts: int
    max_tokens: int
    capacity: int
    alignment: int
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    rows: list[list[Token | None]]
    expert_of_row: list[list[int]]
    row_of: np.ndarray
    num_received: np.ndarray
    ranks_per_node: int

    @property
    def num_devices(self) -> int:
        return len(self.rows)

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_devices

    @property
    def num_groups(self) -> int:
        return self.num_local if self.layout == "expert" else 1

    @property
    def num_rows(self) -> np.ndarray:
        """int32 [R, groups], rows of tokens."""
        counts = np.zeros((self.num_devices, self.num_groups), np.int32)
        for device, row, _ in self.live_rows():
            counts[device, self.expert_of_row[device][row]] += 1
        return counts

    @property
    def group_sizes(self) -> np.ndarray:
        return round_up(self.num_rows, self.alignment)

    @property
    def num_dropped(self) -> np.ndarray:
        return self.num_received - self.num_rows.sum(axis=1)

    @property
    def num_invalid(self) -> np.ndarray:
        valid = valid_entries(self.topk_idx, self.num_experts)
        return np.sum((self.topk_idx != -1) & ~valid, axis=(1, 2))

    @property
    def source(self) -> np.ndarray:
        """int32 [R, C], source device · max_tokens + token, −1 in rows without a token."""
        source = np.full((self.num_devices, self.capacity), -1, np.int32)
        for device, row, token in self.live_rows():
            source[device, row] = token.device * self.max_tokens + token.number
        return source

    @property
    def mask(self) -> np.ndarray:
        """bool [R, C], rows of a token."""
        return self.source >= 0

    @property
    def written(self) -> np.ndarray:
        """bool [R, C], rows of a token or of zeros; the others are not specified."""
        return np.arange(self.capacity) < self.group_sizes.sum(axis=1)[:, None]

    @property
    def row_weights(self) -> np.ndarray:
        """float32 [R, C], expert-major: the router weight of each row, 0 where there is none."""
        weights = np.zeros((self.num_devices, self.capacity), np.float32)
        for device, row, entry in self.entries():
            weights[device, row] = self.topk_weights[entry]
        return weights

    @property
    def row_topk(self) -> tuple[np.ndarray, np.ndarray]:
        """Token-major: int32 [R, C, K] local experts or −1, float32 [R, C, K] router weights or 0."""
        shape = (self.num_devices, self.capacity, self.topk_idx.shape[-1])
        local_experts, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for device, row, entry in self.entries():
            k = entry[-1]
            local_experts[device, row, k] = self.topk_idx[entry] % self.num_local
            weights[device, row, k] = self.topk_weights[entry]
        return local_experts, weights

    def live_rows(self):
        """Yield (device, row, token) for every row of a token."""
        for device, rows in enumerate(self.rows):
            for row, token in enumerate(rows):
                if token is not None:
                    yield device, row, token

    def entries(self):
        """Yield (device of the expert, row, index into topk_idx) for every entry that has a row."""
        for entry in np.ndindex(self.topk_idx.shape):
            if self.row_of[entry] >= 0:
                yield int(self.topk_idx[entry]) // self.num_local, int(self.row_of[entry]), entry


def route(
    topk_idx: np.ndarray,
    topk_weights: np.ndarray,
    *,
    num_experts: int,
    max_tokens: int,
    layout: str = "expert",
    capacity: int | None = None,
    expert_capacity: int | None = None,
    alignment: int = 1,
    ranks_per_node: int | None = None,
) -> Routes:
    """Compute all routes of a dispatch."""
    num_devices, num_tokens, num_topk = topk_idx.shape
    num_local = num_experts // num_devices
    if capacity is None:
        capacity = worst_case_capacity(layout, num_devices, num_tokens, num_topk, num_local, alignment)
    valid = valid_entries(topk_idx, num_experts)
    row_of = np.full(topk_idx.shape, -1)
    all_rows, all_experts, num_received = [], [], np.zeros(num_devices, np.int64)

    for device in range(num_devices):
        here = valid & (topk_idx // num_local == device)
        rows: list[Token | None] = []
        expert_of_row: list[int] = []
        # Groups of rows one after the other: a local expert each, or all tokens of the device in one.
        for group in range(num_local if layout == "expert" else 1):
            wanted = here & (topk_idx % num_local == group) if layout == "expert" else here
            tokens = [Token(*index) for index in np.argwhere(wanted.any(axis=-1)).tolist()]
            num_received[device] += len(tokens)
            kept = tokens[:expert_capacity]
            for position, token in enumerate(kept):
                row = len(rows) + position
                if row < capacity:
                    row_of[token][wanted[token]] = row
            padded = round_up(len(kept), alignment)
            rows += kept + [None] * (padded - len(kept))
            expert_of_row += [group] * padded
        all_rows.append(rows[:capacity])
        all_experts.append(expert_of_row[:capacity])

    return Routes(
        layout, num_experts, max_tokens, capacity, alignment, topk_idx, topk_weights,
        all_rows, all_experts, row_of, num_received, ranks_per_node or num_devices,
    )  # fmt: skip


def copy_rows(routes: Routes, x: np.ndarray) -> np.ndarray:
    """Return the tokens [R, C, H] that arrive; rows that are not `written` are zero here."""
    tokens = np.zeros((routes.num_devices, routes.capacity, x.shape[-1]), x.dtype)
    for device, row, token in routes.live_rows():
        tokens[device, row] = x[token]
    return tokens


def combine(
    routes: Routes,
    y: np.ndarray,
    *,
    weighted: bool,
    bias: np.ndarray | None = None,
    quantize: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return out [R, T, H]: every token's rows summed, in exactly this order of roundings.

    `quantize` maps a float32 sum that goes to another device, for a token of it or of one with its index on
    another node, to what arrives there, float32.
    """
    num_devices, num_tokens, _ = routes.topk_idx.shape
    per_node = routes.ranks_per_node
    out = np.zeros((num_devices, num_tokens, y.shape[-1]), y.dtype)

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(y.dtype).astype(np.float32)

    for token in np.ndindex(num_devices, num_tokens):
        total = np.float32(0) if bias is None else bias[token].astype(np.float32)
        for first in range(0, num_devices, per_node):
            proxy = first + token[0] % per_node  # which adds up the sums of its node's devices
            parts = []
            for device in range(first, first + per_node):
                part = _sum_on_device(routes, y, token, device, weighted)
                if part is not None:
                    parts.append(rounded(part) if quantize is None or device == proxy else quantize(part))
            if per_node < num_devices and parts:
                node = functools.reduce(np.add, parts)
                parts = [rounded(node) if quantize is None or proxy == token[0] else quantize(node)]
            for part in parts:
                total = total + part
        out[token] = np.asarray(total).astype(y.dtype)
    return out


def _sum_on_device(
    routes: Routes, y: np.ndarray, token: tuple[int, ...], device: int, weighted: bool
) -> np.ndarray | None:
    """Return the float32 sum of a token's rows on a device, None if there are none."""
    part = None
    rows_used = set()  # token-major, all experts of a token on a device share one row
    for k, expert in enumerate(routes.topk_idx[token]):
        row = routes.row_of[*token, k]
        if row < 0 or expert // routes.num_local != device:
            continue
        if routes.layout == "token" and row in rows_used:
            continue
        rows_used.add(row)
        weight = routes.topk_weights[*token, k] if weighted else np.float32(1)
        product = weight * y[device, row].astype(np.float32)
        part = product if part is None else part + product
    return part


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot products float32 [...] of rows [..., H], in exactly this order of roundings.

    Elements are taken in blocks of 2048. In a block, 256 sums [32, 8] take the products of eight elements
    each, 256 apart, one after the other; then the last axis is folded by halves, then the other. Blocks are
    added in order.
    """
    products = a.astype(np.float32) * b.astype(np.float32)
    # The zeros that fill the last block change no bit: no sum is −0, because every sum starts at +0.
    padded = round_up(products.shape[-1], 2048)
    products = np.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, padded - products.shape[-1])])
    blocks = products.reshape(*products.shape[:-1], -1, 8, 32, 8)
    total = np.zeros(blocks.shape[:-4], np.float32)
    for block in range(blocks.shape[-4]):
        sums = np.zeros((*total.shape, 32, 8), np.float32)
        for element in range(8):
            sums = sums + blocks[..., block, element, :, :]
        for half in (4, 2, 1):
            sums = sums[..., :half] + sums[..., half:]
        sums = sums[..., 0]
        for half in (16, 8, 4, 2, 1):
            sums = sums[..., :half] + sums[..., half:]
        total = total + sums[..., 0]
    return total


class DispatchGradients(NamedTuple):
    """x [R, T, H] and topk_weights [R, T, K], in their dtypes."""

    x: np.ndarray
    topk_weights: np.ndarray


def dispatch_gradients(routes: Routes, tokens: np.ndarray, weights: np.ndarray) -> DispatchGradients:
    """Return the gradients of dispatch for cotangents of its rows.

    `weights` is that of the router weights, [R, C], or token-major [R, C, K]. Rows return to
    their tokens, so that x gets the sum of its rows, and an entry the value of its row, 0 where it has none.
    """
    topk_weights = np.zeros(routes.topk_idx.shape, np.float32)
    for device, row, entry in routes.entries():
        k = entry[-1]
        topk_weights[entry] = weights[device, row] if routes.layout == "expert" else weights[device, row, k]
    return DispatchGradients(combine(routes, tokens, weighted=False), topk_weights)


class CombineGradients(NamedTuple):
    """y [R, C, H], zero in rows without a token, topk_weights [R, T, K], bias [R, T, H], in their dtypes."""

    y: np.ndarray
    topk_weights: np.ndarray
    bias: np.ndarray


def combine_gradients(routes: Routes, y: np.ndarray, g: np.ndarray, *, weighted: bool) -> CombineGradients:
    """Return the gradients of combine for the cotangent g [R, T, H] of its result.

    A row gets the cotangent of its token, times the weight, rounded once; a weight gets ⟨g, y⟩ of its row.
    """
    rows = copy_rows(routes, g)
    topk_weights = np.zeros(routes.topk_idx.shape, np.float32)
    if weighted:
        rows = (routes.row_weights[..., None] * rows.astype(np.float32)).astype(y.dtype)
        for device, row, entry in routes.entries():
            topk_weights[entry] = dot(g[entry[:-1]], y[device, row])
    return CombineGradients(rows, topk_weights, g)


@dataclass(frozen=True)
class MoEGradients:
    """Gradients of ⟨g, combine(y)⟩ for y = experts(dispatch(x)), in float64.

    Attributes:
        x: [R, T, H].
        topk_weights: [R, T, K], 0 where an entry went nowhere.
        bias: [R, T, H].
        y: [R, C, H], zero in rows without a token.
        expert_matrices: [E, H, H].
    """

    out: np.ndarray
    x: np.ndarray
    topk_weights: np.ndarray
    bias: np.ndarray
    y: np.ndarray
    expert_matrices: np.ndarray


def moe_gradients(
    routes: Routes, x: np.ndarray, bias: np.ndarray, expert_matrices: np.ndarray, g: np.ndarray
) -> MoEGradients:
    """Differentiate a Mixture of linear Experts in closed form, densely.

    P [R, T, K, E] is one where entry k of a token reached expert e:
    out[t] = bias[t] + Σ_k Σ_e w[t,k] P[t,k,e] (x[t] · A[e]).
    """
    x, bias, matrices, g = (np.asarray(value, np.float64) for value in (x, bias, expert_matrices, g))
    one_hot = np.zeros((*routes.topk_idx.shape, routes.num_experts))
    for _, _, entry in routes.entries():
        one_hot[*entry, routes.topk_idx[entry]] = 1
    weights = np.asarray(routes.topk_weights, np.float64)
    gate = np.einsum("rtk,rtke->rte", weights, one_hot)
    results = np.einsum("rth,ehj->rtej", x, matrices)

    y_gradient = np.zeros((routes.num_devices, routes.capacity, x.shape[-1]))
    for device, row, (*token, k) in routes.entries():
        y_gradient[device, row] += weights[*token, k] * g[tuple(token)]
    return MoEGradients(
        out=bias + np.einsum("rte,rtej->rtj", gate, results),
        x=np.einsum("rte,ehj,rtj->rth", gate, matrices, g),
        topk_weights=np.einsum("rtke,rtej,rtj->rtk", one_hot, results, g),
        bias=g,
        y=y_gradient,
        expert_matrices=np.einsum("rth,rte,rtj->ehj", x, gate, g),
    )
