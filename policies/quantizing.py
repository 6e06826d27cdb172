"""Quantizing leaves as they are loaded: which ones, and without a second copy of a large one."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.errors import ConfigError
from dsjax.quantization import SCHEMES, QuantizedArray, Recipe, Scheme, quantize_array, scheme
from dsjax.quantization.recipe import KEPT_PLAIN, choose
from dsjax.quantization.rounding import Fit, check_fit
from policies.sources.blocks import KINDS

_PIECE = 2**24  # weights quantized at a time: rounding takes several arrays of their size


def check_recipe(quantize: Recipe | None, fit: str = "nearest") -> None:
    """Refuse what no checkpoint can be quantized to.

    Raises:
      ConfigError: names the scheme or the fit, and those that there are.
    """
    if fit != "nearest" and quantize in (None, "none"):
        raise ConfigError(f"fit={fit!r} is how weights are rounded; say to what with quantize=")
    names = quantize.values() if isinstance(quantize, Mapping) else [quantize]
    for name in names:
        if name is None or (name == "none" and quantize == "none"):
            continue
        try:
            to = scheme(name)
        except ConfigError as error:
            if not isinstance(name, str):
                raise
            raise ConfigError(
                f"quantize={name!r} is not supported; None (keep what the checkpoint holds), 'none' (dequantize) "
                f"and {', '.join(map(repr, SCHEMES))} are"
            ) from error
        check_fit(to, fit)


def schemes_of_leaves(quantize: Recipe | None, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Scheme]:
    """What leaves are to be quantized to, by path.

    Args:
      quantize: as for `dsjax.load`.
      shapes: of all leaves.

    Raises:
      ConfigError: a pattern of a recipe matches nothing.
      ParameterError: a leaf does not take its scheme.
    """
    if quantize is None or quantize == "none":
        return {}
    if isinstance(quantize, str):
        to = scheme(quantize)
        if to.name in KINDS:
            return {path: to for path, shape in shapes.items() if _is_whole(path, shape, to)}
    return choose(shapes, quantize)


def _is_whole(path: str, shape: tuple[int, ...], to: Scheme) -> bool:
    """Whether a leaf is an embedding or a large matrix whose rows are whole groups."""
    *_, module, name = path.split(".")
    assert to.group_size is not None
    return len(shape) > 1 and shape[-1] % to.group_size == 0 and name == "weight" and module not in KEPT_PLAIN


def quantized_in_pieces(
    leaf: jax.Array | QuantizedArray, to: Scheme, fit: Fit, dtype: np.dtype, name: str
) -> QuantizedArray:
    """A leaf in few bits, some rows or experts at a time where that changes nothing.

    Args:
      leaf: on its device, plain or in other bits.
      to: the scheme.
      fit: as for `quantize_array`.
      dtype: what the leaf reads as.
      name: of the leaf, for messages.
    """
    per_row = leaf.size // leaf.shape[0]
    independent = leaf.ndim > 2 or (to.rows == 1 and not to.has_tensor_scale)
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    if leaf.size <= _PIECE or spread or not independent:
        return quantize_array(leaf, to, fit=fit, dtype=dtype, name=name)
    step = max(1, _PIECE // per_row)
    pieces = [
        quantize_array(leaf[begin : begin + step], to, fit=fit, dtype=dtype, name=name)
        for begin in range(0, leaf.shape[0], step)
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
