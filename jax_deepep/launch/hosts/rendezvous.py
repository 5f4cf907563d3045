"""Rendezvous of the launchers of one job: a port for JAX's coordinator, and messages about failures.

Launcher 0 listens; the others connect and stay connected. So no free port has to be chosen by hand,
hosts may start different numbers of ranks, and a rank that dies on one host ends the ranks of all hosts
within seconds: JAX alone would notice after its heartbeat timeout of 100 s.

Messages are lines of JSON; see `job_watch`.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax_deepep.launch.hosts.cluster_environment import LauncherPosition, PositionError
from jax_deepep.launch.rank_environment import JobPosition

_FIRST_PORT, _NUM_PORTS, _CANDIDATES = 20000, 12000, 8  # below the ports that the kernel hands out
Message = dict[str, Any]


class Peer:
    """The connection to another launcher."""

    def __init__(self, connection: socket.socket, index: int = 0) -> None:
        self.index = index  # of the launcher at the other end
        self._connection = connection
        self._partial = b""

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._connection.fileno()

    def receive(self, timeout_s: float = 0.0, limit: int = 65536) -> list[Message] | None:
        """Return the messages that arrive within this time, if any; None if the connection is closed."""
        self._connection.settimeout(timeout_s)
        try:
            data = self._connection.recv(limit)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def send(self, message: Message) -> None:
        """Send; a closed connection is noticed when reading."""
        self._connection.settimeout(10)
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass
class HostLink:
    """The connections of this launcher: to all others for launcher 0, to launcher 0 for the others."""

    job: JobPosition
    peers: list[Peer]
    reserved: socket.socket | None = (
        None  # keeps the coordinator's port free for rank 0, which can bind it too
    )

    @property
    def is_first(self) -> bool:
        """Whether this is launcher 0."""
        return self.job.first_rank == 0

    def send(self, message: Message) -> None:
        """Send to every launcher that is connected."""
        for peer in self.peers:
            peer.send(message)


def rendezvous(
    position: LauncherPosition, num_local: int, timeout_s: float, cancelled: Callable[[], bool]
) -> HostLink:
    """Find the other launchers of the job.

    Args:
        position: this launcher among the others.
        num_local: how many ranks it starts.
        timeout_s: the longest to wait for the others.
        cancelled: polled; true ends the wait with `InterruptedError`.
    """
    deadline = time.monotonic() + timeout_s
    if position.index == 0:
        return _accept_others(position, num_local, deadline, cancelled)
    return _join_first(position, num_local, deadline, cancelled)


def _bind_address(position: LauncherPosition) -> str:
    """Where launcher 0 and JAX's coordinator listen: the named address and nothing else."""
    try:
        address = socket.getaddrinfo(position.coordinator, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise PositionError(
            f"--coordinator: {position.coordinator!r} is not a known host ({error})"
        ) from error
    named_loopback = position.coordinator == "localhost" or position.coordinator.startswith(("127.", "::1"))
    if str(address).startswith("127.") and not named_loopback:
        # Often /etc/hosts maps the machine's name to 127.0.1.1, which other hosts cannot reach.
        return "0.0.0.0"
    return str(address)


def reserve_port(address: str, port: int) -> socket.socket:
    """Return a socket that reserves a port, 0 for any, for JAX's coordinator until it is closed."""
    # With SO_REUSEPORT, JAX's coordinator (gRPC sets it too) can bind the port while this socket holds it,
    # and no other process can take it in between. A socket that does not listen accepts no connections.
    holder = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        holder.bind((address, port))
    except OSError as error:
        holder.close()
        raise PositionError(
            f"--coordinator: cannot listen on {address}:{port or 'any port'} ({error.strerror}); it must "
            "be an address of the first host, with a port that is free there or with none"
        ) from error
    return holder


def _in_url(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ports(position: LauncherPosition) -> list[int]:
    if position.port is not None:
        return [position.port]
    start = int(_fingerprint(position)[:8], 16)
    return [_FIRST_PORT + (start + step * 37) % _NUM_PORTS for step in range(_CANDIDATES)]


def _fingerprint(position: LauncherPosition) -> str:
    who = f"{position.coordinator} {position.port} {position.count} {position.job} {os.getuid()}"
    return hashlib.sha256(who.encode()).hexdigest()


def _accept_others(
    position: LauncherPosition, num_local: int, deadline: float, cancelled: Callable[[], bool]
) -> HostLink:
    address = _bind_address(position)
    arrived: dict[int, tuple[Peer, int]] = {}
    if position.count > 1:
        with _listen(position, address) as listener:
            while len(arrived) < position.count - 1:
                missing = sorted(set(range(1, position.count)) - set(arrived))
                _check_wait(deadline, cancelled, f"launchers {missing} of {position.count} did not arrive")
                try:
                    peer = Peer(listener.accept()[0])
                except TimeoutError:
                    continue
                hello = _next_message(peer, 5.0) or {}
                if hello.get("job") != _fingerprint(position) or hello["index"] not in missing:
                    peer.close()
                    continue
                peer.send({"welcome": True})
                peer.index = hello["index"]
                arrived[peer.index] = (peer, hello["num_local"])
    reserved = reserve_port(address, position.port or 0 if position.count == 1 else 0)
    port = reserved.getsockname()[1]
    counts = [num_local, *(arrived[index][1] for index in sorted(arrived))]
    coordinator = _in_url(position.coordinator, port)
    for index, (peer, _) in arrived.items():
        peer.send({"coordinator": coordinator, "num_ranks": sum(counts), "first_rank": sum(counts[:index])})
    job = JobPosition(
        0, num_local, sum(counts), coordinator, _in_url(address, port), position.local_index * num_local
    )
    return HostLink(job, [peer for peer, _ in arrived.values()], reserved)


def _listen(position: LauncherPosition, address: str) -> socket.socket:
    tried: list[int] = []
    for port in _ports(position):
        try:
            listener = socket.create_server(
                (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
            )
        except OSError:
            tried.append(port)
            continue
        listener.settimeout(0.2)
        return listener
    raise PositionError(
        f"--coordinator: cannot listen on {address}, port {' or '.join(map(str, tried))}; it must be an "
        "address of the first host (--node-rank 0), with a port that is free there: --coordinator HOST:PORT"
    )


def _join_first(
    position: LauncherPosition, num_local: int, deadline: float, cancelled: Callable[[], bool]
) -> HostLink:
    hello = {"job": _fingerprint(position), "index": position.index, "num_local": num_local}
    while True:
        for port in _ports(position):
            _check_wait(
                deadline,
                cancelled,
                f"launcher 0 was not found at {position.coordinator}, ports {_ports(position)}",
            )
            try:
                peer = Peer(socket.create_connection((position.coordinator, port), timeout=2))
            except OSError:
                continue
            peer.send(hello)
            if not (_next_message(peer, 5.0) or {}).get("welcome"):
                peer.close()  # the port of another program
                continue
            agreed: Message | None = {}
            while agreed == {}:
                _check_wait(deadline, cancelled, "some other launchers did not arrive")
                agreed = _next_message(peer, 0.2)
            if agreed is None:
                raise PositionError("launcher 0 ended before all others had arrived; see its output")
            job = JobPosition(
                agreed["first_rank"], num_local, agreed["num_ranks"], agreed["coordinator"],
                agreed["coordinator"], position.local_index * num_local,
            )  # fmt: skip
            return HostLink(job, [peer])
        time.sleep(0.2)


def _next_message(peer: Peer, seconds: float) -> Message | None:
    """Return one message, {} on timeout, None if the other end closes the connection or is no launcher."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            messages = peer.receive(left, limit=1)  # byte by byte, to leave what follows the message unread
        except ValueError:
            return None
        if messages is None or messages:
            return messages[0] if messages and isinstance(messages[0], dict) else None
    return {}


def _check_wait(deadline: float, cancelled: Callable[[], bool], what: str) -> None:
    if cancelled():
        raise InterruptedError
    if time.monotonic() > deadline:
        raise PositionError(
            f"--start-timeout: {what} in time; start the same line on every host, and see that --hosts, "
            "--coordinator and the number of hosts are the same everywhere"
        )
