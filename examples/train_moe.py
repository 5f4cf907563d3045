"""Train a small Mixture-of-Experts language model on the sources of Python's standard library.

    python examples/train_moe.py

needs nothing but `pip install jax_deepep[examples]`. Without an accelerator it splits the CPU into 8
devices, so that the program is the one that would run on 8 GPUs: the batch and the experts are split
over one mesh axis, and `jax_deepep` carries every token to the devices of its experts and back.
`MoE._per_device` is the part to read first.
"""
# ruff: noqa: E402 (the environment comes before the imports)

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

# Whether a launcher started several processes of this script.
LAUNCHED = "JAX_COORDINATOR_ADDRESS" in os.environ or any(
    int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
)
# Eight devices of one CPU wait for each other in collectives, so XLA's thread pool (NPROC) must hold
# more threads than that, however few cores there are.
if not LAUNCHED and "JAX_NUM_CPU_DEVICES" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from standard_library_text import VOCABULARY, Text
from tqdm import tqdm

import jax_deepep as ep

BLOCK = 64  # rows of one matrix product of the experts
STEPS = 250
EVALUATE_EVERY = 25  # steps
REQUIRED_BELOW_UNIGRAM = 0.2


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and of the share that every device has of a batch."""

    hidden: int = 64
    expert_hidden: int = 128
    heads: int = 4
    layers: int = 2
    experts: int = 16
    experts_per_token: int = 2
    capacity_factor: float = 2.0  # rows that a device takes, in units of its fair share
    balance: float = 0.03  # weight of the load-balance loss
    context: int = 128  # bytes
    sequences_per_device: int = 4


class ExpertWeight(nnx.Param):
    """A parameter [E, ...], of which every device holds the part of its own experts."""


def apply_experts(tokens: jax.Array, group_sizes: jax.Array, wi: jax.Array, wo: jax.Array) -> jax.Array:
    """Apply to each group of `tokens` [C, H] the network of its expert: wi [L, H, F], wo [L, F, H].

    Groups begin at multiples of BLOCK rows, the `alignment` of the dispatch: each block has one expert,
    and all make one batched product. On GPU and TPU use `jax.lax.ragged_dot`, which XLA's CPU backend
    computes for every expert in full. Measured on 2 cores, C=2176, H=64, F=128, one product and its
    gradient: 4.7 ms like this and 29 ms with ragged_dot for L=8 experts; 3.7 and 6.0 ms for L=2.
    """
    blocks = tokens.reshape(-1, BLOCK, tokens.shape[-1])
    first_rows = jnp.arange(len(blocks)) * BLOCK
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), first_rows, side="right")
    expert = jnp.minimum(expert, len(wi) - 1)  # blocks after the last group: nobody reads them
    hidden = jax.nn.gelu(jnp.einsum("bth,bhf->btf", blocks, wi[expert]))
    return jnp.einsum("btf,bfh->bth", hidden, wo[expert]).reshape(tokens.shape)


class MoE(nnx.Module):
    """A feed-forward layer whose experts live on different devices."""

    def __init__(self, config: Config, comm: ep.Communicator, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        experts, hidden, width = config.experts, config.hidden, config.expert_hidden
        self.gate = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (hidden, experts)))
        self.wi = ExpertWeight(init(rngs.params(), (experts, hidden, width)))
        self.wo = ExpertWeight(init(rngs.params(), (experts, width, hidden)))
        self.config, self.comm = config, comm

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (residual + the experts' output [B, S, H], tokens per expert [E], balance loss)."""
        # The ops work on what one device holds, hence shard_map. It knows (check_vma, its default)
        # that all devices share `gate`, and sums the gradient of `gate` over them.
        split, same = P("expert"), P()
        specs = {"in_specs": (split, split, same, split, split), "out_specs": (split, same, same)}
        per_device = jax.shard_map(self._per_device, mesh=self.comm.mesh, **specs)
        return per_device(x, residual, self.gate[...], self.wi[...], self.wo[...])

    def _per_device(self, x, residual, gate, wi, wo):
        config, comm = self.config, self.comm
        tokens = x.reshape(-1, config.hidden)  # [T, H]
        probabilities = jax.nn.softmax(tokens @ gate)  # [T, E]
        topk_weights, topk_idx = jax.lax.top_k(probabilities, config.experts_per_token)
        topk_weights /= topk_weights.sum(axis=-1, keepdims=True)

        # Shapes are static, so the rows that a device may receive need a bound. The default never
        # drops one, but must provide for every token of every device coming here at once.
        rows = round(config.capacity_factor * topk_idx.size / BLOCK + comm.num_local_experts) * BLOCK
        sizes = {"capacity": rows, "alignment": BLOCK}
        dispatched, handle = ep.dispatch(tokens, topk_idx, topk_weights, comm=comm, **sizes)
        # Rows after the last group were never written and may hold NaN. The gradients of wi and wo
        # sum over all rows of a block, so those are cleared first.
        rows = jnp.where(dispatched.mask[:, None], dispatched.tokens, 0)
        rows = apply_experts(rows, dispatched.group_sizes, wi, wo)
        # Adds the rows of each token, times its router weights, to the residual. combine can apply the
        # weights itself; applied here, both implementations give the same bits: only sums are left to it.
        rows *= dispatched.weights[:, None]
        out = ep.combine(rows, handle, comm=comm, weighted=False, bias=residual.reshape(tokens.shape))

        # The balance loss of Switch Transformers; 1, its minimum, when all experts have equal loads.
        load = jax.lax.psum(jax.nn.one_hot(topk_idx, config.experts).sum(axis=(0, 1)), "expert")
        mean_probability = jax.lax.pmean(probabilities.mean(axis=0), "expert")
        balance = config.experts * jnp.sum(load / load.sum() * mean_probability)
        return out.reshape(x.shape), load, balance


class Block(nnx.Module):
    """Causal self-attention, then the experts. Returns what MoE does."""

    def __init__(self, config: Config, comm: ep.Communicator, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.norm2 = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.qkv = nnx.Linear(config.hidden, 3 * config.hidden, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, rngs=rngs)
        self.moe = MoE(config, comm, rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        attention = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.out(attention.reshape(x.shape))
        return self.moe(self.norm2(x), residual=x)


class LanguageModel(nnx.Module):
    """Predicts the next byte."""

    def __init__(self, config: Config, comm: ep.Communicator, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, config.hidden, rngs=rngs)
        self.position = nnx.Embed(config.context, config.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(config, comm, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, VOCABULARY, rngs=rngs)

    def losses(self, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (nats per byte [], balance loss [], tokens per expert [layers, E]) of [B, S + 1]."""
        text = text.astype(jnp.int32)
        x = self.embedding(text[:, :-1]) + self.position(jnp.arange(text.shape[1] - 1))
        loads, balances = [None] * len(self.blocks), [None] * len(self.blocks)
        for layer, block in enumerate(self.blocks):
            x, loads[layer], balances[layer] = block(x)
        logits = self.head(self.norm(x))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()
        return nats, jnp.stack(balances).mean(), jnp.stack(loads)


@dataclass
class History:
    """What a training run showed, one entry per step."""

    train: list[float] = field(default_factory=list)  # nats per byte
    held_out: dict[int, float] = field(default_factory=dict)  # nats per byte, by step
    loads: list[np.ndarray] = field(default_factory=list)  # tokens per expert, [layers, E]
    rates: list[float] = field(default_factory=list)  # tokens per second


def placement_of(tree, mesh: jax.sharding.Mesh):
    """Split experts' weights, and the optimizer's moments of them, over the devices; copy the rest."""
    split, copied = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())
    is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda v: split if isinstance(v, ExpertWeight) else copied, tree, is_leaf=is_leaf)


def train(
    implementation: str, steps: int, seed: int, config: Config, stop_after: int | None = None
) -> tuple[History, Text]:
    """Train on every device there is; return what it showed, and the text it read.

    The learning rate follows a schedule of `steps`; `stop_after` ends the training earlier.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())
    sequences = config.sequences_per_device * mesh.size
    text = Text(context=config.context, sequences=sequences, seed=seed)
    # Made once, outside of jit; the model closes over it.
    comm = ep.Communicator(
        mesh, num_experts=config.experts, num_experts_per_tok=config.experts_per_token,
        max_tokens=config.sequences_per_device * config.context, hidden_size=config.hidden,
        implementation=implementation)  # fmt: skip
    rates = optax.warmup_cosine_decay_schedule(0.0, 1e-2, max(1, steps // 10), max(2, steps), 5e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates))

    def init():
        weights = nnx.state(LanguageModel(config, comm, nnx.Rngs(seed)))
        return weights, optimizer.init(weights)

    def loss_of(weights, batch):
        nats, balance, loads = nnx.merge(graph, weights).losses(batch)
        return nats + config.balance * balance, (nats, loads)

    def update(state, batch):
        weights, moments = state
        gradients, (nats, loads) = jax.grad(loss_of, has_aux=True)(weights, batch)
        updates, moments = optimizer.update(gradients, moments, weights)
        return (optax.apply_updates(weights, updates), moments), nats, loads

    def place(batch):  # every process draws the same batch, and keeps the part of its devices
        return jax.make_array_from_callback(batch.shape, split, lambda index: batch[index])

    # Every weight is born on its device; to know where that is, the shapes come first.
    graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, comm, nnx.Rngs(seed))))
    placement = placement_of(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=placement)()
    update = jax.jit(update, donate_argnums=0, out_shardings=(placement, everywhere, everywhere))
    nats_of = jax.jit(lambda state, batch: loss_of(state[0], batch)[1][0], out_shardings=everywhere)

    is_first = jax.process_index() == 0
    if is_first:
        print(comm.describe(), flush=True)
    history = History()
    last = steps if stop_after is None else stop_after
    with tqdm(range(1, last + 1), comm.implementation, unit="step", disable=not is_first) as bar:
        for step in bar:
            start = time.perf_counter()
            state, nats, loads = update(state, place(text.training_batch()))
            history.train.append(float(nats))  # waits for the step
            history.loads.append(np.asarray(loads))
            history.rates.append(sequences * config.context / (time.perf_counter() - start))
            bar.set_postfix(loss=f"{history.train[-1]:.3f}", tokens_per_s=f"{history.rates[-1]:,.0f}")
            if step % EVALUATE_EVERY == 0 or step == last:
                losses = [float(nats_of(state, place(batch))) for batch in text.held_out_batches]
                history.held_out[step] = float(np.mean(losses))
    comm.check()  # raises what the ops met, if anything
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
    """Run the first steps of the training natively and in JAX collectives; return 0 if the losses agree."""
    runs = [train(name, STEPS, seed, config, stop_after=steps)[0].train for name in ("native", "xla")]
    print(" step   native      xla  difference")
    for step, (native, xla) in enumerate(zip(*runs, strict=True), start=1):
        print(f"{step:5d}  {native:7.5f}  {xla:7.5f}  {abs(native - xla):10.1e}")
    largest = np.abs(np.subtract(*runs)).max()
    print(f"largest difference {largest:.1e} nats per byte; at most 1e-3 is right")
    return 0 if largest <= 1e-3 else 1


def main() -> int | str:
    """Run the command line; return the exit status or what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS}, to compare 50)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--implementation", choices=("auto", "native", "xla"), default="auto",
                        help="how rows are carried (default: auto, native where there is one)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("train_moe.png"), help="plot (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="compare the losses of native and xla")
    options = parser.parse_args()
    if LAUNCHED:
        jax.distributed.initialize()
    if options.compare:
        return compare(options.steps or 50, options.seed, Config())

    history, text = train(options.implementation, options.steps or STEPS, options.seed, Config())
    held_out, unigram = list(history.held_out.values())[-1], text.unigram_loss()
    below = 1 - held_out / unigram
    if jax.process_index() == 0:
        plot(history, unigram, options.out)
        rate = np.median(history.rates)
        print(f"wrote {options.out}\ntraining  {history.train[-1]:.3f} nats per byte, {rate:,.0f} tokens/s")
        print(f"held out  {held_out:.3f} nats per byte, {below:.1%} below {unigram:.3f} of the unigram model")
    return 0 if below >= REQUIRED_BELOW_UNIGRAM else f"at least {REQUIRED_BELOW_UNIGRAM:.0%} is expected"


if __name__ == "__main__":
    sys.exit(main())
