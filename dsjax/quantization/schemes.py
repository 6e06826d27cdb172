"""Schemes: how a weight is stored in few bits, by name."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.errors import ConfigError, ParameterError
from pallas_kernels.quantized_matmul.formats import ELEMENTS, RUN

_SCALE_DTYPES = ("float32", "bfloat16", "float16", "e4m3", "e8m0")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A storage format: `weight = tensor_scale * scale * (number - zero) + minimum`.

    Attributes:
      name: as in `SCHEMES`, or what `scheme` makes of the other fields.
      element: what a code is: `"int8"`, `"uint8"`, `"int4"`, `"e4m3"`, `"e5m2"`, `"e3m2"`, `"e2m1"` or `"nf4"`.
      group_size: consecutive weights of a row that share a scale; `None` for all of them.
      rows: consecutive rows that share their scales; `None` for all of them.
      zero: constant subtracted from every number.
      has_zeros: whether there is also one to subtract for each scale.
      has_minimum: whether each scale has a minimum that is added.
      has_tensor_scale: whether scales have themselves a float32 scale for the whole matrix.
      scale_dtype: what scales are stored in; `"e8m0"` is a power of two, in uint8.
      activations: `"int8"` or `"e4m3"` to round what the weight is multiplied with to 8 bits too, or `None`.
    """

    name: str
    element: str
    group_size: int | None = None
    rows: int | None = 1
    zero: int = 0
    has_zeros: bool = False
    has_minimum: bool = False
    has_tensor_scale: bool = False
    scale_dtype: str = "float32"
    activations: str | None = None

    def __post_init__(self):
        if self.element not in ELEMENTS:
            raise ConfigError(f"element {self.element!r} is unknown; known are: {', '.join(ELEMENTS)}")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ConfigError(f"scale_dtype {self.scale_dtype!r} is unknown; known are: {', '.join(_SCALE_DTYPES)}")
        if self.activations is not None and self._refuses_activations():
            raise ConfigError(
                f"activations={self.activations!r}: inputs are rounded to 'int8' beside int8 codes and to 'e4m3' "
                "beside float8 ones, with a scale for each row of the weight or for all, and no zero points"
            )
        for name in ("group_size", "rows"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ConfigError(f"{name}={size}: a scale is shared by one weight or more; None stands for all")

    def _refuses_activations(self) -> bool:
        wanted = {"int8": "int8", "e4m3": "e4m3", "e5m2": "e4m3"}.get(self.element)
        return self.activations != wanted or self.group_size is not None or not self.is_symmetric or self.zero != 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return ELEMENTS[self.element].bits

    @property
    def is_symmetric(self) -> bool:
        """Whether zero is where every format has it, so that scales alone say where a weight lies."""
        return not self.has_zeros and not self.has_minimum

    @property
    def unit(self) -> int:
        """Weights of a row that can not be taken apart: they are packed together or share a scale."""
        run = 1 if self.bits == 8 else RUN
        return run if self.group_size is None else math.lcm(run, self.group_size)

    def check(self, shape: tuple[int, ...], what: str = "the weight") -> None:
        """Refuse a shape that can not be stored like this.

        Args:
          shape: of the weight, `[..., out, in]`.
          what: its name in the message.

        Raises:
          ParameterError: it is no matrix, or its rows are not whole groups; the message says which groups would do.
        """
        if len(shape) < 2:
            raise ParameterError(
                f"{what} has shape {list(shape)}; '{self.name}' is for matrices [..., out, in]. Norms and biases stay "
                "as they are"
            )
        if self._fits(shape[-1]):
            return
        others = [
            name
            for name, other in SCHEMES.items()
            if other.element == self.element and other.has_zeros == self.has_zeros and other._fits(shape[-1])
        ]
        if shape[-1] % (1 if self.bits == 8 else RUN):
            problem = f"{RUN} weights are packed together in '{self.name}'"
        else:
            problem = f"'{self.name}' has groups of {self.group_size}"
        remedy = f"these would: {', '.join(others)}" if others else "leave it as it is, or take a scheme of 8 bits"
        raise ParameterError(f"{what}: {problem}, which does not divide rows of {shape[-1]}; {remedy}")

    def _fits(self, columns: int) -> bool:
        # Blocks may be cut off at the edge of the matrix, groups may not.
        return columns % (self.unit if self.rows == 1 else 1 if self.bits == 8 else RUN) == 0

    def parts(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that stand for a weight of this shape, by their names in `QuantizedArray`."""
        *lead, out, columns = shape
        small = (
            *lead,
            1 if self.rows is None else -(-out // self.rows),
            1 if self.group_size is None else -(-columns // self.group_size),
        )
        dtype = {"e8m0": jnp.uint8, "e4m3": jnp.float8_e4m3fn}.get(self.scale_dtype, self.scale_dtype)
        parts = {
            "values": ((*lead, out, columns * self.bits // 8), ELEMENTS[self.element].dtype),
            "scales": (small, dtype),
        }
        if self.has_minimum:
            parts["minimums"] = small, dtype
        if self.has_zeros:
            parts["zeros"] = small, jnp.uint8
        if self.has_tensor_scale:
            parts["tensor_scale"] = (*lead, 1, 1), jnp.float32
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in parts.items()}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes, scales included."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts(shape).values())


_BASES = {
    "int8": Scheme("int8", "int8"),
    "int4": Scheme("int4", "int4", group_size=32, zero=8, scale_dtype="bfloat16"),
    "fp8_e4m3": Scheme("fp8_e4m3", "e4m3"),
    "fp8_e5m2": Scheme("fp8_e5m2", "e5m2"),
    "fp6": Scheme("fp6", "e3m2"),
    "nf4": Scheme("nf4", "nf4", group_size=64, scale_dtype="bfloat16"),
    "fp4": Scheme("fp4", "e2m1", group_size=32, scale_dtype="bfloat16"),
    "mxfp4": Scheme("mxfp4", "e2m1", group_size=32, scale_dtype="e8m0"),
    "nvfp4": Scheme("nvfp4", "e2m1", group_size=16, scale_dtype="e4m3", has_tensor_scale=True),
}


# What inputs are rounded to in the schemes that end in `w8a8`.
_OWN_ACTIVATIONS = {"int8": "int8", "e4m3": "e4m3"}


def _asymmetric(base: Scheme) -> Scheme:
    """The same integers with a zero point for each scale."""
    return dataclasses.replace(base, element={"int8": "uint8"}.get(base.element, base.element), zero=0, has_zeros=True)


def _scale_dtype(made: Scheme) -> str:
    """Scales of groups count among the bytes; one a row or a block does not, and is stored as it was computed."""
    return "bfloat16" if made.group_size is not None and made.rows == 1 else "float32"


def _named(made: Scheme) -> Scheme:
    """The scheme with the name that its fields give it."""
    if made.element == "e2m1":
        key = "nvfp4" if made.has_tensor_scale else "mxfp4" if made.scale_dtype == "e8m0" else "fp4"
    else:
        element = {"uint8": "int8"}.get(made.element, made.element)
        key = next(name for name, base in _BASES.items() if base.element == element)
    base = _BASES[key]
    group = "channel" if made.group_size is None else f"g{made.group_size}"
    name = key + ("_asym" if made.has_zeros else "")
    if made.rows is None and made.group_size is None:
        name += "_tensor"
    elif made.rows == made.group_size == 128:
        name += "_block"
    elif made.rows != 1:
        name += f"_rows{made.rows}_{group}"
    elif made.group_size != base.group_size:
        name += f"_{group}"
    if made.activations is not None and made.activations == _OWN_ACTIVATIONS.get(made.element):
        name += "_w8a8"
    usual = _asymmetric(base) if made.has_zeros else base
    usual = dataclasses.replace(usual, name=made.name, group_size=made.group_size, rows=made.rows)
    if key not in ("mxfp4", "nvfp4"):
        usual = dataclasses.replace(usual, scale_dtype=_scale_dtype(made))
    if name.endswith("_w8a8"):
        usual = dataclasses.replace(usual, activations=made.activations)
    for field in dataclasses.fields(Scheme):
        if (value := getattr(made, field.name)) != getattr(usual, field.name):
            name += f",{field.name}={value}"
    return dataclasses.replace(made, name=name)


def variant(base: Scheme, **changes: Any) -> Scheme:
    """A scheme with some fields changed, and the name that goes with them: the one in `SCHEMES` where there is one."""
    made = _named(dataclasses.replace(base, **changes))
    return SCHEMES[made.name] if SCHEMES.get(made.name) == made else made


def _table() -> dict[str, Scheme]:
    # The block formats of GGUF (llama.cpp, ggml-quants): 32 weights a block.
    made = [
        Scheme("q4_0", "int4", group_size=32, zero=8, scale_dtype="float16"),
        Scheme("q4_1", "int4", group_size=32, has_minimum=True, scale_dtype="float16"),
        Scheme("q8_0", "int8", group_size=32, scale_dtype="float16"),
        *_BASES.values(),
    ]
    for name in ("int8", "int4"):
        for base in (_BASES[name], _asymmetric(_BASES[name])):
            for size in (None, 32, 64, 128):
                sized = dataclasses.replace(base, group_size=size)
                made.append(_named(dataclasses.replace(sized, scale_dtype=_scale_dtype(sized))))
    for name in ("fp8_e4m3", "fp8_e5m2"):
        made.append(_named(dataclasses.replace(_BASES[name], rows=None)))
        made.append(_named(dataclasses.replace(_BASES[name], rows=128, group_size=128)))
    for name in ("int8", "fp8_e4m3"):
        base = _BASES[name]
        made.append(_named(dataclasses.replace(base, activations=_OWN_ACTIVATIONS[base.element])))
    return {one.name: one for one in made}


SCHEMES = _table()
_ALIASES = {
    "fp8": "fp8_e4m3",
    "fp8_tensor": "fp8_e4m3_tensor",
    "fp8_block": "fp8_e4m3_block",
    "fp8_w8a8": "fp8_e4m3_w8a8",
    "fp6_e3m2": "fp6",
    "int4_g32": "int4",
    "int4_asym_g32": "int4_asym",
}


def scheme(name: str | Scheme, /, **changes: Any) -> Scheme:
    """A scheme by name, or one made from it.

    Args:
      name: in `SCHEMES`; `"fp8"` is short for `"fp8_e4m3"`. A `Scheme` is given back.
      **changes: fields of `Scheme` to change, and `symmetric=False` for integers with a zero point for each scale. The
        dtype of the scales goes with the group unless it is among them.

    Returns:
      The scheme, with a name that says what it is: `scheme("int4", group_size=64)` is `SCHEMES["int4_g64"]`.

    Raises:
      ConfigError: the name or a change is unknown, or floating codes shall have zero points.
    """
    if isinstance(name, Scheme):
        base = name
    else:
        base = SCHEMES.get(_ALIASES.get(name, name))
        if base is None:
            raise ConfigError(f"scheme {name!r} is unknown; known are: {', '.join(SCHEMES)}")
    if not changes:
        return base
    symmetric = changes.pop("symmetric", base.is_symmetric)
    if unknown := changes.keys() - {field.name for field in dataclasses.fields(Scheme)[1:]}:
        raise ConfigError(f"a scheme has no {', '.join(sorted(unknown))} to choose; see dsjax.quantization.Scheme")
    if symmetric != base.is_symmetric:
        if symmetric or base.element not in ("int8", "int4"):
            raise ConfigError(f"'{base.name}' can not be made {'' if symmetric else 'a'}symmetric; int8 and int4 can")
        base = _asymmetric(base)
    made = dataclasses.replace(base, **changes)
    if "scale_dtype" not in changes and base.scale_dtype in ("float32", "bfloat16"):
        made = dataclasses.replace(made, scale_dtype=_scale_dtype(made))
    return variant(made)
