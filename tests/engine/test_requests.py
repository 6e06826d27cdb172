"""Requests: what may be asked, in which forms, and every field of the answer, against a loop over dense logits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax import SamplingParams, testing
from dsjax.errors import QueueFullError, RequestError

SIZES = dict(slots=4, token_budget=32, page_size=8, max_context=128, pages=40)
EOS = 1
STOPS = (38, 155, 307)
MESSAGES = [{"role": "user", "content": "once upon a time 🦊"}]


@pytest.fixture(scope="module")
def engine():
    return dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES)


@pytest.fixture(scope="module")
def dense(engine):
    """Logits at all places of a text, float64, always by the same program."""

    def logits(tokens):
        padded = np.zeros((1, SIZES["max_context"]), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(dsjax.logits(engine.params, padded, np.array([len(tokens)])), np.float64)[0, : len(tokens)]

    return logits


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_prompts(rng, *lengths):
    return [rng.integers(2, 320, length).tolist() for length in lengths]


def greedy(count, **more):
    return SamplingParams(**dict(temperature=0, max_tokens=count, ignore_eos=True) | more)


def test_prompts_in_all_forms(engine):
    tokenizer = engine.tokenizer
    text = "once upon a time 🦊"
    ids, chat = tokenizer.encode(text), tokenizer.apply_chat_template(MESSAGES)
    single = [
        (text, ids),
        (ids, ids),
        (tuple(ids), ids),
        (np.array(ids), ids),
        (np.array(ids, np.uint8 if max(ids) < 256 else np.int64), ids),
        (jnp.array(ids), ids),
        ([np.int64(token) for token in ids], ids),
        (MESSAGES, chat),
        ("", [tokenizer.bos_id]),
    ]
    expected = {}
    for prompt, tokens in single:
        (output,) = engine.generate(prompt, greedy(4))
        assert output.prompt_token_ids == tokens
        assert output.prompt == (prompt if isinstance(prompt, str) else None)
        assert expected.setdefault(tuple(tokens), output.outputs[0].token_ids) == output.outputs[0].token_ids
    together = engine.generate([prompt for prompt, _ in single], greedy(4))
    assert [output.outputs[0].token_ids for output in together] == [expected[tuple(tokens)] for _, tokens in single]
    both = engine.generate(np.array([ids[:5], ids[1:6]]), [greedy(2), greedy(3)])
    assert [len(output.outputs[0].token_ids) for output in both] == [2, 3]
    assert [output.prompt_token_ids for output in both] == [ids[:5], ids[1:6]]


WRONG_PROMPTS = {
    "empty": ([[]], "at least one token"),
    "nothing": ([], "no prompts"),
    "fractions": ([[1.5, 2]], "text, chat messages, or at least one token"),
    "truths": ([np.array([True, False])], "text, chat messages, or at least one token"),
    "nested": ([[[1, 2], [3]]], "text, chat messages, or at least one token"),
    "mixed": ([[1, "a"]], "text, chat messages, or at least one token"),
    "number": (5, "a list of these, got 5"),
    "none": (None, "a list of these, got None"),
    "one message": ({"role": "user", "content": ""}, "a list of these"),
    "a number among texts": (["a", 5], "text, chat messages, or at least one token"),
    "beyond the vocabulary": ([[3, 320]], "token id 320 at position 1; ids of this model are 0 to 319"),
    "negative": ([[-1]], "token id -1 at position 0"),
    "huge": ([[2**70]], "text, chat messages, or at least one token"),
    "too long": ([[3] * 128], "128 tokens leaves no room in a context of 128: shorten it"),
    "second": (["fine", [320]], "token id 320"),
    "messages": ([[{"role": "user"}, 5]], "text, chat messages, or at least one token"),
}


@pytest.mark.parametrize("case", WRONG_PROMPTS)
def test_prompts_that_can_not_be_served(engine, case):
    prompt, message = WRONG_PROMPTS[case]
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt)
    assert not engine.has_unfinished_requests()


WRONG_PARAMS = {
    "too few": ([SamplingParams()], "1 sampling params for 2 prompts"),
    "no params": ([None, None], "SamplingParams"),
    "a dictionary": ({"n": 2}, "SamplingParams"),
    "n": (SamplingParams(n=9), "n=9 samples are more than 8"),
    "logprobs": (SamplingParams(logprobs=21), "logprobs=21 is more than this engine reports, 20"),
    "prompt_logprobs": (SamplingParams(prompt_logprobs=21), "prompt_logprobs=21"),
    "stop ids": (SamplingParams(stop_token_ids=range(2, 40)), "stop_token_ids .* room for"),
    "unknown stop id": (SamplingParams(stop_token_ids=[320]), "stop_token_ids has token id 320"),
    "bias": (SamplingParams(logit_bias={320: 1.0}), "logit_bias has token id 320"),
    "allowed": (SamplingParams(allowed_token_ids=[5, 320]), "allowed_token_ids has token id 320"),
    "nothing left": (SamplingParams(allowed_token_ids=[EOS], min_tokens=1), "no token may be drawn"),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_settings_that_can_not_be_served(engine, case):
    params, message = WRONG_PARAMS[case]
    with pytest.raises(RequestError, match=message):
        engine.generate([[3], [4]], params)
    assert not engine.has_unfinished_requests()


def test_text_needs_a_tokenizer(engine):
    without = dsjax.Engine(engine.params, **SIZES)
    for prompt in ("text", MESSAGES):
        with pytest.raises(RequestError, match="no tokenizer"):
            without.generate(prompt)
    with pytest.raises(RequestError, match="stop needs text"):
        without.generate([3], SamplingParams(stop="x"))
    (output,) = without.generate([3], greedy(5, logprobs=1))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 5
    assert {entry.decoded_token for entry in output.outputs[0].logprobs[0].values()} == {None}


def test_samples_are_those_of_generate(engine, rng):
    """Tokens, log-probabilities and why they ended."""
    prompts = random_prompts(rng, 3, 40, 17, 8, 1, 60)
    settings = [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.3, top_p=0.8),
        dict(temperature=1.0, min_p=0.1, repetition_penalty=1.3),
        dict(temperature=0.0),
        dict(temperature=1.0, top_k=20, top_p=0.9),
    ]
    limits = [20, 3, 20, 11, 20, 1]
    params = [
        SamplingParams(n=2, seed=7 + i, max_tokens=limit, stop_token_ids=STOPS, **each)
        for i, (each, limit) in enumerate(zip(settings, limits, strict=True))
    ]
    columns = {name: [getattr(each, name) for each in params] for name in ("temperature", "top_k", "top_p", "min_p")}
    reference = dsjax.generate(
        engine.params,
        prompts,
        n=2,
        max_new_tokens=20,
        limits=limits,
        key=jnp.stack([jax.random.key(7 + i) for i in range(len(prompts))]),
        stop_ids=STOPS,
        repetition_penalty=[each.repetition_penalty for each in params],
        **columns,
    )
    outputs = engine.generate(prompts, params)
    reasons = set()
    for b, i in itertools.product(range(len(prompts)), range(2)):
        sample, length = outputs[b].outputs[i], int(reference.lengths[b, i])
        assert sample.index == i and sample.error is None
        assert sample.token_ids == reference.tokens[b, i, :length].tolist()
        np.testing.assert_allclose(sample.token_logprobs, reference.logprobs[b, i, :length], atol=1e-4)
        stopped = reference.finish[b, i] == dsjax.Finish.STOP
        last = sample.token_ids[-1]
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert sample.stop_reason == (last if stopped and last != EOS else None)
        text = engine.tokenizer.decode(sample.token_ids[:-1] if stopped else sample.token_ids)
        assert sample.text == text
        reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


def expected_tokens(dense, prompt, params):
    """Greedy decoding in numpy, by the definitions of vLLM."""
    tokens = []
    while len(tokens) < params.max_tokens:
        logits = dense([*prompt, *tokens])[-1]
        forbidden = np.zeros(len(logits), bool)
        if params.allowed_token_ids is not None:
            forbidden[:] = True
            forbidden[list(params.allowed_token_ids)] = False
        ends = [*([] if params.ignore_eos else [EOS]), *params.stop_token_ids]
        if len(tokens) < params.min_tokens:
            forbidden[ends] = True
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        counts = np.bincount(tokens, minlength=len(logits))
        seen = (counts > 0) | np.isin(np.arange(len(logits)), prompt)
        factor = np.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits = np.where(seen, logits * factor, logits)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        token = int(np.where(forbidden, -np.inf, logits).argmax())
        tokens.append(token)
        if token in ends:
            break
    return tokens


def test_penalties_and_constraints_against_numpy(engine, dense, rng):
    settings = [
        dict(),
        dict(repetition_penalty=1.8),
        dict(presence_penalty=1.5),
        dict(frequency_penalty=0.9),
        dict(presence_penalty=-1.0, frequency_penalty=-0.5),
        dict(logit_bias={7: 100.0, 9: 3.0}, frequency_penalty=2.0),
        dict(logit_bias={int(token): float("-inf") for token in rng.permutation(320)[:200]}),
        dict(allowed_token_ids=[40, 41, 42, 300]),
        dict(allowed_token_ids=[EOS, 7, 8], min_tokens=6),
        dict(logit_bias={EOS: 50.0}, min_tokens=4),
        dict(logit_bias={EOS: 50.0}, min_tokens=4, ignore_eos=True),
        dict(logit_bias={9: 50.0}, stop_token_ids=[9], min_tokens=3),
        dict(
            allowed_token_ids=range(20, 200),
            logit_bias={25: 2.0, 30: -3.0},
            repetition_penalty=0.8,
            presence_penalty=0.7,
            frequency_penalty=0.3,
            min_tokens=5,
            stop_token_ids=range(100, 110),
        ),
    ]
    prompts = random_prompts(rng, *rng.integers(1, 50, len(settings)))
    params = [SamplingParams(**dict(temperature=0, max_tokens=14) | each) for each in settings]
    plain = set()
    for prompt, each, output in zip(prompts, params, engine.generate(prompts, params), strict=True):
        (sample,) = output.outputs
        assert sample.token_ids == expected_tokens(dense, prompt, each), each
        table = log_softmax(dense([*prompt, *sample.token_ids]))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(sample.token_logprobs, table[np.arange(len(table)), sample.token_ids], atol=1e-4)
        plain.add(sample.token_ids == expected_tokens(dense, prompt, greedy(14)))
    assert False in plain
    # Rows that had constraints have none any more.
    prompts = random_prompts(rng, *[9] * 8)
    for prompt, output in zip(prompts, engine.generate(prompts, greedy(6)), strict=True):
        assert output.outputs[0].token_ids == expected_tokens(dense, prompt, greedy(6))


def check(output, params, dense):
    prompt = output.prompt_token_ids
    for sample in output.outputs:
        tokens = sample.token_ids
        table = log_softmax(dense([*prompt, *tokens]))[len(prompt) - 1 : -1]
        own = table[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(sample.token_logprobs, own, atol=1e-4)
        assert math.isclose(sample.cumulative_logprob, own.sum(), abs_tol=1e-3)
        check_entries(sample.logprobs, params.logprobs, tokens, table)
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs[0] is None
        table = log_softmax(dense(prompt))[:-1]
        check_entries(output.prompt_logprobs[1:], params.prompt_logprobs, prompt[1:], table)


def check_entries(entries, count, tokens, table):
    if count is None:
        assert entries is None
        return
    assert len(entries) == len(tokens)
    for entry, token, row in zip(entries, tokens, table, strict=True):
        likeliest = np.argsort(-row)[:count].tolist()
        assert list(entry) == [token, *(one for one in likeliest if one != token)]
        for one, found in entry.items():
            assert found.rank == 1 + (row > row[one]).sum()
            assert math.isclose(found.logprob, row[one], abs_tol=1e-4)
            assert isinstance(found.decoded_token, str)


def test_logprobs_and_ranks(engine, dense, rng):
    """Fresh, out of the prefix cache, and while sequences are put back for want of pages."""
    prompts = random_prompts(rng, 1, 40, 33, 70)
    asked = [
        SamplingParams(max_tokens=8, seed=1, logprobs=0, prompt_logprobs=0),
        SamplingParams(max_tokens=8, seed=2, logprobs=5, prompt_logprobs=3, n=2),
        SamplingParams(max_tokens=8, seed=3, logprobs=20),
        SamplingParams(max_tokens=8, seed=4, temperature=0, prompt_logprobs=20, repetition_penalty=1.5),
    ]
    for _ in range(2):
        for output, params in zip(engine.generate(prompts, asked), asked, strict=True):
            check(output, params, dense)
    before = engine.stats()
    prompts = random_prompts(rng, 20, 50, 7, 30, 40)
    asked = [greedy(128 - len(prompt) - 10, logprobs=2, prompt_logprobs=1) for prompt in prompts]
    for output, params in zip(engine.generate(prompts, asked), asked, strict=True):
        check(output, params, dense)
    assert engine.stats()["preemptions"] > before["preemptions"]
    assert engine.free_blocks == SIZES["pages"]


def test_processors_leave_log_probabilities_as_they_are(engine, dense, rng):
    """Those of the request itself, and of prompts that are read beside it."""

    def forbid(tokens, logits):
        return np.where(np.arange(len(logits)) % 7 == len(tokens) % 7, logits, -np.inf)

    prompts = random_prompts(rng, 12, 50, 9)
    asked = [
        greedy(9, logits_processor=forbid, logprobs=3, prompt_logprobs=2),
        greedy(5, prompt_logprobs=4, logprobs=1),
        greedy(30, logprobs=2),
    ]
    outputs = engine.generate(prompts, asked)
    for output, params in zip(outputs, asked, strict=True):
        check(output, params, dense)
    forced = outputs[0].outputs[0]
    assert [token % 7 for token in forced.token_ids] == [(12 + i) % 7 for i in range(9)]
    assert any(entry[token].rank > 3 for entry, token in zip(forced.logprobs, forced.token_ids, strict=True))


def test_what_ends_a_sequence(engine):
    forced = {EOS: 1e4}
    stop, comma = engine.tokenizer.encode(" the", add_special_tokens=False)[0], 13
    asked = {
        "end": SamplingParams(logit_bias=forced, min_tokens=3),
        "ignored": SamplingParams(logit_bias=forced, ignore_eos=True, max_tokens=5),
        "own": SamplingParams(logit_bias={stop: 1e4}, stop_token_ids=[comma, stop]),
        "shown": SamplingParams(logit_bias={stop: 1e4}, stop_token_ids=[stop], include_stop_str_in_output=True),
        "text": SamplingParams(logit_bias={stop: 1e4}, stop=["e t", "nothing"], logprobs=1),
        "kept": SamplingParams(logit_bias={stop: 1e4}, stop="e t", include_stop_str_in_output=True),
        "late": SamplingParams(logit_bias={stop: 1e4}, stop="e t", min_tokens=4),
        "never": SamplingParams(logit_bias={stop: 1e4}, stop="nothing", max_tokens=3),
        "both": SamplingParams(logit_bias=forced, stop="x"),
    }
    outputs = dict(zip(asked, engine.generate([[3]] * len(asked), list(asked.values())), strict=True))
    found = {
        name: (o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].stop_reason)
        for name, o in outputs.items()
    }
    texts = {name: output.outputs[0].text for name, output in outputs.items()}
    assert found["end"][0][3:] == [EOS] and found["end"][1:] == ("stop", None)
    assert found["ignored"] == ([EOS] * 5, "length", None) and texts["ignored"] == ""
    assert found["own"] == ([stop], "stop", stop) and texts["own"] == ""
    assert found["shown"] == ([stop], "stop", stop) and texts["shown"] == " the"
    assert found["text"] == ([stop] * 2, "stop", "e t") and texts["text"] == " th"
    assert len(outputs["text"].outputs[0].logprobs) == len(outputs["text"].outputs[0].token_logprobs) == 2
    assert found["kept"] == ([stop] * 2, "stop", "e t") and texts["kept"] == " the t"
    assert found["late"][0] == [stop] * 5 and texts["late"].startswith(" th")
    assert found["never"] == ([stop] * 3, "length", None) and texts["never"] == " the the the"
    assert found["both"] == ([EOS], "stop", None)


def test_as_many_tokens_as_the_context_holds(engine, rng):
    prompts = random_prompts(rng, 1, 50, 127)
    for prompt, output in zip(prompts, engine.generate(prompts, greedy(None)), strict=True):
        (sample,) = output.outputs
        assert len(sample.token_ids) == 128 - len(prompt) and sample.finish_reason == "length"
    (output,) = engine.generate([[3] * 120], greedy(1000))
    assert len(output.outputs[0].token_ids) == 8


def test_fields_of_an_output(engine):
    outputs = engine.generate(["once", "upon"], SamplingParams(n=2, max_tokens=6, seed=0, ignore_eos=True))
    assert len({output.request_id for output in outputs}) == 2
    for output in outputs:
        metrics = output.metrics
        assert output.finished and all(sample.finished for sample in output.outputs)
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
        assert 0 < metrics.ttft < metrics.e2e and metrics.output_tokens == 6
        assert math.isclose(metrics.tpot, (metrics.e2e - metrics.ttft) / 5)


def test_a_queue_that_is_full(engine, monkeypatch):
    monkeypatch.setattr(engine, "max_waiting", 2)
    with pytest.raises(QueueFullError, match="0 requests wait and max_waiting=2"):
        engine.generate([[3]] * 3, greedy(1))
    names = [engine.add_request([3], greedy(2)) for _ in range(2)]
    for refused in (lambda: engine.add_request([4], request_id="late"), lambda: engine.stream([4])):
        with pytest.raises(QueueFullError, match="2 requests wait"):
            refused()
    ended = []
    while engine.has_unfinished_requests():
        ended += engine.step()
    assert sorted(output.request_id for output in ended) == sorted(names)
    assert engine.add_request([4], greedy(1), request_id="late") == "late"
    engine.abort("late")
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "abort"


def test_requests_by_name(engine):
    name = engine.add_request("once upon", greedy(30), request_id="mine")
    with pytest.raises(RequestError, match="'mine' is running"):
        engine.add_request([3], request_id="mine")
    with pytest.raises(RequestError, match="no request 'other'"):
        engine.abort("other")
    seen = [[]]
    while engine.has_unfinished_requests():
        for output in engine.step(partial=True):
            assert output.request_id == name
            tokens = output.outputs[0].token_ids
            assert tokens[: len(seen[-1])] == seen[-1]
            assert (
                output.outputs[0].text == "" or not tokens or output.outputs[0].text in engine.tokenizer.decode(tokens)
            )
            seen.append(tokens)
    (whole,) = engine.generate("once upon", greedy(30))
    assert seen[-1] == whole.outputs[0].token_ids and len({len(tokens) for tokens in seen}) > 10


def test_priorities(engine):
    """Served in order of priority, and of arrival within one; more requests than rows."""
    priorities = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1, 0, 0, 1, 2]
    names = {engine.add_request([3 + i], greedy(9), priority=p): (p, i) for i, p in enumerate(priorities)}
    ended = []
    while engine.has_unfinished_requests():
        ended += engine.step()
    ended.sort(key=lambda output: (output.metrics.first_token_time, names[output.request_id]))
    assert [names[output.request_id] for output in ended] == sorted(names.values())
