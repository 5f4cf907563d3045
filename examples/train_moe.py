"""Train a small Mixture-of-Experts language model on the sources of Python's standard library.

    python examples/train_moe.py

needs `pip install -e '.[examples]'` in a clone. Without an accelerator it splits the CPU into 8 devices and
runs the same program as on 8 GPUs: the batch and the experts are sharded over one mesh axis, and `jax_deepep`
sends every token to the devices of its experts and back. The model is in `moe_language_model.py`;
`decode_moe.py` generates text with the weights that `--save` writes.

With `--wire fp8` tokens cross links to their experts in blocks of float8; with `--combine-gradient-wire fp8`
besides, so do gradients to the experts, and results return as they are: DeepSeek-V3's recipe.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from virtual_devices import LAUNCHED

# isort: split
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from moe_language_model import Config, LanguageModel, abstract_model, save
from standard_library_text import Text
from tqdm import tqdm

# Without TF32, so that losses can be compared with those of CPUs.
jax.config.update("jax_default_matmul_precision", "float32")

STEPS = 250
EVALUATE_EVERY = 25  # steps
WIRES = ("none", "fp8", "fp8_ue8m0", "mxfp8", "nvfp4")
REQUIRED_BELOW_UNIGRAM = 0.2


@dataclass
class History:
    """Measurements of a training run, one entry per step."""

    train: list[float] = field(default_factory=list)  # nats per byte
    held_out: dict[int, float] = field(default_factory=dict)  # nats per byte, by step
    loads: list[np.ndarray] = field(default_factory=list)  # tokens per expert, [layers, E]
    rates: list[float] = field(default_factory=list)  # tokens per second


def train(
    implementation: str,
    steps: int,
    seed: int,
    config: Config,
    stop_after: int | None = None,
    save_to: Path | None = None,
) -> tuple[History, Text]:
    """Train on all devices; return the history, and the text that was used.

    The learning rate follows a schedule of `steps`; `stop_after` ends the training earlier. The weights
    at the end are written to the folder `save_to`.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())
    sequences = config.sequences_per_device * mesh.size
    text = Text(context=config.context, sequences=sequences, seed=seed)
    # Made once, outside of jit; the model closes over it.
    comm = config.communicator(mesh, config.sequences_per_device * config.context, implementation)
    rates = optax.warmup_cosine_decay_schedule(0.0, 1e-2, max(1, steps // 10), max(2, steps), 5e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates))

    def init():
        _, weights = nnx.split(LanguageModel(config, comm, nnx.Rngs(seed)))
        return weights, optimizer.init(weights)

    def loss_of(weights, batch):
        nats, balance, loads = nnx.merge(graph, weights).losses(batch)
        return nats + config.balance * balance, (nats, loads)

    def update(state, batch):
        weights, moments = state
        gradients, (nats, loads) = jax.grad(loss_of, has_aux=True)(weights, batch)
        updates, moments = optimizer.update(gradients, moments, weights)
        return (optax.apply_updates(weights, updates), moments), nats, loads

    def shard(batch):  # every process draws the same batch, and keeps the part of its devices
        return jax.make_array_from_callback(batch.shape, split, lambda index: batch[index])

    # Weights and the optimizer's moments are initialised with the model's shardings.
    graph, _ = abstract_model(config, comm)
    shardings = nnx.get_named_sharding(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=shardings)()
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere))
    nats_of = jax.jit(lambda state, batch: loss_of(state[0], batch)[1][0], out_shardings=everywhere)

    is_first = jax.process_index() == 0
    if is_first:
        print(f"{comm.describe()}\ncompiling ...", flush=True)
    # Compiled before the progress bar starts, which would count it as a slow first step.
    batch = jax.typeof(text.held_out_batches[0])
    batch = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=split)
    update, nats_of = (function.lower(state, batch).compile() for function in (update, nats_of))
    history = History()
    last = steps if stop_after is None else stop_after
    with tqdm(range(1, last + 1), comm.implementation, unit="step", disable=not is_first) as bar:
        for step in bar:
            start = time.perf_counter()
            state, nats, loads = update(state, shard(text.training_batch()))
            history.train.append(float(nats))  # waits for the step
            history.loads.append(np.asarray(loads))
            history.rates.append(sequences * config.context / (time.perf_counter() - start))
            bar.set_postfix(loss=f"{history.train[-1]:.3f}", tokens_per_s=f"{history.rates[-1]:,.0f}")
            if step % EVALUATE_EVERY == 0 or step == last:
                losses = [float(nats_of(state, shard(batch))) for batch in text.held_out_batches]
                history.held_out[step] = float(np.mean(losses))
    comm.check()  # raises the errors of ops
    if save_to is not None:
        save(save_to, config, state[0])
    comm.close()
    return history, text


def plot(history: History, unigram: float, path: Path) -> None:
    """Write the loss curves and the load per expert as a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(history.train) + 1), history.train, alpha=0.6, label="train")
    left.plot(list(history.held_out), list(history.held_out.values()), "o-", markersize=3, label="held out")
    left.axhline(unigram, color="gray", linestyle="--", label="held out, unigram model")
    left.set(xlabel="step", ylabel="nats per byte", title="Loss")
    load = np.mean(history.loads[-EVALUATE_EVERY:], axis=0)  # [layers, E]
    for layer, values in enumerate(load):
        right.bar(np.arange(len(values)) + 0.4 * layer - 0.2, values, 0.4, label=f"layer {layer}")
    right.axhline(load.mean(), color="gray", linestyle="--", label="even load")
    right.set(xlabel="expert", ylabel="tokens per step", title="Load per expert at the end")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)


def compare(steps: int, seed: int, config: Config) -> int:
    """Run the first steps of the training natively and with JAX collectives; return 0 if the losses agree.

    Both combine the experts' results up to float32 rounding. Eventually rounding sends a token to another
    expert in one of them, and from then on they differ by more.
    """
    runs = [train(name, STEPS, seed, config, stop_after=steps)[0].train for name in ("native", "xla")]
    print(" step   native      xla  difference")
    for step, (native, xla) in enumerate(zip(*runs, strict=True), start=1):
        print(f"{step:5d}  {native:7.5f}  {xla:7.5f}  {abs(native - xla):10.1e}")
    difference = np.abs(np.subtract(*runs))
    early, largest = difference[:10].max(), difference.max()
    print(f"largest difference: {early:.1e} nats per byte in the first 10 steps, where 1e-4 is allowed;")
    print(f"{largest:.1e} in all, where 3e-2 is allowed")
    return 0 if early <= 1e-4 and largest <= 3e-2 else 1


def main() -> int | str:
    """Run the command line; return the exit status or what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS}, to compare 50)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--implementation", choices=("auto", "native", "xla"), default="auto",
                        help="of dispatch and combine (default: auto, native where available)")  # fmt: skip
    parser.add_argument("--wire", choices=WIRES, default="none",
                        help="format in which dispatch sends rows (default: none, as they are)")  # fmt: skip
    parser.add_argument("--combine-wire", choices=WIRES[:-1], default="none",
                        help="that of combine (default: none)")  # fmt: skip
    parser.add_argument("--combine-gradient-wire", choices=WIRES, default="none",
                        help="that of combine's gradient (default: none)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("train_moe.png"), help="plot (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the weights there, for decode_moe.py")
    parser.add_argument("--compare", action="store_true", help="compare the losses of native and xla")
    options = parser.parse_args()
    names = ("wire", "combine_wire", "combine_gradient_wire")
    formats = {name: getattr(options, name) for name in names}
    config = Config(**{name: None if format == "none" else format for name, format in formats.items()})
    if LAUNCHED:
        jax.distributed.initialize()
    if options.compare:
        return compare(options.steps or 50, options.seed, config)

    steps = options.steps or STEPS
    history, text = train(options.implementation, steps, options.seed, config, save_to=options.save)
    held_out, unigram = list(history.held_out.values())[-1], text.unigram_loss()
    below = 1 - held_out / unigram
    if jax.process_index() == 0:
        plot(history, unigram, options.out)
        rate = np.median(history.rates)
        print(f"wrote {options.out}\ntraining  {history.train[-1]:.3f} nats per byte, {rate:,.0f} tokens/s")
        print(f"held out  {held_out:.3f} nats per byte, {below:.1%} below {unigram:.3f} of the unigram model")
    if options.steps or below >= REQUIRED_BELOW_UNIGRAM:
        return 0
    return f"expected at least {REQUIRED_BELOW_UNIGRAM:.0%} below the unigram model, got {below:.1%}"


if __name__ == "__main__":
    sys.exit(main())
