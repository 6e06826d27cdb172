"""What may be drawn, bias, penalties and ranks, against transformers' processors, torch and numpy in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from dsjax.errors import RequestError
from dsjax.ragged.state import Sampling
from dsjax.sampling import add_bias, keep_allowed, penalize_generated, rule_out, sample, top_logprobs
from pallas_kernels.launches import read_schedule
from pallas_kernels.targets import compile_for

VOCAB = 70  # the last word of a bit mask is not full
SLOTS = 8
PROMPT = 6
NEW = 5  # room for generated tokens

NEUTRAL = Sampling(
    temperature=jnp.ones(SLOTS),
    top_k=jnp.zeros(SLOTS, jnp.int32),
    top_p=jnp.ones(SLOTS),
    min_p=jnp.zeros(SLOTS),
    repetition_penalty=jnp.ones(SLOTS),
    presence_penalty=jnp.zeros(SLOTS),
    frequency_penalty=jnp.zeros(SLOTS),
    min_tokens=jnp.zeros(SLOTS, jnp.int32),
    bias_ids=jnp.full((SLOTS, 3), -1, jnp.int32),
    bias_values=jnp.full((SLOTS, 3), 50.0),
    allowed=jnp.full((SLOTS, 3), 0xFFFFFFFF, jnp.uint32),
)


@dataclasses.dataclass
class Case:
    """A batch, some slots of which ask for much and some for nothing."""

    logits: np.ndarray
    prompt: np.ndarray
    new_tokens: list[np.ndarray]
    stop_ids: list[list[int]]
    bias: list[dict[int, float]]
    allowed: list[list[int]]
    settings: dict[str, np.ndarray]


@pytest.fixture
def case(rng) -> Case:
    logits = rng.normal(size=(SLOTS, VOCAB)).astype(np.float32)
    likely = np.argsort(-logits, axis=1)
    asks = np.arange(SLOTS) % 4 != 3
    return Case(
        logits=logits,
        # Likely tokens, so that what is done to them shows; some generated twice.
        prompt=likely[:, :PROMPT],
        new_tokens=[likely[row, 2 + rng.integers(0, 6, row % (NEW + 1))] for row in range(SLOTS)],
        stop_ids=[[int(likely[row, 0]), VOCAB - 1][: row % 3] for row in range(SLOTS)],
        # The first is a token that was seen, so it matters that the repetition penalty comes after.
        bias=[{int(likely[row, 1]): 1.0, VOCAB - 1: 2.5} if asks[row] else {} for row in range(SLOTS)],
        # One word of the mask is full in every slot.
        allowed=[sorted({*range(0, 64, 1 + asks[row]), *range(64, VOCAB), *likely[row, :4]}) for row in range(SLOTS)],
        settings={
            "temperature": np.linspace(0.5, 1.5, SLOTS),
            "top_k": np.where(asks, 12, 0),
            "top_p": np.where(asks, 0.9, 1.0),
            "min_p": np.where(asks, 0.1, 0.0),
            "repetition_penalty": np.where(asks, 1.6, 1.0),
            "presence_penalty": np.where(asks, 0.7, 0.0),
            "frequency_penalty": np.where(asks, -0.4, 0.0),
            "min_tokens": np.where(asks, 4, 0),
        },
    )


def padded(rows, width, fill):
    return jnp.asarray([[*row, *[fill] * (width - len(row))] for row in rows], jnp.int32)


def mask_of(allowed):
    words = np.zeros((SLOTS, 3 * 32), np.uint64)
    for row, ids in enumerate(allowed):
        words[row, ids] = 1
    words[:, VOCAB:] = 1
    return jnp.asarray((words.reshape(SLOTS, 3, 32) << np.arange(32, dtype=np.uint64)).sum(-1), jnp.uint32)


def bias_of(case: Case) -> tuple[jax.Array, jax.Array]:
    """Ids and values; a value without an id must do nothing."""
    values = [[*bias.values(), *[50.0] * (3 - len(bias))] for bias in case.bias]
    return padded([list(bias) for bias in case.bias], 3, -1), jnp.asarray(values, jnp.float32)


def sampling_of(case: Case) -> Sampling:
    given = {name: jnp.asarray(value, getattr(NEUTRAL, name).dtype) for name, value in case.settings.items()}
    return dataclasses.replace(
        NEUTRAL,
        **given,
        bias_ids=bias_of(case)[0],
        bias_values=bias_of(case)[1],
        allowed=mask_of(case.allowed),
    )


@jax.jit
def draw(logits, sampling, prompt, new_tokens, generated, stop_ids):
    return sample(
        logits,
        sampling,
        jax.random.split(jax.random.key(0), SLOTS),
        lambda: jnp.concatenate([prompt, new_tokens], axis=1),
        new_tokens=lambda: new_tokens,
        generated=generated,
        stop_ids=stop_ids,
        with_distribution=True,
    )


def drawn(case: Case, sampling: Sampling):
    token, logprob, used = draw(
        case.logits,
        sampling,
        jnp.asarray(case.prompt, jnp.int32),
        padded(case.new_tokens, NEW, VOCAB),
        jnp.asarray([len(tokens) for tokens in case.new_tokens]),
        padded(case.stop_ids, 2, -1),
    )
    own = jax.nn.log_softmax(case.logits)[jnp.arange(SLOTS), token]
    np.testing.assert_allclose(logprob, own, atol=1e-5, err_msg="log-probabilities are of the unmodified logits")
    return np.asarray(token), np.asarray(used)


def processed(processor: Any, scores: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """What a processor of transformers makes of one row."""
    seen = np.zeros(1, np.int64) if seen is None else seen
    return processor(torch.tensor(seen[None]), torch.tensor(scores[None]))[0].numpy()


def unchanged(seen, scores):
    """For settings that transformers' processors refuse: empty ones."""
    return scores


def suppressing(ids: list[int]) -> Any:
    return hf.SuppressTokensLogitsProcessor(ids) if ids else unchanged


def biasing(bias: dict[int, float]) -> Any:
    sequences: Any = {(token,): value for token, value in bias.items()}
    return hf.SequenceBiasLogitsProcessor(sequences) if bias else unchanged


def left_out(case: Case, row: int) -> list[int]:
    return sorted(set(range(VOCAB)) - set(case.allowed[row]))


def counted(case: Case, row: int, scores: np.ndarray) -> np.ndarray:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence, of generated tokens only."""
    counts = np.bincount(case.new_tokens[row], minlength=VOCAB)
    frequency, presence = (case.settings[f"{name}_penalty"][row] for name in ("frequency", "presence"))
    return scores - counts * frequency - (counts > 0) * presence


def expected_scores(case: Case, row: int) -> np.ndarray:
    """Logits of one slot, in float64, after transformers' processors in the order that is documented."""
    settings = {name: value[row].item() for name, value in case.settings.items()}
    first = [suppressing(left_out(case, row))]
    if case.stop_ids[row]:
        first.append(hf.MinNewTokensLengthLogitsProcessor(PROMPT, settings["min_tokens"], case.stop_ids[row]))
    first += [biasing(case.bias[row]), hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])]
    seen = np.concatenate([case.prompt[row], case.new_tokens[row]])
    return counted(case, row, processed(hf.LogitsProcessorList(first), case.logits[row].astype(np.float64), seen))


def expected_logprobs(case: Case, row: int) -> np.ndarray:
    """Of the distribution that one slot is sampled from."""
    settings = {name: value[row].item() for name, value in case.settings.items()}
    last = [hf.TemperatureLogitsWarper(settings["temperature"])]
    if settings["top_k"]:
        last += [hf.TopKLogitsWarper(settings["top_k"]), hf.TopPLogitsWarper(settings["top_p"])]
        last += [hf.MinPLogitsWarper(settings["min_p"])]
    return log_softmax(processed(hf.LogitsProcessorList(last), expected_scores(case, row)))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.tensor(scores), -1).numpy()


def test_greedy_is_the_highest_after_everything(case):
    case.settings["temperature"][:] = 0
    token, used = drawn(case, sampling_of(case))
    expected = [int(np.argmax(expected_scores(case, row))) for row in range(SLOTS)]
    np.testing.assert_array_equal(token, expected)
    assert not used.any()
    assert (token != np.argmax(case.logits, -1)).any()


def test_distribution_equals_transformers(case):
    """The probability of what is drawn tells of every token that is left, so of every step and of their order."""
    token, used = drawn(case, sampling_of(case))
    expected = [expected_logprobs(case, row)[token[row]] for row in range(SLOTS)]
    np.testing.assert_allclose(used, expected, atol=1e-5)


def test_allowed_equals_transformers(case):
    expected = [processed(suppressing(left_out(case, row)), case.logits[row]) for row in range(SLOTS)]
    np.testing.assert_array_equal(keep_allowed(jnp.asarray(case.logits), mask_of(case.allowed)), expected)


def test_ruled_out_equals_transformers(case):
    rows = np.arange(SLOTS) != 1
    expected = [
        processed(suppressing(case.stop_ids[row] if rows[row] else []), case.logits[row]) for row in range(SLOTS)
    ]
    result = rule_out(jnp.asarray(case.logits), padded(case.stop_ids, 2, -1), jnp.asarray(rows))
    np.testing.assert_array_equal(result, expected)


def test_bias_of_a_few_tokens_equals_transformers(case):
    expected = np.stack([processed(biasing(case.bias[row]), case.logits[row]) for row in range(SLOTS)])
    np.testing.assert_allclose(add_bias(jnp.asarray(case.logits), *bias_of(case)), expected, rtol=1e-6)
    last_changed = expected[:, -1] != case.logits[:, -1]
    assert last_changed.any() and not last_changed.all(), "an id of -1 must not be taken for the last token"


def test_frequency_and_presence_penalties_follow_the_formula(case):
    result = penalize_generated(
        jnp.asarray(case.logits),
        padded(case.new_tokens, NEW, VOCAB),
        *(jnp.asarray(case.settings[f"{name}_penalty"], jnp.float32) for name in ("frequency", "presence")),
    )
    expected = [counted(case, row, case.logits[row].astype(np.float64)) for row in range(SLOTS)]
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert max(np.bincount(tokens).max(initial=0) for tokens in case.new_tokens) > 1, "some token came twice"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_nobody_asks_for_changes_nothing(case, temperature):
    neutral = dataclasses.replace(NEUTRAL, temperature=jnp.full(SLOTS, temperature))
    absent = {field.name: None for field in dataclasses.fields(Sampling) if field.default is None}
    without = dataclasses.replace(neutral, repetition_penalty=None, **absent)
    for mine, theirs in zip(drawn(case, neutral), drawn(case, without), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_absent_settings_are_not_in_the_program(case):
    def never():
        raise AssertionError("traced")

    without = Sampling(NEUTRAL.temperature, NEUTRAL.top_k, NEUTRAL.top_p, NEUTRAL.min_p, repetition_penalty=None)
    keys = jax.random.split(jax.random.key(0), SLOTS)
    program = jax.make_jaxpr(lambda logits: sample(logits, without, keys, never, new_tokens=never))(case.logits)
    assert "scatter" not in str(program)


@pytest.mark.parametrize(
    "name,missing",
    [("min_tokens", "stop_ids"), ("presence_penalty", "new_tokens"), ("frequency_penalty", "new_tokens")],
)
def test_a_setting_without_its_argument_is_refused(case, name, missing):
    plain = Sampling(NEUTRAL.temperature, NEUTRAL.top_k, NEUTRAL.top_p, NEUTRAL.min_p, None)
    asks = dataclasses.replace(plain, **{name: getattr(NEUTRAL, name)})
    with pytest.raises(RequestError, match=f"{name}.*{missing}"):
        sample(jnp.asarray(case.logits), asks, jax.random.split(jax.random.key(0), SLOTS))


def test_top_logprobs_equal_torch(case):
    token = jnp.arange(SLOTS, dtype=jnp.int32) * 7
    ids, logprobs, rank = top_logprobs(jnp.asarray(case.logits), token, 5)
    values, places = torch.topk(torch.tensor(log_softmax(case.logits)), 5)
    np.testing.assert_array_equal(ids, places.numpy())
    np.testing.assert_allclose(logprobs, values.numpy(), atol=1e-5)
    order = np.argsort(-case.logits, axis=1)
    np.testing.assert_array_equal(rank, [1 + np.flatnonzero(order[row] == token[row])[0] for row in range(SLOTS)])
    with pytest.raises(RequestError, match=f"{VOCAB} tokens"):
        top_logprobs(jnp.asarray(case.logits), token, VOCAB + 1)


def test_equals_are_ranked_together_lower_ids_first():
    tied = jnp.asarray([[0.0, 2.0, 1.0, 2.0, 1.0]] * 2)
    ids, _, rank = top_logprobs(tied, jnp.asarray([3, 4]), 4)
    np.testing.assert_array_equal(ids, [[1, 3, 2, 4]] * 2)
    np.testing.assert_array_equal(rank, [1, 3])


def test_every_feature_stays_in_one_cuda_graph(gpu_compiler, case, tmp_path):
    def program(logits, sampling, keys, tokens, count):
        keys = jax.random.wrap_key_data(keys)
        return sample(
            logits, sampling, keys, lambda: tokens, new_tokens=lambda: tokens, generated=count, stop_ids=tokens
        )

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    shapes = jax.tree.map(shape, (jnp.asarray(case.logits), NEUTRAL, jnp.zeros((SLOTS, 2), jnp.uint32)))
    tokens = jax.ShapeDtypeStruct((SLOTS, NEW), jnp.int32)
    compile_for(program, *shapes, tokens, shape(NEUTRAL.min_tokens), target="h200", dump_to=tmp_path)
    schedule = read_schedule(tmp_path)
    assert (schedule.cuda_graphs, schedule.outside_graphs) == (1, [])
