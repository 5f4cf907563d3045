"""Arguments and results of a call: masks, the user's routing, repeated routing, `MoEAux`."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import E, F, H, K, config_of, loss_of, numbers, on_mesh, parameters_of
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import fetch, put_on_mesh
from moe_layer import assert_close

import jax_deepep as ep
from jax_deepep import flax as ep_flax
from jax_deepep import gating
from jax_deepep.flax import linen
from jax_deepep.moe import MoEConfig, moe

BATCH, SEQUENCE = 8, 6
SHAPE = (BATCH, SEQUENCE)
MASK = np.random.default_rng(0).random(SHAPE) < 0.7
MASK[2] = False  # a whole sequence


def network_of(config: MoEConfig, parameters: Any, x: Any, topk_idx: Any, topk_weights: Any) -> Any:
    """Return the output of the chosen and the shared experts for the tokens x [T, H], in float32."""
    wi_0, wi_1, wo = (parameters[name] for name in ("wi_0", "wi_1", "wo"))
    hidden = config.activation(jnp.einsum("th,ehf->tef", x, wi_0)) * jnp.einsum("th,ehf->tef", x, wi_1)
    weights = (jax.nn.one_hot(topk_idx, E) * topk_weights[..., None]).sum(axis=1)
    out = jnp.einsum("te,tef,efh->th", weights, hidden, wo)
    if config.shared_intermediate_size:
        hidden = config.activation(x @ parameters["shared_wi_0"]) * (x @ parameters["shared_wi_1"])
        out += hidden @ parameters["shared_wo"]
    return out


def sharded(config: MoEConfig, value: np.ndarray) -> jax.Array:
    """Put values of tokens onto the mesh, with the batch sharded if it divides evenly."""
    is_even = value.shape[0] % config.num_token_shards == 0
    return put_on_mesh(value, config.mesh, P(config.token_axes if is_even else None))


def call_of(config: MoEConfig, parameters: dict[str, np.ndarray], x: np.ndarray, **given: Any) -> Any:
    """Return ((output, aux), gradients of parameters, x and float arguments of a call), unsharded."""
    arrays = {name: sharded(config, given.pop(name)) for name in ("mask", "topk_idx") if name in given}
    floats = {name: sharded(config, given.pop(name)) for name in ("topk_weights",) if name in given}
    operands = on_mesh(config, parameters), sharded(config, x), floats, arrays
    gradients, results = step_of(config, **given)(*operands)
    return fetch(results), fetch(gradients)


@functools.cache
def step_of(config: MoEConfig, **given: bool) -> Any:
    """Return the program of `call_of`."""

    def loss(parameters, x, floats, arrays):
        out, aux = moe(config, parameters, x, **arrays, **floats, **given)
        losses = aux.balance_loss + aux.z_loss
        if aux.sequence_balance_loss is not None:
            losses += aux.sequence_balance_loss
        kept = jnp.where(arrays["mask"][..., None], out, 0) if "mask" in arrays else out
        return loss_of(kept) + losses, (out, aux)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def expected_aux(config: MoEConfig, logits: Any, topk_idx: Any, mask: np.ndarray) -> Any:
    """Return (load, balance loss, z-loss, balance loss of sequences) of logits [B, S, E]."""
    chosen = jax.nn.one_hot(topk_idx, E).sum(axis=-2) * mask[..., None]
    probability = gating.router_probabilities(logits, config.score_function) * mask[..., None]

    def loss(axes):
        number = jnp.maximum(mask.sum(axis=axes), 1)
        return gating.balance_loss(chosen.sum(axis=axes), probability.sum(axis=axes) / number[..., None])

    z = (jax.nn.logsumexp(logits, axis=-1) ** 2 * mask).sum() / mask.sum()
    return chosen.sum(axis=(0, 1)), loss((0, 1)), z, loss((1,)).sum() / mask.any(axis=1).sum()


def check(config: MoEConfig, shape: tuple[int, int], mask: np.ndarray | None = None, **given: Any) -> Any:
    """Compare a call, gradients included, with a dense layer; return its aux.

    Where the mask is False, x holds NaN.
    """
    parameters, x = parameters_of(config), numbers(*shape, H).copy()
    is_token = np.ones(shape, bool) if mask is None else mask
    clean = np.where(is_token[..., None], x, 0)
    chosen, weights = given.get("topk_idx"), given.get("topk_weights")
    choices = {"score_function": config.score_function, "normalize": config.normalize, "scale": config.scale}

    def loss(parameters, x, floats):
        logits = x @ parameters["gate"]
        own, _ = gating.group_limited_topk(logits, num_experts_per_tok=K, **choices)
        topk_idx = own if chosen is None else jnp.where((chosen >= 0).any(-1, keepdims=True), chosen, own)
        if weights is None:
            topk_weights = gating.weights_of(logits, topk_idx, **choices)
            load, *losses = expected_aux(config, logits, topk_idx, is_token)
        else:
            topk_idx, topk_weights = chosen, floats["topk_weights"]
            load, losses = expected_aux(config, logits, topk_idx, is_token)[0], [0.0, 0.0, 0.0]
        flat = (value.reshape(-1, value.shape[-1]) for value in (x, topk_idx, topk_weights))
        out = network_of(config, parameters, *flat).reshape(x.shape) * is_token[..., None]
        topk_idx = jnp.where(is_token[..., None], topk_idx, -1)
        return loss_of(out) + sum(losses), (out, topk_idx, load, *losses)

    floats = {} if weights is None else {"topk_weights": weights}
    gradients, expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(parameters, clean, floats)
    x[~is_token] = np.nan
    if mask is not None:
        given["mask"] = mask
    (out, aux), got_gradients = call_of(config, parameters, x, sequence_loss=True, **given)
    got = (out, aux.topk_idx, aux.expert_load, aux.balance_loss, aux.z_loss, aux.sequence_balance_loss)
    assert_close((got, got_gradients), jax.tree.map(np.asarray, (expected, gradients)))
    np.testing.assert_array_equal(aux.topk_idx, expected[1])
    assert not aux.num_dropped
    return aux


def replayed(config: MoEConfig) -> np.ndarray:
    """Return experts of an earlier run; some tokens have none, as new ones do."""
    rng = np.random.default_rng(1)
    topk_idx = np.stack([rng.permutation(E)[:K] for _ in range(BATCH * SEQUENCE)]).reshape(*SHAPE, K)
    topk_idx[0, ::2] = -1
    topk_idx[1, 1, 1:] = -1
    return topk_idx.astype(np.int32)


def test_masked_tokens_affect_nothing() -> None:
    """Neither load, losses nor gradients; and their output is 0, whatever they hold."""
    check(config_of("data × expert", shared_intermediate_size=8, num_chunks=2), SHAPE, MASK)


def test_packed_tokens_that_do_not_divide() -> None:
    """Sequences are then split over devices, and the layer adds padding."""
    check(config_of("data × expert"), (3, 5), MASK[:3, :5] | (np.arange(5) == 1))


def test_given_routing() -> None:
    config = config_of("data × expert")
    topk_idx, weights = replayed(config), numbers(*SHAPE, K, seed=5)
    aux = check(config, SHAPE, MASK, topk_idx=topk_idx, topk_weights=weights)
    assert aux.balance_loss == aux.z_loss == 0


def test_routing_is_repeated() -> None:
    """For tokens that have one, with the router's weights and gradients.

    The choice that a call reports, for the other tokens too, gives another call bitwise the same results.
    """
    axis_types = AxisType.Explicit
    config = config_of("fsdp × expert × tensor", axis_types, score_function="sigmoid", scale=2.5)
    aux = check(config, SHAPE, MASK, topk_idx=replayed(config))
    call = functools.partial(call_of, config, parameters_of(config), numbers(*SHAPE, H), sequence_loss=True)
    results = [call(mask=MASK, topk_idx=topk_idx) for topk_idx in (replayed(config), aux.topk_idx)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_users_router() -> None:
    """It returns logits, or experts and weights, and may close over traced values."""
    config = config_of("data × expert")
    parameters, x = on_mesh(config, parameters_of(config)), sharded(config, numbers(*SHAPE, H))
    gate = numbers(H, E, seed=7)

    def by_logits(scale, x, parameters):
        return moe(config, parameters, x, router=lambda x: scale * (x @ gate), router_logits=True)

    def by_choice(scale, x, parameters):
        def router(x):
            return ep.group_limited_topk(scale * (x @ gate), num_experts_per_tok=K, score_function="softmax")

        return moe(config, parameters, x, router=router)

    def run(call):
        def loss(scale, *operands):
            out, aux = call(scale, *operands)
            return loss_of(out), (out, aux)

        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return fetch(step(jnp.float32(0.5), x, parameters))

    (gradients, (out, aux)), (expected_gradients, (expected, of_choice)) = run(by_logits), run(by_choice)
    assert_close((gradients, out), (expected_gradients, expected))
    assert gradients[0] != 0
    np.testing.assert_array_equal(aux.topk_idx, of_choice.topk_idx)
    assert_close(aux.router_logits, np.asarray(0.5 * numbers(*SHAPE, H) @ gate))


@pytest.mark.collectives
def test_implementations_agree() -> None:
    """On all results of a call, with a capacity and a mask."""
    native = config_of("data × expert", capacity_factor=0.7, alignment=1)
    sizes = {"num_experts": E, "num_experts_per_tok": K, "max_tokens": 64, "hidden_size": H}
    comm = ep.Communicator(native.mesh, implementation="xla", **sizes)
    xla = config_of("data × expert", comm=comm, capacity_factor=0.7, alignment=1)
    shape = (native.num_token_shards, 64)
    parameters, x = parameters_of(native), numbers(*shape, H)
    mask = np.random.default_rng(0).random(shape) < 0.9
    results = [call_of(config, parameters, x, mask=mask, router_logits=True) for config in (native, xla)]
    assert_close(*results)
    assert results[0][0][1].num_dropped > 0


def test_aux_without_an_exchange() -> None:
    """For each device alone, or not at all: such a step has no collective of XLA."""
    config = config_of("expert")
    operands = (on_mesh(config, parameters_of(config)), sharded(config, numbers(*SHAPE, H)))
    programs = {
        scope: jax.jit(functools.partial(moe, config, aux=scope)).lower(*operands).compile()
        for scope in ("global", "local", "off")
    }
    assert re.search(" all-reduce", programs["global"].as_text())
    for scope in ("local", "off"):
        assert not re.search(" (all-reduce|all-gather|all-to-all|collective)", programs[scope].as_text())
    results = {scope: fetch(program(*operands)) for scope, program in programs.items()}
    for out, _ in results.values():
        np.testing.assert_array_equal(out, results["global"][0])
    assert results["off"][1] is None
    every, local = results["global"][1], results["local"][1]
    devices = config.num_token_shards
    assert local.expert_load.shape == local.expert_drops.shape == (devices, E)
    assert local.z_loss.shape == local.balance_loss.shape == local.num_dropped.shape == (devices,)
    np.testing.assert_array_equal(local.expert_load.sum(axis=0), every.expert_load)
    np.testing.assert_array_equal(local.topk_idx, every.topk_idx)
    assert_close(local.z_loss.mean(), every.z_loss)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_modules_take_the_same_arguments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument of a call reaches the layer unchanged."""
    config = config_of("data × expert")
    given = {"mask": MASK, "router": len, "topk_idx": INDEX, "topk_weights": INDEX + 0.5, "aux": "local"}
    given |= {"router_logits": True, "sequence_loss": True}
    arguments = inspect.signature(moe).parameters.values()
    assert given.keys() == {argument.name for argument in arguments if argument.kind == argument.KEYWORD_ONLY}
    monkeypatch.setattr(f"jax_deepep.flax.{kind}.moe", lambda *operands, **taken: (operands, taken))
    if kind == "nnx":
        layer = ep_flax.MoE(E, K, H, F, comm=config.comm, rngs=nnx.Rngs(0))
    else:
        layer = linen.MoE(E, K, H, F, comm=config.comm).bind({"params": parameters_of(config)})
    x = numbers(*SHAPE, H)
    (of_layer, parameters, taken_x, expert_map), taken = layer(x, **given)
    assert of_layer == config
    assert parameters.keys() == config.parameters.keys()
    assert taken_x is x
    assert expert_map is None
    assert taken == given


INDEX = np.zeros((*SHAPE, K), np.int32)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"mask": MASK[1:]}, ValueError, r"mask: expected shape x\.shape\[:-1\] = \[8, 6\], got \[7, 6\]"),
        ({"mask": MASK.astype(np.int32)}, TypeError, "mask: expected dtype bool, got int32"),
        (
            {"topk_idx": INDEX[..., 1:]},
            ValueError,
            r"topk_idx: expected shape \[\*x\.shape.*, got \[8, 6, 2\]",
        ),
        ({"topk_idx": INDEX + 0.5}, TypeError, "topk_idx: expected dtype int32, got float.*"),
        (
            {"topk_idx": INDEX, "topk_weights": INDEX},
            TypeError,
            "topk_weights: expected floats, got dtype int32",
        ),
        (
            {"topk_weights": INDEX + 0.5},
            ValueError,
            "topk_weights: expected None without topk_idx, got an arr",
        ),
        (
            {"router": lambda x: x, "topk_idx": INDEX, "topk_weights": INDEX + 0.5},
            ValueError,
            "router: expected None with topk_weights, got a function; there is nothing to route",
        ),
        ({"router": 3}, TypeError, "router: expected a function of x, got 3; pass one, or None"),
        (
            {"router": lambda x: x},
            ValueError,
            r"router: expected shape .*num_experts\] = \[8, 6, 8\], got \[8, 6, 16\]",
        ),
        (
            {"router": lambda x: (x, x), "topk_idx": INDEX},
            ValueError,
            r"router: expected logits or \(topk_idx, topk_weights\), got 2 results beside topk_idx; leave",
        ),
        ({"aux": "none"}, ValueError, 'aux: expected "global", "local" or "off", got \'none\'; pass one of'),
        (
            {"aux": "off", "router_logits": True},
            ValueError,
            "router_logits: expected False with topk_weights or",
        ),
        (
            {"router_logits": np.int32(1)},
            TypeError,
            "router_logits: expected True or False, got",
        ),
        ({"sequence_loss": 1}, TypeError, "sequence_loss: expected True or False, got 1; pass a bool"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], words: str) -> None:
    config = config_of("data × expert")
    with pytest.raises(error, match=words):
        moe(config, parameters_of(config), numbers(*SHAPE, H), **given)


def test_parameters_that_are_no_mapping() -> None:
    config = config_of("data × expert")
    with pytest.raises(TypeError, match="parameters: expected a mapping of names to arrays, got list; i"):
        moe(config, list(parameters_of(config).values()), numbers(*SHAPE, H))


@pytest.mark.collectives
def test_arrays_whose_axes_are_explicit_elsewhere() -> None:
    """As `jax.make_mesh` makes them by default, while the layer's mesh has Auto ones; with gradients."""
    config = config_of("data × expert")
    parameters, x = parameters_of(config), numbers(8, 6, H)
    topk_idx = np.argsort(numbers(8, 6, E))[..., :K].astype(np.int32)
    expected = call_of(config, parameters, x, topk_idx=topk_idx)
    explicit = config_of("data × expert", AxisType.Explicit)
    arrays = {"topk_idx": sharded(explicit, topk_idx)}
    gradients, results = step_of(config)(on_mesh(explicit, parameters), sharded(explicit, x), {}, arrays)
    jax.tree.map(np.testing.assert_array_equal, (fetch(results), fetch(gradients)), expected)

    @jax.jit
    def with_router(x, parameters):
        return moe(config, parameters, x, router=lambda x: x @ parameters["gate"])[0]

    out = fetch(with_router(sharded(explicit, x), on_mesh(explicit, parameters)))
    assert_close(out, fetch(with_router(sharded(config, x), on_mesh(config, parameters))))


def test_arrays_on_other_axes() -> None:
    config = config_of("expert")
    other = jax.sharding.Mesh(config.mesh.devices, ("batch",), axis_types=(AxisType.Explicit,))
    words = (
        r"x: expected an array on the mesh of the communicator, \[expert=.* \(Auto\)\], got one on \[batch="
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            functools.partial(moe, config),
            parameters_of(config),
            put_on_mesh(numbers(8, H), other, P("batch")),
        )


def test_sizes_that_are_not_static() -> None:
    config = config_of("expert")
    (size,) = jax.export.symbolic_shape("size")
    words = r"x: expected a static shape, got \[size, 16\]; trace or export a program for each size"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            functools.partial(moe, config), parameters_of(config), jax.ShapeDtypeStruct((size, H), np.float32)
        )
