"""The plot of `python -m jax_deepep.bench routing`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jax_deepep.bench.routing import Routing

ALL, KEPT, DROPPED, EVEN = "#c3d3e8", "#3b6fb6", "#d1495b", "#444444"


def draw(routings: Sequence[Routing], title: str, path: Path) -> None:
    """Draw for each run the rows from device to device, the load per expert, and the rows per device.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(14, 1 + 3.6 * len(routings)), layout="constrained")
    figure.suptitle(title)
    most_sent = max(routing.rows_sent.max() for routing in routings)
    most_rows = max((routing.rows + routing.dropped).max() for routing in routings)
    all_axes = figure.subplots(len(routings), 3, squeeze=False, width_ratios=(1, 1.3, 1))
    for (pairs, experts, devices), routing in zip(all_axes, routings, strict=True):
        _pairs(pairs, routing, most_sent)
        _experts(experts, routing)
        indices = range(len(routing.rows))
        devices.bar(indices, routing.rows, color=KEPT, label="kept")
        devices.bar(indices, routing.dropped, bottom=routing.rows, color=DROPPED, label="dropped")
        _even(devices, routing.rows + routing.dropped)
        title = f"largest / mean {routing.imbalance:.2f}, {routing.share_dropped:.1%} dropped"
        devices.set(xlabel="device", ylabel="rows", ylim=(0, 1.15 * most_rows), title=title)
        devices.legend(ncols=3, loc="upper center")
    figure.savefig(path, dpi=120)


def _pairs(axes: Any, routing: Routing, most: int) -> None:
    """Draw the heat map, with numbers on up to 8 devices."""
    image = axes.imshow(routing.rows_sent, cmap="Blues", vmin=0, vmax=most)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(xlabel="to device", ylabel="from device", title=f"{routing.name}: rows sent")
    if len(routing.rows_sent) <= 8:
        for (source, target), rows in np.ndenumerate(routing.rows_sent):
            color = "white" if rows > 0.6 * most else "black"
            axes.text(target, source, f"{rows}", ha="center", va="center", color=color, fontsize=7)


def _experts(axes: Any, routing: Routing) -> None:
    """Draw the load of each expert, and of each of its replicas."""
    indices = range(len(routing.expert_load))
    if (routing.replicas > 1).any():
        axes.bar(indices, routing.expert_load, width=1.0, color=ALL, label="all replicas")
    axes.bar(indices, routing.expert_load / routing.replicas, width=1.0, color=KEPT, label="one replica")
    _even(axes, routing.expert_load)
    axes.set(xlabel="expert", ylabel="tokens", title="load per expert")
    axes.legend()


def _even(axes: Any, values: np.ndarray) -> None:
    axes.axhline(values.mean(), color=EVEN, linestyle="--", linewidth=1, label="even")
