import json
import subprocess
import sys

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.errors import CheckpointError, RequestError
from dsjax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

TEXTS = [
    "Hello, world! It's a test; they'll see, we've done it, I'M HERE.",
    "Numbers: 1234567890, 3.14159, 1,000,000 and 12 34 567.",
    "naïve façade, Ærøskøbing, Straße, Ελληνικά, русский язык, العربية, עברית",
    "日本語のテキストと中文字符，한국어도 있습니다。",
    "👩‍👩‍👧‍👦 family, 🇩🇰 flag, 👍🏽 thumb, 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and ✈️",
    "combining: e\u0301 a\u0308\u0304 ก็ नमस्ते",
    "tabs\tand\n\nnewlines\r\n   and   spaces    at the end   ",
    "   leading spaces, then\u00a0no-break and \u3000 ideographic ones",
    "def f(x):\n    return x ** 2  # comment\n\n\nprint(f'{f(3)!r}')",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "\u0000\u0001 control \u200b zero width \ufeff mark",
    "",
]
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def theirs(smollm2_path):
    # As AutoTokenizer does, but without its detour through the config, which takes seconds.
    return transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.fixture(scope="module")
def trained():
    """Byte-level merges learned from the texts above, cut as GPT-2 does: numbers have merges too."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return json.loads(tokenizer.to_str())["model"]


@pytest.fixture
def write_vocabulary(tmp_path):
    def write(tokens, kinds, *, merges=None, scores=None, model="gpt2", architecture="llama", **fields):
        writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", architecture)
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        if merges is not None:
            writer.add_token_merges(merges)
        if scores is not None:
            writer.add_token_scores(scores)
        for name, value in fields.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add("tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}", value)
        # transformers wants a model's shape too before it reads a tokenizer.
        writer.add_embedding_length(8)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "vocab.gguf"

    return write


@pytest.fixture
def write_trained(write_vocabulary, trained):
    def write(pre, **fields):
        tokens = sorted(trained["vocab"], key=trained["vocab"].get)
        kinds = [3 if token.startswith("<|") else 1 for token in tokens]
        merges = [" ".join(merge) for merge in trained["merges"]]
        if pre is not None:
            fields["pre"] = pre
        return write_vocabulary(tokens, kinds, merges=merges, **({"bos_token_id": 0, "eos_token_id": 2} | fields))

    return write


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_is_transformers(smollm2, theirs, text):
    ids = smollm2.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert smollm2.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_smollm2_on_any_text(smollm2, theirs, text):
    ids = smollm2.encode(text)
    assert ids == theirs(text)["input_ids"]
    # Not always the text: this vocabulary lacks the bytes of planes that no one uses.
    assert smollm2.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat(smollm2, theirs, prompt):
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
    assert smollm2.apply_chat_template(MESSAGES, add_generation_prompt=prompt) == expected


def test_smollm2_special_tokens(smollm2):
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.vocab_size) == (1, (2,), 49152)
    assert smollm2.encode("<|im_end|>") == [2] and smollm2.decode([2]) == ""
    assert smollm2.decode([2, 10**6], skip_special_tokens=False) == "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pre", ["gpt-2", "default", None, "llama-bpe", "qwen2"])
def test_byte_level_files_are_transformers(write_trained, pre, text):
    path = write_trained(pre, add_bos_token=False)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(path)
    if (
        pre != "qwen2" or "e\u0301" not in text
    ):  # the original tokenizer composes characters; transformers does not here
        assert ours.encode(text) == theirs(text)["input_ids"]
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_pre_tokenizers_differ(write_vocabulary):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "34", "1234", "eÌ", "Ã©"]
    merges = ["1 2", "3 4", "12 34", "e Ì", "Ã ©"]
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        path = write_vocabulary(tokens, [1] * len(tokens), merges=merges, pre=pre, add_bos_token=False)
        tokenizer = load_tokenizer(path)
        pieces[pre] = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("e\u0301 1234")]
    assert pieces["gpt-2"][-2:] == ["Ġ", "1234"]
    assert pieces["smollm"][-5:] == ["Ġ", "1", "2", "3", "4"]
    assert pieces["llama-bpe"][-4:] == ["Ġ", "12", "3", "4"]
    assert pieces["qwen2"] == ["Ã©", "Ġ", "1", "2", "3", "4"]


def test_llama_bpe_takes_whole_words_first(write_vocabulary):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "bc", "abc"]
    fields = dict(merges=["b c", "a b"], add_bos_token=False)
    whole = load_tokenizer(write_vocabulary(tokens, [1] * len(tokens), pre="llama-bpe", **fields))
    assert whole.encode("abc") == [len(tokens) - 1]
    merged = load_tokenizer(write_vocabulary(tokens, [1] * len(tokens), pre="gpt-2", **fields))
    assert merged.encode("abc") == [tokens.index("a"), tokens.index("bc")]


@pytest.mark.parametrize(
    ("pre", "fields", "around"),
    [
        ("gpt-2", {}, ([], [])),
        ("llama-bpe", {}, ([0], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("gpt-2", {"add_bos_token": True}, ([0], [])),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ([0], [2])),
        ("gpt-2", {"add_eos_token": True}, ([], [2])),
    ],
)
def test_tokens_round_the_text(write_trained, pre, fields, around):
    tokenizer = load_tokenizer(write_trained(pre, **fields))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == around[0] + plain + around[1]


def test_chat_has_one_beginning(write_trained):
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = load_tokenizer(write_trained("llama-bpe", chat_template=template))
    ids = tokenizer.apply_chat_template(MESSAGES[:1])
    assert ids[0] == 0 and ids.count(0) == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "user: What is 2 + 2?"


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPM_WORDS = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "llo", "hello", "▁h", "▁hello", "▁▁", "é", "w", "▁w"]


@pytest.fixture
def sentencepiece_path(write_vocabulary):
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(SPM_WORDS)]
    scores = [0.0] * len(SPM) + [-float(i) for i in (90, 91, 92, 93, 94, 3, 1, 2, 0, 4, 5, 6, 7, 95, 96, 8)]
    return write_vocabulary(
        [*SPM, *SPM_WORDS], kinds, scores=scores, model="llama", bos_token_id=1, eos_token_id=2, unknown_token_id=0
    )


@pytest.mark.parametrize("text", ["hello hello", "hellé", "hell wo  hello", "日本 w", "hello\nhello", "x"])
def test_sentencepiece_files_are_transformers(sentencepiece_path, text):
    theirs = transformers.AutoTokenizer.from_pretrained(sentencepiece_path.parent, gguf_file=sentencepiece_path.name)
    ours = load_tokenizer(sentencepiece_path)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == [1, *ids]
    assert ours.decode([1, *ids]) == theirs.decode([1, *ids], skip_special_tokens=True) == text


def test_sentencepiece_merges_by_score(sentencepiece_path):
    # Scores say ll, then llo, then he (twice), hell, hello, and at last the space before hello.
    tokenizer = load_tokenizer(sentencepiece_path)
    ids = tokenizer.encode("hello hell", add_special_tokens=False)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["▁hello", "▁", "hell"]


def test_sentencepiece_puts_a_space_first(sentencepiece_path):
    # Also before a space, as sentencepiece itself does (transformers' own conversion does not).
    tokenizer = load_tokenizer(sentencepiece_path)
    ids = tokenizer.encode(" w", add_special_tokens=False)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["▁▁", "w"]
    assert tokenizer.decode(ids) == " w"


@pytest.mark.parametrize("style", ["template", "list", "file"])
def test_folder_is_transformers(tmp_path, trained, style):
    merges = [tuple(merge) for merge in trained["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(trained["vocab"], merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    hf.chat_template = (
        "{% for m in messages %}\n    {% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
        "{{ bos_token + m.role + '\\n' + m.content | trim + eos_token }}\n{% endfor %}{{ messages | tojson }}"
        "{% generation %}{% if add_generation_prompt %}{{ bos_token }}assistant{% endif %}{% endgeneration %}"
    )
    hf.save_pretrained(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "tokenizer.json"))
    if style != "file":
        settings_path = tmp_path / "tokenizer_config.json"
        (tmp_path / "chat_template.jinja").unlink()
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": hf.chat_template}]
        template = named if style == "list" else hf.chat_template
        settings_path.write_text(json.dumps(json.loads(settings_path.read_text()) | {"chat_template": template}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))

    ours = load_tokenizer(tmp_path)
    vocab = trained["vocab"]
    assert (ours.bos_id, ours.eos_ids) == (vocab["<|im_start|>"], (9, 2)) and ours.vocab_size == len(vocab)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == hf(text)["input_ids"]
        assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": " é <b>2</b> "}]
    for prompt in (True, False):
        expected = hf.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    with pytest.raises(RequestError, match="the chat template refuses these messages: no system"):
        ours.apply_chat_template([{"role": "system", "content": "x"}])


def test_no_chat_template(smollm2):
    with pytest.raises(RequestError, match="no chat template; pass plain text"):
        Tokenizer(smollm2.backend).apply_chat_template(MESSAGES)


def test_a_template_can_not_reach_the_host(smollm2):
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.clear() }}", "{{ broken"):
        with pytest.raises(RequestError, match="refuses these messages"):
            Tokenizer(smollm2.backend, chat_template=template).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model=bert is not read; these are: gpt2, llama; load a tokenizer.json"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre=tekken is not read; these are: default, gpt-2, smollm"),
        ({"merges": None}, "needs tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, "has a line that is not two tokens"),
        ({"merges": ["a z"]}, "vocabulary in the metadata is damaged"),
    ],
)
def test_unread_vocabularies(write_vocabulary, fields, message):
    path = write_vocabulary(["a", "b", "ab"], [1, 1, 1], **({"merges": ["a b"]} | fields))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_unread_folders(tmp_path):
    with pytest.raises(CheckpointError, match="there is no tokenizer.json; save one"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="tokenizer.json: it has no decoder"):
        load_tokenizer(tmp_path)
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"its decoder \(WordPiece\) is not read"):
        load_tokenizer(tmp_path)


def pieces_of(tokenizer, ids, **options):
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push([i]) for i in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_streams_join_to_the_text(smollm2, text):
    pieces = pieces_of(smollm2, smollm2.encode(text), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streams_hold_unfinished_characters(smollm2):
    ids = smollm2.encode("👍")
    assert len(ids) > 1
    assert pieces_of(smollm2, ids) == [*[""] * (len(ids) - 1), "👍", ""]
    assert pieces_of(smollm2, ids[:-1])[-1] == "\ufffd"
    assert pieces_of(smollm2, [*ids[:-1], *smollm2.encode("a")])[-2] == "\ufffda"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(smollm2, data):
    ids = data.draw(st.lists(st.integers(0, 49151), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    skip = data.draw(st.booleans())
    stream = StreamDecoder(smollm2, skip_special_tokens=skip)
    pieces = [stream.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole = "".join(pieces) + stream.finish()
    assert whole == smollm2.decode(ids, skip_special_tokens=skip)
    assert whole == smollm2.backend.decode(ids, skip_special_tokens=skip)


def test_sentencepiece_streams(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path)
    for text in ("hello 日本 wé", "  hello", "x"):
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.backend.decode(ids)


def test_importing_is_light():
    code = "import sys, dsjax.tokenizer; print({'torch', 'transformers', 'huggingface_hub.hf_api'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
