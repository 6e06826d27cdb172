"""What a request gives back, named as in vLLM."""

import dataclasses
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(NamedTuple):
    """Log-probability of one token at one place, under the model's own distribution."""

    logprob: float
    rank: int | None = None  # 1 for the likeliest token
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of one monotonic clock; `None` for what has not.

    Attributes:
      arrival_time: the engine took it.
      first_scheduled_time: the first step that read its prompt began.
      first_token_time: its first token was there.
      finished_time: its last token was there, that of all its sequences.
      output_tokens: length of its longest sequence.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    output_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token: from arrival, in seconds."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def e2e(self) -> float | None:
        """End-to-end latency: from arrival to the last token, in seconds."""
        return _between(self.arrival_time, self.finished_time)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, `(e2e - ttft) / (output_tokens - 1)`; `None` where there is no second.

        Seconds.
        """
        generating = _between(self.first_token_time, self.finished_time)
        return None if generating is None or self.output_tokens < 2 else generating / (self.output_tokens - 1)


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One sequence that was generated.

    Attributes:
      index: which of the request's `n` sequences.
      text: what was generated, as far as it may be shown; empty without a tokenizer.
      token_ids: of what was generated, the one that ended it included.
      cumulative_logprob: sum of `token_logprobs`.
      token_logprobs: log-probability of each token under the model's own distribution.
      logprobs: for each token those of the likeliest tokens and its own, by id; `None` if not asked for.
      finish_reason: `None` while it runs; `"stop"` after a stop token or text, `"length"` at its limit of tokens or of
        the context, `"abort"` if the caller ended it, `"error"` if something raised.
      stop_reason: the stop text or the id in `stop_token_ids` that ended it; `None` for the model's own end tokens.
      error: what was raised.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float = 0.0
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        parts = [str(self.index), _short(self.text), f"{len(self.token_ids)} tokens"]
        if self.token_ids:
            parts.append(f"logprob {self.cumulative_logprob:.2f}")
        parts.append(self.finish_reason or "running")
        parts += [_short(reason) for reason in (self.stop_reason, self.error) if reason is not None]
        return f"CompletionOutput({', '.join(parts)})"


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A request and what came of it so far.

    Attributes:
      request_id: the caller's, or the engine's own.
      prompt: the text, where there was one.
      prompt_token_ids: what the model read.
      outputs: its sequences, in the order of their index.
      finished: whether all of them have ended.
      metrics: when things happened to it.
      prompt_logprobs: for each token of the prompt those of the likeliest tokens and its own, by id, `None` for the
        first; `None` if not asked for.
      num_cached_tokens: tokens of the prompt whose keys were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    def __repr__(self) -> str:
        parts = [_short(self.request_id)]
        if self.prompt is not None:
            parts.append(_short(self.prompt))
        cached = f" ({self.num_cached_tokens} cached)" if self.num_cached_tokens else ""
        parts.append(f"{len(self.prompt_token_ids)} prompt tokens{cached}")
        if self.finished and self.metrics.e2e is not None:
            parts.append(f"finished in {self.metrics.e2e:.2f} s")
        else:
            parts.append("finished" if self.finished else "running")
        head = f"RequestOutput({', '.join(parts)}"
        return head + "".join(f",\n  {output!r}" for output in self.outputs) + ")"


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _short(value: Any, most: int = 60) -> str:
    """A `repr` of a line at most; long texts are cut before they are copied."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."
