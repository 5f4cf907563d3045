"""Redundant experts: several copies of hot ones, so that every device has about as many rows.

A *placement* says which expert every slot of every device holds: int32 [P], P = R · S, and device r has the
slots [r · S, (r + 1) · S). For dispatch and combine, the slots are the experts. `plan_experts` makes a
placement from measured loads, on the host; `to_slots`, on the device, chooses a copy for every token. With
a module of `jax_deepep.flax` that was built with num_physical_experts=P:

    placement = plan_experts(load, num_physical=P, num_devices=R)  # every now and then
    out, aux = layer(x, placement)                                 # in every step
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

__all__ = ["imbalance", "plan_experts", "to_slots"]

# What bounds the search for a plan: steps of it, and steps times slots.
MOST_STEPS, MOST_SLOT_STEPS = 400, 12_000
LEAST_GAIN = 1e-9


def plan_experts(
    load: ArrayLike, *, num_physical: int, num_devices: int, own_first: bool = True
) -> np.ndarray:
    """Return a placement that evens out the devices' loads. Deterministic, on the host.

    No device holds an expert twice. It begins with copies for the experts with the highest load per copy,
    each on the device with the lowest load, and goes on with a local search: two slots swap their experts,
    or one takes another, where that lowers the highest load of a device. Some milliseconds; close to optimal.

    Args:
        load: [E] or [layers, E], non-negative: for example the `expert_load` of a layer, summed over steps.
        num_physical: P, slots on all devices: a multiple of R, at least E.
        num_devices: R, devices of the expert-parallel group; E is a multiple of it.
        own_first: leave every expert where the parameters have it: the first E / R slots of device r hold
            the experts [r · E / R, (r + 1) · E / R), and copies fill the others, so that only these are to
            be fetched. False: any expert anywhere, which is more even, for weights that are placed once.

    Returns:
        int32 [P] or [layers, P].

    Raises:
        ValueError: sizes that do not fit, or a load that is none.
    """
    load = np.asarray(load, np.float64)
    if load.ndim not in (1, 2) or load.size == 0:
        raise ValueError(f"load: got shape {load.shape}; takes [num_experts] or [layers, num_experts].")
    if not (np.isfinite(load) & (load >= 0)).all():
        raise ValueError("load: got a negative number, or one that is not finite; takes tokens per expert.")
    num_experts = load.shape[-1]
    num_physical = checked_integer("num_physical", num_physical, minimum=1)
    num_devices = checked_integer("num_devices", num_devices, minimum=1)
    if num_experts % num_devices:
        raise ValueError(f"num_devices: got {num_devices}; takes a divisor of the {num_experts} experts.")
    if num_physical < num_experts or num_physical % num_devices:
        raise ValueError(
            f"num_physical: got {num_physical}; takes a multiple of num_devices={num_devices}, at "
            f"least {num_experts}, the number of experts."
        )
    if num_physical > num_experts * num_devices:
        raise ValueError(
            f"num_physical: got {num_physical}; takes at most {num_experts * num_devices}: every "
            "expert once on every device."
        )
    plans = [_plan(row, num_physical, num_devices, own_first) for row in load.reshape(-1, num_experts)]
    return np.stack(plans) if load.ndim == 2 else plans[0]


def imbalance(load: ArrayLike, placement: ArrayLike, num_devices: int) -> float:
    """Return the largest load of a device over the mean, if copies of an expert have equal parts of its load.

    Args:
        load: [E].
        placement: int32 [P], which names every expert.
        num_devices: R.
    """
    load, placement = np.asarray(load, np.float64), np.asarray(placement)
    copies = np.bincount(placement, minlength=len(load))
    of_device = (load / copies)[placement].reshape(num_devices, -1).sum(axis=1)
    return float(of_device.max() / of_device.mean()) if of_device.any() else 1.0


def to_slots(topk_idx: jax.Array, token: jax.Array, placement: jax.Array, *, num_experts: int) -> jax.Array:
    """Return for each expert of each token a slot that holds it.

    A hash of the token's number and the expert chooses among the copies: what tokens say often follows from
    where they stand, and copies in turn could put all rows of an expert on one of them.

    Args:
        topk_idx: int32 [T, K], experts; entries outside of [0, E) stay as they are.
        token: int32 [T], the numbers of the tokens, over all devices.
        placement: int32 [P], may be traced. An expert that it does not name is an error of the caller: its
            tokens get −1, no expert.
        num_experts: E.
    """
    copies = jnp.zeros(num_experts, jnp.int32).at[placement].add(1)
    # The slots ordered by what they hold: those of an expert stand together.
    slots = jnp.argsort(placement, stable=True).astype(jnp.int32)
    first_slot = jnp.cumsum(copies) - copies
    is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
    expert = jnp.where(is_expert, topk_idx, 0)
    copy = _hash(token[:, None], expert) % jnp.maximum(copies[expert], 1).astype(jnp.uint32)
    slot = slots[first_slot[expert] + copy.astype(jnp.int32)]
    slot = jnp.where(copies[expert] > 0, slot, -1)
    return jnp.where(is_expert, slot, topk_idx)


def _hash(token: jax.Array, expert: jax.Array) -> jax.Array:
    """Return 32 bits, uint32, each of which depends on every bit of both."""
    value = token.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + expert.astype(jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        value = (value ^ (value >> jnp.uint32(shift))) * jnp.uint32(factor)
    return value ^ (value >> jnp.uint32(16))


def _plan(load: np.ndarray, num_physical: int, num_devices: int, own_first: bool) -> np.ndarray:
    """Return the best of several local optima of a search that begins with a greedy placement."""
    plan = _Plan(load, num_physical // num_devices, num_devices, own_first)
    plan.fill()
    random = np.random.default_rng(0)
    steps = min(MOST_STEPS, MOST_SLOT_STEPS // num_physical)  # not seconds: the same plan on every machine
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
    """Which expert every slot holds, while it is searched for; no expert is twice on one device.

    Attributes:
        expert: [R, S]; the first `num_own` of each row stay.
        holds: bool [E, R], the same as a table.
        copies: [E], how many slots hold each expert.
    """

    def __init__(self, load: np.ndarray, slots: int, num_devices: int, own_first: bool):
        self.load = load
        self.num_own = len(load) // num_devices if own_first else 0
        expert = np.full((num_devices, slots), -1)
        if own_first:
            expert[:, : self.num_own] = np.arange(len(load)).reshape(num_devices, -1)
        self.restore(expert)

    def restore(self, expert: np.ndarray) -> None:
        """Begin with `expert`, or go back to it; −1 is an empty slot."""
        self.expert = expert.copy()
        self.holds = np.zeros((len(self.load), len(expert)), bool)
        device, slot = np.nonzero(expert >= 0)
        self.holds[expert[device, slot], device] = True
        self.copies = self.holds.sum(axis=1)

    def loads(self) -> np.ndarray:
        """Return the load of every device, [R]."""
        return (self.load / self.copies)[self.expert].sum(axis=1)

    def fill(self) -> None:
        """Give copies to the experts with the highest load per copy; place all, the highest loads first."""
        num_devices, slots = self.expert.shape
        copies = [1] * len(self.load)
        queue = [(-load, expert) for expert, load in enumerate(self.load.tolist())]
        heapq.heapify(queue)
        for _ in range(self.expert.size - len(copies)):
            while copies[queue[0][1]] == num_devices:
                heapq.heappop(queue)
            expert = queue[0][1]
            copies[expert] += 1
            heapq.heapreplace(queue, (-self.load[expert] / copies[expert], expert))
        per_copy = self.load / np.array(copies)
        num_held = np.full(num_devices, self.num_own)
        # The load of a device that has a free slot; no more are taken from others.
        open_load = np.where(num_held < slots, per_copy @ self.holds, np.inf)
        for expert in np.argsort(-per_copy, kind="stable").tolist():
            for _ in range(copies[expert] - (self.num_own > 0)):
                device = int(open_load.argmin())
                if self.holds[expert, device]:
                    device = int(np.where(self.holds[expert], np.inf, open_load).argmin())
                if self.holds[expert, device] or open_load[device] == np.inf:
                    break  # every free slot is on a device that has it
                self._put(device, num_held[device], expert)
                num_held[device] += 1
                full = num_held[device] == slots
                open_load[device] = np.inf if full else open_load[device] + per_copy[expert]
        for device, slot in np.argwhere(self.expert < 0):
            share = self.load / np.maximum(self.copies, 1)
            self._put(device, slot, np.where(self.holds[:, device], -1, share).argmax())

    def _put(self, device: Any, slot: Any, expert: Any) -> None:
        if (old := self.expert[device, slot]) >= 0:
            self.holds[old, device] = False
            self.copies[old] -= 1
        self.expert[device, slot] = expert
        self.holds[expert, device] = True
        self.copies[expert] += 1

    def improve(self) -> bool:
        """Make the one change that lowers the load of the most loaded device most; False if none does.

        Two slots swap their experts, or one slot takes another expert. What such a change does to the other
        devices is estimated from above, so that it never makes matters worse.
        """
        per_copy = self.load / self.copies
        with_more = self.load / (self.copies + 1)
        loads = per_copy[self.expert].sum(axis=1)
        hot = int(loads.argmax())
        own, of_hot = self.num_own, loads[hot]
        of_others = loads.copy()
        of_others[hot] = -np.inf
        # Of an expert with one copy less: what every other device that holds it gains, and the largest load.
        rise = self.load / np.maximum(self.copies - 1, 1) - per_copy
        largest_holder = np.full(len(self.copies), -np.inf)
        by_load = of_others.argsort()  # of the devices that hold an expert, the last one written stays
        largest_holder[self.expert[by_load]] = of_others[by_load, None]
        risen = largest_holder + rise

        # Slots that may change [R, S'], and those of the hot device [S'].
        theirs = self.expert[:, own:]
        its, share, is_in_hot = theirs[hot], per_copy[theirs], self.holds[theirs, hot]
        is_only_copy = self.copies[theirs] == 1
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
        has_wanted, less = self.holds[wanted], (per_copy - with_more)[wanted][:, None]
        of_rest = (of_others - has_wanted * less).max(axis=1)
        after = of_hot + np.where(is_in_hot, rise[theirs], 0) - less[:, :, None]
        np.maximum(after, loads[:, None] - share + with_more[wanted][:, None, None], out=after)
        np.maximum(after, np.maximum(of_rest[:, None, None], risen[theirs]), out=after)
        consider(
            after,
            is_only_copy | has_wanted[:, :, None],
            lambda mine, device, slot: [(device, own + slot, wanted[mine])],
        )
        # A slot of the hot device takes another expert: [S', E].
        consider(
            np.maximum(
                (of_hot - share[hot])[:, None] + with_more,
                np.maximum(of_others.max(), risen[its])[:, None],
            ),
            is_only_copy[hot][:, None] | self.holds[:, hot],
            lambda mine, expert: [(hot, own + mine, expert)],
        )
        for device, slot, expert in changes:
            self._put(device, slot, expert)
        return bool(changes)

    def disturb(self, random: np.random.Generator) -> None:
        """Change two slots at random, or four."""
        num_devices, slots = self.expert.shape
        for _ in range(2 * (slots > self.num_own)):
            hot = int(self.loads().argmax())
            device, other = random.integers(num_devices, size=2)
            device = hot if random.random() < 0.5 else device
            mine, theirs = random.integers(self.num_own, slots, size=2)
            old, new = self.expert[device, mine], self.expert[other, theirs]
            can_swap = not self.holds[new, device] and not self.holds[old, other]
            if can_swap and random.random() < 0.5:
                self._put(device, mine, new)
                self._put(other, theirs, old)
            elif self.copies[old] > 1 and not self.holds[:, device].all():
                self._put(device, mine, random.choice(np.flatnonzero(~self.holds[:, device])))
