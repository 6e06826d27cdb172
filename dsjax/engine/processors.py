"""Processors of logits: functions of the caller that the host runs in the middle of a step."""

from typing import Any

import numpy as np

from dsjax.engine.requests import Request, Rows
from dsjax.errors import RequestError


def process(rows: Rows, owners, contexts, q_lens, logits: np.ndarray) -> list[tuple[Request, Exception]]:
    """Let the requests of a step change their logits.

    Args:
      rows: of the host.
      owners: `int32[S]`, row of each slot, negative where there is none.
      contexts: `int32[S]`, tokens of it before this step.
      q_lens: `int32[S]`, tokens in this step.
      logits: `float32[S, V]`; changed in place.

    Returns:
      Requests whose processors raised or gave what no token can be drawn from, and the errors.
    """
    failed: dict[Request, Exception] = {}
    for slot, row in enumerate(owners.tolist()):
        sequence = rows.sequences[row] if row >= 0 else None
        if sequence is None or sequence.finish_reason or sequence.request in failed:
            continue
        request = sequence.request
        processor = request.params.logits_processor
        length = len(request.tokens) + rows.lengths[row]
        if processor is None or not q_lens[slot] or contexts[slot] + q_lens[slot] < length:
            continue  # in the last case its prompt is still being read
        known = np.concatenate([request.tokens, rows.tokens[row, : rows.lengths[row]]]).tolist()
        try:
            logits[slot] = _checked(processor(known, logits[slot].copy()), logits.shape[1:])
        except Exception as error:
            failed[request] = error
    return list(failed.items())


def _checked(logits: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What a processor gave.

    Raises:
      RequestError: no token can be drawn from it.
    """
    logits = np.asarray(logits, np.float32)
    if logits.shape != shape:
        raise RequestError(f"logits_processor gave an array of shape {list(logits.shape)}, not {list(shape)}")
    if not (logits < np.inf).all() or not np.isfinite(logits).any():
        raise RequestError("logits_processor gave NaN or inf, or -inf for every token; -inf forbids, but not all")
    return logits
