"""Padding costs nothing: documents packed into rows for training, prompts of different lengths prefilled.

    python examples/packed_sequences.py

Batches have fixed shapes, documents do not. In training, several documents share a row; for prefill, every
prompt has its own row, padded at the end. Segment ids say which document a token belongs to, 0 for padding:
attention uses them, and the MoE layer takes `mask=segment_ids > 0`. Padding then goes to no expert, counts in
no load and no loss, and its values, NaN included, have no effect.
"""

from virtual_devices import LAUNCHED

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_deepep as ep
from jax_deepep.flax import MoE

VOCABULARY, HIDDEN, EXPERTS, EXPERTS_PER_TOKEN, LENGTH, STEPS = 32, 32, 16, 2, 64, 30
ALLOWED = 1e-4  # difference of logits, because sums have another order


class Model(nnx.Module):
    """One block that predicts the next token of each document."""

    def __init__(self, comm: ep.Communicator, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.position = nnx.Embed(LENGTH, HIDDEN, rngs=rngs)
        self.qkv = nnx.Linear(HIDDEN, 3 * HIDDEN, rngs=rngs)
        self.moe = MoE(EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, 2 * HIDDEN, comm=comm, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, position, segment_ids, padding=0.0):
        """Return (logits [B, S, V], `aux` of the MoE layer); its input is `padding` where no token is."""
        x = self.embedding(tokens) + self.position(position)
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, 1, HIDDEN), 2, 0)
        is_same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x += jax.nn.dot_product_attention(query, key, value, mask=is_same, is_causal=True)[:, :, 0]
        is_token = segment_ids > 0
        moved, aux = self.moe(jnp.where(is_token[..., None], x, padding), mask=is_token)
        return self.head(x + moved), aux


@nnx.jit
def train(model, optimizer, tokens, position, segment_ids):
    """Make one step; return (loss, tokens per expert)."""

    def loss_of(model):
        logits, aux = model(tokens, position, segment_ids)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        # Neither padding is predicted, nor the first token of the next document.
        counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
        return jnp.sum(nats, where=counts) / counts.sum() + 0.01 * aux.balance_loss, aux.expert_load

    (loss, load), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss, load


def rows_of(documents: list[np.ndarray], multiple: int, *, packed: bool):
    """Return (tokens, position, segment_ids) [B, S] with B a `multiple`, and each document's (row, start)."""
    positions, row, start = [], 0, 0
    for document in documents:
        if start and (not packed or start + len(document) > LENGTH):
            row, start = row + 1, 0
        positions.append((row, start))
        start += len(document)
    tokens, position, segment_ids = np.zeros((3, (row // multiple + 1) * multiple, LENGTH), np.int32)
    for number, (document, (row, start)) in enumerate(zip(documents, positions, strict=True), start=1):
        here = np.s_[row, start : start + len(document)]
        tokens[here], position[here], segment_ids[here] = document, np.arange(len(document)), number
    return (tokens, position, segment_ids), positions


def main() -> None:
    """Train on packed documents, then compare their logits with those of each document alone."""
    if LAUNCHED:
        jax.distributed.initialize()
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("expert"), jax.P()))
    rng = np.random.default_rng(0)  # documents that count up, each with its own step
    lengths = rng.integers(4, LENGTH // 2, 8 * mesh.size)
    documents = [(rng.integers(32) + rng.integers(1, 4) * np.arange(n)) % VOCABULARY for n in lengths]
    (packed, positions), (prompts, _) = (rows_of(documents, mesh.size, packed=p) for p in (True, False))
    comm = ep.Communicator(
        mesh, num_experts=EXPERTS, num_experts_per_tok=EXPERTS_PER_TOKEN, hidden_size=HIDDEN,
        max_tokens=prompts[0].size // mesh.size,
    )  # fmt: skip
    model = Model(comm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    shard = lambda batch: [jax.make_array_from_callback(v.shape, split, lambda i, v=v: v[i]) for v in batch]  # noqa: E731
    losses, loads = zip(*(train(model, optimizer, *shard(packed)) for _ in range(STEPS)), strict=True)
    forward = nnx.jit(lambda model, *batch: model(*batch)[0], out_shardings=everywhere)
    logits, beside_nan = (np.asarray(forward(model, *shard(packed), value)) for value in (0.0, np.nan))
    alone = np.asarray(forward(model, *shard(prompts), 0.0))
    comm.check()  # raises the errors of ops
    is_token, load = packed[2] > 0, int(loads[-1].sum())
    difference = max(
        np.abs(logits[row, start : start + n] - alone[number, :n]).max()
        for number, (n, (row, start)) in enumerate(zip(lengths, positions, strict=True))
    )
    if jax.process_index() == 0:
        for name, (_, _, segment_ids) in (("packed", packed), ("prompts", prompts)):
            print(f"{name:8} {len(segment_ids)} rows, {(segment_ids == 0).mean():.0%} padding")
        print(f"loss     {float(losses[0]):.3f} → {float(losses[-1]):.3f}")
        print(f"load     {load} rows of {is_token.sum()} tokens, {EXPERTS_PER_TOKEN} experts each")
        print(f"a document alone differs by {difference:.0e}; {ALLOWED:.0e} is allowed")
    assert load == EXPERTS_PER_TOKEN * is_token.sum(), "the load counts padding"
    assert np.array_equal(logits[is_token], beside_nan[is_token]), "NaN in padding reached a token"
    assert difference <= ALLOWED, "a document depends on others in its row"


if __name__ == "__main__":
    main()
