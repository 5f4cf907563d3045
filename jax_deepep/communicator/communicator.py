"""The communicator: an expert-parallel group and its resources, made once, outside of jit."""

import os
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jax.sharding import Mesh

from jax_deepep import jax_compat
from jax_deepep.communicator import native_module
from jax_deepep.communicator.backend import Backend, agree, begin_exchange, choose
from jax_deepep.communicator.config import (
    CommunicatorConfig,
    Implementation,
    Mode,
    OpMode,
    check_mesh,
    config_or_error,
    groups_of,
)
from jax_deepep.communicator.cuda_half import CudaHalf
from jax_deepep.communicator.launch_warnings import warn_of_launch
from jax_deepep.communicator.launched_programs import LaunchedPrograms
from jax_deepep.communicator.native_types import NativeCommunicator
from jax_deepep.communicator.topology import Topology
from jax_deepep.cpu_threads import warn_of_too_few_threads
from jax_deepep.errors import CommunicatorError, InvalidRoutingError, PeerTimeoutError


@dataclass(frozen=True)
class CommunicatorStats:
    """Rows and waits of a communicator since it was made or `stats()` was last called.

    Arrays are [num_groups, R, R], indexed [group, rank, peer]; ranks of other processes are zero.

    Attributes:
        rows_sent: int64, rows that rank sent to peer, itself included: one per (token, device) and op,
            however many experts of the device the token goes to. A row that peer drops for lack of capacity
            counts in low-latency mode, where it travels, and not in throughput mode. Between nodes a row goes
            to the rank of the same index, once per (token, node), dropped there or not, which sends it on
            inside its node; in combine likewise the other way. Where nodes of CPU devices share memory they
            only round: ranks exchange rows directly.
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
            `axis_name` is a separate group.
        axis_name: the expert-parallel axis, or a tuple of axes, outermost first; with () every device is
            its own group.
        num_experts: E, a multiple of the group size R; device r owns experts [r·E/R, (r+1)·E/R).
        num_experts_per_tok: K, entries per token in `topk_idx`; 1 ≤ K ≤ E.
        max_tokens: most tokens per device and op.
        hidden_size: H, elements of a row.
        implementation: "native" for CUDA or CPU kernels, "xla" for JAX collectives, which run on every
            platform; "auto" is native where the platform supports it and, on GPUs, every group is inside
            one host, however many hosts the mesh has. The attribute holds the choice. Groups of GPUs that
            span hosts are native on request, by NVSHMEM, with one process per GPU.
        mode: "low_latency" for decoding: one message per op and peer, into memory of the communicator that on
            GPUs grows with `max_tokens` (see `buffer_bytes`), and rows of at most 2 · H bytes (bfloat16,
            float16, narrow integers); "throughput" for everything else. "auto" chooses for every dispatch
            from its tokens per device when it is traced (`handle.mode`; `describe()` tells the rule).
            Results are the same bits in both. Between nodes of GPUs it is "throughput".
        num_sms: CUDA: SMs that one op occupies; None = chosen for each op from its bytes. At most
            the SMs of the GPU less two, divided by the ranks that share it: all of them must run at once.
            Chosen for each op, a quarter stays for collectives of XLA that run beside ops; if num_sms leaves
            them too few, the two may wait for each other until `timeout_s`.
        timeout_s: seconds, the longest any wait on a peer may last; between nodes a wait for a rank that may
            itself wait lasts a quarter longer, so that the missing one is named.
        ranks_per_node: consecutive ranks of a group on one node, a divisor of R; None = the consecutive ranks
            of a host, where all hosts have as many, else R. A row goes to another node once, and `combine`
            adds up the sums of a node before they leave it, rounded once: its bits depend on this number.
            The attribute holds the choice. On CPU other nodes are reached by TCP.

    `config` keeps the arguments as given.

    Raises:
        ValueError, TypeError: an invalid argument; the message has the expected and the given value.
        CommunicatorError: processes gave different arguments, or run different builds of this package.
        PeerTimeoutError: a process of the mesh did not arrive within `timeout_s`.
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
    ranks_per_node: int | None = None
    config: CommunicatorConfig = field(init=False)
    topology: Topology = field(init=False)
    id: int = field(init=False)
    fingerprint: int = field(init=False)
    _chosen: CommunicatorConfig = field(init=False)  # with the nodes that were found
    _backend: Backend = field(init=False)
    _launched: LaunchedPrograms = field(init=False)
    _creator_pid: int = field(init=False)

    def __post_init__(self) -> None:
        if jax_compat.is_tracing():
            raise ValueError(
                "Communicator: expected to be made outside of jit and other transformations, got a call "
                "while tracing; make it before, and close over it or pass it to the layers as comm=."
            )
        check_mesh(self.mesh)
        arguments = dict(vars(self))
        config = config_or_error(arguments)
        topology = groups_of(arguments) if isinstance(config, Exception) else config.topology
        warn_of_launch(stacklevel=4)
        with begin_exchange(topology, self.timeout_s) as exchange:
            agreement = agree(exchange, topology, arguments, config)
            # Not earlier: if only one process raised, the others would wait for it.
            if isinstance(config, Exception):
                raise config
            chosen = config.on_nodes(agreement.ranks_per_node, agreement.between_hosts)
            backend = choose(chosen, agreement.unsupported_reason, exchange)
        for name in arguments:  # integers of any type are ints there
            self._set(name, getattr(config, name))
        self._set("config", config)
        self._set("_chosen", chosen)
        self._set("topology", chosen.topology)
        self._set("ranks_per_node", chosen.topology.ranks_per_node)
        self._set("fingerprint", chosen.fingerprint)
        self._set("id", exchange.id)
        self._set("implementation", backend.implementation)
        self._set("_backend", backend)
        local_devices = topology.local_devices(exchange.process)
        self._set("_launched", LaunchedPrograms(local_devices))
        self._set("_creator_pid", os.getpid())
        if backend.native is not None:
            native_module.close_at_exit(self, backend.native, self._launched)
            if topology.platform == "cpu":
                warn_of_too_few_threads(len(local_devices))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Communicator #{self.id}({self.size} ranks along {self.axis_name!r}, "
            f"{self.num_experts} experts, {self.implementation})"
        )

    @property
    def _native(self) -> NativeCommunicator | None:
        return self._backend.native

    @property
    def _is_inherited(self) -> bool:
        """Whether this process is a fork of the one that made the communicator."""
        return os.getpid() != self._creator_pid

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

    def mode_of(self, num_tokens: int) -> OpMode:
        """Return the mode of a dispatch of `num_tokens` per device, and of the ops that take its handle."""
        return self._chosen.mode_of(num_tokens)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that this process holds for the communicator between ops."""
        return 0 if self._native is None else self._native.buffer_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return getattr(self, "_closed", False)

    def describe(self) -> str:
        """Return one screen: topology, transport, buffers, mode, and why they were chosen."""
        mesh = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        groups, processes = len(self.topology.groups), len(self.topology.processes)
        state = "closed" if self.closed else self._broken_message() or "ready"
        rows = [
            ("mesh", f"{mesh}; platform {', '.join(sorted(self.topology.platforms))}"),
            ("groups", f"{groups} of {self.size} devices along {', '.join(self.axis_names) or 'no axis'}"
                       f"{self._describe_nodes()}; {processes} process(es)"),
            ("experts", f"{self.num_experts}, {self.num_local_experts} per device, "
                        f"{self.num_experts_per_tok} per token"),
            ("rows", f"up to {self.max_tokens} tokens per device of {self.hidden_size} elements"),
            ("implementation", f"{self.implementation} ({self._backend.reason})"),
            ("transport", self._backend.transport()),
            ("mode", self._describe_mode()),
            ("in flight", self._describe_overlap()),
            ("buffers", f"{self.buffer_bytes / 2**20:.1f} MiB held between ops"),
            ("timeout", f"{self.timeout_s:g} s"),
            ("state", state),
        ]  # fmt: skip
        lines = [f"Communicator #{self.id}", *(f"  {name:<15} {text}" for name, text in rows)]
        return "\n".join(lines)

    def _describe_nodes(self) -> str:
        nodes = self.topology.num_nodes
        return f", on {nodes} nodes of {self.topology.ranks_per_node}" if nodes > 1 else ""

    def _describe_mode(self) -> str:
        if self.mode != "auto":
            return f"{self.mode}, as asked"
        if self.platform == "cuda" and self.topology.num_nodes > 1:
            return "throughput (auto: low_latency between nodes has not been measured)"
        tokens = self._chosen.most_low_latency_tokens
        if tokens == 0:
            return f"throughput (auto: {self.num_experts} experts are too many for low_latency)"
        return f"auto: low_latency for dispatches of up to {tokens} tokens per device, throughput for others"

    def _describe_overlap(self) -> str:
        if self.implementation == "xla":
            return "start does all of an op"
        if self.platform == "cpu":
            return "ops run on threads of their own"
        sms = "24 SMs or less" if self.num_sms is None else f"{self.num_sms} SMs"
        throughput = f"throughput: on a stream of its own, {sms}, not captured in CUDA graphs"
        low_latency = "low_latency: start sends, done receives, no SM in between"
        of_mode = {"throughput": throughput, "low_latency": low_latency}
        return of_mode.get(self.mode, f"{throughput}; {low_latency}")

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

        By the device's clock, in CUDA graphs too. Call it when the op has ended: it does not wait for it.

        Raises:
            CommunicatorError: the ops are not native ones of GPUs.
        """
        half = self._backend.half
        if not isinstance(half, CudaHalf):
            raise CommunicatorError(
                f"last_ops: expected native ops on GPUs, got {self.implementation} ones on {self.platform}; "
                "time whole programs there."
            )
        return [LastOp(*of_device) for of_device in half.native.last_ops]

    def check(self) -> None:
        """Wait for the ops launched so far and raise their errors. Local and sticky.

        Those are the ops of programs that this thread has launched or that have a live result in this
        process, and ops that have begun.

        Raises:
            PeerTimeoutError: a peer did not arrive in time; the communicator is broken.
            CommunicatorError: it is broken for another reason, or a GPU of this process has had an
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
        if self._is_inherited:
            return (
                f"{self!r} belongs to process {self._creator_pid}, of which this one is a fork, without its "
                "threads; make a new one here, or start processes with spawn."
            )
        self._launched.wait()
        return "" if self._native is None else self._native.wait_for_ops()

    def _broken_message(self) -> str:
        return "" if self._native is None else self._native.broken

    def _raise_if_broken(self) -> None:
        if self._native is not None and (message := self._native.broken):
            raise PeerTimeoutError(message) if self._native.timed_out else CommunicatorError(message)

    def raise_if_unusable(self) -> None:
        """Raise if no op may be traced with this communicator: it is closed or broken."""
        if self.closed:
            raise CommunicatorError(f"comm: {self!r} is closed; make a new Communicator and trace again.")
        self._raise_if_broken()

    def close(self) -> None:
        """Wait for the ops launched so far, then free what the communicator holds. Local; may be repeated.

        It waits for what `check` waits for. Tracing with it raises afterwards; a program with native ops that
        was compiled before fails with a clear error. On GPUs such programs may be replayed, and keep its own
        memory (`buffer_bytes`) until they are gone: `jax.clear_caches()`.
        """
        if not self.closed:
            if self._native is not None and not self._is_inherited:
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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"comm: {self!r} cannot be pickled, because it holds devices and shared state; make a new one "
            "in every process, with the same arguments."
        )
