"""Chooses what the ops of a communicator run on, the same in all processes of the mesh, with the reason."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_deepep.communicator import native_module, nvshmem
from jax_deepep.communicator.build_identity import texts_of_build
from jax_deepep.communicator.config import CommunicatorConfig, is_timeout, texts_of
from jax_deepep.communicator.cuda_half import address_in_pool, window_of
from jax_deepep.communicator.native import make_native_half
from jax_deepep.communicator.native_half import NativeHalf
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


class Agreement(NamedTuple):
    """What the processes of a mesh have found about it together.

    Attributes:
        unsupported_reason: why a process cannot have native ops, or an empty string.
        ranks_per_node: declared or found; None for all of a group.
        between_hosts: GPUs: whether rows go to other hosts, as `Topology.between_hosts`.
    """

    unsupported_reason: str
    ranks_per_node: int | None
    between_hosts: bool = False


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
) -> Agreement:
    """Compare the arguments, and find the nodes if no argument declares them.

    Args:
        exchange: between all processes of the mesh.
        topology: of the mesh; any groups, where `arguments` are wrong.
        arguments: of the communicator, valid or not.
        config: the same, or the error that they cause.

    Raises:
        CommunicatorError: processes have different arguments, or run different builds of this package.
        PeerTimeoutError: a process did not arrive in time.
    """
    here = exchange.process
    exchange.begin_phase("arguments")
    summary = Summary(texts_of_build(arguments["implementation"], topology.platform) | texts_of(arguments))
    if isinstance(config, CommunicatorConfig) and (reason := unsupported_reason_here(config)):
        summary.add("unsupported", [here], reason)
    host = host_identity()
    exchange.publish("host", host)
    begins = compare_hosts(exchange, topology, host, summary, finds_nodes=arguments["ranks_per_node"] is None)
    exchange.report(summary)
    findings = exchange.verdict()
    ranks_per_node = arguments["ranks_per_node"]
    unsupported = findings.get("unsupported", "")
    spans_hosts = findings.get("group between hosts", "")
    found = topology
    if "first node ends" in findings:
        ranks_per_node = int(findings["first node ends"])
        if text := _uneven_hosts(exchange, topology, begins, ranks_per_node):
            return Agreement(unsupported or f"{spans_hosts}, and {text}", None)
        found = dataclasses.replace(topology, num_nodes=topology.num_ranks // ranks_per_node)
    elif not spans_hosts:
        return Agreement(unsupported or topology.uneven_nodes(), ranks_per_node)
    if topology.platform == "cuda" and isinstance(config, CommunicatorConfig) and not unsupported:
        reason = findings.get("node between hosts") or _why_not_between_hosts(exchange, found, config)
        return Agreement(f"{spans_hosts}, and {reason}" if reason else "", ranks_per_node, not reason)
    if found is topology or topology.platform == "cuda":
        return Agreement(unsupported or spans_hosts, ranks_per_node)
    if all(found.uses_puts(group) for group in range(len(found.groups))):
        return Agreement(unsupported or found.uneven_nodes(), ranks_per_node)
    # The devices of a process alternate with others', and no rank has neighbours on its host.
    return Agreement(unsupported or spans_hosts, None)


def compare_hosts(
    exchange: Exchange, topology: Topology, host: str, summary: Summary, *, finds_nodes: bool
) -> set[int]:
    """Add to `summary` what the hosts of other processes show; return the first ranks of hosts.

    Args:
        exchange: in which all processes publish their hosts.
        topology: of the mesh.
        host: of this process.
        summary: gets a group with processes that should share memory and cannot, and the first rank of the
            second host.
        finds_nodes: whether to look for first ranks.
    """
    here = exchange.process
    neighbours = topology.neighbours_of(here) if finds_nodes else {}
    # Where GPUs of a group are on several hosts, each of its nodes must be on one.
    declared_on_gpus = topology.num_nodes > 1 and topology.platform == "cuda"
    nodes = dataclasses.replace(topology, between_hosts=declared_on_gpus)
    leaders = {*topology.leaders_of(here).values(), *nodes.leaders_of(here).values()}
    others = (leaders | {*neighbours.values()}) - {here}
    hosts = exchange.read("host", others) | {here: host}
    if spanning := topology.group_between_hosts(here, hosts):
        group, text = spanning
        summary.add("group between hosts", [group, here], text)
    if nodes.between_hosts and (spanning := nodes.group_between_hosts(here, hosts)):
        text = f"a node of {topology.ranks_per_node} ranks (ranks_per_node) is on several hosts: leave it out"
        summary.add("node between hosts", [spanning[0], here], text)
    begins = {rank for (_, rank), before in neighbours.items() if hosts[before] != host}
    for rank in sorted(begins)[:1]:
        summary.add("first node ends", [rank], str(rank))
    return begins


def _uneven_hosts(exchange: Exchange, topology: Topology, begins: set[int], ranks_per_node: int) -> str:
    """Return why the hosts are not nodes of so many ranks each, or an empty string."""
    own = np.nonzero(topology.process_of == exchange.process)[1].tolist()
    # A process whose ranks are not consecutive has no neighbour of its own in between.
    wrong = begins ^ {rank for rank in own if rank % ranks_per_node == 0 and rank > 0}
    summary = Summary()
    if topology.num_ranks % ranks_per_node:
        wrong.add(topology.num_ranks - topology.num_ranks % ranks_per_node)
    for rank in sorted(wrong)[:1]:
        text = (
            f"the hosts have different numbers of consecutive ranks: the first one {ranks_per_node}, and "
            f"rank {rank} does not fit"
        )
        summary.add("uneven hosts", [rank], text)
    return exchange.agree("nodes", summary).get("uneven hosts", "")


def _why_not_between_hosts(exchange: Exchange, found: Topology, config: CommunicatorConfig) -> str:
    """Return why GPU groups of several hosts cannot have native ops, or an empty string."""
    summary = Summary()
    reason = "" if config.implementation == "xla" else nvshmem.unsupported_reason(found, exchange.process)
    if config.implementation == "auto" and not reason:
        reason = 'NVSHMEM has not been tested between hosts yet: implementation="native" takes it there'
    if reason:
        summary.add("unsupported", [exchange.process], reason)
    return exchange.agree("hosts", summary).get("unsupported", "")


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
