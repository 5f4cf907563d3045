"""Text that every machine has: the sources of Python's own standard library, as bytes."""

import sysconfig
from pathlib import Path

import numpy as np

VOCABULARY = 256  # bytes
HELD_OUT_BATCHES = 4


class Text:
    """Windows of bytes [sequences, context + 1] from the standard library.

    Every tenth file is held out.

    Attributes:
        held_out_batches: fixed windows, evenly spaced over the held-out files.
    """

    def __init__(self, *, context: int, sequences: int, seed: int):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        contents = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
        held_out = np.concatenate(contents[::10])
        del contents[::10]
        self._train = np.concatenate(contents)
        self._window = np.arange(context + 1)
        self._random = np.random.default_rng(seed)
        self.sequences = sequences
        last = len(held_out) - len(self._window)
        starts = np.linspace(0, last, HELD_OUT_BATCHES * sequences).astype(int)
        self.held_out_batches = np.split(held_out[starts[:, None] + self._window], HELD_OUT_BATCHES)

    def training_batch(self) -> np.ndarray:
        """Return windows at random positions of the files that are not held out."""
        starts = self._random.integers(0, len(self._train) - len(self._window), self.sequences)
        return self._train[starts[:, None] + self._window]

    def unigram_loss(self) -> float:
        """Return nats per held-out byte of a model that knows only the frequency of each byte."""
        counts = np.bincount(self._train, minlength=VOCABULARY) + 1.0  # no byte has probability 0
        nats = -np.log(counts / counts.sum())
        return float(np.mean([nats[batch[:, 1:]] for batch in self.held_out_batches]))
