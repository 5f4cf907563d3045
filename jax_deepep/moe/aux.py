"""What a MoE layer tells besides its output, and how it is summed up."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepep import gating
from jax_deepep.moe.config import MoEConfig
from jax_deepep.moe.order import zero_after

Scope = Literal["global", "local", "off"]  # of `MoEAux`


class MoEAux(NamedTuple):
    """What a MoE layer tells besides its output.

    With `aux="global"` over all tokens of all devices, by one small exchange after the layer's own. With
    `aux="local"` every device tells of its own tokens, without any exchange: arrays have a leading axis [D]
    then, for D = `config.num_token_shards` devices in the order in which they split the tokens; `topk_idx`
    and `router_logits` are as ever. Tokens that `mask` leaves out count nowhere.

    Attributes:
        expert_load: int32 [E], tokens that chose each expert, dropped rows included.
        balance_loss: float32 [], `jax_deepep.gating.balance_loss` over all tokens; 1 when all loads are
            equal, 0 without any token, or where `topk_weights` were given, since there is no router then.
        z_loss: float32 [], the mean over tokens of logsumexp(router logits)², which keeps logits small (Zoph
            et al., 2022, "ST-MoE"); 0 where there is no router.
        expert_drops: int32 [E], those of `expert_load` whose row did not fit into a capacity.
        num_dropped: int32 [], their sum.
        topk_idx: int32 [..., K], the experts that each token chose, −1 for none; as `topk_idx` of a later
            call it makes that one choose the same.
        sequence_balance_loss: float32 [], the mean over sequences of the same over one sequence each; None
            without `sequence_loss=True`.
        router_logits: float32 [..., E]; None without `router_logits=True`.
    """

    expert_load: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    expert_drops: jax.Array
    num_dropped: jax.Array
    topk_idx: jax.Array
    sequence_balance_loss: jax.Array | None
    router_logits: jax.Array | None


def _with_keys(aux: MoEAux) -> tuple[list[tuple[Any, Any]], None]:
    return [(jax.tree_util.SequenceKey(index), value) for index, value in enumerate(aux)], None


# With the keys of a tuple: those of attributes, as any NamedTuple has them, are an error in `nnx.tabulate`.
jax.tree_util.register_pytree_with_keys(MoEAux, _with_keys, lambda _, values: MoEAux(*values))


class Call(NamedTuple):
    """The static part of a call of the layer, besides its configuration.

    Attributes:
        aux: over what `MoEAux` is.
        router_logits, sequence_loss: whether it has them.
        num_tokens: of all devices.
        sequence_length: S.
        dtype: of the computation.
        num_chunks: in which the tokens of a device pass.
    """

    aux: Scope
    router_logits: bool
    sequence_loss: bool
    num_tokens: int
    sequence_length: int
    dtype: Any
    num_chunks: int


class Sums(NamedTuple):
    """Sums over some tokens of one device; or those of every sequence, with a leading axis.

    Attributes:
        load: int32 [E], tokens that chose each expert.
        probability: float32 [E], of `gating.router_probabilities`; 0 without a router.
        num_tokens: int32 [].
    """

    load: jax.Array
    probability: jax.Array
    num_tokens: jax.Array

    def loss(self) -> jax.Array:
        """Return the balance loss of these tokens; 0 if there is none."""
        return gating.balance_loss(
            self.load, self.probability / jnp.maximum(self.num_tokens, 1).astype(jnp.float32)[..., None]
        )

    def sum_of_losses(self) -> tuple[jax.Array, jax.Array]:
        """Return (the sum of the losses of sequences, the number of those with a token)."""
        return self.loss().sum(), (self.num_tokens > 0).sum(dtype=jnp.int32)


class Counts(NamedTuple):
    """What one device counts.

    Attributes:
        all: sums over all of its tokens.
        sequences: sums of each sequence [W, ...], from the first one on that the device has tokens of; None
            if nobody asks for them.
        z: float32 [], the sum of logsumexp².
        drops: int32 [E]; None if nothing can be dropped.
        num_received: int32 [], rows that came to this device.
    """

    all: Sums
    sequences: Sums | None
    z: jax.Array
    drops: jax.Array | None
    num_received: jax.Array


class Sequences(NamedTuple):
    """How the tokens of a device belong to sequences.

    Attributes:
        length: S.
        number: of all sequences.
        num_tokens: of a device, padding included.
    """

    length: int
    number: int
    num_tokens: int

    @property
    def are_whole(self) -> bool:
        """Whether every sequence is on one device."""
        return self.num_tokens % self.length == 0

    @property
    def window(self) -> int:
        """How many sequences a device may have tokens of."""
        return self.num_tokens // self.length + (0 if self.are_whole else 2)

    def first(self, device: jax.Array) -> jax.Array:
        """Return the first sequence that a device has tokens of."""
        return device * self.num_tokens // self.length

    def sums(self, sequence: jax.Array, values: jax.Array) -> jax.Array:
        """Return the sums of `values` [T, ...] by `sequence` [T], counted from the first of the device."""
        return jnp.zeros((self.window, *values.shape[1:]), values.dtype).at[sequence].add(values)


def global_aux(
    config: MoEConfig,
    call: Call,
    sequences: Sequences,
    device: jax.Array,
    counts: Counts,
    out: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
    """Return (`out`, what `_fields` does), summed over all devices."""
    # Our waits are bounded and say for whom: no collective of XLA comes before. Chunks are one loop, of which
    # the gradient of the balance loss under `jax.checkpoint` wants the load without dispatching again.
    early = counts.num_received if call.num_chunks == 1 else counts.all.load[0]
    zero, out = zero_after(early, out)
    zero = _alike(config, zero)
    every, of_sequences, z, drops = jax.tree.map(lambda v: v + zero.astype(v.dtype), counts[:4])
    drops = None if drops is None else _alike(config, drops)
    if of_sequences is None:
        of_sequence = None
    elif sequences.are_whole:
        of_sequence = of_sequences.sum_of_losses()
    else:
        place = sequences.first(device) + jnp.arange(sequences.window, dtype=jnp.int32)
        whole = lax.psum(
            jax.tree.map(
                lambda v: jnp.zeros((sequences.number, *v.shape[1:]), v.dtype).at[place].add(v, mode="drop"),
                of_sequences,
            ),
            config.token_axes,
        )
        of_sequence = whole.sum_of_losses()
    of_device = (every, z, drops, of_sequence if sequences.are_whole else None)
    every, z, drops, summed = lax.psum(of_device, config.token_axes)
    return out, _fields(every, z, drops, summed if sequences.are_whole else of_sequence)


def _alike(config: MoEConfig, value: jax.Array) -> jax.Array:
    """Mark a value of our ops as the same along the tensor axis."""
    return lax.pmax(value, config.tensor_axes) if config.tensor_axes else value


def local_aux(config: MoEConfig, counts: Counts) -> dict[str, Any]:
    """Return what `_fields` does for the tokens of one device, with a leading axis [1]."""
    drops = None if counts.drops is None else _alike(config, counts.drops)
    of_sequence = None if counts.sequences is None else counts.sequences.sum_of_losses()
    fields = _fields(counts.all, counts.z, drops, of_sequence)
    return jax.tree.map(lambda value: value[None], fields)


def _fields(
    every: Sums, z: jax.Array, drops: jax.Array | None, of_sequence: tuple[jax.Array, jax.Array] | None
) -> dict[str, Any]:
    """Return the fields of `MoEAux` that are sums, or come from them."""
    drops = jnp.zeros_like(every.load) if drops is None else drops
    mean = None
    if of_sequence is not None:
        mean = of_sequence[0] / jnp.maximum(of_sequence[1], 1).astype(jnp.float32)
    return {
        "expert_load": every.load,
        "balance_loss": every.loss(),
        "z_loss": z / jnp.maximum(every.num_tokens, 1).astype(jnp.float32),
        "expert_drops": drops,
        "num_dropped": drops.sum(dtype=jnp.int32),
        "sequence_balance_loss": mean,
    }
