"""The checked arguments of a communicator, and what follows from them alone."""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import Mesh

from jax_deepep.capacity import INT32_MAX
from jax_deepep.checks import checked_integer
from jax_deepep.communicator.key_value_store import digest_of
from jax_deepep.communicator.topology import Topology

Implementation = Literal["auto", "native", "xla"]
Mode = Literal["auto", "throughput", "low_latency"]
OpMode = Literal["throughput", "low_latency"]

INTEGERS = ("num_experts", "num_experts_per_tok", "max_tokens", "hidden_size", "num_sms", "ranks_per_node")
OPTIONAL_INTEGERS = ("num_sms", "ranks_per_node")

# With mode="auto", ops of up to so many tokens of all devices of a group take low-latency mode: on two GPUs
# it is faster there (bench/RESULTS.md), and its memory stays small. A group of one counts as two.
AUTO_LOW_LATENCY_TOKENS = 1024

# And so that all experts fit: its kernels mark each expert's tokens in shared memory, T · E / 4 bytes, where
# throughput mode has room for any supported number of experts.
AUTO_LOW_LATENCY_MARKS = 2**18

# Longer arguments are cut where processes compare them, and distinguished by a digest.
MOST_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class CommunicatorConfig:
    """The arguments of a `Communicator`, which documents them, as given and not as chosen.

    Integers of any type, NumPy's for example, are ints here.

    Raises:
        ValueError, TypeError: an invalid argument; the message has the expected and the given value.
    """

    mesh: Mesh
    axis_name: str | tuple[str, ...]
    num_experts: int
    num_experts_per_tok: int
    max_tokens: int
    hidden_size: int
    implementation: Implementation
    mode: Mode
    num_sms: int | None
    timeout_s: float
    ranks_per_node: int | None
    _between_hosts: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        axis_names = _checked_axis_names(self.mesh, self.axis_name)
        if not isinstance(self.axis_name, str):
            object.__setattr__(self, "axis_name", axis_names)
        for name in INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL_INTEGERS:
                object.__setattr__(self, name, checked_integer(name, value, minimum=1))
        self._check_sizes()
        _check_timeout(self.timeout_s)
        if self.mode not in ("auto", "throughput", "low_latency"):
            raise ValueError(f'mode: expected "auto", "throughput" or "low_latency", got {self.mode!r}.')
        if self.implementation not in ("auto", "native", "xla"):
            raise ValueError(
                f'implementation: expected "auto", "native" or "xla", got {self.implementation!r}.'
            )
        self._check_nodes()

    def _check_sizes(self) -> None:
        if self.num_experts % self.size:
            below = self.num_experts - self.num_experts % self.size
            raise ValueError(
                f"num_experts: expected a multiple of the {self.size} devices along {self.axis_name!r}, got "
                f"{self.num_experts}; pass {below + self.size}, for example."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: expected at most num_experts={self.num_experts}, got "
                f"{self.num_experts_per_tok}; a token goes to an expert once."
            )
        most_tokens = INT32_MAX // (self.size * self.num_experts_per_tok)
        if self.max_tokens > most_tokens:
            raise ValueError(
                f"max_tokens: expected at most {most_tokens} on each of {self.size} devices, got "
                f"{self.max_tokens}; entries of all tokens are numbered in int32."
            )

    def _check_nodes(self) -> None:
        if self.ranks_per_node is not None and self.size % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node: expected a divisor of the {self.size} ranks along {self.axis_name!r}, got "
                f"{self.ranks_per_node}; leave it out, and nodes are the hosts."
            )

    def on_nodes(self, ranks_per_node: int | None, between_hosts: bool) -> "CommunicatorConfig":
        """Return the same with the nodes that the processes have agreed on, see `Topology`."""
        chosen = dataclasses.replace(self, ranks_per_node=ranks_per_node)
        object.__setattr__(chosen, "_between_hosts", between_hosts)
        return chosen

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The expert-parallel axes as a tuple, outermost first."""
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name

    @property
    def size(self) -> int:
        """R, devices in one expert-parallel group."""
        return math.prod(self.mesh.shape[name] for name in self.axis_names)

    @property
    def most_low_latency_tokens(self) -> int:
        """The most tokens per device of an op in low-latency mode; 0 if no op takes it."""
        if self.mode == "auto" and self.topology.platform == "cuda" and self.topology.num_nodes > 1:
            return 0  # not measured yet
        if self.mode == "auto":
            of_group = AUTO_LOW_LATENCY_TOKENS // max(self.size, 2)
            return min(self.max_tokens, of_group, AUTO_LOW_LATENCY_MARKS // self.num_experts)
        return self.max_tokens if self.mode == "low_latency" else 0

    @property
    def low_latency_row_bytes(self) -> int:
        """The bytes of the widest row of an op in low-latency mode.

        With "auto" any row, so that what a dispatch has chosen holds for its combine, whatever its dtype.
        """
        return max((4 if self.mode == "auto" else 2) * self.hidden_size, 16)

    def mode_of(self, num_tokens: int) -> OpMode:
        """Return the mode of a dispatch of `num_tokens` per device, and of what follows its handle."""
        most = self.most_low_latency_tokens
        return "low_latency" if most > 0 and num_tokens <= most else "throughput"

    @functools.cached_property
    def topology(self) -> Topology:
        """The groups of the mesh, and their nodes."""
        topology = Topology.of(self.mesh, self.axis_names, self.ranks_per_node)
        return dataclasses.replace(topology, between_hosts=self._between_hosts)

    @functools.cached_property
    def fingerprint(self) -> int:
        """63 bits that differ when the arguments do; stored in compiled programs."""
        facts = (self.size, self.mesh.size // self.size, self.axis_names, self.num_experts,
                 self.num_experts_per_tok, self.max_tokens, self.hidden_size, self.mode,
                 self.topology.num_nodes)  # fmt: skip
        digest = hashlib.sha256(repr(facts).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def check_mesh(mesh: Any) -> None:
    """Raise unless `mesh` is a mesh of devices."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh: expected a jax.sharding.Mesh of devices, got {type(mesh).__name__}; make one with "
            'jax.make_mesh((8,), ("expert",)), for example.'
        )


def config_or_error(arguments: Mapping[str, Any]) -> CommunicatorConfig | Exception:
    """Return the checked arguments, or the error to raise once all processes know of it."""
    try:
        return CommunicatorConfig(**arguments)
    except Exception as error:
        return error


def groups_of(arguments: Mapping[str, Any]) -> Topology:
    """Return the groups for invalid arguments: the whole mesh as one group if `axis_name` is invalid."""
    mesh: Mesh = arguments["mesh"]
    try:
        axis_names = _checked_axis_names(mesh, arguments["axis_name"])
    except Exception:
        axis_names = mesh.axis_names
    return Topology.of(mesh, axis_names)


def is_timeout(value: Any) -> bool:
    """Return whether `value` is a number of seconds that a wait can last."""
    return isinstance(value, (int, float)) and value > 0 and math.isfinite(value)


def texts_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return arguments, valid or not, as texts of bounded length that are equal if the arguments are."""
    mesh: Mesh = arguments["mesh"]
    texts = {"mesh": f"{dict(mesh.shape)} of devices {[device.id for device in mesh.devices.flat]}"}
    for name, value in arguments.items():
        if name != "mesh":
            texts[name] = repr(_plain_integer(value) if name in INTEGERS else value)
    return {name: _cut(text) for name, text in texts.items()}


def _plain_integer(value: Any) -> Any:
    """Return an integer of any type as an int; anything else as it is."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _cut(text: str) -> str:
    """Return a text of a bounded length that differs between texts that differ."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}… (digest {digest_of(text)})"


def _checked_axis_names(mesh: Mesh, axis_name: Any) -> tuple[str, ...]:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"axis_name: expected a mesh axis or a tuple of them, got {axis_name!r}.")
    for name in names:
        if name not in mesh.axis_names:
            remedy = " or ".join(f'axis_name="{axis}"' for axis in mesh.axis_names)
            raise ValueError(
                f"axis_name: expected an axis of mesh, {mesh.axis_names}, got {name!r}; pass {remedy}."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name: expected every axis once, got {axis_name!r}.")
    return tuple(names)


def _check_timeout(timeout_s: Any) -> None:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise TypeError(f"timeout_s: expected seconds, a positive number, got {timeout_s!r}.")
    if not is_timeout(timeout_s):
        raise ValueError(f"timeout_s: expected seconds, a positive finite number, got {timeout_s!r}.")
