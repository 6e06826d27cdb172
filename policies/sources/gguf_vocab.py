"""The tokenizer inside a GGUF file: vocabulary, merges and special tokens as a `tokenizers.Tokenizer`."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dsjax.errors import CheckpointError
from policies.gguf_models import gguf_token_ids

_SPACE = "\u2581"  # how SentencePiece spells a space
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


# How text is cut before merging, by tokenizer.ggml.pre. ByteLevel's own pattern is GPT-2's.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_LLAMA3_SPLIT),
    "qwen2": _split(_QWEN2_SPLIT),
}


def gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """Tokenizer from the metadata of a GGUF file.

    Args:
      metadata: its key-value section.
      origin: the file, for messages.

    Raises:
      CheckpointError: there is no vocabulary, or it is of a kind that is not read.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{origin}: has no vocabulary (tokenizer.ggml.tokens); load a tokenizer.json instead")
    model = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(
            f"{origin}: tokenizer.ggml.model={model} is not read; these are: {', '.join(builders)}; load a "
            "tokenizer.json instead"
        )
    bos_id, eos_ids = gguf_token_ids(metadata)
    try:
        tokenizer = builders[model](metadata, tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except Exception as error:  # tokenizers raises plain Exceptions for a vocabulary that contradicts itself
        raise CheckpointError(f"{origin}: the vocabulary in the metadata is damaged ({error})") from error

    # Control tokens are matched whole in a text and are left out of decoded text; user-defined ones only the first.
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, kind in zip(tokens, kinds, strict=False) if kind == wanted]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen])

    # llama.cpp's defaults for files that do not say.
    begins = model == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    begin = bos_id if metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    end = eos_ids[0] if metadata.get("tokenizer.ggml.add_eos_token", False) and eos_ids else None
    ends = [(tokens[item], item) for item in (begin, end) if item is not None and item < len(tokens)]
    if ends:
        single = [*(tokens[i] for i in (begin,) if i is not None), "$A", *(tokens[i] for i in (end,) if i is not None)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=ends)
    return tokenizer


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("tokenizer.ggml.merges has a line that is not two tokens")
    return pairs


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """GPT-2's byte-level BPE with the pre-tokenizer that the file names."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer.ggml.pre={pre} is not read; these are: {', '.join(_PRE_TOKENIZERS)}; load a tokenizer.json "
            "instead"
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise CheckpointError("a byte-level vocabulary needs tokenizer.ggml.merges, which the metadata lacks")
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as that token, without merging up to it.
    tokenizer = Tokenizer(models.BPE(vocab, _merges(metadata), ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        # llama.cpp leaves this out; the model's own tokenizer has it, and was trained so.
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE: the pair that makes the token of the highest score merges first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata)
    else:
        scores, kinds = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
        ranked = [
            (score, cut, token)
            for token, score, kind in zip(tokens, scores, kinds, strict=True)
            if kind == _NORMAL
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        ranked.sort(key=lambda item: item[:2], reverse=True)
        merges = [(token[:cut], token[cut:]) for _, cut, token in ranked]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))

    # SentencePiece puts a space before every text, also before one that begins with a space, and before the text after
    # a control token.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer
