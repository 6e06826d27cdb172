"""An engine over several devices, and several engines on one."""

import jax
import pytest

import dsjax
from dsjax import testing

SIZES = {"slots": 2, "token_budget": 16, "page_size": 16, "max_context": 64, "pages": 8}
PROMPTS = [[5, 6, 7], list(range(20, 50))]
GREEDY = dsjax.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params()


def test_over_two_devices(params):
    """Heads of the pages are spread like those of the weights, and the tokens are those of one device."""
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    engine = dsjax.Engine(params, mesh=mesh, **SIZES)
    keys = engine._core.state.pages.keys[0]
    assert keys.sharding.shard_shape(keys.shape)[1] == keys.shape[1] // 2
    expected = dsjax.generate(params, PROMPTS, max_new_tokens=8, ignore_eos=True).tokens[:, 0].tolist()
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == expected
    assert engine.plan.page == dsjax.Engine(params, **SIZES).plan.page // 2
    with pytest.raises(dsjax.ParameterError, match="other devices"):
        engine.update(params)


def test_side_by_side_with_other_parameters(params):
    """Two engines have no state in common, and `update` is all that tells them apart."""
    other = testing.tiny_params(seed=1)
    one, two = dsjax.Engine(params, **SIZES), dsjax.Engine(other, **SIZES)
    names = [one.add_request(prompt, GREEDY) for prompt in PROMPTS] + [two.add_request(PROMPTS[1], GREEDY)]
    found = {}
    while one.has_unfinished_requests() or two.has_unfinished_requests():
        for engine in (one, two):
            for output in engine.step():
                found[engine is one, output.request_id] = output.outputs[0].token_ids
    expected = dsjax.generate(params, PROMPTS, max_new_tokens=8, ignore_eos=True).tokens[:, 0].tolist()
    assert [found[True, name] for name in names[:2]] == expected
    assert found[False, names[2]] != expected[1]

    again = two.generate(PROMPTS[1], GREEDY)[0]
    assert again.num_cached_tokens == 16 and again.outputs[0].token_ids == found[False, names[2]]
    two.update(params)
    before = two.stats()["compilations"]
    (last,) = two.generate(PROMPTS[1], GREEDY)
    assert last.outputs[0].token_ids == expected[1]
    assert last.num_cached_tokens == 0, "the prefix that is cached is of other parameters"
    assert two.stats()["compilations"] == before
