"""The native modules and their communicators as type checkers see them: see `xla_ffi/bindings/`."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Memory of this process or a peer: an open descriptor, its size in bytes (0 where it is known), the PCI
# address of its GPU, and a number that is unique among the allocations of all processes.
Export = tuple[int, int, str, int]

# The ordinal of a GPU, and an address in XLA's memory pool on it.
AddressInPool = tuple[int, int]


@runtime_checkable
class NativeCommunicator(Protocol):
    """The native half of a communicator, on any platform."""

    @property
    def buffer_bytes(self) -> int: ...

    @property
    def broken(self) -> str:
        """What broke it, or an empty string."""

    @property
    def timed_out(self) -> bool:
        """Whether a missing peer broke it."""

    @property
    def invalid_routing(self) -> str:
        """What is wrong with entries of `topk_idx` that ops have ignored, or an empty string."""

    def wait_for_ops(self) -> str:
        """Return an error of a device of this process, or an empty string."""

    def take_stats(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def leave(self, why: str) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class CpuCommunicator(NativeCommunicator, Protocol):
    """`Communicator` of the module for CPUs."""

    @property
    def segment_descriptor(self) -> int:
        """The memory that peers attach; −1 where no other process has a rank of its groups."""

    @property
    def shares_memory(self) -> bool: ...

    @property
    def num_running_ops(self) -> int: ...

    def attach_peer(self, process: int, descriptor: int) -> None:
        """Map a peer's memory and take ownership of the descriptor."""

    def attach_remote(self, group: int, process: int, descriptor: int) -> None:
        """Take ownership of a connection to a process on another node."""

    def start(self) -> None: ...


@runtime_checkable
class CudaCommunicator(NativeCommunicator, Protocol):
    """`Communicator` of the module for GPUs."""

    @property
    def most_blocks(self) -> int: ...

    @property
    def between_nodes(self) -> str:
        """How rows get to other nodes; empty on one node."""

    @property
    def last_ops(self) -> Sequence[tuple[float, int]]:
        """Seconds and SMs of the last op of each rank of this process."""

    def exports(self) -> list[Export]:
        """Return two exports for each device; the caller owns the descriptors."""

    def attach_peer(self, process: int, exports: Sequence[Export]) -> None: ...

    def start(self, ranks_per_gpu: Sequence[int], processes: Sequence[int]) -> None: ...


class NativeModule(Protocol):
    """A native module, for any platform: a table of capsules."""

    source_digest: str

    # Numbers and sizes that are the same on all platforms.
    layouts: dict[str, int]  # names and codes
    modes: dict[str, int]  # likewise
    parts: dict[str, int]  # likewise
    wires: dict[str, int]  # likewise; "None" is a name too
    no_limit: int
    payload_alignment: int  # rows of integers are a multiple of these

    def max_row_bytes(self, *, hidden_size: int) -> int: ...

    def num_groups(self, *, layout: int, num_local_experts: int) -> int: ...

    def pair_table_shape(
        self, *, num_ranks: int, num_experts: int, num_topk: int, num_tokens: int
    ) -> tuple[int, int]: ...

    def dispatch_scratch_ints(
        self, *, num_ranks: int, num_experts: int, num_topk: int, num_tokens: int
    ) -> int: ...

    def wire_row_bytes(self, *, wire: int, size: int) -> int: ...

    def combine_sums(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        num_topk: int,
        num_tokens: int,
        ranks_per_node: int,
        layout: int,
        capacity: int,
        row_size: int,
        element_bytes: int,
        wire: int,
    ) -> tuple[int, int]: ...

    def state_types(self) -> dict[str, dict[str, Any]]: ...

    def targets(self) -> dict[str, dict[str, Any]]: ...


class CpuModule(NativeModule, Protocol):
    """The module for CPUs."""

    def begin_program(self, on_main_thread: bool) -> None: ...

    def Communicator(self, **arguments: Any) -> CpuCommunicator: ...


class CudaModule(NativeModule, Protocol):
    """The module for GPUs."""

    def router_limits(self) -> tuple[int, int, int]:
        """Return how many experts, groups of experts and entries of shares the router's kernels take."""

    def unsupported_reason(
        self,
        num_ranks: int,
        num_experts: int,
        num_topk: int,
        max_tokens: int,
        device: AddressInPool,
        limit_bytes: int,
        window: tuple[int, int],
    ) -> str: ...

    def load_remote_library(self, path: str) -> None:
        """Load what carries puts between hosts."""

    def make_remote_id(self) -> bytes:
        """Make what all processes pass to `connect_processes`, in one of them."""

    def connect_processes(self, id: bytes, process: int, num_processes: int, device: int) -> None:
        """Connect all processes, of which this one has an index and a GPU: collective and unbounded."""

    @property
    def launch_op(self) -> Any:
        """A capsule with which another module launches its kernels as ops."""

    def Communicator(self, **arguments: Any) -> CudaCommunicator: ...
