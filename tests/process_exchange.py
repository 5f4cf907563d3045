"""Bytes between the processes of a run, over the key-value store that `jax.distributed` has started.

Not by a device collective: NCCL may reject ranks that share a GPU.
"""

import collections
import os

import jax

from jax_deepep import jax_compat

CHUNK_BYTES = 1 << 21  # gRPC limits messages to 4 MiB
TIMEOUT_MS = 120_000

_calls: collections.Counter[str] = collections.Counter()
_previous: list[str] = []  # keys of this process that may not have been read yet


def all_gather(mine: bytes) -> list[bytes]:
    """Exchange bytes between all processes; return them by process."""
    client = jax_compat.coordination_client()
    # Counted by test: where a process leaves a failed test early, the others miss it in that test alone.
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    call = f"jax_deepep_tests/{test}/{_calls[test]}"
    _calls[test] += 1

    chunks = [mine[begin : begin + CHUNK_BYTES] for begin in range(0, len(mine), CHUNK_BYTES)] or [b""]
    keys = [f"{call}/{jax.process_index()}/{number}" for number in range(len(chunks))]
    for number, (key, chunk) in enumerate(zip(keys, chunks, strict=True), start=1):
        more = b"+" if number < len(chunks) else b"."
        client.key_value_set_bytes(key, more + chunk)
    everyones = [_read(client, f"{call}/{process}") for process in range(jax.process_count())]

    # A process that has published its bytes in this call has read all those of the previous call.
    for key in _previous:
        client.key_value_delete(key)
    _previous[:] = keys
    return everyones


def _read(client, key: str) -> bytes:
    data, more, number = bytearray(), True, 0
    while more:
        chunk = client.blocking_key_value_get_bytes(f"{key}/{number}", TIMEOUT_MS)
        data += chunk[1:]
        more, number = chunk[:1] == b"+", number + 1
    return bytes(data)
