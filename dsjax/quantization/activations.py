"""Products with activations quantized as they come (W8A8): with 8 bits on both sides, tensor cores are twice as fast.

Each token has its own scale, from its largest number, as each row of the weight has its own (ZeroQuant, arXiv
2206.01861): both come out of the sum, and are multiplied in after it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.errors import ConfigError
from dsjax.quantization.codes import LIMITS, encode
from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.schemes import Scheme


def quantize_rows(x: jax.Array, element: str) -> tuple[jax.Array, jax.Array]:
    """Activations in 8 bits with a scale for each row.

    Args:
      x: `[..., in]`, floating.
      element: `"int8"`, `"e4m3"` or `"e5m2"`.

    Returns:
      Codes `[..., in]` and float32 scales `[..., 1]`; `codes * scales` is `x`, and a row of zeros has a scale of zero.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1, keepdims=True) / LIMITS[element][1]
    return encode(jnp.where(scales == 0, 0, wide / jnp.where(scales == 0, 1, scales)), element), scales


def takes_quantized_rows(scheme: Scheme) -> bool:
    """Whether `quantized_product` can be had: symmetric 8-bit codes whose scale does not change along a row."""
    return scheme.bits == 8 and scheme.group_size is None and scheme.is_symmetric and scheme.zero == 0


def quantized_product(x: jax.Array, weight: QuantizedArray, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`x @ weight.T` with `x` rounded to the weight's kind of 8 bits; the sum is int32, or float32 for floats.

    Args:
      x: `[..., in]`, floating.
      weight: `[out, in]`; see `takes_quantized_rows`.
      dtype: of the result, default that of `x`.

    Raises:
      ConfigError: the weight's scheme has groups, zero points, or other than 8 bits.
    """
    scheme = weight.scheme
    if not takes_quantized_rows(scheme):
        raise ConfigError(
            f"8-bit activations need a weight with 8 bits and a scale for each row or for all, such as 'int8' or "
            f"'fp8_e4m3'; this one is '{scheme.name}'"
        )
    codes, scales = quantize_rows(weight.inputs(x), "int8" if scheme.element == "int8" else "e4m3")
    exact = jnp.int32 if scheme.element == "int8" else jnp.float32
    sums = lax.dot_general(
        codes, weight.values, (((codes.ndim - 1,), (1,)), ((), ())), preferred_element_type=exact
    ).astype(jnp.float32)
    return (sums * scales * weight.scales.astype(jnp.float32)[:, 0]).astype(dtype or x.dtype)
