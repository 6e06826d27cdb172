import pytest

from dsjax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def test_times_are_those_of_the_benchmarks():
    metrics = RequestMetrics(arrival_time=100.0)
    assert (metrics.ttft, metrics.tpot, metrics.e2e) == (None, None, None)
    metrics.first_token_time = 100.5
    metrics.output_tokens = 5
    assert (metrics.ttft, metrics.tpot, metrics.e2e) == (0.5, None, None)
    metrics.finished_time = 102.5
    assert (metrics.ttft, metrics.tpot, metrics.e2e) == (0.5, pytest.approx(2.0 / 4), 2.5)
    metrics.output_tokens = 1
    assert metrics.tpot is None


def test_outputs_print_in_a_line():
    sequence = CompletionOutput(
        0, "once " * 10_000, list(range(9000)), -3.14159, finish_reason="stop", stop_reason="\n"
    )
    output = RequestOutput(
        "7", "Tell me", [1, 2, 3], [sequence], True, RequestMetrics(0.0, finished_time=1.5), num_cached_tokens=2
    )
    head, line = repr(output).split("\n")
    assert head == "RequestOutput('7', 'Tell me', 3 prompt tokens (2 cached), finished in 1.50 s,"
    assert line.startswith("  CompletionOutput(0, 'once once") and len(line) < 140
    assert line.endswith("..., 9000 tokens, logprob -3.14, stop, '\\n'))")
    failed = CompletionOutput(1, finish_reason="error", error=ValueError("in a processor"))
    assert repr(failed) == "CompletionOutput(1, '', 0 tokens, error, ValueError('in a processor'))"
    assert repr(CompletionOutput(0)) == "CompletionOutput(0, '', 0 tokens, running)"
    assert not CompletionOutput(0).finished and failed.finished


def test_logprobs_have_the_names_of_vllm():
    entry = Logprob(-0.5, 1, " a")
    assert (entry.logprob, entry.rank, entry.decoded_token) == (-0.5, 1, " a")
