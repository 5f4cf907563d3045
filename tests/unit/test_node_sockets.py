"""Connections between nodes: who is let in, and what is said when somebody is missing."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

import jax_deepep as ep
from jax_deepep.communicator import node_sockets
from jax_deepep.communicator.node_sockets import NodeSockets

PEERS = {0: [(0, 1), (3, 1)], 1: [(0, 0), (3, 0)]}  # of two processes that share two groups


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, NodeSockets]]:
    monkeypatch.setenv("JAX_DEEPEP_ADDRESS", "127.0.0.1")
    with NodeSockets(0, PEERS[0]) as first, NodeSockets(1, PEERS[1]) as second:
        yield {0: first, 1: second}


def connect(
    sockets: dict[int, NodeSockets], timeout_s: float = 20.0
) -> dict[int, dict[tuple[int, int], int]]:
    offers = {process: of_process.offer for process, of_process in sockets.items()}
    connected: dict[int, dict[tuple[int, int], int]] = {}

    def connect_one(process: int) -> None:
        connected[process] = sockets[process].connect(offers, timeout_s)

    threads = [threading.Thread(target=connect_one, args=(process,)) for process in sockets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return connected


def test_peers_are_connected_for_each_group(sockets: dict[int, NodeSockets], monkeypatch) -> None:
    """In spite of strangers, who come first: one is silent, one does not know the secret."""
    monkeypatch.setattr(node_sockets, "_LONGEST_HELLO_S", 0.1)
    offer = sockets[0].offer
    with (
        socket.create_connection((offer["address"], offer["port"])) as silent,
        socket.create_connection((offer["address"], offer["port"])) as stranger,
    ):
        stranger.sendall(node_sockets._HELLO.pack(b"0" * 32, 0, 1))
        connected = connect(sockets)
        assert silent.recv(1) == b""  # closed
    assert {process: set(of_process) for process, of_process in connected.items()} == {
        process: set(peers) for process, peers in PEERS.items()
    }
    for group, _ in PEERS[0]:
        with (
            socket.socket(fileno=connected[0][group, 1]) as one,
            socket.socket(fileno=connected[1][group, 0]) as other,
        ):
            one.sendall(bytes([group]))
            other.settimeout(10)
            assert other.recv(1) == bytes([group])
            assert not os.get_inheritable(one.fileno())


def test_a_peer_that_does_not_connect_is_named(sockets: dict[int, NodeSockets]) -> None:
    with pytest.raises(ep.CommunicatorError, match="process 1, on another node, did not connect to"):
        sockets[0].connect({}, 0.1)


def test_a_peer_that_cannot_be_reached_is_named(sockets: dict[int, NodeSockets]) -> None:
    offers = {0: sockets[0].offer}
    sockets[0].close()
    words = r"process 0, on another node, could not be reached at 127.0.0.1 port \d+ \(.*open the ports"
    with pytest.raises(ep.CommunicatorError, match=words):
        sockets[1].connect(offers, 5.0)


def test_an_address_of_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DEEPEP_ADDRESS", "192.0.2.1")  # reserved for documentation
    words = "JAX_DEEPEP_ADDRESS: expected an address of this host in the job's network, got '192.0.2.1'"
    with contextlib.ExitStack() as stack, pytest.raises(ep.CommunicatorError, match=words):
        stack.enter_context(NodeSockets(0, PEERS[0]))


def test_the_address_is_the_one_towards_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_DEEPEP_ADDRESS", raising=False)
    monkeypatch.setattr(node_sockets.jax_compat, "coordinator_address", lambda: "localhost:1234")
    assert node_sockets.address_of_this_host() in ("127.0.0.1", "::1")


def test_a_host_that_knows_its_name_as_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others cannot reach it there: the address of the default route is offered, if there is one."""
    monkeypatch.delenv("JAX_DEEPEP_ADDRESS", raising=False)
    monkeypatch.setattr(node_sockets.jax_compat, "coordinator_address", lambda: "node0:1234")
    towards = {"node0": "127.0.1.1", node_sockets._SOME_OTHER_HOST: "10.1.2.3"}
    monkeypatch.setattr(node_sockets, "_source_address_towards", lambda host, port: towards[host])
    assert node_sockets.address_of_this_host() == "10.1.2.3"
