import codecs
import time
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from dsjax.engine.sampling_params import SamplingParams
from dsjax.engine.text import TextStream
from dsjax.tokenizer import Tokenizer

WORDS = ["a", "b", "ab", "ba", "aab", "bab", " ", "é", "e\u0301", "👍", "👍🏽", "ก็", "日", "\n\n"]


def byte_level():
    """A vocabulary whose tokens are words and pieces of characters, and the bytes of each token."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    spelled = {}
    for word in WORDS:
        characters, raw = spell(word)[0][0], word.encode()
        assert len(characters) == len(raw)
        for start in range(len(raw)):
            for stop in range(start + 1, len(raw) + 1):
                spelled[characters[start:stop]] = raw[start:stop]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(spelled)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend), [*spelled.values(), b"<end>"]


def sentencepiece():
    raw = {f"<0x{byte:02X}>": bytes([byte]) for word in WORDS for byte in word.encode()}
    raw |= {word.replace(" ", "▁"): word.encode() for word in [*WORDS, " a", " ab"]}
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(raw)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend), [*raw.values(), b"<end>"]


VOCABULARIES = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}


def ids_of(kind, *pieces):
    raw = VOCABULARIES[kind][1]
    return [raw.index(piece.encode() if isinstance(piece, str) else piece) for piece in pieces]


def texts_of(kind, ids, skip):
    """The text that is complete after each token, from none to all, and at last with what was left over."""
    _, raw = VOCABULARIES[kind]
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), [""]
    for token in ids:
        texts.append(texts[-1] + decoder.decode(b"" if skip and token == len(raw) - 1 else raw[token]))
    texts.append(texts[-1] + decoder.decode(b"", final=True))
    return [text.removeprefix(" ") for text in texts] if kind == "sentencepiece" else texts


def first_stop(texts, params):
    """Oracle: the stop text, the shown text and the tokens at the first moment that a stop text is complete."""
    early = len(texts[min(params.min_tokens, len(texts) - 2)])
    if params.min_tokens >= len(texts) - 2:
        early = len(texts[-1])  # every token is one of the first
    for used, text in enumerate(texts):
        found = [
            (start, index, stop)
            for index, stop in enumerate(params.stop)
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > early
        ]
        if found:
            start, _, stop = min(found)
            shown = text[: start + len(stop)] if params.include_stop_str_in_output else text[:start]
            return stop, shown, min(used, len(texts) - 2)
    return None, texts[-1], len(texts) - 2


def open_end(text, stops):
    """Oracle: how many of the last characters begin some stop text and are not all of it."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)


STOPS = st.one_of(
    st.text("ab", min_size=1, max_size=6),
    st.text("ab é👍\u0301\ufffd🏽\n<en", min_size=1, max_size=4),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join),
)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(VOCABULARIES)))
def test_any_tokens_and_stops(data, kind):
    tokenizer, raw = VOCABULARIES[kind]
    often = st.sampled_from(ids_of(kind, "a", "b", "ab", "ba", "bab", "👍", b"\xf0", b"\x9f", b"\xcc", "<end>"))
    ids = data.draw(st.lists(st.one_of(often, st.integers(0, len(raw) - 1)), max_size=24))
    params = SamplingParams(
        max_tokens=None,
        stop=data.draw(st.lists(STOPS, max_size=4)),
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 3, 7])),
        skip_special_tokens=data.draw(st.booleans()),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    texts = texts_of(kind, ids, params.skip_special_tokens)
    stop, shown, used = first_stop(texts, params)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    stream, pieces = TextStream(tokenizer, params), []
    for start, end in pairwise([0, *cuts, len(ids)]):
        pieces.append(stream.push(ids[start:end]))
        if not stream.ended:
            assert stream.text == texts[end][: len(texts[end]) - open_end(texts[end], params.stop)]
            assert stream.tokens_used == end
    pieces.append(stream.push([], final=True))
    assert "".join(pieces) == stream.text == shown
    assert (stream.stopped, stream.tokens_used, stream.ended) == (stop, used, True)
    if stop is None:
        assert shown == tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        if kind == "byte_level":
            assert shown == tokenizer.backend.decode(ids, skip_special_tokens=params.skip_special_tokens)
    assert stream.push(ids, final=True) == "" and stream.text == shown and stream.tokens_used == used


def streamed(pieces, *, kind="byte_level", stop_id=False, **options):
    stream, shown = TextStream(VOCABULARIES[kind][0], SamplingParams(**options)), []
    ids = ids_of(kind, *pieces)
    for place, token in enumerate(ids):
        last = place == len(ids) - 1
        shown.append(stream.push([token], stop_id=stop_id and last, final=last))
    return shown, stream.stopped, stream.tokens_used


def test_characters_are_whole():
    thumb = "👍".encode()
    assert streamed([thumb[:1], thumb[1:], "a"]) == (["", "👍", "a"], None, 3)
    assert streamed(["a", thumb[:3]]) == (["a", "\ufffd"], None, 2)
    assert streamed([*(bytes([byte]) for byte in thumb), "b"], kind="sentencepiece")[0] == ["", "", "", "👍", "b"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop": "bab"}, (["a", "", "", ""], "bab", 4)),
        ({"stop": "bab", "include_stop_str_in_output": True}, (["a", "", "", "bab"], "bab", 4)),
        ({"stop": "bba"}, (["a", "", "ba", "", "bb"], None, 5)),  # what was held back comes when it can no longer stop
        ({"stop": ["a", "ab"]}, ([""], "a", 1)),
        ({"stop": "a", "min_tokens": 1}, (["a", "b", ""], "a", 3)),
        ({"stop": "ab", "min_tokens": 1}, (["", ""], "ab", 2)),  # it may begin in the first tokens
        ({"stop": "ab", "min_tokens": 2}, (["", "ab", "", ""], "ab", 4)),
        ({"stop": ["ab", "ba"], "min_tokens": 2}, (["", "a", ""], "ba", 3)),
    ],
)
def test_stops(options, expected):
    shown, stopped, used = streamed(["a", "b", "a", "b", "b"], **options)
    assert (shown[: len(expected[0])], stopped, used) == expected and not any(shown[len(expected[0]) :])


def test_leftmost_then_first_listed():
    assert streamed(["aab"], stop=["b", "ab", "a", "aa"])[:2] == ([""], "a")
    assert streamed(["aab"], stop=["ab", "aab", "a"])[:2] == ([""], "aab")
    assert streamed(["bab"], stop=["a", "bab"])[:2] == ([""], "bab")
    assert streamed(["b", "aab"], stop=["b a", "ab", "aab"])[:2] == (["", "b"], "aab")
    assert streamed(["b", "aab"], stop=["ab", "aa"])[:2] == (["b", ""], "aa")
    # A text that is complete ends the sequence, though an earlier one might have become complete later.
    assert streamed(["aab", "a"], stop=["aaba", "ab"]) == (["a", ""], "ab", 1)


def test_stop_ids_are_not_text():
    assert streamed(["a", "b"], stop_id=True) == (["a", ""], None, 2)
    assert streamed(["a", "b"], stop_id=True, include_stop_str_in_output=True) == (["a", "b"], None, 2)
    assert streamed(["a", "<end>"], stop_id=True, include_stop_str_in_output=True) == (["a", ""], None, 2)
    shown = streamed(["a", "<end>"], stop_id=True, include_stop_str_in_output=True, skip_special_tokens=False)[0]
    assert shown == ["a", "<end>"]
    # What was held back for a stop text, or for want of its last byte, still comes.
    assert streamed(["a", b"\xf0", "<end>"], stop="aa", stop_id=True) == (["", "", "a\ufffd"], None, 3)


def test_without_tokenizer_tokens_count():
    stream = TextStream(None, SamplingParams())
    assert (stream.push([1, 2]), stream.push([3], stop_id=True), stream.push([4])) == ("", "", "")
    assert (stream.text, stream.tokens_used, stream.ended) == ("", 3, True)


def test_cost_of_a_token_is_constant():
    a = ids_of("byte_level", "a")
    stream = TextStream(VOCABULARIES["byte_level"][0], SamplingParams(stop=["a" * 40_000 + "b", "ab"]))

    def seconds(count):
        start = time.process_time()
        for _ in range(count):
            stream.push(a)
        return time.process_time() - start

    first, _, last = seconds(10_000), seconds(80_000), seconds(10_000)
    assert stream.text == "a" * 60_000  # the rest may still begin the long one
    assert last < 5 * first
