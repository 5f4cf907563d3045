"""Passes open files between processes over Unix sockets in the abstract namespace.

These have no file, and vanish with their process. A peer must run as the same user and know a secret, which
it reads from the key-value store.
"""

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from jax_deepep.errors import CommunicatorError

_SECRET_BYTES = 32
_SENT, _FAILED = b"d", b"e"  # the first byte of an answer


class DescriptorServer:
    """Sends open files, which stay the caller's, to peers that present the secret, until it is closed.

    Args:
        descriptors: at least one and at most 253 (the kernel's limit for one message).
        num_peers: how many may connect at once.
    """

    def __init__(self, descriptors: Sequence[int], num_peers: int) -> None:
        self._descriptors = list(descriptors)
        self._secret = secrets.token_hex(_SECRET_BYTES // 2).encode()
        self._address = f"jax_deepep-{secrets.token_hex(16)}"
        self._stopping = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self._address}")
        self._listener.listen(num_peers)
        self._listener.setblocking(False)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def offer(self) -> dict[str, Any]:
        """What a peer needs to receive the files; confidential."""
        return {"address": self._address, "secret": self._secret.decode(), "count": len(self._descriptors)}

    def _serve(self) -> None:
        connections: set[socket.socket] = set()  # that have not sent a secret yet
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        try:
                            connection, _ = self._listener.accept()
                        except OSError:  # a lack of descriptors, say, which may pass
                            self._stopping.wait(0.1)
                            continue
                        connection.setblocking(False)
                        connections.add(connection)
                        selector.register(connection, selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket):
                        selector.unregister(key.fileobj)
                        connections.discard(key.fileobj)
                        with key.fileobj as connection, contextlib.suppress(OSError):  # it was closed
                            self._answer(connection)
        for connection in connections:
            connection.close()

    def _answer(self, connection: socket.socket) -> None:
        if not _is_same_user(connection):
            return
        if not hmac.compare_digest(connection.recv(_SECRET_BYTES), self._secret):
            return
        try:
            socket.send_fds(connection, [_SENT], self._descriptors)
        except OSError as error:
            connection.sendall(_FAILED + str(error).encode())

    def close(self) -> None:
        """End the server; nothing is sent afterwards."""
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> "DescriptorServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def receive(offer: dict[str, Any], peer: str, timeout_s: float) -> list[int]:
    """Return a peer's open files, for the caller to close; child processes do not inherit them.

    Raises:
        CommunicatorError: naming the `peer` and what went wrong.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(f"\0{offer['address']}")
            if not _is_same_user(connection):
                raise CommunicatorError(f"a process of another user listens at the address of {peer}")
            connection.sendall(offer["secret"].encode())
            answer, descriptors = _receive_message(connection, offer["count"])
    except TimeoutError:
        raise CommunicatorError(f"{peer} did not send its memory in time; look at what it does") from None
    except OSError as error:
        raise CommunicatorError(
            f"{peer} did not send its memory ({error}); it may have ended: look at its output"
        ) from error
    if answer == _SENT and len(descriptors) == offer["count"]:
        return descriptors
    close_all(descriptors)
    if answer == _SENT:
        raise CommunicatorError(
            f"{peer} sent {offer['count']} open files, and {len(descriptors)} arrived; raise the limit of "
            "open files of this process (ulimit -n)"
        )
    reason = answer.removeprefix(_FAILED).decode() or "it closed the connection"
    raise CommunicatorError(f"{peer} did not send its memory ({reason}); look at its output")


def _receive_message(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Return bytes and the open files sent with them; socket.recv_fds ignores its flags."""
    received = array("i")
    answer, extras, *_ = connection.recvmsg(
        256, socket.CMSG_LEN(most * received.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in extras:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data)
    return answer, received.tolist()


def close_all(descriptors: Iterable[int]) -> None:
    """Close open files."""
    for descriptor in descriptors:
        os.close(descriptor)


def _is_same_user(connection: socket.socket) -> bool:
    """Return whether the process at the other end runs as this user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
