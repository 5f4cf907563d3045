"""How processes find each other when a communicator is made.

Bytes travel over the key-value store of JAX's coordination service, which `jax.distributed` has
started anyway; file descriptors travel between processes of one host over Unix sockets of the
abstract namespace, which have no file and vanish with their process. No fixed ports, no pickles;
every wait has a deadline and its error names who is missing.
"""

import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jax_deepep import jax_compat
from jax_deepep.errors import CommunicatorError, PeerTimeoutError

# As good as forever, and no clock or timeout of the system overflows.
LONGEST_WAIT_S = 1e9

# How many exchanges each set of processes has had: the same number in all of them, because making a
# communicator is collective. Part of every key, so that no two exchanges meet.
_num_exchanges: dict[tuple[int, ...], int] = {}


class Exchange:
    """One exchange between the processes of a mesh: a namespace, and a deadline for all of it.

    Args:
        processes: process indices that take part, this one among them.
        timeout_s: seconds that the whole exchange may last.
        name_of: describes a process in errors, by the ranks that it has.
    """

    def __init__(self, processes: set[int], timeout_s: float, name_of: Callable[[int], str]) -> None:
        self.processes = tuple(sorted(processes))
        self.process = jax.process_index()
        number = _num_exchanges.get(self.processes, 0)
        _num_exchanges[self.processes] = number + 1
        members = "-".join(map(str, self.processes))
        self._namespace = f"jax_deepep/{members}/{number}"
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + min(timeout_s, LONGEST_WAIT_S)
        self._name_of = name_of
        self._client = jax_compat.coordination_client()

    def _seconds_left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def all_gather(self, name: str, message: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Give `message`, of JSON values, to all processes; return everyone's, by process.

        Raises:
            PeerTimeoutError: some process did not give its own in time.
        """
        key = f"{self._namespace}/{name}"
        self._client.key_value_set_bytes(f"{key}/{self.process}", json.dumps(message).encode())
        messages: dict[int, dict[str, Any]] = {}
        for process in self.processes:
            milliseconds = int(self._seconds_left() * 1000) + 1
            try:
                data = self._client.blocking_key_value_get_bytes(f"{key}/{process}", milliseconds)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                continue
            messages[process] = json.loads(data)
        self._raise_if_missing(set(messages), f"the exchange of {name}")
        return messages

    def _raise_if_missing(self, found: set[int], what: str) -> None:
        missing = [self._name_of(process) for process in self.processes if process not in found]
        if missing:
            raise PeerTimeoutError(
                f"making a communicator on {self._name_of(self.process)} waited "
                f"{self._timeout_s:g} s (timeout_s) in {what} for {', '.join(missing)}. Every "
                "process of the mesh must make the same communicators in the same order."
            )

    def send_descriptors_to_all(self, descriptors: Sequence[int]) -> dict[int, list[int]]:
        """Give open files to all other processes of this host; return theirs, by process.

        All processes give at least one and at most 253 (the kernel's limit for one message). What is
        returned is the caller's to close.

        Raises:
            PeerTimeoutError: some process did not come in time.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            address = f"jax_deepep-{secrets.token_hex(16)}"
            listener.bind(f"\0{address}")
            listener.listen(len(self.processes))
            mine = {"address": address, "count": len(descriptors)}
            everyones = self.all_gather("descriptors", mine)
            server = threading.Thread(
                target=self._serve_descriptors, args=(listener, list(descriptors)), daemon=True
            )
            server.start()
            received: dict[int, list[int]] = {}
            try:
                for process in self.processes:
                    if process != self.process:
                        received[process] = self._receive_descriptors(**everyones[process])
                # Nobody may stop serving before everybody has been served.
                self.all_gather("completion", {})
            except BaseException:
                _close(descriptor for peers in received.values() for descriptor in peers)
                raise
            server.join(self._seconds_left())
        return received

    def _serve_descriptors(self, listener: socket.socket, descriptors: list[int]) -> None:
        served = 0
        while served < len(self.processes) - 1:
            listener.settimeout(self._seconds_left())
            try:
                connection, _ = listener.accept()
            except OSError:  # the deadline, or the listener was closed: the main thread reports it
                return
            with connection:
                if _is_same_user(connection):
                    socket.send_fds(connection, [b"d"], descriptors)
                    served += 1

    def _receive_descriptors(self, address: str, count: int) -> list[int]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self._seconds_left())
            connection.connect(f"\0{address}")
            if not _is_same_user(connection):
                raise CommunicatorError("a process of another user listens in place of a peer")
            _, descriptors, _, _ = socket.recv_fds(connection, 1, count)
        if len(descriptors) != count:
            _close(descriptors)
            raise CommunicatorError("a peer closed its connection instead of sending its memory")
        return list(descriptors)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _is_same_user(connection: socket.socket) -> bool:
    """Return whether the process at the other end runs as this user: the address is no secret."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user == os.getuid()


def host_identity() -> str:
    """Return what is equal for processes that can share memory and abstract Unix sockets."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/net')}/user {os.getuid()}"


def check_same_arguments(arguments: Mapping[int, Mapping[str, str]], name_of: Callable[[int], str]) -> None:
    """Raise if processes gave different arguments; `arguments` has each one's, as text, by process.

    Raises:
        CommunicatorError: naming the argument, the ranks and both values.
    """
    first, *others = arguments
    for name, value in arguments[first].items():
        for process in others:
            if arguments[process][name] != value:
                raise CommunicatorError(
                    f"{name}: {name_of(first)} got {value}, but {name_of(process)} got "
                    f"{arguments[process][name]}; every process takes the same value. "
                    "Start all processes with the same arguments."
                )
