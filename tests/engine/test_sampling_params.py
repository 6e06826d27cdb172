import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from dsjax.engine.sampling_params import SamplingParams
from dsjax.errors import RequestError

ROOM = dict(max_logprobs=5, max_stop_ids=3, max_logit_bias=2, has_tokenizer=True)


def test_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == dict(
        n=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias=None,
        seed=None,
        max_tokens=16,
        min_tokens=0,
        stop=(),
        stop_token_ids=(),
        ignore_eos=False,
        logprobs=None,
        prompt_logprobs=None,
        allowed_token_ids=None,
        logits_processor=None,
        skip_special_tokens=True,
        include_stop_str_in_output=False,
    )


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"stop": "ab"}, {"stop": ("ab",)}),
        ({"stop": ["ab", "c", "ab"]}, {"stop": ("ab", "c")}),
        ({"stop_token_ids": np.array([3, 1, 3])}, {"stop_token_ids": (3, 1)}),
        ({"allowed_token_ids": [np.int64(3)]}, {"allowed_token_ids": (3,)}),
        ({"logit_bias": {np.int32(4): np.float32(1.5), 5: -math.inf}}, {"logit_bias": {4: 1.5, 5: -math.inf}}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"temperature": 1e-6}, {"temperature": 0.0, "greedy": True}),
        ({"temperature": np.float32(0.5), "top_p": 1}, {"temperature": 0.5, "top_p": 1.0, "greedy": False}),
        ({"n": np.int64(2), "seed": 2**32 - 1}, {"n": 2, "seed": 2**32 - 1}),
        ({"max_tokens": None, "min_tokens": 100}, {"max_tokens": None}),
        ({"ignore_eos": np.True_}, {"ignore_eos": True}),
        ({"logprobs": 0}, {"logprobs": 0}),
    ],
)
def test_normal_forms(given, normal):
    params = SamplingParams(**given)
    for name, value in normal.items():
        found = getattr(params, name)
        assert found == value and type(found) is type(value)
    # What is normal stays so, wherever it is sent.
    assert dataclasses.replace(params) == copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


def test_it_keeps_its_own_copies():
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[1], stop[0] = 3.0, "b"
    assert params.logit_bias == {1: 2.0} and params.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be from 1 to 2147483647, got 0; ask for one"),
        ({"n": True}, "n must be a whole number, got True"),
        ({"n": 1.0}, "n must be a whole number, got 1.0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1; 0 takes the likeliest"),
        ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": 1e39}, "temperature must be finite"),  # infinite in float32
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": "0"}, "temperature must be a number, got '0'"),
        ({"top_p": 0}, "top_p must be from 1e-06 to 1, got 0; 1 keeps every token, and temperature=0"),
        ({"top_p": 1.1}, "top_p must be from 1e-06 to 1, got 1.1"),
        ({"top_k": -2}, "top_k must be from -1 to 2147483647, got -2; 0 or -1 keeps every token"),
        ({"top_k": 2**31}, "top_k must be from -1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        ({"presence_penalty": -2.5}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be from -2 to 2, got inf"),
        ({"repetition_penalty": 0}, "repetition_penalty must be finite and at least 1e-06, got 0; 1 is off"),
        ({"seed": -1}, r"seed must be from 0 to 4294967295, got -1; take it modulo 2\*\*32, or None"),
        ({"seed": 2**32}, "seed must be from 0"),  # jax.random.key would take it for 0
        ({"max_tokens": 0}, "max_tokens must be from 1 to 2147483647, got 0; None generates up to"),
        ({"min_tokens": -1}, "min_tokens must be from 0"),
        ({"min_tokens": 17}, "min_tokens=17 is above max_tokens=16"),
        ({"logprobs": -1}, "logprobs must be from 0 to .* None none"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be a whole number, got True"),
        ({"stop": ""}, "stop has an empty text"),
        ({"stop": ["a", 2]}, "stop must be made of texts, got 2; token ids go in stop_token_ids"),
        ({"stop": None}, r"stop must be a text or a sequence of texts, got None; \(\) sets none"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a sequence of token ids, got 5"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a sequence of token ids, got '12'"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be made of token ids.* got True"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids must be made of token ids.* got -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logit_bias": [1]}, "logit_bias must map token ids"),
        ({"logit_bias": {"1": 1}}, "logit_bias must be made of token ids.* got '1'"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] must be from -1e\+20 to 1e\+20, got nan"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\] must be .* got inf; -inf forbids"),
        ({"logit_bias": {1: None}}, r"logit_bias\[1\] must be a number, got None"),
        ({"logits_processor": 3}, "logits_processor must be a function"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"skip_special_tokens": None}, "skip_special_tokens must be True or False"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        SamplingParams(**given)


def test_stop_ids(tiny_config):
    assert SamplingParams(stop_token_ids=[7, 5]).stop_ids(tiny_config) == (5, 7)
    assert SamplingParams(stop_token_ids=[7], ignore_eos=True).stop_ids(tiny_config) == (7,)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"logprobs": 5, "prompt_logprobs": 0, "stop": "a", "stop_token_ids": [96, 5, 0]},
        {"stop_token_ids": [1, 2, 3], "ignore_eos": True, "logit_bias": {0: 1, 96: -math.inf}},
        {"allowed_token_ids": range(97), "min_tokens": 4},
        {"allowed_token_ids": [5]},  # ends at once, as was asked for
        {"allowed_token_ids": [5], "min_tokens": 4, "ignore_eos": True},
    ],
)
def test_what_fits_the_engine(tiny_config, given):
    SamplingParams(**given).check(tiny_config, **ROOM)


@pytest.mark.parametrize(
    ("given", "room", "message"),
    [
        ({"stop_token_ids": [97]}, {}, "stop_token_ids has token id 97; ids of this model are 0 to 96"),
        ({"allowed_token_ids": [1, 100]}, {}, "allowed_token_ids has token id 100"),
        ({"logit_bias": {97: 1}}, {}, "logit_bias has token id 97"),
        ({"logprobs": 6}, {}, "logprobs=6 is more than this engine reports, 5; ask for fewer, or give"),
        ({"prompt_logprobs": 98}, {"max_logprobs": 200}, "prompt_logprobs=98 is more than this engine reports, 97"),
        ({"stop_token_ids": [1, 2, 3]}, {}, r"stop_token_ids \(with the model's own end tokens\) has 4 .* room for 3"),
        ({"logit_bias": {1: 1, 2: 1, 3: 1}}, {}, "logit_bias has 3 entries; this engine has room for 2"),
        ({"stop": "a"}, {"has_tokenizer": False}, "stop needs text: give the engine a tokenizer"),
        ({"allowed_token_ids": [5], "min_tokens": 1}, {}, "no token may be drawn"),
        ({"allowed_token_ids": [1, 5], "min_tokens": 1, "logit_bias": {1: -math.inf}}, {}, "no token may be drawn"),
        (
            {"logit_bias": dict.fromkeys(range(97), -math.inf)},
            {"max_logit_bias": 97},
            "no token may be drawn",
        ),
    ],
)
def test_what_does_not(tiny_config, given, room, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        SamplingParams(**given).check(tiny_config, **(ROOM | room))
