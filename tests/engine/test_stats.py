"""What an engine says of itself: every figure over runs whose figures are known."""

import gzip
import re
import types

import jax
import pytest

import dsjax
from dsjax import SamplingParams, testing
from dsjax.engine import stats
from dsjax.errors import EngineError

SIZES = dict(slots=4, token_budget=32, page_size=8, max_context=128, pages=40)
TOTALS = ("preemptions", "calls", "prefill_calls", "generated_tokens", "prompt_tokens")
ENDS = ("finished", "aborted", "failed", "faults")


@pytest.fixture
def engine():
    return dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES)


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def steady(figures):
    """Those that do not change with time alone."""
    return {name: value for name, value in figures.items() if not name.endswith("tokens_per_second")}


def prompts(rng, *lengths):
    return [rng.integers(2, 320, length).tolist() for length in lengths]


def test_before_anything(engine):
    figures = engine.stats()
    assert figures.pop("pages") == 40 and figures.pop("compilations") >= 5
    assert set(figures) > {*TOTALS, *ENDS} and set(figures.values()) == {0}


def test_tokens_of_prompts_and_generated_ones(engine, rng):
    """Prompts in pieces, in one step, of one token, and answers of one token."""
    lengths, limits = [1, 70, 33, 8, 20], [1, 9, 12, 1, 30]
    engine.generate(prompts(rng, *lengths), [greedy(limit) for limit in limits])
    figures = engine.stats()
    assert figures["prompt_tokens"] == sum(lengths)
    assert figures["generated_tokens"] == sum(limits)
    assert figures["finished"] == 5 and not any(figures[name] for name in ("aborted", "failed", "faults"))
    assert figures["calls"] > figures["prefill_calls"] >= 5  # 132 tokens at 32 a call
    assert figures["host_us_per_step"] > 0
    assert figures["pages_used"] == figures["running"] == figures["waiting"] == figures["live_requests"] == 0
    # Samples share their prompt; each computes its last token itself, to draw its own first one.
    engine.generate(prompts(rng, 20), greedy(5, n=3))
    assert engine.stats()["prompt_tokens"] == sum(lengths) + 20 + 2


def test_hit_rate(engine, rng):
    """All full pages before the last token are found."""
    (prompt,) = prompts(rng, 33)
    engine.generate([prompt], greedy(2))
    assert engine.stats()["prefix_hit_rate"] == 0
    engine.generate([prompt], greedy(2))
    figures = engine.stats()
    assert figures["prefix_hit_rate"] == 32 / 66 and figures["prompt_tokens"] == 33 + 1
    engine.generate(prompts(rng, 34), greedy(2))
    assert engine.stats()["prefix_hit_rate"] == 32 / 100


def test_running_and_waiting(engine, rng):
    """Two prompts of three pages are read at once; the others wait for slots, or for rows of the device."""
    for prompt in prompts(rng, *[20] * 11):
        engine.add_request(prompt, greedy(60))
    assert engine.stats()["waiting"] == 11 and engine.stats()["running"] == 0
    seen = []
    while engine.has_unfinished_requests():
        engine.step()
        seen.append(engine.stats())
    assert max(figures["running"] for figures in seen) == 4
    assert max(figures["live_requests"] for figures in seen) == 8
    assert max(figures["pages_used"] for figures in seen) == 40
    busy = [figures for figures in seen if figures["calls"] and figures["live_requests"] == 8]
    assert all(figures["running"] + figures["waiting"] == 11 - figures["finished"] for figures in busy[1:])
    assert seen[-1]["pages_used"] == seen[-1]["waiting"] == seen[-1]["running"] == 0
    assert [figures["finished"] for figures in seen] == sorted(figures["finished"] for figures in seen)
    assert seen[-1]["finished"] == 11


def test_preemptions_and_what_is_computed_again(engine, rng):
    asked = prompts(rng, 20, 20, 20, 20)
    engine.generate(asked, greedy(100))  # 60 pages, and there are 40
    figures = engine.stats()
    assert figures["preemptions"] > 0
    assert figures["generated_tokens"] == 400 and figures["prompt_tokens"] > 80


def test_totals_never_go_back(engine, rng, monkeypatch):
    """Not when pages are made anew, after a release or a fault, and the device counts from zero."""

    def raises(tokens, logits):
        raise ValueError

    asked = prompts(rng, 20, 20, 20, 20)
    engine.generate(asked, greedy(100))
    before = engine.stats()
    engine.release()
    assert engine.stats()["pages_used"] == 0
    engine.retake()
    assert steady(engine.stats()) == steady(before)
    engine.generate(prompts(rng, 10), greedy(3))
    after = engine.stats()
    assert after["prompt_tokens"] == before["prompt_tokens"] + 10
    assert after["generated_tokens"] == before["generated_tokens"] + 3
    assert after["preemptions"] == before["preemptions"]
    assert 0 < after["prefix_hit_rate"] < before["prefix_hit_rate"]

    call, left = engine._core.programs.call, [2]

    def fails(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("the device is gone")
        return call(*args, **kwargs)

    monkeypatch.setattr(engine._core.programs, "call", fails)
    engine.generate(prompts(rng, 10), greedy(3))
    name = engine.add_request(prompts(rng, 10)[0], greedy(3))
    engine.abort(name)
    engine.step()
    engine.generate([3], greedy(3, logits_processor=raises))
    final = engine.stats()
    assert [final[name] - after[name] for name in ENDS] == [1, 1, 1, 1]
    assert 10 <= final["prompt_tokens"] - after["prompt_tokens"] < 40
    assert final["pages_used"] == 0


def test_pages_of_put(engine):
    engine.put([1], [list(range(2, 20))])
    assert engine.stats()["pages_used"] == 3 == 40 - engine.free_blocks
    engine.flush(1)
    assert engine.stats()["pages_used"] == 0


def test_rates(monkeypatch):
    """Over the last ten seconds, from the end of the first call in them."""
    clock = [100.0]
    monkeypatch.setattr(stats, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    counts = stats.Stats(types.SimpleNamespace(pages=1))
    status = dict.fromkeys(("preemptions", "computed", "found", "asked", "running", "waiting", "free_pages"), 0)
    assert counts.rates() == (0, 0)
    for seconds, computed, tokens, continued in [(0, 50, 1, 0), (1, 130, 4, 3), (1, 190, 10, 10)]:
        clock[0] += seconds
        status = status | {"computed": computed}
        counts.call(True, tokens, continued, status)
    assert counts.rates() == ((77 + 50) / 2, 14 / 2)
    clock[0] += 2
    assert counts.rates() == ((77 + 50) / 4, 14 / 4)
    clock[0] += 30
    assert counts.rates() == (0, 0)


def test_counts_of_the_device_wrap():
    counts = stats.Stats(types.SimpleNamespace(pages=1))
    status = dict.fromkeys(("preemptions", "computed", "found", "asked", "running", "waiting", "free_pages"), 0)
    for computed in (2**31 - 10, 5 - 2**31, 7):  # int32 goes on below zero
        counts.call(True, 0, 0, status | {"computed": computed, "asked": computed, "found": computed})
    figures = counts.snapshot(waiting=0, live=1, held=0, programs=0)
    assert figures["prompt_tokens"] == 2**32 + 7 and figures["prefix_hit_rate"] == 1


METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def test_prometheus_text(engine, rng):
    engine.generate(prompts(rng, 33, 33), greedy(12))
    engine._core.stats._counts["generated_tokens"] = 123_456_789
    figures, text = engine.stats(), engine.metrics_text()
    assert text.endswith("\n")
    lines = text.splitlines()
    found = {}
    for help_line, type_line, sample in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name, value = sample.split(" ")
        kind = type_line.removeprefix(f"# TYPE {name} ")
        assert METRIC.fullmatch(name) and kind in ("gauge", "counter")
        assert help_line.startswith(f"# HELP {name} ") and len(help_line.split(" ", 3)[3]) > 5
        assert name.endswith("_total") == (kind == "counter")
        found[name.removeprefix("dsjax_").removesuffix("_total")] = float(value)
    assert found.keys() == figures.keys()
    assert steady(found) == steady(figures)
    gauges = {line.split()[2] for line in lines if line.endswith(" gauge")}
    assert not gauges & {f"dsjax_{name}" for name in (*TOTALS, *ENDS, "compilations")}


def test_prometheus_reads_it(engine):
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(engine.metrics_text())}
    assert len(families) == len(engine.stats())
    assert families["dsjax_calls"].type == "counter" and families["dsjax_pages"].type == "gauge"
    assert families["dsjax_pages"].samples[0].value == 40 and families["dsjax_pages"].documentation


def test_model_times(engine, rng):
    """As the original's: only where asked for, and cleared by reading."""
    with pytest.raises(EngineError, match="profile_model_time"):
        engine.model_times()
    engine.profile_model_time()
    before = engine.stats()["calls"]
    engine.generate(prompts(rng, 40), greedy(6))
    times = engine.model_times()
    assert len(times) == engine.stats()["calls"] - before > 6 and all(0 < time < 60 for time in times)
    assert engine.model_times() == []
    engine.generate(prompts(rng, 4), greedy(2, logits_processor=lambda tokens, logits: logits))
    assert len(engine.model_times()) == 2
    engine.profile_model_time(False)
    with pytest.raises(EngineError, match="profile_model_time"):
        engine.model_times()


def test_stages_in_a_trace(engine, rng, tmp_path):
    with jax.profiler.trace(str(tmp_path), create_perfetto_trace=False):
        engine.generate(prompts(rng, 20), greedy(3))
    (file,) = tmp_path.rglob("*.trace.json.gz")
    text = gzip.decompress(file.read_bytes()).decode()
    for stage in ("dsjax.submit", "dsjax.call", "dsjax.wait", "dsjax.read"):
        assert f'"{stage}' in text, stage
