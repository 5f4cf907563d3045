"""Launchers of one job meet, agree on a port for JAX's coordinator, and tell each other of failures.

Launcher 0 listens; the others connect and stay connected. So no port has to be chosen by hand and
guessed to be free, hosts may start different numbers of ranks, and a rank that dies on one host ends
the ranks of all hosts within seconds: JAX alone would notice after its heartbeat timeout of 100 s.

Messages are JSON, one a line; `job_watch` says which.
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

from jax_deepep.launch.hosts.cluster_environment import LauncherPlace, PlaceError
from jax_deepep.launch.rank_environment import JobPlace

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
        """Return the messages that come within this time, if any; None if the connection is closed."""
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
        """Send; that the other launcher is gone is noticed when reading."""
        self._connection.settimeout(10)
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


@dataclass
class HostLink:
    """The connections of this launcher: to all others for launcher 0, to launcher 0 for the others."""

    job: JobPlace
    peers: list[Peer]
    reserved: socket.socket | None = (
        None  # holds the coordinator's port for rank 0, which may bind it beside us
    )

    @property
    def is_first(self) -> bool:
        """Whether this is launcher 0."""
        return self.job.first_rank == 0

    def send(self, message: Message) -> None:
        """Send to every launcher that is connected."""
        for peer in self.peers:
            peer.send(message)


def meet(place: LauncherPlace, num_local: int, timeout_s: float, cancelled: Callable[[], bool]) -> HostLink:
    """Find the other launchers of the job.

    Args:
        place: this launcher among the others.
        num_local: how many ranks it starts.
        timeout_s: the longest to wait for the others.
        cancelled: asked now and then; true ends the wait with `InterruptedError`.
    """
    deadline = time.monotonic() + timeout_s
    if place.index == 0:
        return _welcome_others(place, num_local, deadline, cancelled)
    return _join_first(place, num_local, deadline, cancelled)


def _bind_address(place: LauncherPlace) -> str:
    """Where launcher 0 and JAX's coordinator listen: the named address and nothing else."""
    try:
        address = socket.getaddrinfo(place.coordinator, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise PlaceError(f"--coordinator: {place.coordinator!r} is not a known host ({error})") from error
    named_loopback = place.coordinator == "localhost" or place.coordinator.startswith(("127.", "::1"))
    if str(address).startswith("127.") and not named_loopback:
        # Many a /etc/hosts maps the machine's own name to 127.0.1.1, where no other host can reach it.
        return "0.0.0.0"
    return str(address)


def reserve_port(address: str, port: int) -> socket.socket:
    """Return what keeps a port, 0 for any, free for JAX's coordinator until it is closed."""
    # With SO_REUSEPORT, JAX's coordinator (gRPC sets it too) can bind the port while we hold it, and
    # nobody else gets it in between. A socket that does not listen takes no connections.
    holder = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        holder.bind((address, port))
    except OSError as error:
        holder.close()
        raise PlaceError(
            f"--coordinator: cannot listen on {address}:{port or 'any port'} ({error.strerror}); it must "
            "be an address of the first host, with a port that is free there or with none"
        ) from error
    return holder


def _in_url(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ports(place: LauncherPlace) -> list[int]:
    if place.port is not None:
        return [place.port]
    start = int(_fingerprint(place)[:8], 16)
    return [_FIRST_PORT + (start + step * 37) % _NUM_PORTS for step in range(_CANDIDATES)]


def _fingerprint(place: LauncherPlace) -> str:
    who = f"{place.coordinator} {place.port} {place.count} {place.job} {os.getuid()}"
    return hashlib.sha256(who.encode()).hexdigest()


def _welcome_others(
    place: LauncherPlace, num_local: int, deadline: float, cancelled: Callable[[], bool]
) -> HostLink:
    address = _bind_address(place)
    met: dict[int, tuple[Peer, int]] = {}
    if place.count > 1:
        with _listen(place, address) as listener:
            while len(met) < place.count - 1:
                missing = sorted(set(range(1, place.count)) - set(met))
                _check_wait(deadline, cancelled, f"launchers {missing} of {place.count} did not come")
                try:
                    peer = Peer(listener.accept()[0])
                except TimeoutError:
                    continue
                hello = _next_message(peer, 5.0) or {}
                if hello.get("job") != _fingerprint(place) or hello["index"] not in missing:
                    peer.close()
                    continue
                peer.send({"welcome": True})
                peer.index = hello["index"]
                met[peer.index] = (peer, hello["num_local"])
    reserved = reserve_port(address, place.port or 0 if place.count == 1 else 0)
    port = reserved.getsockname()[1]
    counts = [num_local, *(met[index][1] for index in sorted(met))]
    coordinator = _in_url(place.coordinator, port)
    for index, (peer, _) in met.items():
        peer.send({"coordinator": coordinator, "num_ranks": sum(counts), "first_rank": sum(counts[:index])})
    job = JobPlace(
        0, num_local, sum(counts), coordinator, _in_url(address, port), place.local_index * num_local
    )
    return HostLink(job, [peer for peer, _ in met.values()], reserved)


def _listen(place: LauncherPlace, address: str) -> socket.socket:
    tried: list[int] = []
    for port in _ports(place):
        try:
            listener = socket.create_server(
                (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
            )
        except OSError:
            tried.append(port)
            continue
        listener.settimeout(0.2)
        return listener
    raise PlaceError(
        f"--coordinator: cannot listen on {address}, port {' or '.join(map(str, tried))}; it must be an "
        "address of the first host (--node-rank 0), with a port that is free there: --coordinator HOST:PORT"
    )


def _join_first(
    place: LauncherPlace, num_local: int, deadline: float, cancelled: Callable[[], bool]
) -> HostLink:
    hello = {"job": _fingerprint(place), "index": place.index, "num_local": num_local}
    while True:
        for port in _ports(place):
            _check_wait(
                deadline, cancelled, f"launcher 0 was not found at {place.coordinator}, ports {_ports(place)}"
            )
            try:
                peer = Peer(socket.create_connection((place.coordinator, port), timeout=2))
            except OSError:
                continue
            peer.send(hello)
            if not (_next_message(peer, 5.0) or {}).get("welcome"):
                peer.close()  # somebody else's port
                continue
            agreed: Message | None = {}
            while agreed == {}:
                _check_wait(deadline, cancelled, "some other launchers did not come")
                agreed = _next_message(peer, 0.2)
            if agreed is None:
                raise PlaceError("launcher 0 went away while the others were still coming; see its output")
            job = JobPlace(
                agreed["first_rank"], num_local, agreed["num_ranks"], agreed["coordinator"],
                agreed["coordinator"], place.local_index * num_local,
            )  # fmt: skip
            return HostLink(job, [peer])
        time.sleep(0.2)


def _next_message(peer: Peer, seconds: float) -> Message | None:
    """Return one message, {} if none comes in time, None if the other end hangs up or is no launcher."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            messages = peer.receive(left, limit=1)  # byte by byte: what follows the message stays there
        except ValueError:
            return None
        if messages is None or messages:
            return messages[0] if messages and isinstance(messages[0], dict) else None
    return {}


def _check_wait(deadline: float, cancelled: Callable[[], bool], what: str) -> None:
    if cancelled():
        raise InterruptedError
    if time.monotonic() > deadline:
        raise PlaceError(
            f"--start-timeout: {what} in time; start the same line on every host, and see that --hosts, "
            "--coordinator and the number of hosts are the same everywhere"
        )
