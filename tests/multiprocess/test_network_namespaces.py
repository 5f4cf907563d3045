"""Two hosts as two network namespaces of this machine, which see each other only through a network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_runs import ROOT, environment
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

NAMESPACES = ("jax_deepep_0", "jax_deepep_1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
DEADLINE_S = 120
SELECTION = "native and nodes and (major or groups)"  # the problems of two nodes
CONFORMANCE = Path(__file__).parent.parent / "conformance"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def can_make_namespaces() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None


@pytest.fixture
def namespaces() -> Iterator[None]:
    links = [f"veth{index}_{os.getpid()}" for index in range(2)]
    try:
        for namespace in NAMESPACES:
            ip("netns", "add", namespace)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for link, namespace, address in zip(links, NAMESPACES, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", namespace)
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", link)
            ip("-n", namespace, "link", "set", link, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield
    finally:
        for namespace in NAMESPACES:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and the command ip, for network namespaces")
def test_conformance_between_two_hosts(namespaces: None) -> None:
    """Two processes of two devices in each: the oracle's bits, for the nodes that are declared."""
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONFORMANCE), "-k", SELECTION]
    launch = ["-m", "jax_deepep.launch", "-n", "2", "--platform", "cpu", "--devices-per-process", "2"]
    hosts = []
    for index, namespace in enumerate(NAMESPACES):
        options = ["--hosts", ",".join(ADDRESSES), "--node-rank", str(index), "--"]
        command = [sys.executable, *launch, *options, sys.executable, *suite]
        hosts.append(
            subprocess.Popen(
                ["ip", "netns", "exec", namespace, *command],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [host.communicate(timeout=DEADLINE_S)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, output in zip(hosts, outputs, strict=True):
        assert host.returncode == 0, output
    assert " passed" in outputs[0], outputs
    assert "skipped" not in "".join(outputs)
