"""The tiny model and tokenizer for users' own tests: they fit each other, and behave as large ones do."""

import doctest

import hypothesis
import jax
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

import dsjax
from dsjax import testing
from dsjax.errors import ConfigError
from dsjax.tokenizer import StreamDecoder

MESSAGES = [{"role": "user", "content": "the fox 🦊?"}, {"role": "assistant", "content": "é"}]


@pytest.fixture(scope="module")
def tokenizer():
    return testing.tiny_tokenizer()


def test_the_example_in_the_docstring():
    assert doctest.testmod(testing).failed == 0


@hypothesis.given(text=st.text(max_size=40))
@hypothesis.example("e\u0301 👩‍👩‍👧 🇩🇰\r\n\u0000\u200b日本語   ")
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == text
    assert tokenizer.backend.decode(ids, skip_special_tokens=True) == text
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push([token]) for token in ids) + stream.finish() == text


def test_every_byte_and_every_token_is_within_reach(tokenizer):
    spelled = {tokenizer.token_bytes(token): token for token in range(2, tokenizer.vocab_size)}
    assert len(spelled) == tokenizer.vocab_size - 2
    assert {bytes([byte]) for byte in range(256)} <= spelled.keys()
    for data, token in spelled.items():
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.encode(text, add_special_tokens=False) == [token]


def test_tokens_cut_words_and_characters(tokenizer):
    pieces = [tokenizer.token_bytes(token) for token in tokenizer.encode("saying 🙃", add_special_tokens=False)]
    assert pieces == [b"s", b"a", b"y", b"ing", b" \xf0\x9f\x99", b"\x83"]


def test_the_chat_template_is_what_transformers_makes_of_it(tokenizer):
    special = tokenizer.special_tokens
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special)
    theirs.chat_template = tokenizer.chat_template
    for ending in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=ending, return_dict=False)
        assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=ending) == expected


def test_model_and_tokenizer_fit(tokenizer):
    config = testing.tiny_config()
    assert config.vocab_size == tokenizer.vocab_size
    assert (config.bos_id, config.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids)


def test_a_config_can_be_changed():
    config = testing.tiny_config(num_layers=1, tie_embeddings=True)
    assert (config.num_layers, config.hidden_size) == (1, testing.tiny_config().hidden_size)
    assert "head" not in testing.tiny_params(config)
    with pytest.raises(ConfigError, match="num_kv_heads=3"):
        testing.tiny_config(num_kv_heads=3)


def test_parameters_are_those_of_their_seed():
    first, again, other = (testing.tiny_params(seed=seed) for seed in (1, 1, 2))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    assert all(jax.tree.leaves(same))
    assert not (first["embed"]["weight"] == other["embed"]["weight"]).any()


def test_the_next_token_is_neither_certain_nor_anyones_guess(tokenizer):
    ids = tokenizer.encode("once upon a time the fox said 🦊 that 日本 is far away and so it was")
    logits = np.asarray(dsjax.logits(testing.tiny_params(), [ids])[0], np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    choices = np.exp(-(probabilities * np.log(probabilities)).sum(-1))  # a fair die of so many sides is as uncertain
    assert 4 < np.median(choices) < 40
