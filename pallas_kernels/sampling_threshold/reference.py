"""What the thresholds mean, written for reading: sort, sum, look up."""

import jax
import jax.numpy as jnp


def threshold(logits, top_k, top_p, min_p):
    """The oracle of every backend; see `api.sampling_threshold`."""
    vocab = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    highest = descending[:, 0]
    last = jnp.clip(jnp.where(top_k > 0, top_k, vocab), 1, vocab) - 1
    by_k = jnp.where(top_k > 0, jnp.take_along_axis(descending, last[:, None], axis=1)[:, 0], -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(jnp.where(descending >= by_k[:, None], descending, -jnp.inf)), axis=-1)
    needed = jnp.argmax(mass >= top_p[:, None], axis=-1)
    by_p = jnp.where(top_p < 1, jnp.take_along_axis(descending, needed[:, None], axis=1)[:, 0], -jnp.inf)
    return jnp.minimum(jnp.maximum(jnp.maximum(by_k, by_p), highest + jnp.log(min_p)), highest)
