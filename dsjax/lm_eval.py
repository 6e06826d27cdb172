"""An engine as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

    import lm_eval
    from dsjax.lm_eval import DsjaxLM

    lm_eval.simple_evaluate(model=DsjaxLM(dsjax.Engine(params, tokenizer)), tasks=["lambada_openai"])
    lm_eval.simple_evaluate(model="dsjax", model_args="pretrained=path/or/hub-id,quantize=int8", tasks=["piqa"])

What counts as context, how it is cut and what is scored follows the harness's own `HFLM`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsjax.engine import Engine, RequestOutput, SamplingParams
from dsjax.errors import RequestError
from dsjax.params import prepare_in_place
from dsjax.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"dsjax.lm_eval needs the lm-evaluation-harness ({error}): pip install 'dsjax[lm-eval]'"
    ) from error

ROUND = (
    16  # requests for each slot that are in the engine at once; their prompts' log-probabilities are held until read
)
MOST_NEW = 256  # tokens to generate where a task does not say; the harness's own number
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_OTHER = ("until", "do_sample", "use_cache", "num_beams", "num_return_sequences")


@register_model("dsjax")
class DsjaxLM(LM):
    """Answers the harness's three kinds of requests with an engine.

    Log-likelihoods are those of a prompt's own tokens (`prompt_logprobs`), under the model's own distribution.

    Args:
      engine: with a tokenizer. A text and what continues it may have `max_context - 1` tokens together.

    Raises:
      RequestError: the engine has no tokenizer, or no token begins or ends its texts.
    """

    def __init__(self, engine: Engine):
        super().__init__()
        if engine.tokenizer is None:
            raise RequestError("the harness speaks in text and the engine has no tokenizer: Engine(params, tokenizer)")
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        ends = (*self.tokenizer.eos_ids, *engine.config.eos_ids)
        begin = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else next(iter(ends), None)
        if begin is None:
            raise RequestError("no token begins or ends texts of this model; give the tokenizer a bos_id or eos_ids")
        self.prefix_token_id: int = begin
        # A prompt leaves room for one token more, and all tokens but the last are what the model reads.
        self.max_length: int = engine.sizes.max_context - 2

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None):
        """The model that `model_args` of the harness describes.

        Args:
          arg_dict: `pretrained` (a path or hub id), `dtype`, `quantize` and `fit` are for `dsjax.load`, the rest for
            `Engine`.
          additional_config: what the harness adds about batches and devices; an engine chooses those itself.
        """
        del additional_config
        import dsjax

        options = dict(arg_dict)
        if "pretrained" not in options:
            raise RequestError("model_args must say pretrained=PATH, a checkpoint that dsjax.load reads")
        path = options.pop("pretrained")
        loading = {name: options.pop(name) for name in ("dtype", "quantize", "fit") if name in options}
        params = dsjax.load(path, **loading)
        if options.get("mesh") is None:  # what is laid out for kernels is not spread over devices
            params = prepare_in_place(params)
        return cls(Engine(params, dsjax.load_tokenizer(path), **options))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None):
        """As `create_from_arg_obj`, from `"name=value,name=value"`."""
        from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would give it.

        Args:
          requests: with `args = (context, continuation)`; an empty context is the token that begins texts.
          disable_tqdm: show no bar.

        Raises:
          RequestError: a continuation is longer than the model's context.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        found = self._score(pairs, disable_tqdm)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token given as much as the context holds.

        A text is cut into pieces as long as the context. Each piece is given the token before it, but the last as many
        as fit.

        Args:
          requests: with `args = (text,)`.
          disable_tqdm: show no bar.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            for pair in self._windows(self._encode(request.args[0])):
                pairs.append(pair)
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            sums[owner] += logprob
        for request, result in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts up to, and without, the first of some texts.

        Args:
          requests: with `args = (context, settings)`; of the settings `until`, `max_gen_toks` (or one of its other
            names), `do_sample` and what `SamplingParams` has of `temperature`, `top_p`, `top_k`, `min_p`,
            `repetition_penalty` and `seed` are used. Without `do_sample` or a temperature it is greedy.
          disable_tqdm: show no bar.

        Raises:
          RequestError: a setting is not known, or as many tokens as the context holds are to be generated.
        """
        prompts, params = [], []
        for context, settings in (request.args for request in requests):
            sampling = self._sampling(settings)
            room = self.max_length - (sampling.max_tokens or 0)
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a prompt in a context of "
                    f"{self.max_length} tokens: lower it, or make the engine with a larger max_context"
                )
            prompts.append((self._encode(context) or [self.prefix_token_id])[-room:])
            params.append(sampling)
        texts = [output.outputs[0].text for output in self._run(prompts, params, disable_tqdm)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's own format, as text."""
        ids = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template that is used; the model has one at most."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name that tells tokenizers and templates apart, for the harness's cache of requests."""
        source = self.tokenizer.backend.to_str() + (self.tokenizer.chat_template or "")
        return f"dsjax-{hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def _encode(self, text: str) -> list[int]:
        """Token ids with the token that begins texts, if the model expects one, once."""
        begin = self.tokenizer.special_tokens.get("bos_token")
        return self.tokenizer.encode(text, add_special_tokens=not (begin and text.startswith(begin)))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut from those of the whole text: a space between them belongs to the continuation."""
        if not context:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
        text = context.rstrip()
        whole = self._encode(context + continuation)
        length = len(self._encode(text)) if text else 0
        return whole[:length] or [self.prefix_token_id], whole[length:]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts and continuations that cover a text; see `loglikelihood_rolling`."""
        whole = [self.prefix_token_id, *ids]
        for begin in range(1, len(whole), self.max_length):
            end = min(begin + self.max_length, len(whole))
            yield whole[max(0, end - self.max_length - 1) : begin], whole[begin:end]

    def _score(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of the second of each pair, and whether each of its tokens is the likeliest."""
        for _, continuation in pairs:
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens is longer than the context of {self.max_length}: "
                    "shorten it, or make the engine with a larger max_context"
                )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        asked = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        prompts = [(pairs[i][0] + pairs[i][1])[-self.max_length - 1 :] for i in asked]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._run(prompts, [params] * len(prompts), disable_tqdm)
        for i, output in zip(asked, outputs, strict=True):
            count = len(pairs[i][1])
            scored = zip(output.prompt_token_ids[-count:], (output.prompt_logprobs or [])[-count:], strict=True)
            entries = [(logprobs or {})[token] for token, logprobs in scored]
            found[i] = sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)
        return found

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], disable_tqdm: bool
    ) -> Iterator[RequestOutput]:
        """Outputs in order, from rounds that fill the engine."""
        size = ROUND * self.engine.sizes.slots
        for begin in range(0, len(prompts), size):
            outputs = self.engine.generate(
                prompts[begin : begin + size],
                params[begin : begin + size],
                progress=False if disable_tqdm else None,
            )
            for output in outputs:
                if (error := output.outputs[0].error) is not None:
                    raise error
                yield output

    def _sampling(self, settings: Mapping[str, Any]) -> SamplingParams:
        known = (*_LENGTHS, *_SAMPLING, *_OTHER)
        if unknown := [name for name in settings if name not in known]:
            raise RequestError(f"generation settings {', '.join(unknown)} are unknown; known are: {', '.join(known)}")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        # Control tokens are not part of the text, so those are stopped at by their ids.
        ids = {stop: self.tokenizer.backend.token_to_id(stop) for stop in stops if stop}
        special = {stop: token for stop, token in ids.items() if token in self.tokenizer.special_ids}
        options = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        if not settings.get("do_sample", options.get("temperature", 0) > 0):
            options["temperature"] = 0.0
        return SamplingParams(
            **options,
            max_tokens=int(next((settings[name] for name in _LENGTHS if settings.get(name) is not None), MOST_NEW)),
            stop=[stop for stop in ids if stop not in special],
            stop_token_ids=list(special.values()),
        )
