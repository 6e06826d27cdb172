"""What the backends share about pages of one byte an element."""

import jax.numpy as jnp

# For each dtype that pages may be quantized to, how many powers of two its largest code has. The weights of the softmax
# take the scales of the values in; in float16 such small numbers would lose their bits, so the weights are made larger
# by as much: relative to the highest score less this, to base 2. Sums of weights are too, and nothing else changes.
LIFT = {jnp.dtype(jnp.int8): 7, jnp.dtype(jnp.float8_e4m3fn): 8, jnp.dtype(jnp.float8_e5m2): 15}
DTYPES = tuple(LIFT)
