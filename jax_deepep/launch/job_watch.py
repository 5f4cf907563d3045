"""Watch the ranks of this host until the job is over, and end it when one of them fails.

One thread and one loop: PR_SET_PDEATHSIG is tied to the thread that started the ranks, and nothing
here needs a second one.
"""

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax_deepep.launch.host_rendezvous import HostLink
from jax_deepep.launch.local_processes import RankEnd, RankProcess, first_failure

# A fault in the program usually hits all ranks at once. This long they may end by themselves, so
# that each log has its own end and the true first failure can be told from its consequences. It is
# also the time that the others have for dumping their stacks.
_SETTLE_S = 1.0
_POLL_S = 0.05


@dataclass
class JobOutcome:
    """How the job ended, as this host saw it."""

    status: int = 0
    signal: int | None = None  # the signal that the launcher got
    first: RankProcess | None = None  # the rank of this host that failed first
    first_log_bytes: int = 0  # of its log; what it printed later is about the end of the others
    elsewhere: str | None = None  # what failed on another host
    ended: list[int] = field(default_factory=list)  # ranks that did nothing wrong and were ended
    dumped: list[int] = field(default_factory=list)  # ranks that were asked for their stacks


class JobWatch:
    """The loop. `received` is filled by the launcher's signal handlers."""

    def __init__(
        self, ranks: Sequence[RankProcess], link: HostLink, grace_s: float, received: list[int]
    ) -> None:
        self._ranks = ranks
        self._link = link
        self._grace_s = grace_s
        self._received = received
        self._remote_failure: RankEnd | None = None
        self._remote_text = ""
        self._done_elsewhere: set[int] = set()
        self._end_agreed = False
        self._selector = selectors.DefaultSelector()
        for rank in ranks:
            self._selector.register(rank.output, selectors.EVENT_READ, rank)
        for peer in link.peers:
            self._selector.register(peer, selectors.EVENT_READ, peer)

    def run(self) -> JobOutcome:
        """Return when every rank of this host is gone."""
        outcome = JobOutcome()
        self._pump(lambda: self._stopping() or self._all_exited())
        if not self._stopping():
            self._wait_for_other_hosts()
        if self._received:
            outcome.signal = self._received[0]
            outcome.status = 128 + outcome.signal
            self._link.send({"failed": None, "status": outcome.status, "text": "its launcher got a signal"})
            self._end_ranks(outcome.signal)
        elif self._stopping():
            outcome.dumped = [rank.rank for rank in self._ranks if rank.end is None and rank.dump_stacks()]
            self._find_first(outcome)
            outcome.ended = [rank.rank for rank in self._ranks if rank.end is None]
            self._end_ranks(signal.SIGTERM)
        for rank in self._ranks:
            rank.kill_group()
        self._pump(lambda: not self._outputs_open(), 0.5)  # a process outside the group may hold a pipe
        return outcome

    def _stopping(self) -> bool:
        failed = any(rank.end is not None and rank.end.status != 0 for rank in self._ranks)
        return failed or bool(self._received) or self._remote_failure is not None

    def _find_first(self, outcome: JobOutcome) -> None:
        first = first_failure(self._ranks)
        if first is not None and not first.is_consequence():
            self._tell_others(first)
        self._pump(lambda: bool(self._received) or self._all_exited(), _SETTLE_S)
        first = first_failure(self._ranks)
        remote = self._remote_failure
        if remote is not None and (first is None or first.is_consequence() or first.end is None):
            outcome.status, outcome.elsewhere = remote.status, self._remote_text
            return
        assert first is not None
        assert first.end is not None
        outcome.first, outcome.status = first, first.end.status
        outcome.first_log_bytes = first.log.path.stat().st_size
        if first.is_consequence():
            self._tell_others(first)

    def _tell_others(self, first: RankProcess) -> None:
        assert first.end is not None
        text = f"rank {first.rank} on {socket.gethostname()}: {first.end.how}"
        self._link.send({"failed": first.rank, "status": first.end.status, "text": text})

    def _end_ranks(self, number: int) -> None:
        for rank in self._ranks:
            if not rank.exited:
                rank.signal_group(number)
        signals_before = len(self._received)
        # A second Ctrl-C means: now.
        self._pump(lambda: self._all_exited() or len(self._received) > signals_before, self._grace_s)

    def _wait_for_other_hosts(self) -> None:
        self._link.send({"done": True})
        if self._link.is_first:
            everyone = set(self._link.peers.values()) | self._done_elsewhere
            self._pump(lambda: self._stopping() or self._done_elsewhere >= everyone)
            if not self._stopping():
                self._link.send({"end": True})
        else:
            self._pump(lambda: self._stopping() or self._end_agreed)

    def _all_exited(self) -> bool:
        return all(rank.exited for rank in self._ranks)

    def _outputs_open(self) -> bool:
        return any(isinstance(key.data, RankProcess) for key in self._selector.get_map().values())

    def _pump(self, until: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Carry output and messages and notice exits, until the condition holds or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            for rank in self._ranks:
                rank.poll()
            if until() or time.monotonic() > deadline:
                return
            for key, _ in self._selector.select(_POLL_S):
                if isinstance(key.data, RankProcess):
                    self._read_output(key.data)
                else:
                    self._read_messages(key.data)

    def _read_output(self, rank: RankProcess) -> None:
        try:
            data = os.read(rank.output.fileno(), 65536)
        except BlockingIOError:
            return
        if data:
            rank.log.write(data)
        else:
            self._selector.unregister(rank.output)

    def _read_messages(self, peer: socket.socket) -> None:
        index = self._link.peers[peer]
        for message in self._link.receive(peer):
            if "gone" in message:
                self._selector.unregister(peer)
                peer.close()
                if index not in self._done_elsewhere and not self._end_agreed:
                    self._note_remote(
                        RankEnd(-1, 1, time.monotonic()), f"the launcher of host {index} is gone"
                    )
            elif "failed" in message:
                rank = -1 if message["failed"] is None else message["failed"]
                self._note_remote(RankEnd(rank, message["status"], time.monotonic()), message["text"])
            elif "end" in message:
                self._end_agreed = True
            elif "done" in message and self._link.is_first:
                self._done_elsewhere.add(index)

    def _note_remote(self, end: RankEnd, text: str) -> None:
        if self._remote_failure is None:
            self._remote_failure, self._remote_text = end, text
