"""Which leaves of a tree are stored how."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from dsjax.errors import ConfigError, ParameterError
from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.rounding import Fit, quantize_array
from dsjax.quantization.schemes import Scheme, scheme

Recipe = str | Scheme | Mapping[str, str | Scheme | None]
Tree = TypeVar("Tree")

# Small, and routers decide by small differences; what multiplies latent keys and values is needed as a plain array.
KEPT_PLAIN = ("router", "shared_gate", "positions", "token_types", "patches", "k_up", "v_up")


def quantize(params: Tree, recipe: Recipe, *, fit: Fit = "nearest") -> Tree:
    """A parameter tree with matrices in few bits. Pure and jittable; of fused trees as of others.

    Args:
      params: nested dict of floating arrays, or of quantized leaves, which are quantized anew where the recipe asks for
        another scheme.
      recipe: a scheme, or the name of one, for all matrices of attention, feed-forward and experts, the embedding and
        the head; routers, tables of positions, latent up-projections, norms and biases stay as they are. Or a mapping
        from patterns to schemes, where the first pattern that a leaf matches decides and `None` leaves it as it is:
        `{"embed": None, "layers.*.mlp.*": "int4", "attention": "int8"}`. A pattern with `*`, `?` or `[` is for the
        whole dotted path, as `fnmatch` reads it; any other for a part of it. It takes the same matrices as a scheme
        alone would, unless it names only others.
      fit: see `quantize_array`.

    Returns:
      The tree, with `QuantizedArray` in the place of what was quantized.

    Raises:
      ConfigError: a scheme is unknown, or a pattern matches no leaf.
      ParameterError: a pattern asks for a scheme for norms or biases alone, or rows of a leaf are not whole groups.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QuantizedArray))
    leaves = {dotted(path): leaf for path, leaf in paths}
    chosen = choose({path: tuple(leaf.shape) for path, leaf in leaves.items()}, recipe)
    for path, to in chosen.items():
        leaf = leaves[path]
        if not (isinstance(leaf, QuantizedArray) and leaf.scheme == to):
            leaves[path] = quantize_array(leaf, to, fit=fit, name=f"leaf '{path}'")
    return jax.tree.unflatten(treedef, leaves.values())


def dotted(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as dsjax writes it: `layers.0.mlp.up.weight`."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def choose(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of each leaf that a recipe quantizes.

    Args:
      shapes: of all leaves, by dotted path.
      recipe: as for `quantize`.

    Raises:
      ConfigError: as for `quantize`.
      ParameterError: as for `quantize`.
    """
    patterns = recipe if isinstance(recipe, Mapping) else {"*": recipe}
    chosen: dict[str, Scheme | None] = {}
    for pattern, name in patterns.items():
        to = None if name is None else scheme(name)
        for path in _matching(pattern, to, shapes):
            chosen.setdefault(path, to)
    schemes = {path: to for path, to in chosen.items() if to is not None}
    for path, to in schemes.items():
        to.check(shapes[path], f"leaf '{path}'")
    return schemes


def _matching(pattern: str, to: Scheme | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The leaves that a pattern of a recipe is about."""
    is_glob = any(sign in pattern for sign in "*?[")
    found = [path for path in shapes if (fnmatch.fnmatchcase(path, pattern) if is_glob else pattern in path)]
    if not found:
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in shapes)
        raise ConfigError(f"pattern {pattern!r} of the recipe matches no leaf; there are: {', '.join(names)}")
    if to is None:
        return found
    matrices = [path for path in found if path.split(".")[-1] == "weight" and len(shapes[path]) > 1]
    if not matrices:
        raise ParameterError(
            f"pattern {pattern!r} of the recipe asks for '{to.name}' for leaf '{found[0]}' {list(shapes[found[0]])}, "
            "which is no matrix; norms and biases stay as they are"
        )
    usual = [path for path in matrices if path.rpartition(".")[0].rpartition(".")[2] not in KEPT_PLAIN]
    return usual or matrices
