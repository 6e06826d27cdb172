"""The adapter for the lm-evaluation-harness, against transformers; its own base class where it is installed."""

import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import dsjax
from dsjax import testing

SIZES = dict(slots=4, token_budget=32, page_size=8, max_context=128, pages=40)  # as in tests/engine: compiled once
CONTEXT = 126
BOS = 0
TEXT = (
    "the cat sat on the mat, the dog sat on the log; and then they all went home to sleep until the next day began. "
    * 2
)


@pytest.fixture(scope="module")
def adapter():
    """The module under test, and a stand-in for what it needs of the harness where that is not installed."""
    if importlib.util.find_spec("lm_eval") is None:

        class LM:
            def __init__(self):
                self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

        modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
        modules["lm_eval.api.model"].LM = LM
        modules["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
        modules["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls
        sys.modules |= modules
        yield importlib.import_module("dsjax.lm_eval")
        for name in [*modules, "dsjax.lm_eval"]:
            del sys.modules[name]
    else:
        yield importlib.import_module("dsjax.lm_eval")


@pytest.fixture(scope="module")
def lm(adapter):
    return adapter.DsjaxLM(dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as transformers reads it."""
    path = tmp_path_factory.mktemp("tiny")
    dsjax.export_hf(testing.tiny_params(), path)
    tokenizer = testing.tiny_tokenizer()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=tokenizer.chat_template, **tokenizer.special_tokens
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def scored(model, context, continuation):
    """What transformers makes of tokens after others: the sum of their log-probabilities, and whether it is greedy."""
    ids = (context + continuation)[-CONTEXT - 1 :]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), -1)[-len(continuation) :]
    target = torch.tensor(continuation)
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


def greedy(model, ids, new):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=1,
        )
    return out[0, len(ids) :].tolist()


def test_loglikelihood(lm, theirs):
    """A space before the continuation is its own, an empty context is the first token, a long one loses its begin."""
    context = lm.tokenizer.encode("the cat")
    assert context[0] == BOS

    def encode(text):
        return lm.tokenizer.encode(text, add_special_tokens=False)

    likeliest = lm.tokenizer.decode(greedy(theirs, context, 2))
    asked = [
        ("the cat", " sat on", context, encode(" sat on")),
        ("the cat ", "sat on", context, encode(" sat on")),
        ("<|begin|>the cat", " sat on", context, encode(" sat on")),
        ("the cat", likeliest, context, encode(likeliest)),
        ("", "the dog", [BOS], encode("the dog")),
        ("", "<|begin|>the dog", [BOS], encode("the dog")),
        (TEXT.strip(), " and more", encode(TEXT.strip()), encode(" and more")),
    ]
    assert len(asked[-1][2]) > CONTEXT
    found = lm.loglikelihood(requests(*(each[:2] for each in asked)), disable_tqdm=True)
    for (_, _, before, after), (logprob, is_greedy) in zip(asked, found, strict=True):
        expected, expected_greedy = scored(theirs, before, after)
        np.testing.assert_allclose(logprob, expected, rtol=1e-4)
        assert is_greedy == expected_greedy
    assert [is_greedy for _, is_greedy in found] == [False, False, False, True, False, False, False]
    with pytest.raises(dsjax.RequestError, match="longer than the context of 126"):
        lm.loglikelihood(requests(("the", TEXT)), disable_tqdm=True)


@pytest.mark.parametrize("length", [1, CONTEXT, CONTEXT + 1, 2 * CONTEXT + 7])
def test_loglikelihood_rolling(length, lm, theirs):
    """Each token is scored once; the last window has as much before it as fits."""
    text = ("abcdefghij" * 30)[: length - 1]
    ids = lm.tokenizer.encode(text)
    assert len(ids) == length
    whole, expected = [BOS, *ids], 0.0
    for begin in range(0, length, CONTEXT):
        end = min(begin + CONTEXT, length)
        expected += scored(theirs, whole[max(0, end - CONTEXT) : begin + 1], ids[begin:end])[0]
    (found,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_generate_until(lm, theirs):
    """Ends before the first of the texts, at a control token, or at the limit; in the order of the requests."""
    prompts = ["the cat", "on the log", TEXT.strip()]
    said = []
    for prompt, new in zip(prompts, (12, 7, 12), strict=True):
        ids = lm.tokenizer.encode(prompt)[-(CONTEXT - new) :]
        said.append(lm.tokenizer.decode(greedy(theirs, ids, new)))
    stop = said[0][4:6]
    settings = [
        {"until": [stop, "not there"], "max_gen_toks": 12},
        {"until": "not there", "max_new_tokens": 7, "temperature": 0.0},
        {"until": ["", "<|begin|>"], "max_gen_toks": 12, "do_sample": False},
    ]
    found = lm.generate_until(requests(*zip(prompts, settings, strict=True)), disable_tqdm=True)
    assert found == [said[0].split(stop)[0], *said[1:]]
    with pytest.raises(dsjax.RequestError, match="beam_width are unknown"):
        lm.generate_until(requests(("a", {"beam_width": 3})), disable_tqdm=True)
    with pytest.raises(dsjax.RequestError, match="leaves no room"):
        lm.generate_until(requests(("a", {"max_gen_toks": CONTEXT})), disable_tqdm=True)


def test_control_tokens_end_an_answer(lm):
    """They are not part of the text, so no text could be found."""
    params = lm._sampling({"until": ["<|end|>", "\n\n", "<|begin|>"], "do_sample": True, "temperature": 0.7})
    assert params.stop == ("\n\n",) and params.stop_token_ids == (1, 0) and params.temperature == 0.7


def test_chat(lm, folder):
    messages = [{"role": "user", "content": "the cat"}]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = lm.apply_chat_template(messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert lm._encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert lm.chat_template(True) == tokenizer.chat_template and lm.chat_template() is None
    assert lm.tokenizer_name.startswith("dsjax-")


def test_made_from_arguments(adapter, lm, folder, monkeypatch):
    """Loading has its options, the engine the rest; what the harness says about batches is the engine's to choose."""
    made = []
    monkeypatch.setattr(adapter, "Engine", lambda *args, **options: made.append((args, options)) or lm.engine)
    monkeypatch.setattr(dsjax, "load_tokenizer", lambda path: path)
    arguments = {"pretrained": str(folder), "dtype": "bfloat16", "slots": 2, "max_context": 32}
    adapter.DsjaxLM.create_from_arg_obj(arguments, {"batch_size": 1, "device": None})
    (((params, path), options),) = made
    assert params["embed"]["weight"].dtype == "bfloat16" and path == str(folder)
    assert options == {"slots": 2, "max_context": 32}
    with pytest.raises(dsjax.RequestError, match="pretrained=PATH"):
        adapter.DsjaxLM.create_from_arg_obj({})


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the lm-evaluation-harness is not installed")
def test_is_the_harness_own_model(lm, theirs, folder):
    """The harness' model over transformers, asked the same."""
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    assert get_model("dsjax") is type(lm)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    other = HFLM(theirs, tokenizer=tokenizer, max_length=CONTEXT, device="cpu", batch_size=1)
    pairs = requests(("the cat", " sat"), ("", "on"), (TEXT + " ", "at home"))
    for mine, expected in zip(
        lm.loglikelihood(pairs, disable_tqdm=True), other.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        np.testing.assert_allclose(mine[0], expected[0], rtol=1e-4)
        assert mine[1] == expected[1]
    texts = requests((TEXT,), (TEXT * 3,))
    np.testing.assert_allclose(
        lm.loglikelihood_rolling(texts, disable_tqdm=True),
        other.loglikelihood_rolling(texts, disable_tqdm=True),
        rtol=1e-4,
    )
    asked = requests(("the cat", {"until": ["e"], "max_gen_toks": 9}), (TEXT, {"until": ["t", "a"], "max_gen_toks": 9}))
    assert lm.generate_until(asked, disable_tqdm=True) == other.generate_until(asked, disable_tqdm=True)


def test_missing_harness_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "dsjax.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'dsjax\[lm-eval\]'"):
        importlib.import_module("dsjax.lm_eval")
