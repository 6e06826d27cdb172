"""A layer of experts for `bench.kernels`: what is timed, what it costs, and what else computes the same."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.problems import random_array
from bench.timing import Contender, captured, chained, rotations
from pallas_kernels.grouped_matmul import QuantizedExperts, grouped_matmul, plan_experts
from pallas_kernels.grouped_matmul.shapes import Mixture
from pallas_kernels.quantized_matmul import Format, to_tiles

INT4 = Format("int4", 128, zero=8)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Tokens and their experts, chosen evenly at random; the plan is part of the call, the router is not.

    Attributes:
        mixture: the experts.
        tokens: of a call.
        is_int4: whether weights are four-bit integers in groups of 128.
    """

    mixture: Mixture
    tokens: int
    is_int4: bool = False

    @property
    def chosen(self) -> np.ndarray:
        """Experts of each token, `[T, k]`."""
        scores = np.random.default_rng(0).random((self.tokens, self.mixture.count))
        return np.argsort(scores, axis=1)[:, : self.mixture.per_token].astype(np.int32)

    @property
    def bytes(self) -> int:
        """Bytes of the weights of all experts that some token chose, once, and of rows and results in 16 bits."""
        weights = sum(out * inner for out, inner in self.mixture.products().values())
        each = weights // 2 + 2 * weights // 128 if self.is_int4 else 2 * weights
        return len(np.unique(self.chosen)) * each + 4 * self.tokens * self.mixture.model_dim

    @property
    def flops(self) -> int:
        return 2 * self.chosen.size * sum(out * inner for out, inner in self.mixture.products().values())

    def tiny(self) -> "Experts":
        return Experts(Mixture(4, 2, 128, 128), min(self.tokens, 3), self.is_int4)

    def arrays(self) -> tuple[jax.Array, tuple[jax.Array, jax.Array], list[Any]]:
        """Rows; choices and their weights; and pairs of weights that calls take in turn."""
        shape = self.tokens, self.mixture.per_token
        share = jnp.full(shape, 1 / self.mixture.per_token, jnp.float32)
        make = _int4 if self.is_int4 else _bfloat16
        weights = [
            tuple(
                make(2 * i + j, (self.mixture.count, *each)) for j, each in enumerate(self.mixture.products().values())
            )
            for i in range(rotations(self.bytes))
        ]
        x = random_array(0, (self.tokens, self.mixture.model_dim), jnp.bfloat16)
        return x, (jnp.asarray(self.chosen), share), weights


def _bfloat16(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return random_array(1 + seed, shape, jnp.bfloat16) * shape[-1] ** -0.5


def _int4(seed: int, shape: tuple[int, ...]) -> QuantizedExperts:
    @jax.jit
    def make(values):
        scales = jnp.full((*shape[:2], shape[2] // 128), shape[2] ** -0.5 / 4, jnp.bfloat16)
        values = lax.bitcast_convert_type(values, jnp.uint8)
        values, scales, zeros, minimums, format = to_tiles(values, scales, format=INT4)
        return QuantizedExperts(values, scales, zeros, minimums, None, format)

    return make(random_array(1 + seed, (*shape[:2], shape[2] // 2), jnp.int8))


def layer(problem: Experts) -> tuple[Any, ...]:
    """Plan, both products and the sum over a token's experts: a function and what it is called with."""
    x, choices, weights = problem.arrays()
    run = functools.partial(grouped_matmul, implementation="triton")

    def call(x, choices, weights):
        chosen, share = choices
        plan = plan_experts(chosen, problem.mixture.count)
        hidden = run(x, weights[0], plan, gather=True, activation="silu")
        parts = run(hidden, weights[1], plan, scatter=True, scale=share, dtype=_dtype(problem))
        return parts.sum(axis=0, dtype=jnp.float32).astype(x.dtype)

    return call, x, choices, weights


def kernels(problem: Experts) -> Contender:
    """The layer by this project's kernels."""
    return chained(*layer(problem))


def _dtype(problem: Experts) -> Any:
    return jnp.float32 if problem.tokens <= 512 else jnp.bfloat16


def ragged_dot(problem: Experts) -> Contender:
    """The same by what JAX has: rows sorted by expert, and `lax.ragged_dot`."""
    x, choices, weights = problem.arrays()
    count, k = problem.mixture.count, problem.mixture.per_token
    weights = [tuple(jnp.swapaxes(each, 1, 2) for each in pair) for pair in weights]

    def call(x, choices, weights):
        chosen, share = choices[0].reshape(-1), choices[1].reshape(-1)
        order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=count).astype(jnp.int32)
        gate, up = jnp.split(lax.ragged_dot(x[order // k], weights[0], sizes), 2, axis=-1)
        out = lax.ragged_dot(jax.nn.silu(gate) * up, weights[1], sizes)
        pairs = jnp.zeros_like(out).at[order].set(out * share[order, None].astype(out.dtype))
        return pairs.reshape(-1, k, out.shape[-1]).sum(axis=1)

    return chained(call, x, choices, weights)


def torch_grouped_mm(problem: Experts) -> Contender:
    """The same by the grouped product of torch: rows are gathered before it and added up after it, without weights."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.from_numpy(problem.chosen.reshape(-1)).long()
    order = torch.argsort(chosen, stable=True)
    ends = torch.bincount(chosen, minlength=problem.mixture.count).cumsum(0).int().to(device)
    token = (order // problem.mixture.per_token).to(device)
    x = torch.randn(problem.tokens, problem.mixture.model_dim, device=device, dtype=torch.bfloat16)
    rotation, grouped_mm = rotations(problem.bytes), torch.ops.aten._grouped_mm
    weights = [
        [
            torch.randn(problem.mixture.count, *each, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for each in problem.mixture.products().values()
        ]
        for _ in range(rotation)
    ]

    def call(i: int) -> None:
        with torch.no_grad():
            gate, up = grouped_mm(x[token], weights[i][0], offs=ends).chunk(2, dim=-1)
            out = grouped_mm(torch.nn.functional.silu(gate) * up, weights[i][1], offs=ends)
            torch.zeros_like(x).index_add_(0, token, out)

    return captured(call, rotation)
