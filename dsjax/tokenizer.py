"""Text to token ids and back, chat templates, and text that streams token by token."""

import codecs
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsjax.errors import CheckpointError, RequestError
from policies.fields import token_ids
from policies.gguf_models import gguf_token_ids
from policies.sources import hub
from policies.sources.gguf import GgufFile
from policies.sources.gguf_vocab import gguf_tokenizer
from policies.sources.safetensors import read_json


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE spells each byte: itself if printable in Latin-1, else one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte


class Tokenizer:
    """A tokenizer with the special tokens and the chat template of its model.

    Args:
      backend: the `tokenizers.Tokenizer` that does the work; it must decode by bytes, as SentencePiece
        does, or by Metaspace.
      bos_id: token that begins a text, or `None`.
      eos_ids: tokens that end a generation.
      chat_template: Jinja source, or `None`.
      special_tokens: text of named tokens (`bos_token`, `eos_token`, ...) for the chat template.

    Raises:
      CheckpointError: the backend decodes in another way.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._byte_level, self.strips_first_space = _decoding(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any string; special tokens spelled out in it become those tokens.
          add_special_tokens: put the tokens round it that the model expects (a beginning-of-text token, if any).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary, which padded embeddings produce, are empty.
        """
        stream = StreamDecoder(self, skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that one token stands for; a piece of a character, for some."""
        if token not in self._bytes:
            self._bytes[token] = self._spell(token)
        return self._bytes[token]

    def _spell(self, token: int) -> bytes:
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            # A token with a character outside of the alphabet was added as plain text.
            known = all(character in _BYTE_OF for character in text)
            return bytes(_BYTE_OF[character] for character in text) if known else text.encode()
        if token not in self._added and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(byte[1])
        return text.replace("\u2581", " ").encode()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation in the model's own format.

        The template spells out every special token, so none is added to what it renders.

        Args:
          messages: dictionaries with `role` and `content`.
          add_generation_prompt: end with the opening of the assistant's turn.
          **variables: what else the template knows (`tools`, `enable_thinking`, ...).

        Raises:
          RequestError: the model has no chat template, or the template refuses these messages.
        """
        if self.chat_template is None:
            raise RequestError("this model has no chat template; pass plain text, or set tokenizer.chat_template")
        try:
            text = _compile(self.chat_template).render(
                **(self.special_tokens | {"tools": None, "documents": None} | variables),
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)


class StreamDecoder:
    """Decodes tokens as they come; the pieces joined are the text of all tokens decoded at once.

    A piece ends at a character: the bytes of an unfinished one wait for the next token. Each token costs the same
    however many came before.

    Args:
      tokenizer: whose tokens come.
      skip_special_tokens: leave control tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        data = b"".join(self._tokenizer.token_bytes(token) for token in ids if token not in self._skipped)
        return self._stripped(self._characters.decode(data))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never came to its end."""
        return self._stripped(self._characters.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not (self._strip and text):
            return text
        self._strip = False
        return text.removeprefix(" ")


def load_tokenizer(id_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      id_or_path: a hub id, a Hugging Face folder with tokenizer.json, or a GGUF file.

    Raises:
      CheckpointError: there is none, or it is damaged or of a kind that is not read.
    """
    path = hub.resolve(id_or_path)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_gguf(path: Path) -> Tokenizer:
    metadata = GgufFile(path).metadata
    backend = gguf_tokenizer(metadata, str(path))
    bos_id, eos_ids = gguf_token_ids(metadata)
    named = {"bos_token": bos_id, "eos_token": eos_ids[0] if eos_ids else None}
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={
            name: text for name, i in named.items() if i is not None and (text := backend.id_to_token(i)) is not None
        },
    )


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: there is no tokenizer.json; save one with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise CheckpointError(f"{file}: is not a tokenizer that can be read ({error})") from error
    # Some files carry the settings of a training run; transformers switches them off too.
    backend.no_truncation()
    backend.no_padding()
    settings, config, generation = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json", "generation_config.json")
    )

    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special[name] = content

    def ids(name: str) -> tuple[int, ...]:
        """The named token's id, if the vocabulary has it."""
        found = backend.token_to_id(special[name]) if name in special else None
        return () if found is None else (found,)

    ends = token_ids(generation.get("eos_token_id")) or token_ids(config.get("eos_token_id"))
    ends = tuple(dict.fromkeys(ends + ids("eos_token")))
    begins = ids("bos_token") or token_ids(config.get("bos_token_id"))

    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos_id = begins[0] if begins else None
    try:
        return Tokenizer(backend, bos_id=bos_id, eos_ids=ends, chat_template=template, special_tokens=special)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Whether tokens are spelled in the byte alphabet (else SentencePiece's way), and a first space is dropped."""
    if backend.decoder is None:
        raise CheckpointError("it has no decoder, so ids can not be turned into text")
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    kinds = {part["type"]: part for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        return False, kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds:
        return False, "Strip" in kinds
    raise CheckpointError(f"its decoder ({', '.join(kinds)}) is not read; ByteLevel, ByteFallback and Metaspace are")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a bracket."""

    tags = {"generation"}

    def parse(self, parser):
        """The statements between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: str):
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Unlike Jinja's own filter, which escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _compile(template: str):
    """A chat template in the environment that those on the hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
