"""Which formats there are, and how a checkpoint's tensors become weights; policies see those only."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dsjax.errors import CheckpointError, ConfigError
from policies.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, mxfp4, torchao
from policies.quantized.format import Format, Layout, Parts, QuantizedTensor, Tensor
from policies.sources.files import DTYPES

FORMATS: Mapping[str, Format] = {
    "gptq": gptq.FORMAT,
    "gptq_v2": gptq.FORMAT,
    "awq": awq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "fp8": fp8.FORMAT,
    "fbgemm_fp8": fp8.FORMAT,
    "bitsandbytes": bitsandbytes.FORMAT,
    "mxfp4": mxfp4.FORMAT,
    "hqq": hqq.FORMAT,
    "torchao": torchao.FORMAT,
}
T = TypeVar("T", bound=Tensor)


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A checkpoint's tensors with those of a quantized weight put together.

    Attributes:
      tensors: by the names that an unquantized checkpoint has.
      spare: those of them that a model may do without: biases that are zero.
    """

    tensors: dict[str, Any]
    spare: tuple[str, ...] = ()


def check_config(config: Any) -> None:
    """Refuse a `quantization_config` of config.json that is not read.

    Raises:
      ConfigError: names what is not, and what is.
    """
    _format(config)


def _format(config: Any) -> Format:
    if not isinstance(config, Mapping):
        raise ConfigError(f"config field quantization_config={config!r} should hold an object")
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    if method not in FORMATS:
        raise ConfigError(
            f"quantization_config.quant_method={method} is not supported; these are: {', '.join(FORMATS)}; "
            "load one of those, the unquantized checkpoint, or a GGUF file"
        )
    try:
        FORMATS[method].check(config)
    except ConfigError as error:
        raise ConfigError(f"quantization_config of quant_method={method}: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise ConfigError(
            f"quantization_config of quant_method={method}: a field has a value of the wrong kind ({error})"
        ) from error
    return FORMATS[method]


def assemble(tensors: Mapping[str, T], config: Any) -> Assembled:
    """Weights that lie in several tensors as one tensor each. Which weights are quantized is told by their tensors.

    Args:
      tensors: of a checkpoint, by name.
      config: `quantization_config` of config.json; `None` of a checkpoint that is not quantized.

    Returns:
      The tensors under the names that a plain checkpoint has, where a `QuantizedTensor` is a quantized weight. What it
      was put together from is not among them, nor are scales of activations.

    Raises:
      ConfigError: as for `check_config`.
      CheckpointError: a weight lacks one of its tensors, or they do not fit together.
    """
    if config is None:
        return Assembled(dict(tensors))
    form = _format(config)
    weights: dict[str, QuantizedTensor] = {}
    first: dict[str, str] = {}  # of the tensors that a weight is made from, the weight
    for layout in form.layouts:
        for name in tensors:
            if name.endswith(layout.mark) and name not in first:
                base = name.removesuffix(layout.mark)
                weights[base + layout.weight] = _weight(base, layout, tensors, config)
                first |= dict.fromkeys((base + suffix for suffix in layout.parts), base + layout.weight)
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in first:
            made.setdefault(first[name], weights[first[name]])
        elif not name.endswith(form.unused):
            made[name] = tensor
    return Assembled(made, _zero_biases(made) if form.bias else ())


def _weight(base: str, layout: Layout, tensors: Mapping[str, T], config: Any) -> QuantizedTensor:
    found = {suffix.lstrip("."): tensors[base + suffix] for suffix in layout.parts if base + suffix in tensors}
    parts = Parts(base + layout.weight, found)
    for part, tensor in found.items():
        if tensor.kind not in DTYPES:
            raise parts.error(
                f"its '{part}' is of dtype {tensor.kind}, which is not read; these are: {', '.join(DTYPES)}"
            )
    try:
        return layout.build(parts, config)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise parts.error(f"its tensors do not fit together ({error})") from error


def _zero_biases(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """The biases of quantized layers that are zero."""
    biases = (
        f"{name.removesuffix('weight')}bias" for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)
    )
    return tuple(name for name in biases if name in tensors and not tensors[name].read().any())
