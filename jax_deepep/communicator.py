"""The communicator: who exchanges rows with whom, made once, outside of jit."""

import contextlib
import hashlib
import warnings
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jax_deepep import arguments, bootstrap, build_identity, jax_compat, native_communicator, native_module
from jax_deepep.errors import CommunicatorError, InvalidRoutingError, PeerTimeoutError
from jax_deepep.launched_rank import launched_rank
from jax_deepep.topology import Topology, host_identity

Implementation = Literal["auto", "native", "xla"]
Mode = Literal["auto", "throughput", "low_latency"]

# Longer arguments are cut where processes compare them, and told apart by a digest.
_MOST_CHARACTERS = 120


def _cut(text: str) -> str:
    """Return a text of a bounded length that differs between texts that differ."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}… (digest {bootstrap.digest_of(text)})"


@dataclass(frozen=True)
class CommunicatorStats:
    """What crossed a communicator since it was made or last asked.

    Arrays are [num_groups, R, R], indexed [group, rank, peer]; ranks of other processes are zero.

    Attributes:
        rows_sent: int64, rows that rank sent to peer, itself included: one per (token, device) and op,
            however many experts of the device the token goes to.
        rows_received: int64, rows that rank received from peer.
        seconds_waited: float64, how long ops of rank waited until peer arrived.
    """

    rows_sent: np.ndarray
    rows_received: np.ndarray
    seconds_waited: np.ndarray


class LastOp(NamedTuple):
    """The last op of one device.

    Attributes:
        seconds: from its first instruction on the device to its last, waits for peers included.
        num_sms: SMs that it took.
    """

    seconds: float
    num_sms: int


@dataclass(frozen=True, eq=False, repr=False)
class Communicator:
    """An expert-parallel group of devices, and what its ops need to exchange rows.

    Frozen and hashable by identity: a static argument, free to be closed over by jitted functions.
    Any number of communicators may live at once. Also a context manager that closes itself.

    **Collective:** every process of the mesh makes the same communicators in the same order.

    Args:
        mesh: the device mesh; further axes (data, fsdp, …) are allowed, and each slice along
            `axis_name` is a group of its own.
        axis_name: the expert-parallel axis, or a tuple of axes, outermost first; with () every device is
            a group of its own.
        num_experts: E, a multiple of the group size R; device r owns experts [r·E/R, (r+1)·E/R).
        num_experts_per_tok: K, entries per token in `topk_idx`; 1 ≤ K ≤ E.
        max_tokens: most tokens per device and op.
        hidden_size: H, elements of a row.
        implementation: "native" for our own kernels, "xla" for JAX collectives, which run on every
            platform; "auto" takes the native one where the platform has it and every group lies inside one
            host, however many hosts the mesh has. The attribute holds what was chosen.
        mode: "auto" or "throughput"; "low_latency" is not in this version. The attribute holds
            what was chosen.
        num_sms: CUDA: SMs that one op occupies; None = as many as its bytes want, chosen for each op. At most
            the SMs of the GPU less two, divided by the ranks that share it: all of them must run at once.
        timeout_s: seconds, the longest any wait on a peer may last.

    Raises:
        ValueError, TypeError: a bad argument, named with what it got and what it takes.
        CommunicatorError: processes gave different arguments, or run different builds of this package.
        PeerTimeoutError: a process of the mesh did not come within `timeout_s`.
    """

    mesh: Mesh
    axis_name: str | tuple[str, ...] = "expert"
    _: KW_ONLY
    num_experts: int
    num_experts_per_tok: int
    max_tokens: int
    hidden_size: int
    implementation: Implementation = "auto"
    mode: Mode = "auto"
    num_sms: int | None = None
    timeout_s: float = 600.0
    topology: Topology = field(init=False)
    id: int = field(init=False)
    _why: str = field(init=False)
    _native: Any = field(init=False)

    def __post_init__(self) -> None:
        if jax_compat.is_tracing():
            raise ValueError(
                "Communicator: expected to be made outside of jit and other transformations, got a call "
                "while tracing; make it before, and close over it or pass it to the layers as comm=."
            )
        arguments.check_mesh(self.mesh)
        for name in arguments.SIZES:
            self._set(name, arguments.plain_int(getattr(self, name)))
        wrong_axes = None
        try:
            axis_names = arguments.checked_axis_names(self.mesh, self.axis_name)
        except (TypeError, ValueError) as error:
            wrong_axes, axis_names = error, self.mesh.axis_names
        topology = Topology.of(self.mesh, axis_names)
        self._set("topology", topology)
        rank = launched_rank()
        if rank is not None and rank.num_ranks > 1 and jax.process_count() == 1:
            warnings.warn(
                f"This is rank {rank.rank} of {rank.num_ranks} of python -m jax_deepep.launch, and JAX knows "
                "of no other process: call jax.distributed.initialize() first, in every rank, or each one "
                "computes for itself.",
                stacklevel=3,
            )
        with self._exchange_between_processes() as exchange:
            # Before an error in the arguments is raised here: one that only one process sees would
            # leave the others waiting for it.
            obstacle = self._agree_on_arguments(exchange)
            if wrong_axes is not None:
                raise wrong_axes
            arguments.check_sizes(self, topology.num_ranks)
            requested = self.implementation
            implementation, why = arguments.chosen_implementation(requested, obstacle)
            self._set("implementation", implementation)
            self._set("mode", "throughput")
            self._set("id", exchange.id)
            self._set("_why", why)
            self._set("_native", None)
            if implementation == "native":
                native, why_not = native_communicator.make(self, exchange)
                if why_not:
                    implementation, why = arguments.without_native(requested, why_not)
                    self._set("implementation", implementation)
                    self._set("_why", why)
                    return
                self._set("_native", native)
                native_module.close_at_exit(self, native)

    def _exchange_between_processes(self) -> bootstrap.Exchange:
        timeout_s = self.timeout_s if arguments.is_timeout(self.timeout_s) else 600.0
        topology = self.topology
        if jax.process_index() not in topology.processes:
            raise ValueError(
                f"mesh: got one without a device of this process ({jax.process_index()}); only the "
                "processes of a mesh make its communicators."
            )
        return bootstrap.Exchange.between(topology.processes, timeout_s, topology.describe_process)

    def _agree_on_arguments(self, exchange: bootstrap.Exchange) -> str:
        """Raise if processes differ; return what keeps one of them from native ops, or nothing."""
        here, host = jax.process_index(), host_identity()
        exchange.come_to("arguments")
        exchange.publish("host", host)
        hosts = exchange.read("host", set(self.topology.leaders_of(here).values()) - {here})
        summary = bootstrap.Summary(self._arguments())
        if text := native_communicator.obstacle(self):
            summary.add("obstacle", [here], text)
        if spanning := self.topology.group_between_hosts(here, hosts | {here: host}):
            group, text = spanning
            summary.add("group between hosts", [group, here], text)
        exchange.report(summary)
        findings = exchange.verdict()
        return findings.get("obstacle") or findings.get("group between hosts", "")

    def _arguments(self) -> dict[str, str]:
        """Return the arguments as text that is equal between processes when they are."""
        mesh = f"{dict(self.mesh.shape)} of devices {[device.id for device in self.mesh.devices.flat]}"
        names = ("axis_name", "num_experts", "num_experts_per_tok", "max_tokens", "hidden_size",
                 "implementation", "mode", "num_sms", "timeout_s")  # fmt: skip
        values = {name: repr(getattr(self, name)) for name in names}
        return {
            **build_identity.of(self),
            **{name: _cut(text) for name, text in {"mesh": mesh, **values}.items()},
        }

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Communicator #{self.id}({self.size} ranks along {self.axis_name!r}, "
            f"{self.num_experts} experts, {self.implementation})"
        )

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The expert-parallel axes as a tuple, outermost first."""
        return self.topology.axis_names

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "cuda", "rocm" or "tpu"."""
        return self.topology.platform

    @property
    def size(self) -> int:
        """R, devices in one expert-parallel group."""
        return self.topology.num_ranks

    @property
    def num_local_experts(self) -> int:
        """L = E / R, experts that one device owns."""
        return self.num_experts // self.size

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that this process holds for the communicator between ops."""
        return 0 if self._native is None else self._native.buffer_bytes

    @property
    def fingerprint(self) -> int:
        """63 bits that differ when the arguments do; a compiled program carries them."""
        facts = (self.size, len(self.topology.groups), self.axis_names, self.num_experts,
                 self.num_experts_per_tok, self.max_tokens, self.hidden_size)  # fmt: skip
        digest = hashlib.sha256(repr(facts).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return getattr(self, "_closed", False)

    def describe(self) -> str:
        """Return one screen: topology, transport, buffers, mode, and why they were chosen."""
        mesh = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        groups, processes = len(self.topology.groups), len(self.topology.processes)
        state = "closed" if self.closed else self._broken_message() or "ready"
        if self.implementation == "xla":
            transport = "JAX collectives over the mesh axes"
        elif self.platform == "cuda":
            sms = f"{'up to ' if self.num_sms is None else ''}{self._native.most_blocks} SMs per op"
            transport = f"peers' arrays are read in place, over NVLink or in one GPU; {sms}"
        elif not self._native.shares_memory:  # no group is spread over several processes
            transport = "process memory: peers' arrays are read in place"
        else:
            transport = "shared memory between the processes of this host"
        rows = [
            ("mesh", f"{mesh}; platform {', '.join(sorted(self.topology.platforms))}"),
            ("groups", f"{groups} of {self.size} devices along {', '.join(self.axis_names) or 'no axis'}; "
                       f"{processes} process(es)"),
            ("experts", f"{self.num_experts}, {self.num_local_experts} per device, "
                        f"{self.num_experts_per_tok} per token"),
            ("rows", f"up to {self.max_tokens} tokens per device of {self.hidden_size} elements"),
            ("implementation", f"{self.implementation} ({self._why})"),
            ("transport", transport),
            ("mode", self.mode),
            ("buffers", f"{self.buffer_bytes / 2**20:.1f} MiB held between ops"),
            ("timeout", f"{self.timeout_s:g} s"),
            ("state", state),
        ]  # fmt: skip
        lines = [f"Communicator #{self.id}", *(f"  {name:<15} {text}" for name, text in rows)]
        return "\n".join(lines)

    def stats(self) -> CommunicatorStats:
        """Return rows sent and received and time waited per peer, since the last call.

        A row counts as sent when its receiver has it, which may be a moment after the sender's op.

        Raises:
            CommunicatorError: with implementation="xla", which does not count.
        """
        if self._native is None:
            raise CommunicatorError(
                'stats: implementation="xla" counts nothing; use implementation="native".'
            )
        return CommunicatorStats(*self._native.take_stats())

    def last_ops(self) -> list[LastOp]:
        """Return what the last op took on each device of this process, in the order of the mesh.

        By the device's clock, captured or not. To be called when the op has ended; others are not waited for.

        Raises:
            CommunicatorError: the ops are not native ones of GPUs.
        """
        if self._native is None or self.platform != "cuda":
            raise CommunicatorError(
                f"last_ops: expected native ops on GPUs, got {self.implementation} ones on {self.platform}; "
                "time whole programs there."
            )
        return [LastOp(*of_device) for of_device in self._native.last_ops]

    def check(self) -> None:
        """Wait for the ops launched so far and raise what they met. Local and sticky.

        An op launched so far is one whose program has a live result in this process, or that has
        begun.

        Raises:
            PeerTimeoutError: a peer did not arrive in time; the communicator is broken.
            CommunicatorError: it is broken for another reason, or a GPU of this process has met an
                error.
            InvalidRoutingError: `topk_idx` held invalid entries; the communicator still works.
        """
        if error := self._wait_for_ops():
            raise CommunicatorError(error)
        self._raise_if_broken()
        if self._native is not None and (text := self._native.invalid_routing):
            raise InvalidRoutingError(text)

    def _wait_for_ops(self) -> str:
        """Return an error of a device of this process, or nothing."""
        for array in jax.live_arrays():
            # A program that failed raises here, and one may give its result away meanwhile: both
            # concern whoever uses the result, and neither leaves an op running.
            with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
                if not array.is_deleted():
                    array.block_until_ready()
        return "" if self._native is None else self._native.wait_for_ops()

    def _broken_message(self) -> str:
        return "" if self._native is None else self._native.broken

    def _raise_if_broken(self) -> None:
        if message := self._broken_message():
            raise PeerTimeoutError(message) if self._native.timed_out else CommunicatorError(message)

    def raise_if_unusable(self) -> None:
        """Raise if no op may be traced with this communicator: it is closed or broken."""
        if self.closed:
            raise CommunicatorError(f"comm: {self!r} is closed; make a new Communicator and trace again.")
        self._raise_if_broken()

    def close(self) -> None:
        """Wait for running ops, then free what the communicator holds. Local; may be repeated.

        Tracing with it raises afterwards; a program compiled before fails with a clear error.
        """
        if not self.closed:
            if self._native is not None:
                self._wait_for_ops()
                self._native.close()
            self._set("_closed", True)

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> "Communicator":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Communicator":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"comm: {self!r} cannot be pickled, because it holds devices and an agreement of processes; make "
            "it anew, in every process, with the same arguments."
        )
