"""The one door to Pallas: every import of `jax.experimental.pallas`, and how a Triton kernel is called.

Pallas-Triton is deprecated since JAX 0.11 and its default backend differs between versions, so nothing else in this
project may import it: what replaces it one day is a change of this module alone.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.dispatch import current_gpu

__all__ = ["mosaic", "pl", "pltriton", "triton_call"]

# JAX says so each time it lowers a kernel; this module is where it is known and dealt with.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


def mosaic() -> Any:
    """The module of Pallas-Mosaic-GPU, imported when it is first needed.

    Raises:
      ImportError: JAX 0.10 needs `absl-py` for it and does not say so; `orbax-checkpoint` brings it.
    """
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def triton_call(
    kernel: Callable[..., None],
    *args: jax.Array,
    out_shape: Any,
    grid: Sequence[int],
    name: str,
    num_warps: int,
    num_stages: int,
    input_output_aliases: Mapping[int, int] | None = None,
    interpret: bool | None = None,
) -> Any:
    """Run a Pallas-Triton kernel over whole arrays.

    Args:
      kernel: takes a ref of each argument, then of each result; it finds its place by `pl.program_id`.
      *args: arrays; every program sees them whole.
      out_shape: `jax.ShapeDtypeStruct` of each result.
      grid: programs along up to three axes, all static.
      name: what profiles and compiled programs call it.
      num_warps: warps a program.
      num_stages: depth of software pipelining.
      input_output_aliases: arguments whose buffer a result takes over.
      interpret: simulate it with XLA operations; default where no GPU is compiled for.

    Returns:
      The results, as `out_shape` gives them.
    """
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=tuple(grid),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=dict(input_output_aliases or {}),
        interpret=current_gpu() is None if interpret is None else interpret,
        name=name,
    )
    return call(*args)
