"""The choice of experts as one Pallas-Triton launch, a program a token.

In XLA each `top_k` of a few numbers is a sort of rows, with kernels before and after it. Here a row stays in the
registers of a warp, and the best of what is left is taken from it time after time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.grouped_matmul.routing import OP, Routing


def choose(logits, routing: Routing, bias, correction):
    """See `routing.choose_experts`; logits are `[s, T, E]`."""
    _, tokens, num_experts = logits.shape
    inputs = {"logits": logits, "bias": bias, "correction": correction}
    inputs = {name: each for name, each in inputs.items() if each is not None}
    shape = (tokens, routing.per_token)
    weights, chosen = triton_call(
        functools.partial(_kernel, names=(*inputs, "weights", "chosen"), routing=routing),
        *inputs.values(),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        grid=(tokens,),
        name=OP,
        num_warps=max(1, pl.next_power_of_2(num_experts) // 256),
        num_stages=1,
    )
    return weights, chosen


def _kernel(*refs, names, routing):
    refs = dict(zip(names, refs, strict=True))
    parts, _, num_experts = refs["logits"].shape
    token = pl.program_id(0)
    expert = jnp.arange(pl.next_power_of_2(num_experts), dtype=jnp.int32)
    exists = expert < num_experts

    def load(ref):
        return pltriton.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    logits = functools.reduce(jnp.add, (load(refs["logits"].at[part, token, expert]) for part in range(parts)))
    if "bias" in refs:
        logits += load(refs["bias"].at[expert])
    if routing.score == "sigmoid":
        scores = 1 / (1 + jnp.exp(-logits))
    else:
        logits = jnp.where(exists, logits, -jnp.inf)
        scores = jnp.exp(logits - jnp.max(logits))
        scores = scores / jnp.sum(scores)
    preference = scores + load(refs["correction"].at[expert]) if "correction" in refs else scores
    preference = jnp.where(exists, preference, -jnp.inf)
    if routing.groups > 1:
        preference = _within_groups(preference, expert, num_experts // routing.groups, routing)

    place = jnp.arange(pl.next_power_of_2(routing.per_token), dtype=jnp.int32)
    weights, chosen = jnp.zeros(place.shape, jnp.float32), jnp.zeros(place.shape, jnp.int32)
    for i in range(routing.per_token):
        best = _best(preference, expert)
        weights = jnp.where(place == i, jnp.sum(jnp.where(expert == best, scores, 0.0)), weights)
        chosen = jnp.where(place == i, best, chosen)
        preference = jnp.where(expert == best, -jnp.inf, preference)
    if routing.renormalize:
        weights = weights / jnp.sum(weights)
    mask = place < routing.per_token
    pltriton.store(refs["weights"].at[token, place], weights * routing.scale, mask=mask)
    pltriton.store(refs["chosen"].at[token, place], chosen, mask=mask)


def _best(values, index):
    """The lowest index of the largest value."""
    return jnp.min(jnp.where(values == jnp.max(values), index, jnp.int32(index.shape[0])))


def _within_groups(preference, expert, size, routing):
    """Minus infinity for experts outside of the best groups."""
    group = lax.div(expert, jnp.int32(size))
    scores = jnp.full(preference.shape, -jnp.inf, jnp.float32)  # of each expert's group
    for i in range(routing.groups):
        own = jnp.where(group == i, preference, -jnp.inf)
        score = jnp.max(own)
        if routing.group_score == "top2":
            score += jnp.max(jnp.where(expert == _best(own, expert), -jnp.inf, own))
        scores = jnp.where(group == i, score, scores)
    allowed = jnp.zeros(preference.shape, jnp.bool_)
    for _ in range(routing.groups_per_token):
        best = lax.div(_best(scores, expert), jnp.int32(size))
        allowed |= group == best
        scores = jnp.where(group == best, -jnp.inf, scores)
    return jnp.where(allowed, preference, -jnp.inf)
