"""Signature, checks and choice of backend."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

BACKENDS = ("triton", "xla", "reference")


def sampling_threshold(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    *,
    implementation: str | None = None,
) -> Float[Array, "S"]:
    """The lowest logit that may be drawn, after top-k, top-p and min-p, each over what the one before left.

    As in transformers' order of processors, and like there all of equal logits stay or go together, the likeliest
    always stay. A row with every filter off costs a Triton program nothing.

    Args:
      logits: float32, at the temperature that is sampled at; -inf for what may not be drawn.
      top_k: keep the `top_k` likeliest; 0 is off.
      top_p: keep the likeliest that together reach this probability (arXiv 1904.09751); 1 is off.
      min_p: keep what is at least `min_p` times as likely as the likeliest (arXiv 2407.01082); 0 is off.
      implementation: `"triton"`, `"xla"` or `"reference"`; `None` for the best that the platform has.

    Returns:
      A threshold a row, -inf where nothing is filtered.

    Raises:
      ValueError: logits are not float32, or the backend can not run.
    """
    if logits.dtype != "float32":
        raise ValueError(f"sampling thresholds are of float32 logits, not {logits.dtype}")
    backend = dispatch.select(__name__, BACKENDS, implementation)
    with jax.named_scope("sampling_threshold"):
        return backend.threshold(logits, top_k, top_p, min_p)
