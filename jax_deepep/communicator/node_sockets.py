"""Connects processes on different nodes by TCP: one connection for each pair with the same ranks.

A process listens for its peers of higher numbers and connects to those of lower ones. A peer proves itself by
a secret, which it reads from the key-value store.
"""

import contextlib
import hmac
import ipaddress
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jax_deepep import jax_compat
from jax_deepep.errors import CommunicatorError

ADDRESS_VARIABLE = "JAX_DEEPEP_ADDRESS"

_SOME_OTHER_HOST = "192.0.2.1"  # reserved for documentation: reached by the default route

_HELLO = struct.Struct("!32sqq")  # the secret, the group, and the process that connects
_LONGEST_HELLO_S = 2.0  # of a connection that is not from a peer, say

# A group, and a process on another node.
Peer = tuple[int, int]


class NodeSockets:
    """The sockets of one process to its peers on other nodes; a context manager, which closes what is left.

    Args:
        process: this one.
        peers: of its groups.
    """

    def __init__(self, process: int, peers: Iterable[Peer]) -> None:
        self._process = process
        self._peers = sorted(peers)
        self._secret = secrets.token_hex(16).encode()
        self._address = address_of_this_host()
        self._listener = _listen(self._address, len(self._peers))
        self._connections: dict[Peer, socket.socket] = {}

    @property
    def offer(self) -> dict[str, Any]:
        """What peers need to connect; confidential."""
        return {
            "address": self._address,
            "port": self._listener.getsockname()[1],
            "secret": self._secret.decode(),
        }

    def connect(self, offers: Mapping[int, dict[str, Any]], timeout_s: float) -> dict[Peer, int]:
        """Return a connected socket for every peer, as descriptors for the caller to close.

        Raises:
            CommunicatorError: naming the process that could not be reached, and its address.
        """
        deadline = time.monotonic() + timeout_s
        for group, peer in self._peers:
            if peer < self._process:
                self._connections[group, peer] = self._connect(group, peer, offers[peer], deadline)
        missing = {(group, peer) for group, peer in self._peers if peer > self._process}
        while missing:
            connection = self._accept(deadline, missing)
            found = self._peer_of(connection, deadline)
            if found in missing:
                missing.remove(found)
                self._connections[found] = connection
            else:
                connection.close()
        connected = {peer: connection.detach() for peer, connection in self._connections.items()}
        self._connections = {}
        return connected

    def _connect(self, group: int, peer: int, offer: dict[str, Any], deadline: float) -> socket.socket:
        where = (offer["address"], offer["port"])
        try:
            connection = socket.create_connection(where, timeout=_seconds_until(deadline))
            connection.sendall(_HELLO.pack(offer["secret"].encode(), group, self._process))
            connection.settimeout(None)
        except OSError as error:
            raise CommunicatorError(
                f"process {peer}, on another node, could not be reached at {where[0]} port {where[1]} "
                f"({error}); open the ports between the hosts, or set {ADDRESS_VARIABLE} on each to its "
                "address in the job's network"
            ) from error
        return connection

    def _accept(self, deadline: float, missing: set[Peer]) -> socket.socket:
        self._listener.settimeout(_seconds_until(deadline))
        try:
            if time.monotonic() > deadline:  # strangers may keep coming
                raise TimeoutError
            connection, _ = self._listener.accept()
        except TimeoutError:
            names = ", ".join(f"process {peer}" for peer in sorted({peer for _, peer in missing}))
            raise CommunicatorError(
                f"{names}, on another node, did not connect to {self._address} in time; look at the output "
                f"there, or set {ADDRESS_VARIABLE} on each host to its address in the job's network"
            ) from None
        return connection

    def _peer_of(self, connection: socket.socket, deadline: float) -> Peer | None:
        """Return who connects, or None if it does not know the secret."""
        end = min(deadline, time.monotonic() + _LONGEST_HELLO_S)
        hello = b""
        try:
            while len(hello) < _HELLO.size:
                connection.settimeout(_seconds_until(end))
                part = connection.recv(_HELLO.size - len(hello))
                if not part:
                    return None
                hello += part
        except OSError:
            return None
        connection.settimeout(None)
        secret, group, peer = _HELLO.unpack(hello)
        return (group, peer) if hmac.compare_digest(secret, self._secret) else None

    def close(self) -> None:
        """Close the listener, and connections that were not handed over."""
        self._listener.close()
        for connection in self._connections.values():
            connection.close()

    def __enter__(self) -> "NodeSockets":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seconds_until(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _listen(address: str, num_peers: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=num_peers)
    except OSError as error:
        raise CommunicatorError(
            f"{ADDRESS_VARIABLE}: expected an address of this host in the job's network, got {address!r} "
            f"({error}); set it on each host, or leave it out for the one towards JAX's coordinator"
        ) from error


def address_of_this_host() -> str:
    """Return the address at which other hosts of the job reach this one.

    That is the one from which it reaches JAX's coordinator, unless JAX_DEEPEP_ADDRESS is another.
    """
    if address := os.environ.get(ADDRESS_VARIABLE):
        return address
    host, _, port = jax_compat.coordinator_address().rpartition(":")
    host = host.strip("[]")
    address = _source_address_towards(host, int(port))
    if ipaddress.ip_address(address).is_loopback and not _is_this_machine(host):
        # The coordinator's host knows its own name as a loopback address, as many do.
        with contextlib.suppress(OSError):
            address = _source_address_towards(_SOME_OTHER_HOST, int(port))
    return address


def _source_address_towards(host: str, port: int) -> str:
    family, *_, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        return str(probe.getsockname()[0])


def _is_this_machine(host: str) -> bool:
    """Return whether a job whose coordinator is called so can only be on one machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
