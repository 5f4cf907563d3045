"""Write text with a trained Mixture-of-Experts model: a small server's loop over a queue of prompts.

    python examples/train_moe.py --save model
    python examples/decode_moe.py model

A batch has a fixed number of slots, split over the devices. A prompt from the queue takes a free slot; its
bytes are read at once (prefill), and every step then writes one byte of every running text (decode). Both are
one jitted function, `step`, of static shapes, however long the texts are and wherever their experts live.
"""

import argparse
import dataclasses
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from virtual_devices import LAUNCHED

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moe_language_model import Config, empty_cache, load, load_config

PROMPTS = (
    "def __init__(self, ", "import os\nimport ", "class ", "    return ", "for key, value in ",
    "raise ValueError(", "if __name__ == ", "    # This is ", "try:\n    ", "with open(",
    "from collections import ", "    assert ",
)  # fmt: skip


@dataclass
class Request:
    """One text: its prompt, and what was written so far."""

    prompt: bytes
    written: bytearray = field(default_factory=bytearray)
    log_probabilities: list[float] = field(default_factory=list)  # of each written byte

    @property
    def text(self) -> bytes:
        """The prompt and what follows."""
        return self.prompt + bytes(self.written)


class Server:
    """A model, and what it remembers of the texts in its slots."""

    def __init__(self, path: Path, slots: int, prompt_bytes: int, temperature: float, seed: int):
        mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        self.slots = -(-slots // mesh.size) * mesh.size  # as many on every device
        # No row is dropped here: a text must not depend on the others in its batch.
        self.config: Config = dataclasses.replace(load_config(path), capacity_factor=None)
        self.comm = self.config.communicator(mesh, self.slots // mesh.size * self.config.context)
        self.graph, self.weights = load(path, self.config, self.comm)
        self.split, self.everywhere = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())
        make_cache = jax.jit(lambda: empty_cache(self.config, self.slots), out_shardings=self.split)
        self.cache, self.prompt_bytes = make_cache(), prompt_bytes
        self.key = jax.random.key(seed)
        graph = self.graph

        def step(weights, cache, key, text, count, position, is_running):
            """Read `count` [slots] bytes of `text` [slots, S] at `position`; return the byte after them."""
            # Short prompts are padded, and free slots hold nothing: no expert has to do with either.
            is_text = (jnp.arange(text.shape[1]) < count[:, None]) & is_running[:, None]
            logits, _, new_cache = nnx.merge(graph, weights)(text, cache, position, is_text)
            logits = jnp.take_along_axis(logits, count[:, None, None] - 1, axis=1)[:, 0]
            if temperature > 0:
                following = jax.random.categorical(key, logits / temperature)
            else:
                following = logits.argmax(axis=-1)
            log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), following[:, None], axis=1)
            keep = lambda new, old: jnp.where(is_running[:, None, None, None], new, old)  # noqa: E731
            return following, log_probability[:, 0], jax.tree.map(keep, new_cache, cache)

        outputs = (self.everywhere, self.everywhere, self.split)
        self._step = jax.jit(step, donate_argnums=1, out_shardings=outputs)

    def read(self, requests: dict[int, Request], texts: dict[int, bytes], width: int) -> None:
        """Read the next bytes of the requests in some slots, up to `width`; write one byte to each."""
        text = np.zeros((self.slots, width), np.uint8)
        count, position = np.ones(self.slots, np.int32), np.zeros(self.slots, np.int32)
        is_running = np.zeros(self.slots, bool)
        for slot, request in requests.items():
            new = texts[slot]
            text[slot, : len(new)] = np.frombuffer(new, np.uint8)
            count[slot], position[slot] = len(new), len(request.text) - len(new)
            is_running[slot] = True
        operands = [self._place(value) for value in (text, count, position, is_running)]
        self.key, key = jax.random.split(self.key)
        following, log_probability, self.cache = self._step(self.weights, self.cache, key, *operands)
        following, log_probability = np.asarray(following), np.asarray(log_probability)
        for slot, request in requests.items():
            request.written.append(following[slot])
            request.log_probabilities.append(float(log_probability[slot]))

    def _place(self, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, self.split, lambda index: value[index])

    def serve(self, requests: list[Request], num_bytes: int) -> dict[str, tuple[int, float]]:
        """Write `num_bytes` to every request; return tokens and seconds of prefill and of decode."""
        queue, running = deque(requests), dict[int, Request]()
        spent = {"prefill": (0, 0.0), "decode": (0, 0.0)}
        while queue or running:
            free = [slot for slot in range(self.slots) if slot not in running]
            new = {slot: queue.popleft() for slot, _ in zip(free, range(len(queue)), strict=False)}
            for phase, group, width in (("prefill", new, self.prompt_bytes), ("decode", running, 1)):
                if not group:
                    continue
                texts = {s: r.prompt if phase == "prefill" else r.text[-1:] for s, r in group.items()}
                start = time.perf_counter()
                self.read(group, texts, width)
                total, seconds = spent[phase]
                total += sum(len(text) for text in texts.values())
                spent[phase] = total, seconds + time.perf_counter() - start
            running |= new
            running = {
                slot: request
                for slot, request in running.items()
                if len(request.written) < num_bytes and len(request.text) < self.config.context
            }
        return spent

    def largest_difference(self, requests: list[Request]) -> float:
        """Compare the log-probabilities of all written bytes with those of a forward pass without a cache."""
        forward = jax.jit(
            lambda weights, text: jax.nn.log_softmax(nnx.merge(self.graph, weights)(text)[0]),
            out_shardings=self.everywhere,
        )
        largest = 0.0
        for first in range(0, len(requests), self.slots):
            group = requests[first : first + self.slots]
            text = np.zeros((self.slots, self.config.context), np.uint8)
            for slot, request in enumerate(group):
                text[slot, : len(request.text)] = np.frombuffer(request.text, np.uint8)
            all_log_probabilities = np.asarray(forward(self.weights, self._place(text)))
            for slot, request in enumerate(group):
                place = np.arange(len(request.prompt), len(request.text))
                expected = all_log_probabilities[slot, place - 1, text[slot, place]]
                largest = max(largest, np.abs(expected - request.log_probabilities).max())
        return largest


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train_moe.py --save wrote")
    parser.add_argument(
        "--prompts", nargs="+", default=PROMPTS, help="beginnings of texts (default: some Python)"
    )
    parser.add_argument("--slots", type=int, default=8, help="texts that are written at once (default: 8)")
    parser.add_argument("--bytes", type=int, default=64, help="to write of each text (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.5, help="0: the likeliest byte (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--check", action="store_true", help="compare with a forward pass without a cache")
    options = parser.parse_args()
    if LAUNCHED:
        jax.distributed.initialize()
    requests = [Request(prompt.encode()) for prompt in options.prompts]
    prompt_bytes = max(len(request.prompt) for request in requests)

    server = Server(options.model, options.slots, prompt_bytes, options.temperature, options.seed)
    if not 0 < min(map(len, options.prompts)) <= prompt_bytes < server.config.context:
        parser.error(f"--prompts: takes 1 to {server.config.context - 1} bytes each")
    with server.comm:
        server.serve([Request(b" ")], num_bytes=2)  # compiles both shapes of the step
        spent = server.serve(requests, options.bytes)
        difference = server.largest_difference(requests) if options.check else None
        server.comm.check()  # raises what the ops met, if anything
    if jax.process_index() == 0:
        for request in requests:
            print(f"{request.prompt.decode()!r} → {bytes(request.written).decode(errors='replace')!r}")
        for phase, (total, seconds) in spent.items():
            print(f"{phase:8}{total:6d} tokens, {total / seconds:,.0f} tokens/s")
        if difference is not None:
            print(f"largest difference to a forward pass without a cache {difference:.1e}; 1e-3 is allowed")
    return 0 if difference is None or difference <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
