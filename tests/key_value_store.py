"""The key-value store between processes, in memory: for processes that take turns in one thread.

No call waits: a missing key is a timeout.
"""

from collections import Counter
from dataclasses import dataclass, field

import jax


@dataclass
class Store:
    """What all processes see, and what each one has sent or received, in messages and in bytes."""

    values: dict[str, bytes] = field(default_factory=dict)
    num_messages: Counter = field(default_factory=Counter)
    num_bytes: Counter = field(default_factory=Counter)

    def client(self, process: int) -> "Client":
        return Client(self, process)


@dataclass
class Client:
    """The store of one process, with the interface of JAX's client."""

    store: Store
    process: int

    def _count(self, key: str, value: bytes) -> None:
        self.store.num_messages[self.process] += 1
        self.store.num_bytes[self.process] += len(key) + len(value)

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.store.values
        self._count(key, value)
        self.store.values[key] = value

    def key_value_try_get_bytes(self, key: str) -> bytes:
        self._count(key, self.store.values.get(key, b""))
        if key not in self.store.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.store.values[key]

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes:
        self._count(key, self.store.values.get(key, b""))
        if key not in self.store.values:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key} after {timeout_in_ms} ms")
        return self.store.values[key]

    def key_value_dir_get_bytes(self, key: str) -> list[tuple[str, bytes]]:
        raise NotImplementedError  # slow here, and nothing that the number of processes changes

    def key_value_delete(self, key: str) -> None:
        self._count(key, b"")
        del self.store.values[key]
