"""Parameter trees of other JAX libraries as dsjax's, by a map of names: pure, on the device, also under `jax.jit`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from dsjax.config import ModelConfig
from dsjax.errors import ParameterError
from dsjax.params import Params, leaf_specs, unflatten
from dsjax.quantization import QuantizedArray

Source = str | tuple[str, Callable[[Any], Any]]

_LAYER = re.compile(r"(?<=^layers\.)\d+(?=\.)")
_INDEX = re.compile(r"(.*?)\[([^\[\]]*)\]")
_SHOWN = 20  # problems of one error


def from_tree(tree: Any, config: ModelConfig, names: Mapping[str, Source], ignored: Sequence[str] = ()) -> Params:
    """Parameters from a nested tree of arrays, such as Flax and NNX models have.

    ```python
    names = {
        "embed.weight": "token_embedder.embedding",
        "layers.{i}.mlp.up.weight": ("decoder.layers_{i}.mlp.wi_1.kernel", jnp.transpose),
        "layers.{i}.attention.q.weight": (
            "decoder.layers.self_attention.query.kernel[:, {i}]",  # layers were scanned along axis 1
            lambda kernel: kernel.reshape(kernel.shape[0], -1).T,
        ),
        ...
    }
    params = dsjax.from_tree(state, config, names)
    ```

    Args:
      tree: dictionaries, lists, or any other pytree of arrays (or of tracers). The path of a leaf is its keys joined
        with dots; the `value` in which NNX wraps an array is left out.
      config: the architecture.
      names: for each leaf of dsjax its dotted path, with `{i}` for the layer, to the path in `tree`, which may have
        `{i}` too; or a pair of that path and a function from the array there to dsjax's (`[out, in]` for weights). A
        path may end with an index of integers and colons in brackets, for stacked layers and fused tensors.
      ignored: patterns (regular expressions) of paths in `tree` that are left out.

    Returns:
      The tree, with the dtypes and on the devices that the arrays have.

    Raises:
      ParameterError: names every leaf that is missing, unknown, used by none or of a wrong shape (up to twenty).
    """
    found = _paths(tree)
    specs = leaf_specs(config)
    problems: list[str] = []
    leaves, used = {}, set()
    known = {_LAYER.sub("{i}", path) for path in specs} | specs.keys()
    problems += [f"names has '{path}', which a model of this config lacks" for path in names if path not in known]
    for path, spec in specs.items():
        layer = _LAYER.search(path)
        source = names.get(path) or names.get(_LAYER.sub("{i}", path))
        if source is None:
            problems.append(f"names has no path for leaf '{path}' {list(spec.shape)}")
            continue
        name, function = (source, None) if isinstance(source, str) else source
        name = name.replace("{i}", layer[0]) if layer else name
        try:
            key, index = _split(name)
            if key not in found:
                problems.append(f"leaf '{path}' should come from '{key}', which the tree lacks")
                continue
            used.add(key)
            array = _at(found[key], index) if index else found[key]
            leaf = array if function is None else function(array)
        except Exception as error:  # a caller's function may raise anything
            problems.append(f"leaf '{path}' can not be made from '{name}': {type(error).__name__}: {error}")
            continue
        if tuple(leaf.shape) != spec.shape:
            problems.append(f"leaf '{path}' should have shape {list(spec.shape)}, from '{name}' it has {[*leaf.shape]}")
        leaves[path] = leaf
    patterns = [re.compile(pattern) for pattern in ignored]
    for key in sorted(found.keys() - used):
        if not any(pattern.fullmatch(key) for pattern in patterns):
            shape = list(getattr(found[key], "shape", ()))
            problems.append(f"'{key}' {shape} in the tree is used by no leaf; fill one, or add it to ignored")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ParameterError("the tree does not fit:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    return unflatten(leaves, config)


def _paths(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their keys, joined with dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, QuantizedArray))
    return {".".join(_names(path)): leaf for path, leaf in leaves}


def _names(path: tuple[Any, ...]) -> Iterator[str]:
    for i, key in enumerate(path):
        name = jax.tree_util.keystr((key,), simple=True)
        wraps = i == len(path) - 1 and i > 0 and name == "value" and isinstance(key, jax.tree_util.GetAttrKey)
        if not wraps:
            yield name


def _at(array: Any, index: tuple[int | slice, ...]) -> Any:
    for part, size in zip(index, array.shape, strict=False):
        if isinstance(part, int) and not -size <= part < size:
            raise IndexError(f"{part} of {size}")  # JAX would take the last
    return array[index]


def _split(name: str) -> tuple[str, tuple[int | slice, ...]]:
    """`"a.b[:, 3]"` as `("a.b", (slice(None), 3))`."""
    match = _INDEX.fullmatch(name)
    if match is None:
        return name, ()
    parts = [part.strip() for part in match[2].split(",")]
    return match[1], tuple(slice(None) if part == ":" else int(part) for part in parts)
