"""A plain copy of the same number of bytes with all threads that this process may use."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jax_deepep.bench.environment import usable_cores


class Memcpy:
    """Copies between two warm buffers, split evenly over threads.

    NumPy releases the GIL while it copies, so the threads run side by side.

    Args:
        max_bytes: size of each buffer.
        num_threads: None for one per usable core.
    """

    def __init__(self, max_bytes: int, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or usable_cores()
        self._pool = ThreadPoolExecutor(self.num_threads)
        # Written, not only reserved: the first touch of a page is not part of a copy.
        self._source = np.full(max_bytes, 1, np.uint8)
        self._target = np.full(max_bytes, 2, np.uint8)

    def copy(self, num_bytes: int) -> None:
        """Copy the first `num_bytes` and return when all threads are done."""
        if num_bytes > self._source.size:
            raise ValueError(
                f"num_bytes: expected at most {self._source.size}, got {num_bytes}; raise max_bytes."
            )
        cuts = np.linspace(0, num_bytes, self.num_threads + 1).astype(int)
        parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
        copies = [self._pool.submit(np.copyto, self._target[part], self._source[part]) for part in parts]
        for copy in copies:
            copy.result()

    def close(self) -> None:
        """End the threads and free the buffers."""
        self._pool.shutdown()
        self._source = self._target = np.empty(0, np.uint8)
