"""What one request asks for: how tokens are drawn, when it ends, and what is reported."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import RequestError

LEAST_TEMPERATURE = 1e-5  # below it logits divided by it leave the range of float32
MOST_BIAS = 1e20  # divided by that, it is still finite

# Range of each number: lowest, highest, and what to do about a value outside of it.
_INTEGERS = {
    "n": (1, 2**31 - 1, "ask for one sequence or more"),
    "top_k": (-1, 2**31 - 1, "0 or -1 keeps every token"),
    "min_tokens": (0, 2**31 - 1, "0 sets no minimum"),
}
_OPTIONAL_INTEGERS = {
    "seed": (0, 2**32 - 1, "take it modulo 2**32, or None for one of the engine's"),
    "max_tokens": (1, 2**31 - 1, "None generates up to the context's end"),
    "logprobs": (0, 2**31 - 1, "0 reports the sampled token's alone, None none"),
    "prompt_logprobs": (0, 2**31 - 1, "0 reports the prompt token's alone, None none"),
}
_NUMBERS = {
    "temperature": (0, None, "0 takes the likeliest token"),
    "top_p": (1e-6, 1, "1 keeps every token, and temperature=0 takes the likeliest"),
    "min_p": (0, 1, "0 keeps every token"),
    "presence_penalty": (-2, 2, "0 is off"),
    "frequency_penalty": (-2, 2, "0 is off"),
    "repetition_penalty": (1e-6, None, "1 is off"),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and meanings are vLLM's.

    The order on the logits is: `allowed_token_ids` and `logits_processor`, `logit_bias`, penalties, temperature, top-k,
    top-p, min-p. Numbers of numpy are taken as Python's.

    Attributes:
      n: sequences generated for the prompt.
      temperature: divides the logits; 0 (and what is below 1e-5) takes the likeliest token.
      top_p: the likeliest tokens that together have this probability may be drawn; 1 is off.
      top_k: so many of the likeliest tokens may be drawn; 0 or -1 is off.
      min_p: tokens may be drawn whose probability is this times the highest or more; 0 is off.
      presence_penalty: taken from the logit of each token that was generated before.
      frequency_penalty: taken from it as often as the token was generated.
      repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt or generated.
      logit_bias: what is added to the logits of these token ids; `-inf` forbids one.
      seed: of the request's own random numbers, which makes its output repeatable; `None` leaves it to the engine.
      max_tokens: most tokens to generate; `None` for as many as the context holds.
      min_tokens: tokens before which nothing but `max_tokens` ends a sequence.
      stop: texts that end a sequence, of any length; see `dsjax.engine.text.TextStream`.
      stop_token_ids: tokens that end it, besides the model's own.
      ignore_eos: the model's own end tokens do not end it.
      logprobs: report the log-probabilities of so many of the likeliest tokens, and of the one drawn; `None` for none.
      prompt_logprobs: the same for each token of the prompt but the first.
      allowed_token_ids: no other token is drawn; `None` allows all.
      logits_processor: called on the host with the tokens so far (prompt and generated) and the logits, float32[V];
        returns the logits to use. It must be a pure function.
      skip_special_tokens: control tokens are not part of the text.
      include_stop_str_in_output: what ended the sequence, text or token, is part of the text.

    Raises:
      RequestError: a value of a wrong type or out of range; names the field, the value and the remedy.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processor: Callable[[list[int], np.ndarray], Any] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        given = vars(self)
        normal: dict[str, Any] = {}
        for name, limits in _INTEGERS.items():
            normal[name] = _integer(name, given[name], *limits)
        normal["top_k"] = max(normal["top_k"], 0)
        for name, limits in _OPTIONAL_INTEGERS.items():
            normal[name] = None if given[name] is None else _integer(name, given[name], *limits)
        for name, limits in _NUMBERS.items():
            normal[name] = _number(name, given[name], *limits)
        if normal["temperature"] < LEAST_TEMPERATURE:
            normal["temperature"] = 0.0
        for name in _FLAGS:
            if not isinstance(given[name], bool | np.bool_):
                raise RequestError(f"{name} must be True or False, got {given[name]!r}")
            normal[name] = bool(given[name])
        normal["stop"] = _stop_strings(self.stop)
        normal["stop_token_ids"] = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            normal["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not normal["allowed_token_ids"]:
                raise RequestError("allowed_token_ids is empty, so nothing may be drawn; None allows every token")
        normal["logit_bias"] = None if self.logit_bias is None else _biases(self.logit_bias)
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise RequestError(
                f"logits_processor must be a function of tokens and logits that returns logits, "
                f"got {self.logits_processor!r}"
            )
        if normal["max_tokens"] is not None and normal["min_tokens"] > normal["max_tokens"]:
            raise RequestError(
                f"min_tokens={normal['min_tokens']} is above max_tokens={normal['max_tokens']}; lower the one or "
                "raise the other"
            )
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one, so that nothing is random."""
        return self.temperature == 0

    def stop_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """The tokens that end a sequence of this model: its own, unless they are ignored, and `stop_token_ids`."""
        own = () if self.ignore_eos else config.eos_ids
        return tuple(dict.fromkeys((*own, *self.stop_token_ids)))

    def check(
        self,
        config: ModelConfig,
        *,
        max_logprobs: int,
        max_stop_ids: int,
        max_logit_bias: int,
        has_tokenizer: bool,
    ) -> None:
        """Check what depends on the model and on the sizes that an engine was compiled for.

        Args:
          config: of the model that is to serve the request.
          max_logprobs: most alternatives that can be reported for a token.
          max_stop_ids: room for ids of `stop_ids`.
          max_logit_bias: room for entries of `logit_bias`.
          has_tokenizer: whether the engine makes text of tokens.

        Raises:
          RequestError: token ids beyond the vocabulary, more than there is room for, stop strings without a tokenizer,
            or settings under which no token may be drawn.
        """
        named = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (),
        }
        for name, ids in named.items():
            if ids and max(ids) >= config.vocab_size:
                raise RequestError(
                    f"{name} has token id {max(ids)}; ids of this model are 0 to {config.vocab_size - 1}"
                )
        most = min(max_logprobs, config.vocab_size)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None and value > most:
                raise RequestError(
                    f"{name}={value} is more than this engine reports, {most}; ask for fewer, or give the engine a "
                    "larger max_logprobs"
                )
        stop_ids = self.stop_ids(config)
        for name, count, room in (
            ("stop_token_ids (with the model's own end tokens)", len(stop_ids), max_stop_ids),
            ("logit_bias", len(self.logit_bias or ()), max_logit_bias),
        ):
            if count > room:
                raise RequestError(f"{name} has {count} entries; this engine has room for {room}: give fewer")
        if self.stop and not has_tokenizer:
            raise RequestError("stop needs text: give the engine a tokenizer, or use stop_token_ids")
        self._check_choice(config, stop_ids)

    def _check_choice(self, config: ModelConfig, stop_ids: tuple[int, ...]) -> None:
        """Refuse settings that leave no token: all logits would be -inf, and what is drawn then has no meaning."""
        forbidden = {token for token, bias in (self.logit_bias or {}).items() if bias == -math.inf}
        if self.min_tokens:
            forbidden |= set(stop_ids)
        if self.allowed_token_ids is None:
            some_left = len(forbidden) < config.vocab_size
        else:
            some_left = not forbidden.issuperset(self.allowed_token_ids)
        if not some_left:
            raise RequestError(
                "no token may be drawn: all that allowed_token_ids allows are forbidden by logit_bias or end the "
                f"sequence before min_tokens={self.min_tokens}; allow more"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int, high: int, remedy: str) -> int:
    if not _is_integer(value):
        raise RequestError(f"{name} must be a whole number, got {value!r}; {remedy}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {value}; {remedy}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float | None, remedy: str) -> float:
    if not _is_number(value):
        raise RequestError(f"{name} must be a number, got {value!r}; {remedy}")
    highest = float(np.finfo(np.float32).max) if high is None else high
    if not low <= value <= highest:  # nor is NaN
        limits = f"finite and at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise RequestError(f"{name} must be {limits}, got {value}; {remedy}")
    return float(value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Iterable):
        raise RequestError(f"stop must be a text or a sequence of texts, got {value!r}; () sets none")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"stop must be made of texts, got {text!r}; token ids go in stop_token_ids")
        if not text:
            raise RequestError("stop has an empty text, which would end every sequence at once; leave it out")
    return tuple(dict.fromkeys(texts))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a sequence of token ids, got {value!r}")
    return tuple(dict.fromkeys(_token_id(name, token) for token in value))


def _token_id(name: str, token: Any) -> int:
    if not _is_integer(token) or token < 0:
        raise RequestError(f"{name} must be made of token ids, whole numbers of at least 0, got {token!r}")
    return int(token)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to what is added to their logits, got {value!r}")
    biases = {_token_id("logit_bias", token): bias for token, bias in value.items()}
    for token, bias in biases.items():
        if not _is_number(bias):
            raise RequestError(f"logit_bias[{token}] must be a number, got {bias!r}")
        if not (-MOST_BIAS <= bias <= MOST_BIAS or bias == -math.inf):
            raise RequestError(
                f"logit_bias[{token}] must be from {-MOST_BIAS:g} to {MOST_BIAS:g}, got {bias}; -inf forbids a token, "
                "and allowed_token_ids forces one"
            )
    return {token: float(bias) for token, bias in biases.items()}
