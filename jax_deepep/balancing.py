"""Redundant experts: several replicas of hot ones, so that every device has about as many rows.

An *expert map* says which expert every physical expert holds: int32 [P], P = R · S, and device r has the
physical experts [r · S, (r + 1) · S). To dispatch and combine, these are the experts. `plan_experts` makes an
expert map from measured loads, on the host; `to_physical_experts`, on the device, chooses a replica for every
token. With a module of `jax_deepep.flax` that was built with num_physical_experts=P:

    expert_map = plan_experts(load, num_physical=P, num_devices=R)  # occasionally
    out, aux = layer(x, expert_map)                                 # in every step
    load += aux.expert_load
"""

import heapq
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_deepep.checks import checked_integer
from jax_deepep.deprecation import renamed_arguments, renamed_function

__all__ = ["imbalance", "plan_experts", "to_physical_experts"]

# Bounds of the search for a plan: its steps, and steps times physical experts.
MOST_STEPS, MOST_WORK = 400, 12_000
LEAST_GAIN = 1e-9


@renamed_arguments(own_first="keep_home")
def plan_experts(
    load: ArrayLike, *, num_physical: int, num_devices: int, keep_home: bool = True
) -> np.ndarray:
    """Return an expert map that evens out the devices' loads. Deterministic, on the host.

    No device holds an expert twice. A greedy start gives replicas to the experts with the highest load per
    replica, each on the device with the lowest load. A local search improves it: two physical experts swap
    their experts, or one takes another, where that lowers the highest load of a device. It takes some
    milliseconds and comes close to the optimum.

    Args:
        load: [E] or [layers, E], non-negative: for example the `expert_load` of a layer, summed over steps.
        num_physical: P, physical experts on all devices: a multiple of R, at least E.
        num_devices: R, devices of the EP group; E is a multiple of it.
        keep_home: leave every expert where the parameters have it: the first E / R physical experts of device
            r hold the experts [r · E / R, (r + 1) · E / R), and replicas fill the others, so that only these
            are fetched. False: any expert anywhere, which is more even, for weights that are fetched once.

    Returns:
        int32 [P] or [layers, P].

    Raises:
        ValueError: sizes that do not fit, or an invalid load.
    """
    load = np.asarray(load, np.float64)
    if load.ndim not in (1, 2) or load.size == 0:
        raise ValueError(
            f"load: expected shape [num_experts] or [layers, num_experts], got {list(load.shape)}; pass "
            "tokens per expert."
        )
    if not (np.isfinite(load) & (load >= 0)).all():
        raise ValueError("load: expected finite numbers of at least 0, got others; pass tokens per expert.")
    num_experts = load.shape[-1]
    num_physical = checked_integer("num_physical", num_physical, minimum=1)
    num_devices = checked_integer("num_devices", num_devices, minimum=1)
    if num_experts % num_devices:
        raise ValueError(
            f"num_devices: expected a divisor of the {num_experts} experts, got {num_devices}; pass the size "
            "of the EP group."
        )
    if num_physical < num_experts or num_physical % num_devices:
        raise ValueError(
            f"num_physical: expected a multiple of num_devices={num_devices}, at least the {num_experts} "
            f"experts, got {num_physical}; pass the number of experts plus replicas for each device."
        )
    if num_physical > num_experts * num_devices:
        raise ValueError(
            f"num_physical: expected at most {num_experts * num_devices}, every expert once on every device, "
            f"got {num_physical}; pass fewer."
        )
    plans = [_plan(row, num_physical, num_devices, keep_home) for row in load.reshape(-1, num_experts)]
    return np.stack(plans) if load.ndim == 2 else plans[0]


@renamed_arguments(placement="expert_map")
def imbalance(load: ArrayLike, expert_map: ArrayLike, num_devices: int) -> float:
    """Return the largest load of a device over the mean, if replicas share their expert's load equally.

    Args:
        load: [E].
        expert_map: int32 [P], every expert at least once.
        num_devices: R.
    """
    load, expert_map = np.asarray(load, np.float64), np.asarray(expert_map)
    replicas = np.bincount(expert_map, minlength=len(load))
    of_device = (load / replicas)[expert_map].reshape(num_devices, -1).sum(axis=1)
    return float(of_device.max() / of_device.mean()) if of_device.any() else 1.0


@renamed_arguments(placement="expert_map")
def to_physical_experts(
    topk_idx: jax.Array, token: jax.Array, expert_map: jax.Array, *, num_experts: int
) -> jax.Array:
    """Return for each expert of each token a physical expert that holds it.

    A hash of the token's index and the expert chooses the replica. Round-robin by the index could send all
    rows of an expert to one replica, because what a token is often depends on its position.

    Args:
        topk_idx: int32 [T, K], experts; entries outside of [0, E) stay as they are.
        token: int32 [T], indices of the tokens, over all devices.
        expert_map: int32 [P], may be traced. It must have every expert: entries of `topk_idx` that it lacks
            become −1, no expert.
        num_experts: E.
    """
    replicas = jnp.zeros(num_experts, jnp.int32).at[expert_map].add(1)
    # Sorted by the expert that they hold, so that the replicas of an expert are adjacent.
    physical_experts = jnp.argsort(expert_map, stable=True).astype(jnp.int32)
    first = jnp.cumsum(replicas) - replicas
    is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
    expert = jnp.where(is_expert, topk_idx, 0)
    replica = _hash(token[:, None], expert) % jnp.maximum(replicas[expert], 1).astype(jnp.uint32)
    physical_expert = physical_experts[first[expert] + replica.astype(jnp.int32)]
    physical_expert = jnp.where(replicas[expert] > 0, physical_expert, -1)
    return jnp.where(is_expert, physical_expert, topk_idx)


to_slots = renamed_function("to_slots", to_physical_experts)


def _hash(token: jax.Array, expert: jax.Array) -> jax.Array:
    """Return a uint32, each bit of which depends on every bit of both."""
    value = token.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + expert.astype(jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        value = (value ^ (value >> jnp.uint32(shift))) * jnp.uint32(factor)
    return value ^ (value >> jnp.uint32(16))


def _plan(load: np.ndarray, num_physical: int, num_devices: int, keep_home: bool) -> np.ndarray:
    """Return the best of several local optima of a search that starts from a greedy expert map."""
    plan = _Plan(load, num_physical // num_devices, num_devices, keep_home)
    plan.fill()
    random = np.random.default_rng(0)
    steps = min(MOST_STEPS, MOST_WORK // num_physical)  # not seconds: the same plan on every machine
    best, lowest = plan.expert.copy(), math.inf
    while True:
        while steps > 0 and plan.improve():
            steps -= 1
        largest = plan.loads().max()
        if largest <= lowest:
            best, lowest = plan.expert.copy(), largest
        else:
            plan.restore(best)
        steps -= 1
        if steps <= 0 or lowest <= load.sum() / num_devices * (1 + LEAST_GAIN):
            return best.ravel().astype(np.int32)
        plan.disturb(random)


class _Plan:
    """An expert map during the search; no expert is twice on one device.

    A slot is the index of a physical expert on its device.

    Attributes:
        expert: [R, S], the expert in each slot; the first `num_home` of each row stay.
        holds: bool [E, R], whether a device holds an expert.
        replicas: [E], how many slots hold each expert.
    """

    def __init__(self, load: np.ndarray, slots: int, num_devices: int, keep_home: bool):
        self.load = load
        self.num_home = len(load) // num_devices if keep_home else 0
        expert = np.full((num_devices, slots), -1)
        if keep_home:
            expert[:, : self.num_home] = np.arange(len(load)).reshape(num_devices, -1)
        self.restore(expert)

    def restore(self, expert: np.ndarray) -> None:
        """Set the slots to `expert`, where −1 is an empty slot."""
        self.expert = expert.copy()
        self.holds = np.zeros((len(self.load), len(expert)), bool)
        device, slot = np.nonzero(expert >= 0)
        self.holds[expert[device, slot], device] = True
        self.replicas = self.holds.sum(axis=1)

    def loads(self) -> np.ndarray:
        """Return the load of every device, [R]."""
        return (self.load / self.replicas)[self.expert].sum(axis=1)

    def fill(self) -> None:
        """Give replicas to the experts with the highest load per replica; assign slots by falling load."""
        num_devices, slots = self.expert.shape
        replicas = [1] * len(self.load)
        queue = [(-load, expert) for expert, load in enumerate(self.load.tolist())]
        heapq.heapify(queue)
        for _ in range(self.expert.size - len(replicas)):
            while replicas[queue[0][1]] == num_devices:
                heapq.heappop(queue)
            expert = queue[0][1]
            replicas[expert] += 1
            heapq.heapreplace(queue, (-self.load[expert] / replicas[expert], expert))
        per_replica = self.load / np.array(replicas)
        num_held = np.full(num_devices, self.num_home)
        # The load of each device with a free slot, infinite for the others.
        open_load = np.where(num_held < slots, per_replica @ self.holds, np.inf)
        for expert in np.argsort(-per_replica, kind="stable").tolist():
            for _ in range(replicas[expert] - (self.num_home > 0)):
                device = int(open_load.argmin())
                if self.holds[expert, device]:
                    device = int(np.where(self.holds[expert], np.inf, open_load).argmin())
                if self.holds[expert, device] or open_load[device] == np.inf:
                    break  # every free slot is on a device that holds it already
                self._put(device, num_held[device], expert)
                num_held[device] += 1
                full = num_held[device] == slots
                open_load[device] = np.inf if full else open_load[device] + per_replica[expert]
        for device, slot in np.argwhere(self.expert < 0):
            share = self.load / np.maximum(self.replicas, 1)
            self._put(device, slot, np.where(self.holds[:, device], -1, share).argmax())

    def _put(self, device: Any, slot: Any, expert: Any) -> None:
        if (old := self.expert[device, slot]) >= 0:
            self.holds[old, device] = False
            self.replicas[old] -= 1
        self.expert[device, slot] = expert
        self.holds[expert, device] = True
        self.replicas[expert] += 1

    def improve(self) -> bool:
        """Make the one change that lowers the highest load of a device most; return False if none does.

        Two slots swap their experts, or one slot takes another expert. The loads of the other devices after a
        change are estimated from above, so that no change raises the highest load.
        """
        per_replica = self.load / self.replicas
        with_more = self.load / (self.replicas + 1)
        loads = per_replica[self.expert].sum(axis=1)
        hot = int(loads.argmax())
        own, of_hot = self.num_home, loads[hot]
        of_others = loads.copy()
        of_others[hot] = -np.inf
        # For an expert with one replica less: by how much its other devices' loads rise, and the largest of
        # these loads.
        rise = self.load / np.maximum(self.replicas - 1, 1) - per_replica
        largest_holder = np.full(len(self.replicas), -np.inf)
        by_load = of_others.argsort()  # ascending: the largest load of an expert's devices is written last
        largest_holder[self.expert[by_load]] = of_others[by_load, None]
        risen = largest_holder + rise

        # Slots that may change [R, S'], and those of the hot device [S'].
        theirs = self.expert[:, own:]
        its, share, is_in_hot = theirs[hot], per_replica[theirs], self.holds[theirs, hot]
        is_only_replica = self.replicas[theirs] == 1
        lowest, changes = of_hot * (1 - LEAST_GAIN), []

        def consider(largest: np.ndarray, cannot: np.ndarray, describe: Callable[..., Any]) -> None:
            nonlocal lowest, changes
            largest[cannot] = np.inf
            if largest.size and largest.flat[best := int(largest.argmin())] < lowest:
                lowest, changes = largest.flat[best], describe(*np.unravel_index(best, largest.shape))

        # A slot of the hot device and one elsewhere swap: [S', R, S'].
        moved = share[hot][:, None, None] - share
        consider(
            np.maximum(of_hot - moved, loads[:, None] + moved),
            is_in_hot | self.holds[its][:, :, None],
            lambda mine, device, slot: [
                (hot, own + mine, theirs[device, slot]), (device, own + slot, its[mine])
            ],
        )  # fmt: skip
        # A slot elsewhere takes an expert of the hot device: [S, R, S'].
        wanted = self.expert[hot]
        has_wanted, less = self.holds[wanted], (per_replica - with_more)[wanted][:, None]
        of_rest = (of_others - has_wanted * less).max(axis=1)
        after = of_hot + np.where(is_in_hot, rise[theirs], 0) - less[:, :, None]
        np.maximum(after, loads[:, None] - share + with_more[wanted][:, None, None], out=after)
        np.maximum(after, np.maximum(of_rest[:, None, None], risen[theirs]), out=after)
        consider(
            after,
            is_only_replica | has_wanted[:, :, None],
            lambda mine, device, slot: [(device, own + slot, wanted[mine])],
        )
        # A slot of the hot device takes another expert: [S', E].
        consider(
            np.maximum(
                (of_hot - share[hot])[:, None] + with_more,
                np.maximum(of_others.max(), risen[its])[:, None],
            ),
            is_only_replica[hot][:, None] | self.holds[:, hot],
            lambda mine, expert: [(hot, own + mine, expert)],
        )
        for device, slot, expert in changes:
            self._put(device, slot, expert)
        return bool(changes)

    def disturb(self, random: np.random.Generator) -> None:
        """Change two or four slots at random."""
        num_devices, slots = self.expert.shape
        for _ in range(2 * (slots > self.num_home)):
            hot = int(self.loads().argmax())
            device, other = random.integers(num_devices, size=2)
            device = hot if random.random() < 0.5 else device
            mine, theirs = random.integers(self.num_home, slots, size=2)
            old, new = self.expert[device, mine], self.expert[other, theirs]
            can_swap = not self.holds[new, device] and not self.holds[old, other]
            if can_swap and random.random() < 0.5:
                self._put(device, mine, new)
                self._put(other, theirs, old)
            elif self.replicas[old] > 1 and not self.holds[:, device].all():
                self._put(device, mine, random.choice(np.flatnonzero(~self.holds[:, device])))
