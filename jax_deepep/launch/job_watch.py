"""Watch the ranks of this host until the job is over, and end it when one of them fails.

Launchers of several hosts decide together. Each reports its first failure to launcher 0 at once, and again if
it then finds a likelier cause; launcher 0 notifies all to stop and, after a time for further failures to
arrive, of the first one. So there is one status and one cause, whatever each host saw first.
"""

import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from jax_deepep.launch.hosts.rendezvous import HostLink, Peer
from jax_deepep.launch.job_processes import StopRequests
from jax_deepep.launch.rank_ends import Blame, RankEnd, first_failure
from jax_deepep.launch.rank_logs import OUTPUTS, rank_names, say
from jax_deepep.launch.rank_process import RankProcess

# A fault in the program usually hits all ranks at once. They have this long to end by themselves, so
# that each log is complete and the first failure can be distinguished from its consequences. It is
# also the time that the others have for dumping their stacks.
_SETTLE_S = 1.0
_VERDICT_S = 10.0  # the longest to wait for the decision of launcher 0
_EARLY_END_S = 5.0  # after the last end of a rank: then ranks that still run are reported
_KILL_S = 10.0  # the longest to wait for ranks after SIGKILL; then the guard takes over
_POLL_S = 0.05


@dataclass
class JobOutcome:
    """How the job ended, as this host saw it."""

    status: int = 0
    signal: int | None = None  # received by the launcher; SIGKILL: its front is gone
    first: RankProcess | None = None  # the rank of this host that failed first
    first_log_bytes: int = 0  # of its log; later output is about the end of the others
    elsewhere: str | None = None  # what failed on another host
    done: list[int] = field(default_factory=list)  # ranks that had ended with status 0 before
    ended: list[int] = field(default_factory=list)  # ranks that did nothing wrong and were ended


class JobWatch:
    """The loop: one thread for everything."""

    def __init__(
        self, ranks: Sequence[RankProcess], link: HostLink, grace_s: float, requests: StopRequests
    ) -> None:
        self._ranks = ranks
        self._link = link
        self._grace_s = grace_s
        self._requests = requests
        self._reported: RankEnd | None = None  # the failure of this host that launcher 0 knows
        self._remote: list[RankEnd] = []  # failures of other hosts
        self._stop_requested = False
        self._verdict: RankEnd | None = None
        self._done_elsewhere: dict[int, float] = {}  # when all ranks of another host had ended with status 0
        self._end_agreed = False
        self._early_ends_reported = False
        self._selector = selectors.DefaultSelector()
        for rank in ranks:
            self._selector.register(rank.output, selectors.EVENT_READ, rank)
        for peer in link.peers:
            self._selector.register(peer, selectors.EVENT_READ, peer)

    def run(self) -> JobOutcome:
        """Return when every rank of this host is gone."""
        OUTPUTS.is_ending = self._is_ending
        outcome = JobOutcome()
        self._pump(lambda: self._stopping() or self._all_exited())
        if not self._stopping():
            self._wait_for_other_hosts()
        if self._stopping():
            (self._note_signal if self._signals() else self._decide)(outcome)
            self._end_ranks(outcome.signal or signal.SIGTERM)
        for rank in self._ranks:
            rank.signal_group(signal.SIGKILL)  # its child processes may have outlived it
        self._pump(self._all_exited, _KILL_S)
        self._pump(lambda: not self._outputs_open(), 0.5)  # a process outside the group may hold a pipe
        return outcome

    def _is_ending(self) -> bool:
        """Look at the ranks, too: the loop does not while it waits for the readers of its output."""
        now = time.monotonic()
        for rank in self._ranks:
            rank.poll(now)
        return bool(self._signals()) or self._stopping()

    def _signals(self) -> list[int]:
        return self._requests.read()

    def _stopping(self) -> bool:
        failure = first_failure([*(rank.end for rank in self._ranks), *self._remote])
        return failure is not None or self._stop_requested or bool(self._signals())

    def _note_signal(self, outcome: JobOutcome) -> None:
        outcome.signal = self._signals()[0]
        outcome.status = 128 + outcome.signal
        if outcome.signal != signal.SIGKILL:  # else the other hosts will see that this launcher is gone
            how = f"its launcher received {signal.Signals(outcome.signal).name}"
            self._announce(RankEnd(-1, outcome.status, time.monotonic(), how, Blame.KILLED))

    def _decide(self, outcome: JobOutcome) -> None:
        """Find the first failure, here or on another host."""
        if self._link.is_first:
            self._link.send({"stop": True})
        for rank in self._ranks:
            if rank.end is None:
                rank.dump_stacks()
        alone = not self._link.peers
        self._pump(lambda: bool(self._signals()) or (alone and self._all_exited()), _SETTLE_S)
        if not self._link.is_first:
            self._pump(lambda: bool(self._signals() or self._verdict) or not self._link.peers, _VERDICT_S)
        for rank in self._ranks:
            rank.read_output()  # the end of its output
        ends = [rank.end for rank in self._ranks]
        unknown = RankEnd(-1, 1, 0.0, "the launcher of host 0 requested a stop without a reason")
        first = self._verdict or first_failure([*ends, *self._remote]) or unknown
        if self._link.is_first:
            self._announce(first)
        outcome.done = [end.rank for end in ends if end is not None and end.status == 0]
        outcome.ended = [rank.rank for rank in self._ranks if rank.end is None]
        outcome.status = first.status
        outcome.first = next((rank for rank in self._ranks if rank.rank == first.rank), None)
        if outcome.first is None:
            outcome.elsewhere = first.how
        else:
            outcome.first_log_bytes = outcome.first.log.path.stat().st_size

    def _announce(self, end: RankEnd) -> None:
        """Report a failure here to launcher 0; as launcher 0, notify all of the first failure."""
        if end.rank in self._link.job.ranks:
            end = replace(end, how=f"rank {end.rank} on {socket.gethostname()}: {end.how}")
        self._link.send({"verdict" if self._link.is_first else "failed": asdict(end)})

    def _end_ranks(self, number: int) -> None:
        for rank in self._ranks:
            if not rank.exited:
                rank.signal_group(number)
        signals_before = len(self._signals())
        # A second Ctrl-C ends the grace period.
        self._pump(lambda: self._all_exited() or len(self._signals()) > signals_before, self._grace_s)

    def _wait_for_other_hosts(self) -> None:
        self._link.send({"done": True})
        if self._link.is_first:
            self._pump(lambda: self._stopping() or not self._hosts_at_work())
            if not self._stopping():
                self._link.send({"end": True})
        else:
            self._pump(lambda: self._stopping() or self._end_agreed)

    def _hosts_at_work(self) -> set[int]:
        others = self._link.peers if self._link.is_first else []
        return {peer.index for peer in others} - set(self._done_elsewhere)

    def _all_exited(self) -> bool:
        return all(rank.exited for rank in self._ranks)

    def _outputs_open(self) -> bool:
        return any(isinstance(key.data, RankProcess) for key in self._selector.get_map().values())

    def _pump(self, until: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Forward output, read messages and notice exits, until the condition holds or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            for rank in self._ranks:
                rank.poll(now)
            self._report_to_first_launcher()
            self._report_early_ends(now)
            if until() or now > deadline:
                return
            for key, _ in self._selector.select(_POLL_S):
                if not isinstance(key.data, RankProcess):
                    self._read_messages(key.data)
                elif not key.data.read_output():
                    self._selector.unregister(key.fileobj)

    def _report_to_first_launcher(self) -> None:
        first = first_failure(rank.end for rank in self._ranks)
        if first != self._reported and not self._link.is_first and self._verdict is None:
            self._reported = first
            assert first is not None
            self._announce(first)

    def _report_early_ends(self, now: float) -> None:
        """Print once that some ranks have ended while others, which may wait for them, still run."""
        ended = {rank.rank: rank.end.when for rank in self._ranks if rank.end is not None}
        times = [*ended.values(), *self._done_elsewhere.values()]
        if self._early_ends_reported or not times or now - max(times) < _EARLY_END_S or self._stopping():
            return
        running = [rank.rank for rank in self._ranks if rank.end is None]
        done = [rank_names(ended)] if ended else []
        done += [f"all ranks of host {index}" for index in self._done_elsewhere]
        at_work = [rank_names(running)] if running else []
        at_work += [f"ranks of host {index}" for index in self._hosts_at_work()]
        if at_work:
            self._early_ends_reported = True
            say(
                f"{', '.join(done)} ended with status 0, and {', '.join(at_work)} still at work: "
                "waiting for a rank that has ended will not succeed"
            )

    def _read_messages(self, peer: Peer) -> None:
        now = time.monotonic()
        messages = peer.receive()
        if messages is None:
            self._selector.unregister(peer)
            self._link.peers.remove(peer)
            peer.close()
            if peer.index not in self._done_elsewhere and not self._end_agreed and self._verdict is None:
                how = f"the launcher of host {peer.index} is gone"
                self._remote.append(RankEnd(-1, 1, now, how, Blame.KILLED))
        for message in messages or []:
            if "failed" in message:
                self._remote.append(RankEnd(**{**message["failed"], "when": now}))
            elif "verdict" in message:
                self._verdict = RankEnd(**{**message["verdict"], "when": now})
            elif "done" in message:
                self._done_elsewhere[peer.index] = now
            self._end_agreed |= "end" in message
            self._stop_requested |= "stop" in message or "verdict" in message
