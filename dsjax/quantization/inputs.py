"""What a model multiplies its weights with, found in the traced program: layers need no hooks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from dsjax.quantization.recipe import dotted

# A weight that passed through one of these is still the same weight.
_SAME = ("convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient")


def weight_inputs(model: Callable[[Any], Any], params: Any, rows: int) -> dict[str, jax.Array]:
    """The rows that each matrix of a tree is multiplied with, as far as products can be told from the program.

    Products inside of loops and branches, such as those of experts, are not looked at. Traceable.

    Args:
      model: a function of the tree; it runs once.
      params: nested dict of plain arrays.
      rows: how many rows to keep of each input, evenly spaced.

    Returns:
      By the dotted path of a matrix `[out, in]`, its input `[at most rows, in]`.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    program = jax.make_jaxpr(lambda *arrays: model(jax.tree.unflatten(treedef, arrays)))(*(leaf for _, leaf in leaves))
    found: dict[str, jax.Array] = {}

    def record(path: str, x: jax.Array) -> None:
        x = x.reshape(-1, x.shape[-1])
        step = -(-x.shape[0] // rows)
        found.setdefault(path, x[::step])

    _run(program, [leaf for _, leaf in leaves], [dotted(path) for path, _ in leaves], record)
    return found


def _run(
    program: ClosedJaxpr, arguments: list[Any], paths: list[str | None], record: Callable[[str, jax.Array], None]
) -> tuple[list[Any], list[str | None]]:
    """Evaluate a program whose arguments may be weights; results, and which of them are."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
    weights = {variable: path for variable, path in zip(jaxpr.invars, paths, strict=True) if path is not None}

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def weight(atom: Any) -> str | None:
        return None if isinstance(atom, Literal) else weights.get(atom)

    for equation in jaxpr.eqns:
        given, origins = [value(atom) for atom in equation.invars], [weight(atom) for atom in equation.invars]
        name, made = equation.primitive.name, [None] * len(equation.outvars)
        if name in ("jit", "pjit"):
            results, made = _run(equation.params["jaxpr"], given, origins, record)
        else:
            if name == "dot_general":
                _look(given, origins, equation.params["dimension_numbers"], record)
            results = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
            if name in _SAME and len(origins) == len(made):
                made = origins
        values |= zip(equation.outvars, results, strict=True)
        weights |= {out: path for out, path in zip(equation.outvars, made, strict=True) if path is not None}
    return [value(atom) for atom in jaxpr.outvars], [weight(atom) for atom in jaxpr.outvars]


def _look(given: list[Any], origins: list[str | None], dimension_numbers: Any, record: Callable) -> None:
    """Record the other side of a product with the last axis of a matrix."""
    contracted, batch = dimension_numbers
    for side in (0, 1):
        path, x = origins[side], given[1 - side]
        if path is not None and origins[1 - side] is None and not batch[0]:
            if given[side].ndim == 2 and tuple(contracted[side]) == (1,):
                record(path, jnp.moveaxis(x, contracted[1 - side][0], -1))
