"""A small Mixture-of-Experts language model over bytes, for training and for decoding with a cache.

Read `Block` first: its feed-forward layer is `jax_deepep.flax.MoE`, which takes the tokens of all devices and
sends each to the devices of its experts and back.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from standard_library_text import VOCABULARY

import jax_deepep as ep
from jax_deepep.flax import MoE

Cache = list[dict[str, jax.Array]]  # of every block: keys and values [B, context, heads, hidden / heads]


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and of each device's part of a training batch."""

    hidden: int = 64
    expert_hidden: int = 128
    heads: int = 4
    layers: int = 2
    experts: int = 16
    experts_per_token: int = 2
    capacity_factor: float | None = 2.0  # most rows of a device, in units of its fair share; None = all
    balance: float = 0.03  # weight of the load-balance loss
    wire: str | None = None  # the format in which dispatch sends rows; None = as they are
    combine_wire: str | None = None  # that of combine
    combine_gradient_wire: str | None = None  # that of combine's gradient
    context: int = 128  # bytes
    sequences_per_device: int = 4

    def communicator(
        self, mesh: jax.sharding.Mesh, max_tokens: int, implementation: str = "auto", mode: str = "auto"
    ) -> ep.Communicator:
        """Return a communicator for the devices of `mesh`, for up to `max_tokens` of each at once."""
        return ep.Communicator(
            mesh, num_experts=self.experts, num_experts_per_tok=self.experts_per_token,
            max_tokens=max_tokens, hidden_size=self.hidden, implementation=implementation, mode=mode,
        )  # fmt: skip


class Block(nnx.Module):
    """Causal self-attention, then the experts."""

    def __init__(self, config: Config, comm: ep.Communicator, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.norm2 = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.qkv = nnx.Linear(config.hidden, 3 * config.hidden, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, rngs=rngs)
        # Its parameters are initialised on the devices of their experts.
        self.moe = MoE(
            config.experts, config.experts_per_token, config.hidden, config.expert_hidden, comm=comm,
            capacity_factor=config.capacity_factor, gated=False, activation=jax.nn.gelu, rngs=rngs,
            wire=config.wire,
            combine_wire=ep.Wire(config.combine_wire, backward=config.combine_gradient_wire),
        )  # fmt: skip
        self.heads = config.heads

    def __call__(self, x, cache=None, position=None, mask=None):
        """Return (x [B, S, H], the MoE layer's `aux`, the cache with the keys and values of x)."""
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        if cache is None:
            attention = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
            cache = {
                "key": write(cache["key"], key, position), "value": write(cache["value"], value, position)
            }  # fmt: skip
            # A query sees positions up to its own; later ones hold an earlier text, or nothing.
            positions = position[:, None] + jnp.arange(x.shape[1])  # [B, S]
            visible = jnp.arange(cache["key"].shape[1])[None, None] <= positions[:, :, None]
            attention = jax.nn.dot_product_attention(
                query, cache["key"], cache["value"], mask=visible[:, None]
            )
        x = x + self.out(attention.reshape(x.shape))
        # Padding goes to no expert. Decoding needs no loads and losses, which cost a separate exchange.
        moved, aux = self.moe(self.norm2(x), mask=mask, aux="global" if cache is None else "off")
        return x + moved, aux, cache


class LanguageModel(nnx.Module):
    """Predicts the next byte."""

    def __init__(self, config: Config, comm: ep.Communicator, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, config.hidden, rngs=rngs)
        self.position = nnx.Embed(config.context, config.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(config, comm, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, VOCABULARY, rngs=rngs)

    def __call__(
        self,
        text: jax.Array,
        cache: Cache | None = None,
        position: jax.Array | None = None,
        mask: jax.Array | None = None,
    ):
        """Return (logits [B, S, 256], `aux` of every block, cache).

        Args:
            text: [B, S] bytes. Without a cache, the beginning of a text.
            cache: keys and values of earlier bytes; `empty_cache` makes the first one.
            position: int32 [B], how many bytes of each text the cache has; those in `text` follow.
            mask: bool [B, S], False for padding; None = no padding.
        """
        positions = jnp.arange(text.shape[1])[None] + (0 if position is None else position[:, None])
        x = self.embedding(text.astype(jnp.int32)) + self.position(positions)
        auxes, caches = [], []
        for layer, block in enumerate(self.blocks):
            x, aux, of_block = block(x, None if cache is None else cache[layer], position, mask)
            auxes.append(aux)
            caches.append(of_block)
        return self.head(self.norm(x)), auxes, caches

    def losses(self, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (nats per byte [], balance loss [], tokens per expert [layers, E]) of [B, S + 1]."""
        logits, auxes, _ = self(text[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].astype(jnp.int32)).mean()
        balance = jnp.stack([aux.balance_loss for aux in auxes]).mean()
        return nats, balance, jnp.stack([aux.expert_load for aux in auxes])


def empty_cache(config: Config, sequences: int) -> Cache:
    """Return an empty cache for this many texts."""
    shape = (sequences, config.context, config.heads, config.hidden // config.heads)
    return [{"key": jnp.zeros(shape), "value": jnp.zeros(shape)} for _ in range(config.layers)]


def abstract_model(config: Config, comm: ep.Communicator):
    """Return (graph, state) of the model, with shapes, dtypes and shardings instead of values."""
    model = nnx.eval_shape(lambda: LanguageModel(config, comm, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    shardings = nnx.get_named_sharding(state, comm.mesh)
    abstract = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return graph, jax.tree.map(abstract, state, shardings)


def save(path: Path, config: Config, state) -> None:
    """Write the model's config and weights; every process calls it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / "weights", nnx.to_pure_dict(state), force=True)
    if jax.process_index() == 0:
        (path / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Return the config of a saved model."""
    return Config(**json.loads((path / "config.json").read_text()))


def load(path: Path, config: Config, comm: ep.Communicator):
    """Return (graph, state) of a saved model, sharded over the devices of `comm`."""
    graph, state = abstract_model(config, comm)
    with ocp.StandardCheckpointer() as checkpointer:
        weights = checkpointer.restore(path.absolute() / "weights", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, weights)
    return graph, state
