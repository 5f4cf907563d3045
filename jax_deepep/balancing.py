"""Redundant experts: several copies of hot ones, so that every device has about as many rows.

A *placement* says which expert every slot of every device holds: int32 [P], P = R · S, and device r has the
slots [r · S, (r + 1) · S). For dispatch and combine, the slots are the experts. `plan_experts` makes a
placement from measured loads, on the host; `to_slots`, on the device, chooses a copy for every token. With
a module of `jax_deepep.flax` that was built with num_physical_experts=P:

    placement = plan_experts(load, num_physical=P, num_devices=R)  # every now and then
    out, aux = layer(x, placement)                                 # in every step
    load += aux.expert_load
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_deepep.arguments import checked_integer


def plan_experts(
    load: ArrayLike, *, num_physical: int, num_devices: int, own_first: bool = True
) -> np.ndarray:
    """Return a placement that evens out the devices' loads. Deterministic, on the host.

    Further copies go to the experts with the highest load per copy, each on the device with the lowest load
    that has a free slot and none of them yet. A heuristic: on skewed loads close to even, not optimal.

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
    """Return for each expert of each token a slot that holds it: token t takes copy t mod (number of copies).

    Args:
        topk_idx: int32 [T, K], experts; entries outside of [0, E) stay as they are.
        token: int32 [T], the numbers of the tokens, over all devices: so few tokens of each are spread, too.
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
    slot = slots[first_slot[expert] + token[:, None] % jnp.maximum(copies[expert], 1)]
    slot = jnp.where(copies[expert] > 0, slot, -1)
    return jnp.where(is_expert, slot, topk_idx)


def _plan(load: np.ndarray, num_physical: int, num_devices: int, own_first: bool) -> np.ndarray:
    """Give copies to the experts with the highest load per copy; then place all, the highest loads first."""
    num_experts, slots = len(load), num_physical // num_devices
    copies = np.ones(num_experts, np.int64)
    for _ in range(num_physical - num_experts):
        copies[np.where(copies < num_devices, load / copies, -1).argmax()] += 1
    per_copy = load / copies
    own = np.arange(num_experts).reshape(num_devices, -1).tolist() if own_first else [[]] * num_devices
    held = [list(experts) for experts in own]
    of_device = np.array([per_copy[experts].sum() for experts in held])
    for expert in np.argsort(-per_copy, kind="stable").tolist():
        for _ in range(copies[expert] - own_first):
            free = [device for device in range(num_devices) if len(held[device]) < slots]
            # A second copy on one device is of no use, but the last slots may allow nothing else.
            device = min(free, key=lambda device: (expert in held[device], of_device[device], device))
            held[device].append(expert)
            of_device[device] += per_copy[expert]
    return np.array(held, np.int32).ravel()
