"""Signature, checks and choice of backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.few_row_matmul.reference import ACTIVATIONS
from pallas_kernels.quantized_matmul.formats import ELEMENTS, Format

BACKENDS = ("triton", "xla", "reference")
MAX_ROWS = 512  # what the kernel takes: with more, dequantizing once and a plain product are faster
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def quantized_matmul(
    x: Float[Array, "M K"],
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    minimums: jax.Array | None = None,
    tensor_scale: jax.Array | None = None,
    *,
    format: Format,
    bias: Float[Array, "N"] | None = None,
    activation: str | None = None,
    partial: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M O"] | Float32[Array, "s M N"]:
    """Product of rows with a quantized weight, `x @ weight.T`, with bias and gated activation in the same kernel.

    `weight = tensor_scale * (scale * (number - zero) + minimum)`, as `format` and the arrays say. Numbers are exact in
    the dtype of `x`, sums, bias and activation in float32 and rounded once. Where a group is short beside the rows of
    `x`, the kernel rounds `scale * (number - zero)` to bfloat16.

    Args:
      x: rows; float32, bfloat16 or float16.
      values: packed codes, `[N, K * bits / 8]` in rows; tiles as `tiles.to_tiles` makes them, which the kernel needs.
      scales: `[N / rows, K / group]` in rows, rounded up, the other way round in tiles; float32, bfloat16, float16,
        float8_e4m3fn, or uint8 for powers of two.
      zeros: zero points of the shape of the scales, integers or floating, `None` where `format.zero` is all.
      minimums: of the shape of the scales, added after the scale; `None` for none.
      tensor_scale: float32 `[1, 1]` or `[N, 1]`, of the whole weight or of its rows; `None` for 1.
      format: what the arrays are.
      bias: added to the product.
      activation: as in `few_row_matmul`: the weight holds the rows of the gate and then those of the up projection,
        half each, and the result is `activation(gate) * up`.
      partial: give float32 sums over parts of `K`, for a consumer that reads and adds anyway; without activation and
        bias.
      implementation: `"triton"` (tiles, at most 512 rows), `"xla"` or `"reference"`; `None` for the best that the
        platform has.

    Returns:
      `[M, N]` in the dtype of `x`; `[M, N / 2]` with an activation; with `partial`, `float32[s, M, N]` whose sum over
      the first axis is the product, `s` being static.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or the backend can not run; the message says why.
    """
    _check(x, values, scales, zeros, minimums, tensor_scale, format, bias, activation, partial)
    arrays = (x, values, scales, zeros, minimums, tensor_scale)
    backend = dispatch.select(__name__, BACKENDS, implementation, *arrays, format=format)
    with jax.named_scope("quantized_matmul"):
        return backend.matmul(*arrays, format=format, bias=bias, activation=activation, partial=partial)


def _check(x, values, scales, zeros, minimums, tensor_scale, format, bias, activation, partial):
    axes = 2 if format.layout == "rows" else 3
    if values.ndim != axes:
        raise ValueError(f"values {values.shape} must have {axes} axes in {format.layout}, for a weight [N, K]")
    out, inner = format.shape(values)
    stored = ELEMENTS[format.element].dtype if format.layout == "rows" else jnp.uint16
    if values.dtype != stored:
        raise ValueError(
            f"values are {values.dtype}; {format.element} in {format.layout} is stored in {stored.__name__}"
        )
    if x.ndim != 2 or x.shape[1] != inner:
        raise ValueError(f"x {x.shape} and the weight {(out, inner)} must be [M, K] and [N, K]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be float32, bfloat16 or float16")
    expected = format.scales_shape(out, inner)
    for name, each in (("scales", scales), ("zeros", zeros), ("minimums", minimums)):
        if each is not None and each.shape != expected:
            raise ValueError(f"{name} {each.shape} must be {expected} for a weight {(out, inner)} as {format}")
    if tensor_scale is not None and tensor_scale.shape not in ((1, 1), (out, 1)):
        raise ValueError(f"tensor_scale {tensor_scale.shape} must be (1, 1) or {(out, 1)}")
    if zeros is not None and ELEMENTS[format.element].exponent:
        raise ValueError(f"{format.element} is a float, which takes no zeros; use minimums")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias {bias.shape} must have one entry for each of the {out} rows of the weight")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; there are {sorted(ACTIVATIONS)}")
    if activation is not None and out % 2:
        raise ValueError(
            f"an activation needs as many gate rows as up rows, and the weight has {out} rows, an odd number"
        )
    if partial and (activation is not None or bias is not None):
        raise ValueError("partial sums take no activation and no bias: those need the whole sum")
