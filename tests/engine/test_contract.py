"""Sequences that the caller drives, against a small model of the contract, and beside the engine's own requests."""

import math
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import dsjax
from dsjax import EngineError, RequestError, SamplingParams, SchedulingError, SchedulingResult
from dsjax.ragged.state import FREE
from dsjax.testing import tiny_params, tiny_tokenizer

SLOTS, BUDGET, PAGE, PAGES, CONTEXT = 4, 16, 4, 20, 47
VOCAB = 320
UIDS = (0, 1, 7, 8, 10**12, -3)


def make_engine(params):
    return dsjax.Engine(
        params,
        tiny_tokenizer(),
        slots=SLOTS,
        token_budget=BUDGET,
        page_size=PAGE,
        pages=PAGES,
        max_context=CONTEXT,
        steps_per_sync=2,
    )


@pytest.fixture(scope="module")
def params():
    return tiny_params()


@pytest.fixture(scope="module")
def shared(params):
    """The engine and the true logits of a text; see `engine`."""
    logits = jax.jit(dsjax.logits)

    def expected(text, count):
        padded = np.zeros((1, CONTEXT + 1), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(logits(params, padded))[0, len(text) - count : len(text)]

    made = make_engine(params)
    made.warm_up()
    return made, expected


@pytest.fixture
def engine(shared):
    """The module's engine, empty before and after."""
    engine, _ = shared
    yield engine
    for uid in list(engine._core.held.by_uid):
        engine.flush(uid)
    assert engine.free_blocks == PAGES
    assert not np.asarray(engine._core.state.table.ref_counts).any()
    assert (np.asarray(engine._core.state.slots.sequence) == FREE).all()


class Model:
    """The contract on paper: what each sequence has seen, and nothing else."""

    def __init__(self):
        self.texts: dict[int, list[int]] = {}

    def pages(self, uid):
        return math.ceil(len(self.texts.get(uid, [])) / PAGE)

    @property
    def free(self):
        return PAGES - sum(map(self.pages, self.texts))

    def can_schedule(self, uids, lengths):
        seen = [len(self.texts.get(uid, [])) for uid in uids]
        new_pages = sum(
            math.ceil((before + length) / PAGE) - self.pages(uid)
            for uid, before, length in zip(uids, seen, lengths, strict=True)
        )
        if len(uids) > SLOTS:
            return SchedulingResult.BatchSequenceLimitExceeded
        if len(set(uids) | set(self.texts)) > SLOTS:
            return SchedulingResult.EngineSequenceLimitExceeded
        if sum(lengths) > BUDGET:
            return SchedulingResult.BatchTokenLimitExceeded
        if any(before + length > CONTEXT for before, length in zip(seen, lengths, strict=True)):
            return SchedulingResult.SequenceTokenLimitExceeded
        return SchedulingResult.KVCacheLimitExceeded if new_pages > self.free else SchedulingResult.Success

    def query(self, uid, tokens, blocks):
        if uid not in self.texts and len(self.texts) == SLOTS:
            return 0, 0
        seen, allocated = len(self.texts.get(uid, [])), self.pages(uid)
        new = min(tokens, CONTEXT - seen)
        need = math.ceil((seen + new) / PAGE) - allocated
        return (new, need) if need <= blocks else ((blocks + allocated) * PAGE - seen, blocks)


def random_text(rng, length):
    return rng.integers(0, VOCAB, length).tolist()


def snapshot(engine):
    """Everything on the device that a refusal might have changed, but for the floats."""
    state = engine._core.state
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves((state.table, state.slots))], dict(
        engine._core.held.by_uid
    )


def test_random_calls(shared, engine):
    """`put`, `query`, `can_schedule` and `flush` do what the model on paper does, and each result occurs."""
    _, expected = shared
    occurred = set()

    class Calls(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.model = Model()

        @rule(
            uids=st.lists(st.sampled_from(UIDS), min_size=1, max_size=6, unique=True),
            lengths=st.lists(st.sampled_from([1, 1, 1, 2, 4, 5, 9, 12]), min_size=6, max_size=6),
            single=st.booleans(),
            seed=st.integers(0, 2**32 - 1),
        )
        def put(self, uids, lengths, single, seed):
            rng = np.random.default_rng(seed)
            lists = [random_text(rng, 1 if single else length) for _, length in zip(uids, lengths, strict=False)]
            result = self.model.can_schedule(uids, [len(tokens) for tokens in lists])
            occurred.add(result)
            assert engine.can_schedule(uids, [len(tokens) for tokens in lists]) is result
            if result != SchedulingResult.Success:
                before, held = snapshot(engine)
                with pytest.raises(SchedulingError, match=result.name) as caught:
                    engine.put(uids, lists)
                assert caught.value.result is result
                after, still_held = snapshot(engine)
                assert held == still_held
                assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
                return
            logits = engine.put(uids, lists)
            assert logits.shape == (len(uids), VOCAB) and logits.dtype == jnp.float32
            for row, uid, tokens in zip(np.asarray(logits), uids, lists, strict=True):
                text = self.model.texts.setdefault(uid, [])
                text += tokens
                np.testing.assert_allclose(row, expected(text, 1)[0], atol=1e-4)

        @rule(uid=st.sampled_from(UIDS[:2]), seed=st.integers(0, 9))
        def put_long(self, uid, seed):
            self.put([uid], [BUDGET] * 6, False, seed)

        @rule(
            uid=st.sampled_from(UIDS),
            tokens=st.one_of(st.integers(0, 60), st.just(10**15)),
            blocks=st.one_of(st.integers(0, 13), st.just(10**15)),
        )
        def query(self, uid, tokens, blocks):
            assert engine.query(uid, tokens, blocks) == self.model.query(uid, tokens, blocks)

        @rule(lengths=st.dictionaries(st.sampled_from(UIDS), st.integers(1, 50), max_size=6))
        def ask(self, lengths):
            result = self.model.can_schedule(list(lengths), list(lengths.values()))
            occurred.add(result)
            assert engine.can_schedule(list(lengths), list(lengths.values())) is result

        @precondition(lambda self: self.model.texts)
        @rule(data=st.data())
        def flush(self, data):
            uid = data.draw(st.sampled_from(sorted(self.model.texts)))
            engine.flush(uid)
            del self.model.texts[uid]

        @rule(uid=st.sampled_from(UIDS))
        def flush_unknown(self, uid):
            if uid not in self.model.texts:
                with pytest.warns(UserWarning, match=f"no sequence {uid}"):
                    engine.flush(uid)

        @invariant()
        def accounts(self):
            assert engine.free_blocks == self.model.free
            for uid in UIDS:
                room = engine.get_remaining_block_capacity(uid)
                assert room == -len(self.model.texts.get(uid, [])) % PAGE

        def teardown(self):
            for uid in self.model.texts:
                engine.flush(uid)
            assert engine.free_blocks == PAGES

    settings = hypothesis.settings(max_examples=40, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(Calls, settings=settings)
    assert occurred == set(SchedulingResult)


def test_nothing_compiles_after_warming_up(engine):
    before = engine.stats()["compilations"]
    logits = engine.put([0, 1], [[1, 2, 3], [4]])
    assert logits.shape == (2, VOCAB)
    engine.flush(0)
    engine.flush(1)
    settings = SamplingParams(max_tokens=2, ignore_eos=True, logits_processor=lambda tokens, logits: logits)
    assert len(engine.generate([[5, 6]], settings)[0].outputs[0].token_ids) == 2
    engine.release()
    engine.retake()
    assert engine.stats()["compilations"] == before


def test_numbers_of_the_original():
    names = ["Success", "EngineSequenceLimitExceeded", "BatchSequenceLimitExceeded", "BatchTokenLimitExceeded"]
    names += ["KVCacheLimitExceeded", "SequenceTokenLimitExceeded"]
    assert [result.name for result in SchedulingResult] == names
    assert [result.value for result in SchedulingResult] == list(range(6))
    assert issubclass(SchedulingError, RuntimeError)
    assert SchedulingError(SchedulingResult.KVCacheLimitExceeded).result == 4


def test_room_of_the_last_page(engine):
    """What is left of it, where the original gives what is used."""
    engine.put([3], [[5] * (PAGE + 1)])
    assert engine.get_remaining_block_capacity(3) == PAGE - 1
    engine.put([3], [[5] * (PAGE - 1)])
    assert engine.get_remaining_block_capacity(3) == 0
    assert engine.query(3, 1, 0) == (0, 0) and engine.query(3, 1, 1) == (1, 1)


def test_context_is_enforced(engine, shared):
    """A sequence ends at `max_context`, and its neighbour's pages are its own to the last."""
    _, expected = shared
    rng = np.random.default_rng(0)
    texts = {1: random_text(rng, CONTEXT), 2: random_text(rng, 9)}
    engine.put([2], [texts[2][:8]])
    for begin in range(0, CONTEXT, 15):
        engine.put([1], [texts[1][begin : begin + 15]])
    for length in (1, 2, 15):
        assert engine.can_schedule([1], [length]) is SchedulingResult.SequenceTokenLimitExceeded
    with pytest.raises(SchedulingError, match="SequenceTokenLimitExceeded.*max_context"):
        engine.put([1, 2], [[3], [4]])
    assert engine.query(1, 5, 5) == (0, 0)
    np.testing.assert_allclose(engine.put([2], [texts[2][8:]])[0], expected(texts[2], 1)[0], atol=1e-4)


def test_order_and_kinds_of_arguments(engine, shared):
    """Logits come in the order of the uids; numpy's and JAX's numbers will do."""
    _, expected = shared
    rng = np.random.default_rng(1)
    texts = {uid: random_text(rng, 6) for uid in (30, 10, 20)}
    engine.put(np.array([10, 20]), [np.array(texts[10][:3], np.int64), jnp.array(texts[20][:2])])
    engine.put([20], [(texts[20][2],)])
    logits = engine.put((30, np.int32(20), 10), [texts[30], texts[20][3:], np.array(texts[10][3:], np.uint16)])
    for row, uid in zip(logits, (30, 20, 10), strict=True):
        np.testing.assert_allclose(row, expected(texts[uid], 1)[0], atol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.put([], []), "at least one uid"),
        (lambda e: e.put([1, 2], [[3]]), "got 1 for 2"),
        (lambda e: e.put([1, 1], [[3], [4]]), "each uid once"),
        (lambda e: e.put([1], [[]]), "uid 1 has no tokens"),
        (lambda e: e.put([1], [3]), "must be a list"),
        (lambda e: e.put([1], [[0.5]]), "whole numbers, got 0.5"),
        (lambda e: e.put([1], [np.ones((2, 2), int)]), "whole numbers"),
        (lambda e: e.put([1], ["ab"]), "whole numbers, got 'a'"),
        (lambda e: e.put([1], [[VOCAB]]), f"outside 0 to {VOCAB - 1}"),
        (lambda e: e.put([1], [[-1]]), "outside 0"),
        (lambda e: e.put(["one"], [[1]]), "uids must be whole numbers, got 'one'"),
        (lambda e: e.put(1, [[1]]), "uids must be a list"),
        (lambda e: e.can_schedule([1, 1], [1, 1]), "each uid once"),
        (lambda e: e.can_schedule([1], [0]), "at least 1"),
        (lambda e: e.can_schedule([1], [-5]), "at least 1"),
        (lambda e: e.can_schedule([1], [1.5]), "whole numbers, got 1.5"),
        (lambda e: e.can_schedule([1], [1, 2]), "each"),
        (lambda e: e.query(1, -1, 3), "at least 0, got -1 tokens"),
        (lambda e: e.query(1, 3, -1), "at least 0, got 3 tokens and -1"),
        (lambda e: e.query(1, 2.5, 1), "whole numbers, got 2.5"),
    ],
)
def test_bad_arguments(engine, call, message):
    before = snapshot(engine)
    with pytest.raises(RequestError, match=message):
        call(engine)
    after = snapshot(engine)
    assert before[1] == after[1] and all(np.array_equal(a, b) for a, b in zip(before[0], after[0], strict=True))


def test_nothing_and_huge(engine):
    assert engine.can_schedule([], []) is SchedulingResult.Success
    assert engine.can_schedule([1], [2**70]) is SchedulingResult.BatchTokenLimitExceeded
    assert engine.query(1, 2**70, 2**70) == (CONTEXT, math.ceil(CONTEXT / PAGE))
    assert engine.query(1, 0, 0) == (0, 0)
    assert engine.get_remaining_block_capacity(99) == 0


def alone(params, prompts, settings):
    """What `generate` gives for each request, tokens and log-probabilities; one program for all tests."""
    count = len(prompts)
    out = dsjax.generate(
        params,
        prompts,
        max_new_tokens=24,
        limits=[each.max_tokens for each in settings],
        key=jnp.stack([jax.random.key(each.seed or 0) for each in settings]),
        temperature=[each.temperature for each in settings],
        ignore_eos=[each.ignore_eos for each in settings],
    )
    lengths = np.asarray(out.lengths)[:, 0]
    return [
        (out.tokens[i, 0, : lengths[i]].tolist(), np.asarray(out.logprobs)[i, 0, : lengths[i]]) for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_beside_requests(engine, params, shared, seed):
    """Requests answer as if alone while sequences come and go beside them, and those compute as if alone too."""
    _, expected = shared
    rng = np.random.default_rng(seed)
    prompts = [random_text(rng, rng.integers(1, 24)) for _ in range(8)]
    settings = [
        SamplingParams(max_tokens=int(rng.integers(1, 20)), temperature=float(i % 2), seed=i, ignore_eos=True)
        for i in range(8)
    ]
    waiting = list(zip(prompts, settings, strict=True))
    texts: dict[int, list[int]] = {}
    answers, names, refused, computed = {}, [], 0, 0
    for _ in range(600):
        what = rng.choice(["add", "step", "put", "put", "flush"], p=[0.1, 0.4, 0.2, 0.2, 0.1])
        if what == "add" and waiting:
            try:
                names.append(engine.add_request(*waiting[0]))
                waiting.pop(0)
            except RequestError as error:
                assert "put" in str(error)
                refused += 1
        elif what == "put":
            uids = rng.choice(5, rng.integers(1, 4), replace=False).tolist()
            lists = [random_text(rng, rng.choice([1, 1, 3, 6])) for _ in uids]
            before = {uid: engine.get_remaining_block_capacity(uid) for uid in uids}
            try:
                logits = np.asarray(engine.put(uids, lists))
            except SchedulingError:
                refused += 1
                assert before == {uid: engine.get_remaining_block_capacity(uid) for uid in uids}
                continue
            computed += 1
            for row, uid, tokens in zip(logits, uids, lists, strict=True):
                texts[uid] = texts.get(uid, []) + tokens
                np.testing.assert_allclose(row, expected(texts[uid], 1)[0], atol=1e-4)
        elif what == "flush" and texts:
            uid = rng.choice(list(texts))
            engine.flush(uid)
            del texts[uid]
        else:
            answers |= {output.request_id: output.outputs[0] for output in engine.step()}
        if not waiting and len(answers) == len(prompts):
            break
    assert computed > 10 and refused > 5
    for _ in range(400):
        if waiting and not texts:
            names.append(engine.add_request(*waiting.pop(0)))
        elif texts and rng.random() < 0.1:
            uid = next(iter(texts))
            engine.flush(uid)
            del texts[uid]
        answers |= {output.request_id: output.outputs[0] for output in engine.step()}
    assert not engine.has_unfinished_requests() and len(answers) == len(prompts)
    for name, (tokens, logprobs) in zip(names, alone(params, prompts, settings), strict=True):
        assert answers[name].token_ids == tokens
        np.testing.assert_allclose(answers[name].token_logprobs, logprobs, atol=1e-4)


def hold(engine, pages):
    """Two sequences with so many pages together."""
    for _ in range(pages // 4):
        engine.put([1, 2], [[3] * 2 * PAGE, [4] * 2 * PAGE])
    assert engine.free_blocks == PAGES - pages


def test_requests_that_do_not_fit_beside_put(engine):
    """Told so at the door; and `put` leaves to those who came first what they need."""
    hold(engine, 12)
    with pytest.raises(RequestError, match="need 9 pages of 4 tokens, and there are 8.*flush sequences of put"):
        engine.generate([[1] * 20], SamplingParams(max_tokens=14))
    name = engine.add_request([1] * 20, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))  # 7 pages
    assert engine.can_schedule([3], [4]) is SchedulingResult.Success
    assert engine.can_schedule([3], [5]) is SchedulingResult.KVCacheLimitExceeded
    engine.put([3], [[1]])
    assert engine.can_schedule([4], [1]) is SchedulingResult.EngineSequenceLimitExceeded
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[0].request_id == name and len(outputs[0].outputs[0].token_ids) == 9
    engine.put([4], [[1]])
    with pytest.raises(RequestError, match="all slots are held"):
        engine.generate([[1]], SamplingParams(max_tokens=1))


def test_request_overtaken_by_put(engine):
    """Pages that are taken between the check at the door and the queue end the request, they do not hang it."""
    request = engine._request([1] * 20, SamplingParams(max_tokens=14), priority=0)
    hold(engine, 12)
    engine._core.add(request)
    for _ in range(3):
        engine.step()
    output = request.output().outputs[0]
    assert output.finish_reason == "error" and isinstance(output.error, RequestError)
    assert not engine.has_unfinished_requests()


def test_pages_of_what_ended_are_free_at_once(engine):
    """A stop text ends a sequence on the host; `put` may have its pages before anybody calls `step` again."""
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    text = engine.generate("hello world", params)[0].outputs[0].text
    [output] = engine.generate("hello world", SamplingParams(max_tokens=30, temperature=0, stop=text[2:5]))
    assert output.outputs[0].finish_reason == "stop"
    assert engine.free_blocks == PAGES
    name = engine.add_request([1] * 20, params)
    for _ in range(4):
        engine.step()
    engine.abort(name)
    for _ in range(5):
        engine.put([1], [[1] * 9])
    assert engine.can_schedule([2], [9]) is SchedulingResult.Success


def test_more_requests_than_9999(engine):
    """Names of requests never come twice, and their number is bounded by memory alone."""
    names = {engine.add_request([1], SamplingParams(max_tokens=1)) for _ in range(10_001)}
    assert len(names) == 10_001
    for name in names:
        engine.abort(name)
    outputs = [output for output in engine.step() if output.request_id in names]
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"} and len(outputs) == 10_001
    assert not engine.has_unfinished_requests()


def test_prompt_that_can_not_be_held(engine):
    """An error for the one request, where it is asked for; the others go on."""
    name = engine.add_request([1] * 9, SamplingParams(max_tokens=3))
    with pytest.raises(RequestError, match="leaves no room in a context"):
        engine.add_request([1] * CONTEXT)
    engine.put([1], [[3] * 16])
    engine.put([1], [[3] * 16])
    engine.put([1], [[3] * 8])
    with pytest.raises(RequestError, match="need 11 pages of 4 tokens, and there are 10"):
        engine.add_request([1] * 40, SamplingParams(max_tokens=5))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == [name] and outputs[0].outputs[0].error is None


def test_two_engines(params, engine, shared):
    """Several live in one process, and a batch may hold sequences of any lengths."""
    _, expected = shared
    other = make_engine(tiny_params(seed=1))
    text = random_text(np.random.default_rng(5), 12)
    for begin in range(0, 12, 4):
        mine = engine.put([1], [text[begin : begin + 4]])
        theirs = other.put([1, 2], [text[begin : begin + 4], [begin]])
    np.testing.assert_allclose(mine[0], expected(text, 1)[0], atol=1e-4)
    assert not np.allclose(mine[0], theirs[0], atol=1e-2)
    assert engine.free_blocks == PAGES - 3 and other.free_blocks == PAGES - 4


def test_released(engine):
    """Sequences keep their pages from being released; after that everything says what to do."""
    engine.put([5], [[1, 2, 3]])
    with pytest.raises(EngineError, match=r"flush \[5\]"):
        engine.release()
    engine.flush(5)
    engine.release()
    for call in (
        lambda: engine.put([5], [[1]]),
        lambda: engine.can_schedule([5], [1]),
        lambda: engine.query(5, 1, 1),
        lambda: engine.free_blocks,
        lambda: engine.generate([[1]], SamplingParams(max_tokens=1)),
    ):
        with pytest.raises(EngineError, match=r"engine.retake\(\)"):
            call()
    engine.retake()
    engine.put([5], [[1, 2, 3]])
    engine.retake()
    assert engine.get_remaining_block_capacity(5) == PAGE - 3


def test_serialize(engine, params, tmp_path, monkeypatch):
    """A folder that `load` reads, without a pickle in it."""

    def no_pickle(*_, **__):
        raise AssertionError("pickled")

    with monkeypatch.context() as patch:
        for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
            patch.setattr(pickle, name, no_pickle)
        engine.serialize(tmp_path / "model")
        loaded, tokenizer = dsjax.load(tmp_path / "model"), dsjax.load_tokenizer(tmp_path / "model")
    assert loaded.config == params.config
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), loaded, params)
    assert all(jax.tree.leaves(same))
    assert tokenizer.encode("hello 🦊") == tiny_tokenizer().encode("hello 🦊")
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
