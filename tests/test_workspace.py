"""The memory plan: how many pages there are, what is said where nothing fits, and what an engine really holds."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dsjax
from dsjax import memory, workspace
from dsjax.engine.compiled import Programs
from dsjax.engine.setup import choose_sizes, placed
from dsjax.errors import EngineError, RequestError
from dsjax.workspace import device_bytes

SIZES: dict[str, Any] = dict(slots=4, token_budget=16, page_size=16, max_context=128)
MEGA = 1_000_000


def sizes_of(params, **changes):
    defaults: dict[str, Any] = dict(
        steps_per_sync=None, kv_dtype=None, prefix_caching=True, split_fuse=True, max_logprobs=4
    )
    given: dict[str, Any] = SIZES | defaults | {"implementation": None} | changes
    return choose_sizes(params, None, **given)


@pytest.fixture
def decide(tiny_params):
    """A plan over programs that need so many bytes and are never compiled; and the numbers of pages asked for."""

    def plan(needs, pages=None, fraction=None, **options):
        asked = []

        class Recorded(Programs):
            def warm_up(self, bar=None, names=None):
                asked.append(self.sizes.pages)

            def temporaries(self):
                return needs(self.sizes.pages) if callable(needs) else needs

        return *workspace.plan(
            tiny_params, sizes_of(tiny_params), pages, fraction, False, programs_of=Recorded, **options
        ), asked

    return plan


def test_pages_take_what_the_rest_leaves(decide, tiny_params):
    made, programs, asked = decide(35_000, fraction=0.5, total=8 * MEGA)
    assert made.weights == sum(x.nbytes for x in jax.tree.leaves(tiny_params))
    assert made.page == 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, heads, tokens, head size, float32
    assert made.total == made.weights + made.state + made.temporaries + made.pages * made.page
    assert made.budget == 4 * MEGA and made.budget - 2 * made.page < made.total <= made.budget
    assert asked == [made.pages] == [programs.sizes.pages]


@pytest.mark.parametrize("needs", [2 * MEGA, lambda pages: 1000 * pages], ids=["constant", "grows with the pages"])
def test_a_guess_that_was_too_low(decide, needs):
    made, programs, asked = decide(needs, fraction=0.5, total=8 * MEGA)
    assert len(asked) == 2 and asked[1] < asked[0] and programs.sizes.pages == made.pages == asked[1]
    assert made.total <= made.budget
    assert made.temporaries == (needs(made.pages) if callable(needs) else needs)


def test_a_guess_that_was_too_high(decide):
    """Compiled again for many more pages, and not for a few."""
    made, _, asked = decide(0, fraction=1.0, total=600_000)
    assert len(asked) == 2 and asked[1] > asked[0] * workspace.WORTHWHILE and made.pages == asked[1]
    assert made.total + made.page > made.budget
    assert len(decide(0, fraction=1.0, total=20 * MEGA)[2]) == 1


def test_needs_that_grow_and_shrink_end(decide):
    """Temporaries that are larger with more pages than the second time had: no endless search."""
    made, _, asked = decide(lambda pages: 0 if pages < 40 else 10_000 * (pages - 39), fraction=1.0, total=600_000)
    assert len(asked) <= 4 and made.total <= made.budget


def test_neither_on_a_cpu(decide):
    """No more pages than all slots can fill: the machine has other uses for its memory."""
    made, _, _ = decide(0, total=10**12)
    assert made.pages == 4 * -(-127 // 16)
    assert decide(0, total=400_000)[0].pages < made.pages, "unless there is less"


def test_pages_as_asked(decide):
    made, _, asked = decide(123, pages=7, total=8 * MEGA)
    assert made.pages == 7 and asked == [7] and made.temporaries == 123
    assert made.total == made.weights + made.state + 123 + 7 * made.page


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(pages=4, fraction=0.5), "give pages or memory_fraction, not both"),
        (dict(fraction=0), "memory_fraction=0 must be above 0 and at most 1"),
        (dict(fraction=1.01), "memory_fraction=1.01 must be"),
        (dict(fraction=float("nan")), "memory_fraction=nan must be"),
        (dict(pages=0), "pages must be a whole number of at least 1, got 0"),
        (dict(pages=True), "got True"),
        (dict(pages=2.5), "got 2.5"),
    ],
)
def test_what_is_asked_for_badly(decide, given, message):
    with pytest.raises(RequestError, match=message):
        decide(0, **given)


def test_weights_that_do_not_fit(decide):
    with pytest.raises(EngineError) as caught:
        decide(0, fraction=0.5, total=260_000)
    said = str(caught.value)
    for part in (
        "the model does not fit: 111.5 kB weights + ",
        " temporaries + ",
        "1 page of 8.2 kB",
        "there is 130.0 kB, 50% of 260.0 kB",
        "raise memory_fraction",
        "lower slots, token_budget or max_context",
        "quantize the weights",
        "mesh=",
    ):
        assert part in said
    assert "fewer pages" not in said and "\n" not in said


def test_temporaries_that_do_not_fit(decide):
    """Weights fit, so it is compiled to know: then the message has the true figure."""
    with pytest.raises(EngineError, match=r"111\.5 kB weights \+ 700\.0 kB temporaries .* there is 800\.0 kB"):
        decide(700_000, fraction=0.8, total=MEGA)


def test_pages_that_do_not_fit(decide, monkeypatch):
    monkeypatch.setattr(Programs, "warm_up", lambda *_: pytest.fail("compiled in vain"))
    with pytest.raises(EngineError, match=r"1,000 pages of 8\.2 kB = 8\.\d MB, and there is 8\.0 MB.*use fewer pages"):
        decide(0, pages=1000, total=8 * MEGA)


def test_what_others_hold_is_theirs(decide, monkeypatch, tiny_params):
    """A device that tells: what is in use beside the weights is left alone."""
    weights = device_bytes(tiny_params)
    monkeypatch.setattr(memory, "available", lambda device: ("a shelf", 8 * MEGA))
    monkeypatch.setattr(memory, "in_use", lambda device: weights + 5 * MEGA)
    made, _, _ = decide(0, fraction=0.9)
    assert made.budget == 3 * MEGA >= made.total
    with pytest.raises(EngineError, match=r"there is 3\.0 MB, 38% of 8\.0 MB, of which others hold 5\.0 MB"):
        decide(0, pages=900)


def test_summary(decide):
    made = decide(100_000, pages=40, total=8 * MEGA)[0]
    state = memory.readable(made.state)
    assert made.summary() == (
        f"111.5 kB weights + 100.0 kB temporaries + {state} state + 40 pages (640 tokens, 327.7 kB) "
        f"= {memory.readable(made.total)} of 8.0 MB"
    )
    assert "6 pages (96 tokens, too few for one sequence of 128, 49.2 kB)" in decide(0, pages=6)[0].summary()


# What engines hold.


@pytest.fixture(scope="module")
def engine(tiny_params):
    return dsjax.Engine(tiny_params, max_logprobs=4, pages=40, **SIZES)


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def test_the_plan_names_every_array(tiny_params, engine):
    core = engine._core
    held = sum(x.nbytes for x in jax.tree.leaves((core.params, core.queue, core.state)))
    plan = engine.plan
    assert held == plan.weights + plan.state + plan.pages * plan.page
    before = live_bytes()
    other = dsjax.Engine(tiny_params, max_logprobs=4, pages=40, **SIZES)
    key = other._core._key.nbytes
    assert live_bytes() - before == plan.state + plan.pages * plan.page + key, "and nothing else stays"


def test_temporaries_are_those_of_steps(engine):
    """Not the pages that one program makes: they are counted as pages."""
    assert 0 < engine.plan.temporaries < engine.plan.pages * engine.plan.page
    most = max(program.memory_analysis().temp_size_in_bytes for program in engine._core.programs._compiled.values())
    assert most <= engine.plan.temporaries


def test_donation_holds_in_every_program(engine):
    programs = engine._core.programs
    jobs = {name: job() for name, job in programs._jobs().items() if not name.endswith("_plain")}  # not run on a CPU
    programs.warm_up(names=tuple(jobs))
    state, pages = device_bytes(programs.state_shapes), device_bytes(programs.state_shapes.pages)
    seen = set()
    for name, (_, _, donated, _) in jobs.items():
        needs = programs._compiled[name].memory_analysis()
        if name in ("empty_queue", "constrain"):
            continue
        if name == "empty_state":
            assert needs.output_size_in_bytes >= pages and needs.temp_size_in_bytes < pages
            continue
        seen.add(name)
        assert donated, name
        # The keys of all texts are the one part that some program makes anew.
        assert needs.alias_size_in_bytes > 0.99 * state, f"{name}: the state is updated in place"
    assert seen >= {"submit", "read", "decode", "look", "conclude", "put", "put_one", "flush", "restart"}


def test_release_and_retake(engine):
    prompt, settings = [[3, 1, 4, 1, 5]], dsjax.SamplingParams(max_tokens=6, temperature=0)
    expected = engine.generate(prompt, settings)[0].outputs[0].token_ids
    whole = live_bytes()
    engine.release()
    plan = engine.plan
    assert whole - live_bytes() == plan.state + plan.pages * plan.page
    with pytest.raises(EngineError, match="retake"):
        engine.step()
    engine.retake()
    assert live_bytes() == whole
    assert engine.generate(prompt, settings)[0].outputs[0].token_ids == expected


def test_restart_never_holds_two_pools(engine, monkeypatch):
    """A fault while requests run: what was is gone before new pages are made."""
    core, pool, at_making = engine._core, engine.plan.pages * engine.plan.page, []
    run = core.programs.run
    held = live_bytes()

    def watched(name, *arguments):
        if name == "empty_state":
            at_making.append(live_bytes())
        return run(name, *arguments)

    monkeypatch.setattr(core.programs, "run", watched)
    engine.add_request([7, 8, 9], dsjax.SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    core.restart()
    ended = []
    while engine.has_unfinished_requests():
        ended += engine.step()
    assert len(ended) == 1 and len(ended[0].outputs[0].token_ids) == 4
    assert len(at_making) == 1 and at_making[0] < held - pool / 2


def test_pages_of_quantized_weights_are_not_integers(tiny_params, tmp_path):
    config = dataclasses.replace(tiny_params.config, intermediate_size=64)
    dsjax.export_hf(dsjax.init(config, jax.random.key(1)), tmp_path)
    params = dsjax.load(tmp_path, quantize="q8_0", dtype="float32")
    assert "int8" in {leaf.dtype.name for leaf in jax.tree.leaves(params["embed"])}
    assert sizes_of(params).kv_dtype == "float32"


def test_no_device_gathers_the_pool(tiny_params):
    """Pages spread over devices by heads stay there: all that a step makes is smaller than one device's share."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    params = placed(dsjax.prepare(tiny_params), mesh)
    sizes = dataclasses.replace(sizes_of(params), pages=8192)
    programs = Programs(params, sizes)
    programs.warm_up(names=("read",))
    share = device_bytes(programs.state_shapes.pages.keys[0])
    assert share == 8192 * 1 * 16 * 16 * 4, "half of the heads"
    assert programs.temporaries() < share


def test_predicted_and_measured(tmp_path):
    """In a process of its own: the most that was resident, against the plan."""
    command = [sys.executable, "-m", "bench.memory_plan", "--measure", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    found = json.loads((tmp_path / "out.json").read_text())["cpu"]
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.05)
    assert found["arrays"] == found["weights"] + found["state"] + found["pages"] + 8, "8 bytes are the engine's key"
    assert found["temporaries"] > 0.1 * found["predicted"], "or they would not be told from noise"
