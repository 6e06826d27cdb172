"""What an engine did, in figures."""

import time
from collections import deque

from dsjax.engine.programs import Sizes
from dsjax.engine.requests import Request

_WINDOW = 10.0  # seconds that rates are over
_DEVICE_COUNTS: tuple[str, ...] = ("preemptions", "computed", "found", "asked")  # int32, and they wrap


class Stats:
    """Counters of one engine; written by its loop, read by anybody.

    Args:
      sizes: the engine's.
    """

    def __init__(self, sizes: Sizes):
        self._sizes = sizes
        self._status = {"free_pages": sizes.pages, "running": 0, "waiting": 0}
        self._seen = dict.fromkeys(_DEVICE_COUNTS, 0)
        self._device = dict.fromkeys(_DEVICE_COUNTS, 0)
        self._counts = dict.fromkeys(
            ("calls", "prefill_calls", "generated_tokens", "prompt_tokens", "finished", "aborted", "failed", "faults"),
            0,
        )
        self._host_seconds = 0.0
        self._recent: deque[tuple[float, int, int]] = deque()

    def call(self, reads: bool, tokens: int, continued: int, status: dict[str, int]) -> None:
        """Count a call of the device.

        Args:
          reads: it had room for prompts.
          tokens: generated, that somebody wants.
          continued: tokens that were computed to generate the next one after them, and so are not of prompts.
          status: what the device says of itself.
        """
        now = time.perf_counter()
        new = {name: (status[name] - self._seen[name]) % 2**32 for name in _DEVICE_COUNTS}
        for name, count in new.items():
            self._device[name] += count
            self._seen[name] = status[name]
        self._status = status
        prompt_tokens = new["computed"] - continued
        self._counts["calls"] += 1
        self._counts["prefill_calls"] += reads
        self._counts["generated_tokens"] += tokens
        self._counts["prompt_tokens"] += prompt_tokens
        self._recent.append((now, tokens, prompt_tokens))
        while now - self._recent[0][0] > _WINDOW:
            self._recent.popleft()

    def restarted(self) -> None:
        """The device counts from zero again."""
        self._seen = dict.fromkeys(_DEVICE_COUNTS, 0)

    def rates(self) -> tuple[float, float]:
        """Prompt tokens and generated tokens a second, over the last ten seconds or since the first call in them."""
        now = time.perf_counter()
        recent = [entry for entry in tuple(self._recent) if now - entry[0] <= _WINDOW]
        if len(recent) < 2:
            return 0.0, 0.0
        seconds = now - recent[0][0]
        # The first entry is where the time begins.
        return sum(entry[2] for entry in recent[1:]) / seconds, sum(entry[1] for entry in recent[1:]) / seconds

    def host(self, seconds: float) -> None:
        """Count the host's own work in one round of the loop."""
        self._host_seconds += seconds

    def finished(self, request: Request) -> None:
        """Count a request that ended."""
        reasons = {sequence.finish_reason for sequence in request.sequences}
        self._counts["failed" if "error" in reasons else "aborted" if "abort" in reasons else "finished"] += 1

    def fault(self) -> None:
        """Count a step that failed."""
        self._counts["faults"] += 1

    def snapshot(self, *, waiting: int, live: int, held: int, programs: int) -> dict[str, float]:
        """All figures by name.

        Args:
          waiting: requests that the device does not know of.
          live: those that it does. Without any, what it last said of itself may be long past.
          held: pages of sequences that the scheduler knows nothing of.
          programs: how many were compiled.
        """
        status = self._status if live else {"free_pages": self._sizes.pages - held, "running": 0, "waiting": 0}
        prefill, decode = self.rates()
        found, asked = self._device["found"], self._device["asked"]
        return {
            "waiting": waiting + status["waiting"],
            "running": status["running"],
            "live_requests": live,
            "pages": self._sizes.pages,
            "pages_used": self._sizes.pages - status["free_pages"],
            "preemptions": self._device["preemptions"],
            "prefix_hit_rate": found / asked if asked else 0.0,
            "prompt_tokens_per_second": prefill,
            "tokens_per_second": decode,
            "compilations": programs,
            "host_us_per_step": 1e6 * self._host_seconds / max(self._counts["calls"], 1),
            **self._counts,
        }


_HELP = {
    "waiting": "sequences and requests that wait",
    "running": "sequences that run",
    "live_requests": "requests that the device knows of",
    "pages": "pages in the pool",
    "pages_used": "pages that are held",
    "preemptions": "sequences put back for want of pages",
    "prefix_hit_rate": "share of prompt tokens whose pages were found",
    "prompt_tokens_per_second": "prompt tokens read a second, lately",
    "tokens_per_second": "tokens generated a second, lately",
    "compilations": "programs that were compiled",
    "host_us_per_step": "microseconds of the host's own work a call of the device",
    "calls": "calls of the device",
    "prefill_calls": "calls with room for prompts",
    "generated_tokens": "tokens generated",
    "prompt_tokens": "prompt tokens computed, those computed again included",
    "finished": "requests that ended by themselves",
    "aborted": "requests that were taken back",
    "failed": "requests that ended with an error",
    "faults": "steps that failed",
}
_GAUGES = {
    "waiting",
    "running",
    "live_requests",
    "pages",
    "pages_used",
    "prefix_hit_rate",
    "prompt_tokens_per_second",
    "tokens_per_second",
    "host_us_per_step",
}


def prometheus(figures: dict[str, float]) -> str:
    """Figures in the text format of Prometheus."""
    lines = []
    for name, value in figures.items():
        kind = "gauge" if name in _GAUGES else "counter"
        full = f"dsjax_{name}" + ("" if kind == "gauge" else "_total")
        lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}", f"{full} {value!r}"]
    return "\n".join(lines) + "\n"
