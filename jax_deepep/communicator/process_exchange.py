"""How the processes of a mesh agree on a communicator: in a tree, over a key-value store.

The store is that of JAX's coordination service, which `jax.distributed` has already started. Every process
reads the summaries of at most eight others, merges them with its own, sends the result to its parent, and
forwards the verdict that returns: the number and the size of a process's messages do not grow with the
number of processes, not even for the root. Every wait has a deadline, and its error names the missing
processes. Keys are deleted by the process that reads them, or by their owner at the end.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax

from jax_deepep import jax_compat
from jax_deepep.communicator.key_value_store import KeyValueClient, Namespace, digest_of
from jax_deepep.errors import CommunicatorError, PeerTimeoutError

# Practically unlimited, without overflow in clocks and timeouts of the system.
LONGEST_WAIT_S = 1e9

# Children of a process in the tree.
ARITY = 8

# Longer texts are cut before they are sent, and no more missing processes than this are named.
MOST_CHARACTERS = 2000
MOST_NAMES = 8

# Findings that end the making of a communicator in all processes.
DIFFERENCE = "difference"
ABSENCE = "absence"

# How many exchanges each set of processes has had: the same number in all of them, because making a
# communicator is collective.
_num_exchanges: dict[tuple[int, ...], int] = {}
_numbering = threading.Lock()


@dataclass
class Summary:
    """The report of a process, or of a process and all its descendants in the tree.

    Attributes:
        same: texts by name, equal in all processes that have one of that name.
        findings: by kind, a key that orders the findings of the kind, and the text. Of each kind the first
            one counts.
    """

    same: dict[str, str] = field(default_factory=dict)
    findings: dict[str, tuple[list[int], str]] = field(default_factory=dict)

    def add(self, kind: str, order: Iterable[int], text: str) -> None:
        """Add a finding, unless there is an earlier one of its kind."""
        new = (list(order), text[:MOST_CHARACTERS])
        if kind not in self.findings or new[0] < self.findings[kind][0]:
            self.findings[kind] = new

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Summary":
        return cls(**json.loads(data))


class Exchange:
    """One exchange between the processes of a mesh: a namespace, and a deadline for all of it.

    A context manager; at its end this process deletes its keys. All processes go through the same phases, and
    no process waits in a phase for what another one does in the next:

        begin_phase    publish, read    report    verdict

    Attributes:
        processes: process indices that take part, ascending.
        process: this one.
        id: the same in all of them and in every run, and unique among the exchanges of each: see `between`.

    Args:
        index: of this process in `processes`.
        client: of the key-value store; None without other processes.
        timeout_s: seconds that the whole exchange may last.
        name_of: describes a process in errors, by the ranks that it has.
    """

    def __init__(
        self,
        processes: tuple[int, ...],
        index: int,
        id: int,
        client: KeyValueClient | None,
        timeout_s: float,
        name_of: Callable[[int], str],
    ) -> None:
        self.processes = processes
        self.process = processes[index]
        self.id = id
        self._keys = Namespace(client, f"jax_deepep/{id}")
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + min(timeout_s, LONGEST_WAIT_S)
        self._name_of = name_of
        self._index = index
        self._children = self._children_of(self._index)
        self._phase = 0
        self._phase_name = ""
        self._summary = Summary()
        self._keys_stay = False

    @classmethod
    def between(cls, processes: Iterable[int], timeout_s: float, name_of: Callable[[int], str]) -> "Exchange":
        """Begin the next exchange between `processes`, this one among them.

        Its id, of 63 bits, counts the exchanges of the same processes, independent of other processes and
        threads. Where these are not all processes of the job, their digest precedes the number.
        """
        members = tuple(sorted(processes))
        with _numbering:
            number = _num_exchanges.get(members, 0)
            _num_exchanges[members] = number + 1
        everyone = tuple(range(jax.process_count()))
        digest = 0 if members == everyone else 1 + int(digest_of(members), 16) % (2**31 - 1)
        client = jax_compat.coordination_client() if len(members) > 1 else None
        index = members.index(jax.process_index())
        return cls(members, index, digest << 32 | number, client, timeout_s, name_of)

    def _children_of(self, index: int) -> range:
        # The tree has the processes in ascending order, as a heap.
        first = ARITY * index + 1
        return range(first, min(first + ARITY, len(self.processes)))

    @staticmethod
    def _parent_of(index: int) -> int:
        return (index - 1) // ARITY

    # The steps of a phase.

    def agree(self, phase: str, summary: Summary) -> dict[str, str]:
        """Merge the summaries of all processes; return the first finding of each kind.

        Raises:
            CommunicatorError: texts differ that must be the same.
            PeerTimeoutError: a process did not arrive in time.
        """
        self.begin_phase(phase)
        self.report(summary)
        return self.verdict()

    def begin_phase(self, phase: str) -> None:
        """Begin a phase."""
        self._phase += 1
        self._phase_name = phase
        self._summary = Summary()
        self._set_position(2 * self._phase)

    def publish(self, name: str, message: Any) -> None:
        """Publish a message of JSON values for processes that read it before their next report."""
        self._keys.set_own(self._published(name, self.process), json.dumps(message).encode())

    def read(self, name: str, processes: Iterable[int]) -> dict[int, Any]:
        """Return the messages of other processes by process, waiting for those not yet published."""
        messages: dict[int, Any] = {}
        for process in processes:
            data = self._keys.wait_for(self._published(name, process), self.seconds_left())
            if data is None:
                self._abort(self._missing_from([0]) or [self.processes.index(process)])
            messages[process] = json.loads(data)
        return messages

    def read_all_others(self, name: str) -> list[Any]:
        """Return what all other processes published under a name before a verdict."""
        own = self._published(name, self.process)
        return [json.loads(data) for data in self._keys.values_under(own.rpartition("/")[0], but=own)]

    def report(self, summary: Summary) -> None:
        """Merge `summary` with those of the children in the tree, and send the result to the parent."""
        self._summary = summary
        for child in self._children:
            data = self._keys.take(self._key("up", child), self.seconds_left())
            if data is None:
                self._abort(self._missing_from(self._children) or [child])
            self._merge(Summary.decode(data), self.processes[child])
        if self._index > 0:
            self._keys.set(self._key("up", self._index), summary.encode())
        self._set_position(2 * self._phase + 1)

    def verdict(self) -> dict[str, str]:
        """Return the first finding of each kind of all processes, and forward them to the children."""
        if self._index > 0:
            data = self._keys.take(self._key("down", self._index), self.seconds_left())
            if data is None:
                self._abort(self._missing_above())
            self._summary = Summary.decode(data)
        self._summary.same = {}
        for child in self._children:
            self._keys.set(self._key("down", child), self._summary.encode())
        self._raise_for_findings()
        return {kind: text for kind, (_, text) in self._summary.findings.items()}

    def _merge(self, other: Summary, process: int) -> None:
        for kind, (order, text) in other.findings.items():
            self._summary.add(kind, order, text)
        for position, (name, value) in enumerate(self._summary.same.items()):
            if other.same.get(name, value) != value:
                self._summary.add(
                    DIFFERENCE,
                    [position, process],
                    f"{name}: expected the same in all processes, got {value} on "
                    f"{self._name_of(self.process)} and {other.same[name]} on {self._name_of(process)}; "
                    "start all of them with the same arguments and the same build of jax_deepep, and make "
                    "communicators in the same order.",
                )

    def _raise_for_findings(self) -> None:
        # Others have yet to read the absence, and the missing process may still arrive.
        self._keys_stay = ABSENCE in self._summary.findings
        for kind, error in ((DIFFERENCE, CommunicatorError), (ABSENCE, PeerTimeoutError)):
            if kind in self._summary.findings:
                raise error(self._summary.findings[kind][1])

    # When a process does not arrive.

    def _abort(self, missing: list[int]) -> NoReturn:
        """Raise for missing processes, and notify those that arrive at this phase or the next one."""
        names = [self._name_of(self.processes[index]) for index in missing[:MOST_NAMES]]
        others = " and others" if len(missing) > MOST_NAMES else ""
        self._summary.add(
            ABSENCE,
            [self._index],
            f"making a communicator on {self._name_of(self.process)} waited {self._timeout_s:g} s "
            f"(timeout_s) in the exchange of {self._phase_name} for {', '.join(names)}{others}. Every "
            "process of the mesh must make the same communicators in the same order.",
        )
        self._summary.same = {}
        for phase in (self._phase, self._phase + 1):
            if self._index > 0:
                self._keys.set(self._key("up", self._index, phase), self._summary.encode())
            for child in self._children:
                self._keys.set(self._key("down", child, phase), self._summary.encode())
        self._raise_for_findings()
        raise AssertionError("the absence is a finding")

    def _missing_from(self, indices: Iterable[int]) -> list[int]:
        """Return processes that have not arrived at this phase, among some and their descendants.

        The descendants of a process that has reported have arrived, so few are examined. Ends when there are
        more than are named.
        """
        missing: list[int] = []
        waiting = deque(indices)
        while waiting and len(missing) <= MOST_NAMES:
            index = waiting.popleft()
            position = self._position_of(index)
            if position < 2 * self._phase:
                missing.append(index)
            if position <= 2 * self._phase:
                waiting.extend(self._children_of(index))
        return missing

    def _missing_above(self) -> list[int]:
        """Return the processes that this one waits for, after its report and without a verdict."""
        top = self._index  # the highest ancestor that is present, as are all in between
        while top > 0 and self._position_of(self._parent_of(top)) > 0:
            top = self._parent_of(top)
        # A process that has finished the exchange has deleted its position, and the summaries that it read.
        undecided = top == 0 or self._keys.try_get(self._key("up", top)) is not None
        names = self._missing_from([0]) if undecided else []
        return names or [top if top < self._index else self._parent_of(self._index)]

    def _set_position(self, position: int) -> None:
        """Publish the progress of this process: twice the number of the phase, plus one after its report."""
        self._keys.set_own(self._position_key(self._index), str(position).encode())

    def _position_of(self, index: int) -> int:
        return int(self._keys.try_get(self._position_key(index)) or 0)

    def _key(self, direction: str, index: int, phase: int | None = None) -> str:
        """Return the key of a process's message to its parent (up) or from it (down)."""
        return f"{direction}/{self._phase if phase is None else phase}/{index}"

    def _position_key(self, index: int) -> str:
        return f"at/{index}"

    def _published(self, name: str, process: int) -> str:
        return f"of/{name}/{process}"

    def seconds_left(self) -> float:
        """Return how long this process may still wait, at least a millisecond."""
        return max(self._deadline - time.monotonic(), 0.001)

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keys_stay:
            self._keys.delete_own()
