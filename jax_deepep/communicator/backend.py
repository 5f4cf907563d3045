"""Chooses what the ops of a communicator run on, the same in all processes of the mesh, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jax_deepep.communicator import native_module
from jax_deepep.communicator.build_identity import texts_of_build
from jax_deepep.communicator.config import CommunicatorConfig, is_timeout, texts_of
from jax_deepep.communicator.native import NativeHalf, address_in_pool, make_native_half, window_of
from jax_deepep.communicator.native_types import NativeCommunicator
from jax_deepep.communicator.process_exchange import Exchange, Summary
from jax_deepep.communicator.topology import Topology, host_identity


@dataclass(frozen=True)
class Backend:
    """The chosen implementation.

    Attributes:
        implementation: "native" or "xla".
        reason: why it was chosen.
        half: the native half, started; None for "xla".
    """

    implementation: Literal["native", "xla"]
    reason: str
    half: NativeHalf | None = None

    @property
    def native(self) -> NativeCommunicator | None:
        """The native communicator; None for "xla"."""
        return None if self.half is None else self.half.native

    def transport(self) -> str:
        """Describe how rows reach peers."""
        return "JAX collectives over the mesh axes" if self.half is None else self.half.transport()


def begin_exchange(topology: Topology, timeout_s: Any) -> Exchange:
    """Begin the exchange in which the processes of a mesh make a communicator.

    Args:
        topology: of the mesh.
        timeout_s: the argument of the communicator, valid or not: a limit for the whole exchange.

    Raises:
        ValueError: this process has no device of the mesh.
    """
    if jax.process_index() not in topology.processes:
        raise ValueError(
            f"mesh: expected one with a device of this process ({jax.process_index()}), got one of other "
            "processes; make its communicators in those alone."
        )
    seconds = timeout_s if is_timeout(timeout_s) else 600.0
    return Exchange.between(topology.processes, seconds, topology.describe_process)


def agree(
    exchange: Exchange,
    topology: Topology,
    arguments: Mapping[str, Any],
    config: CommunicatorConfig | Exception,
) -> str:
    """Compare the arguments; return why a process cannot have native ops, or an empty string.

    Args:
        exchange: between all processes of the mesh.
        topology: of the mesh; any groups, where `arguments` are wrong.
        arguments: of the communicator, valid or not.
        config: the same, or the error that they cause.

    Raises:
        CommunicatorError: processes have different arguments, or run different builds of this package.
        PeerTimeoutError: a process did not arrive in time.
    """
    here, host = exchange.process, host_identity()
    exchange.begin_phase("arguments")
    exchange.publish("host", host)
    hosts = exchange.read("host", set(topology.leaders_of(here).values()) - {here})
    summary = Summary(texts_of_build(arguments["implementation"], topology.platform) | texts_of(arguments))
    if isinstance(config, CommunicatorConfig) and (reason := unsupported_reason_here(config)):
        summary.add("unsupported", [here], reason)
    if spanning := topology.group_between_hosts(here, hosts | {here: host}):
        group, text = spanning
        summary.add("group between hosts", [group, here], text)
    exchange.report(summary)
    findings = exchange.verdict()
    return findings.get("unsupported") or findings.get("group between hosts", "")


def choose(config: CommunicatorConfig, unsupported_reason: str, exchange: Exchange) -> Backend:
    """Choose the backend, and make the native half where that is native.

    Args:
        config: of the communicator, the same in all processes.
        unsupported_reason: the reason that all processes agreed on, or an empty string.
        exchange: between all processes of the mesh.

    Raises:
        ValueError: native ops were requested, and a process cannot have them.
    """
    if config.implementation == "xla":
        return Backend("xla", "as asked")
    half = None
    if not unsupported_reason:
        half, unsupported_reason = make_native_half(config, exchange)
    if half is not None:
        return Backend(
            "native", "as asked" if config.implementation == "native" else "auto: available here", half
        )
    if config.implementation == "native":
        raise ValueError(
            f'implementation: expected "xla" or "auto" here, got "native"; {unsupported_reason}.'
        )
    return Backend("xla", f"auto: {unsupported_reason}")


def unsupported_reason_here(config: CommunicatorConfig) -> str:
    """Return why this process cannot have native ops, or an empty string.

    Never raises: the other processes wait for its result.
    """
    if config.implementation == "xla":  # without touching a GPU
        return ""
    topology = config.topology
    if len(topology.platforms) > 1:
        return f"native ops need devices of one platform, not of {', '.join(sorted(topology.platforms))}"
    try:
        if text := native_module.unsupported_reason(topology.platform):
            return text
        return _unsupported_reason_of_gpus(config) if topology.platform == "cuda" else ""
    except Exception as error:
        return f"looking for native ops failed: {type(error).__name__}: {error}"


def _unsupported_reason_of_gpus(config: CommunicatorConfig) -> str:
    module = native_module.load("cuda")
    for device in config.topology.local_devices(jax.process_index()):
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:
            return (
                f"JAX does not report the limit of XLA's memory pool on GPU {device.local_hardware_id} "
                "(memory_stats() has no bytes_limit): leave XLA_PYTHON_CLIENT_ALLOCATOR and "
                "XLA_PYTHON_CLIENT_PREALLOCATE at their defaults"
            )
        if text := module.unsupported_reason(
            config.topology.num_ranks,
            config.num_experts,
            config.num_experts_per_tok,
            config.max_tokens,
            address_in_pool(device),
            limit,
            window_of(config),
        ):
            return text
    return ""
