"""The key-value store of a job: that of JAX's coordination service."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import jax


class KeyValueClient(Protocol):
    """The part of JAX's client that is used."""

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None: ...

    def key_value_try_get_bytes(self, key: str) -> bytes: ...

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes: ...

    def key_value_dir_get_bytes(self, key: str) -> list[tuple[str, bytes]]: ...

    def key_value_delete(self, key: str) -> None: ...


class Namespace:
    """Keys with a common prefix.

    Args:
        client: None without other processes: then nothing is stored or found.
        prefix: of the keys.
    """

    def __init__(self, client: KeyValueClient | None, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._own: set[str] = set()

    def set(self, key: str, value: bytes) -> None:
        """Store a value for one process, which takes and deletes it."""
        if self._client is not None:
            self._client.key_value_set_bytes(self._full(key), value, allow_overwrite=True)

    def set_own(self, key: str, value: bytes) -> None:
        """Store a value that any number of processes may read, until this one deletes it."""
        self._own.add(key)
        self.set(key, value)

    def delete_own(self) -> None:
        """Delete the values that this process owns."""
        while self._own:
            self._delete(self._own.pop())

    def try_get(self, key: str) -> bytes | None:
        """Return a value, or None if there is none yet."""
        if self._client is not None:
            with _none_if("NOT_FOUND"):
                return self._client.key_value_try_get_bytes(self._full(key))
        return None

    def wait_for(self, key: str, seconds: float) -> bytes | None:
        """Return a value, or None if it does not arrive in time."""
        if self._client is not None:
            with _none_if("DEADLINE_EXCEEDED"):
                return self._client.blocking_key_value_get_bytes(self._full(key), int(seconds * 1000) + 1)
        return None

    def take(self, key: str, seconds: float) -> bytes | None:
        """Return a value and delete it, or return None if it does not arrive in time."""
        data = self.wait_for(key, seconds)
        if data is not None:
            self._delete(key)
        return data

    def values_under(self, folder: str, *, but: str) -> list[bytes]:
        """Return the values of all keys that begin with `folder` and a slash, except for one key."""
        if self._client is None:
            return []
        entries = self._client.key_value_dir_get_bytes(self._full(folder))
        return [data for key, data in entries if key != self._full(but)]

    def _delete(self, key: str) -> None:
        if self._client is not None:
            self._client.key_value_delete(self._full(key))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"


@contextlib.contextmanager
def _none_if(reason: str) -> Iterator[None]:
    """Suppress the store's error for a missing key."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if reason not in str(error):
            raise


def digest_of(value: Any) -> str:
    """Return a short text that is equal between processes if `value`, of numbers and texts, is."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
