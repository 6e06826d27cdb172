"""What is shown while requests are answered."""

import time
from typing import Any

from tqdm.auto import tqdm

from dsjax.engine.core import Core
from dsjax.engine.requests import Request
from dsjax.watched import is_watched


class Bar:
    """Requests done, and tokens a second, on a terminal or in a notebook."""

    def __init__(self, requests: list[Request], core: Core, progress: bool | None):
        self.done = 0
        self._requests, self._core = requests, core
        self._begin = time.perf_counter()
        watched = is_watched() if progress is None else progress
        self._bar = tqdm(total=len(requests), unit="request", disable=not watched, delay=0 if progress else 2.0)
        self._shown = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self) -> None:
        """Count what ended; requests mostly end in order, so looking from the first that has not is cheap."""
        while self.done < len(self._requests) and self._requests[self.done].finished:
            self.done += 1
        now = time.perf_counter()
        if self._bar.disable or (now - self._shown < 0.2 and self.done < len(self._requests)):
            return
        self._shown = now
        figures = self._core.stats.rates()
        self._bar.set_postfix_str(f"prefill {figures[0]:.0f}, decode {figures[1]:.0f} tokens/s", refresh=False)
        self._bar.update(sum(request.finished for request in self._requests) - self._bar.n)
