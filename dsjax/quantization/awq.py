"""Activation-aware scaling: columns that meet large inputs are stored larger, and so with smaller errors.

AWQ (arXiv 2306.00978) multiplies each column of a weight by `mean |x| ** alpha` of its input before rounding, and
divides the input by the same; `alpha` is what makes the error of the product smallest over some rows of real input. A
few hundred tokens are enough. The original moves the division into the layer before; a leaf keeps it as `input_scale`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.quantization.inputs import weight_inputs
from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.recipe import Recipe, choose, dotted
from dsjax.quantization.rounding import Fit, quantize_array
from dsjax.quantization.schemes import Scheme

Tree = TypeVar("Tree")

# Projections of the same input, which get the same scaling, so that they may be joined.
_TOGETHER = (("q", "k", "v"), ("gate", "up"))
_ALPHAS = np.linspace(0, 1, 20, endpoint=False, dtype=np.float32)
_FLOOR = 1e-4  # of a column's input, beside the largest


def quantize_for_inputs(
    params: Tree, recipe: Recipe, model: Callable[[Any], Any], *, fit: Fit = "nearest", rows: int = 256
) -> Tree:
    """A parameter tree with matrices in few bits, each scaled for the inputs that it meets.

    Args:
      params: nested dict of plain floating arrays.
      recipe: as for `quantize`.
      model: a function of the tree that shows its weights what they are for:
        `lambda params: dsjax.logits(params, tokens)` with a few hundred tokens, without padding.
      fit: as for `quantize`.
      rows: of each input that errors are compared on.

    Returns:
      The tree. The embedding, and leaves whose input is not found (experts), are quantized as by `quantize`.

    Raises:
      ConfigError: as for `quantize`.
      ParameterError: as for `quantize`.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = {dotted(path): leaf for path, leaf in paths}
    chosen = choose({path: tuple(leaf.shape) for path, leaf in leaves.items()}, recipe)
    inputs = jax.jit(lambda params: weight_inputs(model, params, rows))(params)
    done: dict[str, QuantizedArray] = {}
    for path, to in chosen.items():
        if path in done:
            continue
        group = [other for other in _together(path, chosen) if other in inputs]
        if not group or _module(path) == "embed":
            done[path] = quantize_array(leaves[path], to, fit=fit, name=f"leaf '{path}'")
            continue
        schemes = tuple(chosen[other] for other in group)
        done |= zip(group, _scaled([leaves[other] for other in group], inputs[path], schemes, fit), strict=True)
    return jax.tree.unflatten(treedef, (leaves | done).values())


def _module(path: str) -> str:
    return path.rpartition(".")[0].rpartition(".")[2]


def _together(path: str, chosen: Mapping[str, Scheme]) -> list[str]:
    """The leaves that have the same input as this one, itself included."""
    names = next((names for names in _TOGETHER if _module(path) in names), (_module(path),))
    layer = path.rpartition(".")[0].rpartition(".")[0]
    siblings = [f"{layer}.{name}.weight".removeprefix(".") for name in names]
    return [sibling for sibling in siblings if sibling in chosen]


@functools.partial(jax.jit, static_argnames=("schemes", "fit"))
def _scaled(weights: list[jax.Array], x: jax.Array, schemes: tuple[Scheme, ...], fit: Fit) -> list[QuantizedArray]:
    """Leaves of weights that share the input `x [rows, in]`, scaled so that their products with it change least."""
    wide, x = [weight.astype(jnp.float32) for weight in weights], x.astype(jnp.float32)
    mean = jnp.abs(x).mean(axis=0)
    mean = jnp.maximum(mean, jnp.maximum(_FLOOR * mean.max(), jnp.finfo(jnp.float32).tiny))

    def scale(alpha: jax.Array) -> jax.Array:
        powers = mean**alpha
        return powers / jnp.sqrt(powers.max() * powers.min())

    def leaves(scale: jax.Array) -> list[QuantizedArray]:
        return [quantize_array(weight * scale, to, fit=fit) for weight, to in zip(wide, schemes, strict=True)]

    def error(alpha: jax.Array) -> jax.Array:
        by = scale(alpha)
        changes = (weight - leaf.dequantize() / by for weight, leaf in zip(wide, leaves(by), strict=True))
        return jnp.stack([jnp.square(x @ change.T).sum() for change in changes]).sum()

    best = scale(jnp.asarray(_ALPHAS)[jnp.argmin(jax.lax.map(error, jnp.asarray(_ALPHAS)))])
    return [
        dataclasses.replace(leaf.astype(weight.dtype), input_scale=best, shares_inputs=len(weights) > 1)
        for leaf, weight in zip(leaves(best), weights, strict=True)
    ]
