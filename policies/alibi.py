"""Slopes of ALiBi, attention with linear biases (arXiv 2108.12409)."""

import math


def alibi_slopes(heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """What the score of each head gains a position from query to key.

    A power of two of `n` heads has the slopes `2 ** (-bias_max * i / n)` for `i` from 1 to `n`. Other numbers take
    those of the power of two below, then every second of those of the power above.

    Args:
      heads: how many.
      bias_max: the least slope is `2 ** -bias_max`.
    """
    whole = _power_below(heads)
    first = [2.0 ** (-bias_max * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-bias_max * i / (2 * whole)) for i in range(1, 2 * (heads - whole), 2)]
    return tuple(first + between)


def alibi_bias_max(slopes: tuple[float, ...]) -> int:
    """The `bias_max` of slopes, rounded to a whole number."""
    return round(-math.log2(slopes[_power_below(len(slopes)) - 1]))


def _power_below(heads: int) -> int:
    return 1 << (heads.bit_length() - 1)
