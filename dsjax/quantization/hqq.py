"""Half-quadratic fit of scales and zero points: no calibration, seconds a model (HQQ, Badri and Shaji, 2023).

Errors of a group have heavy tails, so an outlier should not pull at the scale as much as a square would let it. The
error's norm of exponent 0.7 is split in two: what of the error is taken for an outlier, by a shrinkage that has a
closed form, and the scale and zero point that fit the rest best, which is a regression. These two alternate. HQQ fits
the zero point alone; the scale comes along here, at the price of one more sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_NORM = 0.7
_STEPS = 20
_BETA = 10.0  # of the penalty that ties the two halves together, for errors in units of the scale
_GROWTH = 1.01  # of it, each step


def refine(
    blocks: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    *,
    moves: bool,
    axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points whose weights `scale * (rounded(block / scale + zero) - zero)` are nearer to the blocks.

    Args:
      blocks: weights.
      scales: where to begin, one for each block; a scale of zero stays.
      zeros: where to begin, of the same shape.
      rounded: the numbers of the format that are nearest to numbers.
      moves: whether zero points may be changed.
      axes: of a block.

    Returns:
      The best of what was met, by each block's squared error, so never worse than the beginning.
    """

    def mean(x):
        return x.mean(axis=axes, keepdims=True)

    def step(index, state):
        scales, zeros, best_scales, best_zeros, best = state
        divisor = jnp.where(scales == 0, 1, scales)
        numbers = rounded(blocks / divisor + zeros)
        errors = blocks / divisor - (numbers - zeros)
        loss = mean(jnp.square(errors * scales))
        better = loss < best
        best_scales, best_zeros = (
            jnp.where(better, new, old) for new, old in ((scales, best_scales), (zeros, best_zeros))
        )
        size = jnp.abs(errors)
        threshold = jnp.maximum(size, 1e-8) ** (_NORM - 1) / (_BETA * _GROWTH**index)
        targets = blocks - jnp.sign(errors) * jnp.maximum(size - threshold, 0) * scales
        if moves:
            centred = numbers - mean(numbers)
            slope, spread = mean(centred * targets), mean(jnp.square(centred))
        else:
            slope, spread = mean((numbers - zeros) * targets), mean(jnp.square(numbers - zeros))
        new = slope / jnp.where(spread == 0, 1, spread)
        # A slope across zero would turn all codes round.
        scales = jnp.where((spread > 0) & (new * scales > 0), new, scales)
        if moves:
            zeros = jnp.where(scales == 0, zeros, mean(numbers) - mean(targets) / jnp.where(scales == 0, 1, scales))
        return scales, zeros, best_scales, best_zeros, jnp.where(better, loss, best)

    state = scales, zeros, scales, zeros, jnp.full_like(scales, jnp.inf)
    state = jax.lax.fori_loop(0, _STEPS + 1, step, state)
    return state[2], state[3]
