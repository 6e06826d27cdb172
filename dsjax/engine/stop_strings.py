"""Finds the first of several texts in one that grows, reading each character once (Aho and Corasick, 1975)."""

import functools
from collections import deque


class StopStrings:
    """An automaton over stop texts, shared by all sequences that have the same ones.

    A state is the longest end of what was read so far that begins some text. With `("stop", "top up")`:

    | read      | state  | may still become a match |
    | --------- | ------ | ------------------------ |
    | `a sto`   | `sto`  | `sto`                    |
    | `a stop`  | `stop` | `top`; `stop` is one now |
    | `a stops` | `s`    | `s`                      |

    Args:
      texts: what to find; all different, none empty.
    """

    def __init__(self, texts: tuple[str, ...]):
        self.texts = texts
        self._next: list[dict[str, int]] = [{}]  # by state; 0 has read nothing of any text
        self._back = [0]  # state of the next shorter end that begins some text
        self._match = [-1]  # index of the longest text that ends here
        depth = [0]
        for index, text in enumerate(texts):
            state = 0
            for character in text:
                if character not in self._next[state]:
                    self._next[state][character] = len(depth)
                    self._next.append({})
                    self._back.append(0)
                    self._match.append(-1)
                    depth.append(depth[state] + 1)
                state = self._next[state][character]
            self._match[state] = index
        # A text that is complete and that no other continues can become nothing more.
        self._open = [length if followers else 0 for length, followers in zip(depth, self._next, strict=True)]
        waiting = deque(self._next[0].values())
        while waiting:  # shorter states first
            state = waiting.popleft()
            back = self._back[state]
            if self._match[state] < 0:
                self._match[state] = self._match[back]
            self._open[state] = self._open[state] or self._open[back]
            for character, follower in self._next[state].items():
                self._back[follower] = self.step(back, character)
                waiting.append(follower)

    def step(self, state: int, character: str) -> int:
        """The state after one more character; amortised over a text, constant time."""
        while (following := self._next[state].get(character)) is None:
            if not state:
                return 0
            state = self._back[state]
        return following

    def open_length(self, state: int) -> int:
        """How many of the last characters may be the beginning of a match."""
        return self._open[state]

    def find(self, state: int, piece: str) -> tuple[int, tuple[int, int] | None]:
        """Read a piece of text.

        Args:
          state: after what was read before; 0 at first.
          piece: what comes next.

        Returns:
          The state after it, and the match that ends in it as `(start, index of the text)`, if any: that which starts
          first, and of those the one listed first. `start` counts from the piece's first character, so it is negative
          for a match that began before.
        """
        best = None
        for place, character in enumerate(piece, start=1):
            state = self.step(state, character)
            index = self._match[state]
            if index >= 0:
                found = (place - len(self.texts[index]), index)
                best = found if best is None else min(best, found)
        return state, best


@functools.lru_cache(maxsize=64)
def stop_strings(texts: tuple[str, ...]) -> StopStrings:
    """The automaton of these texts, built once for all requests that have them."""
    return StopStrings(texts)
