"""The types of the results of ops: checked by mypy, never run."""

from typing import assert_type

import jax

import jax_deepep as ep


def results_follow_the_layout(
    x: jax.Array, idx: jax.Array, weights: jax.Array, comm: ep.Communicator
) -> jax.Array:
    by_expert, handle = ep.dispatch(x, idx, weights, comm=comm, capacity=8, alignment=4)
    assert_type(by_expert, ep.ExpertMajor)
    assert_type(ep.dispatch(x, handle=handle), tuple[ep.ExpertMajor, ep.Handle[ep.ExpertMajor]])
    by_token, of_tokens = ep.dispatch(x, idx, weights, comm=comm, layout="token")
    assert_type(by_token, ep.TokenMajor)
    assert_type(ep.dispatch(x, handle=of_tokens, comm=comm)[0], ep.TokenMajor)
    ep.dispatch(x, idx, weights)  # type: ignore[call-overload]  # comm= is optional along a handle only
    return ep.combine(by_token.tokens, of_tokens) + ep.combine(by_expert.tokens, handle, comm=comm)
