"""Passing open files between processes: who receives them, and errors."""

import os
import socket
import struct

import pytest

from jax_deepep.communicator import descriptors
from jax_deepep.communicator.descriptors import DescriptorServer, receive
from jax_deepep.errors import CommunicatorError


@pytest.fixture
def file():
    descriptor = os.memfd_create("jax_deepep_test")
    os.write(descriptor, b"of the peer")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def server(file: int):
    with DescriptorServer([file, file], num_peers=2) as server:
        yield server


def connected_to(offer: dict) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect(f"\0{offer['address']}")
    return connection


def assert_serves(server: DescriptorServer) -> None:
    received = receive(server.offer, "rank 1", 60.0)
    try:
        assert [os.pread(descriptor, 100, 0) for descriptor in received] == [b"of the peer"] * 2
        assert not any(os.get_inheritable(descriptor) for descriptor in received)
    finally:
        descriptors.close_all(received)


def test_peers_get_the_files_and_their_child_processes_do_not(server: DescriptorServer) -> None:
    for _ in range(3):
        assert_serves(server)


@pytest.mark.parametrize("secret", [b"", b"0" * 32, b"0" * 1000])
def test_a_peer_without_the_secret_gets_nothing(server: DescriptorServer, secret: bytes) -> None:
    with connected_to(server.offer) as connection:
        connection.sendall(secret)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer, received, _, _ = socket.recv_fds(connection, 100, 2)
        except ConnectionResetError:  # it leaves unexpected bytes unread
            answer, received = b"", []
        assert (answer, received) == (b"", [])
    assert_serves(server)


def test_others_are_served_beside_a_silent_and_a_closed_connection(server: DescriptorServer) -> None:
    """A failed send affects that peer alone."""
    with connected_to(server.offer):
        gone = connected_to(server.offer)
        gone.sendall(server.offer["secret"].encode())
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        assert_serves(server)


def test_a_send_that_fails_is_reported_to_the_peer(
    server: DescriptorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_fds(*arguments: object) -> None:
        raise OSError("Too many references: cannot splice")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "send_fds", send_fds)
        with pytest.raises(CommunicatorError, match=r"rank 1 did not send its memory \(Too many references"):
            receive(server.offer, "rank 1", 60.0)
    assert_serves(server)


def test_a_peer_that_has_ended(file: int) -> None:
    with DescriptorServer([file], num_peers=1) as server:
        offer = server.offer
    with pytest.raises(
        CommunicatorError, match=r"rank 1 did not send its memory \(.*refused.*may have ended"
    ):
        receive(offer, "rank 1", 60.0)


def test_a_peer_that_does_not_answer() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + f"jax_deepep_test-{os.getpid()}")
        listener.listen(1)
        offer = {"address": f"jax_deepep_test-{os.getpid()}", "secret": "x", "count": 1}
        with pytest.raises(CommunicatorError, match="rank 1 did not send its memory in time"):
            receive(offer, "rank 1", 0.2)


def test_fewer_files_than_were_sent(server: DescriptorServer) -> None:
    assert_serves(server)  # its thread has opened what it needs
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CommunicatorError, match=r"rank 1 sent 3 open files, and 2 arrived; .*ulimit -n"):
        receive({**server.offer, "count": 3}, "rank 1", 60.0)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the server may still have the connection
