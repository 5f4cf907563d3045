"""Counts the programs that JAX compiles."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jax_deepep.communicator import native_module


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect an entry for each program that is compiled inside."""
    compiled: list[str] = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if event == native_module.COMPILATION:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
