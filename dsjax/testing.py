"""A tiny model and a tiny tokenizer that fit each other: for tests of what you build on dsjax. Nothing is downloaded.

The model is a llama of 45,216 random parameters. It answers with nonsense, the same nonsense every time, and runs and
compiles as a large one does. The tokenizer spells any text, and cuts words, and characters of several bytes, into
several tokens.

>>> import dsjax
>>> from dsjax.testing import tiny_params, tiny_tokenizer
>>> params, tokenizer = tiny_params(), tiny_tokenizer()
>>> prompt = tokenizer.encode("once upon a time 🦊")
>>> tokenizer.decode(prompt)
'once upon a time 🦊'
>>> out = dsjax.generate(params, [prompt], max_new_tokens=4, ignore_eos=True)
>>> out.tokens.shape, int(out.lengths[0, 0])
((1, 1, 4), 4)
"""

import functools
from typing import Any

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dsjax.config import ModelConfig
from dsjax.params import Params, init
from dsjax.tokenizer import Tokenizer

_BOS, _EOS = "<|begin|>", "<|end|>"
# Each is put together from its bytes one by one, so that every beginning is a token too: `" 🙂"` also gives one of a
# space and three quarters of a character, with which ` 🙃` begins.
_WORDS = (
    *(" the", " and", " of", " to", " in", " is", " that", " with", " for", " you", " once", " time", " said"),
    *("ing", "er", "ed", "ly", "or", "tion"),
    *(" 🙂", "é", "ß", "の", "日本", "…"),
    *("  ", "\n\n", "..."),
)
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _spell(text: str) -> str:
    """A text with a character for each of its bytes, as byte-level BPE writes it."""
    ((spelled, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return spelled


@functools.cache
def _merges() -> tuple[tuple[str, str], ...]:
    """The pairs that become one token, first come first merged."""
    pairs = ((word[:end], word[end]) for word in map(_spell, _WORDS) for end in range(1, len(word)))
    return tuple(dict.fromkeys(pairs))


@functools.cache
def _vocabulary() -> dict[str, int]:
    tokens = [_BOS, _EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, _merges())]
    return {token: i for i, token in enumerate(tokens)}


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 320 tokens with a beginning, an end, and a chat template.

    Any text comes back from its tokens, and every byte has one.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=_vocabulary(), merges=list(_merges())))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_BOS, _EOS])
    bos_id, eos_id = _vocabulary()[_BOS], _vocabulary()[_EOS]
    backend.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, bos_id)])
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=(eos_id,),
        chat_template=_TEMPLATE,
        special_tokens={"bos_token": _BOS, "eos_token": _EOS},
    )


def tiny_config(**changes: Any) -> ModelConfig:
    """The configuration of a tiny llama with the vocabulary of `tiny_tokenizer`.

    Args:
      **changes: fields of `ModelConfig` that should be others.

    Raises:
      ConfigError: the changed fields do not fit each other.
    """
    vocabulary = _vocabulary()
    fields: dict[str, Any] = dict(
        model_type="llama",
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context=256,
        bos_id=vocabulary[_BOS],
        eos_ids=(vocabulary[_EOS],),
    )
    return ModelConfig(**(fields | changes))


def tiny_params(config: ModelConfig | None = None, seed: int = 0) -> Params:
    """Random float32 parameters, equal ones for equal arguments.

    Args:
      config: the architecture; `None` takes `tiny_config()`.
      seed: of the random numbers.

    Returns:
      The tree. A head of its own (`tie_embeddings=False`) is scaled so that the next token is neither certain nor
      anyone's guess.
    """
    params = init(tiny_config() if config is None else config, jax.random.key(seed))
    if "head" in params:
        params["head"]["weight"] *= 4
    return params
