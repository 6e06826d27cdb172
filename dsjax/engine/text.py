"""The text of one sequence as its tokens come: whole characters, and nothing that a stop text may still take back."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsjax.engine.sampling_params import SamplingParams
from dsjax.engine.stop_strings import stop_strings

if TYPE_CHECKING:
    from dsjax.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text that may be shown, and ends it at a stop text.

    The text ends with the first token that completes a stop text; of those that are complete by then, the one that
    starts first counts, and of several that start there the one listed first. So the outcome does not depend on how
    tokens are cut into calls. A stop text that was complete after `min_tokens` tokens does not count.

    The pieces joined are `text`. Each token costs the same however many came before and however long stop texts are.

    Args:
      tokenizer: whose tokens come; `None` gives no text and only counts tokens.
      params: the request's; of them `stop`, `min_tokens`, `skip_special_tokens` and `include_stop_str_in_output`.

    Attributes:
      stopped: the stop text that ended the sequence, or `None`.
      tokens_used: tokens that belong to the sequence; none after that which completed the stop text.
      ended: nothing that comes after this counts.
    """

    def __init__(self, tokenizer: "Tokenizer | None", params: SamplingParams):
        self.stopped: str | None = None
        self.tokens_used = 0
        self.ended = False
        self._decoder = None
        if tokenizer is not None:
            from dsjax.tokenizer import StreamDecoder  # with libraries that token ids alone do not need

            self._decoder = StreamDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = stop_strings(tuple(params.stop)) if params.stop else None
        self._state = 0
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._held: deque[str] = deque()
        self._held_length = 0
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All that was shown so far."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def push(self, ids: Sequence[int], *, stop_id: bool = False, final: bool = False) -> str:
        """Take the next tokens.

        Args:
          ids: token ids; those that come after the end are ignored.
          stop_id: the last of them is a stop id, so they are the final ones. It is part of the text only with
            `include_stop_str_in_output`, and then, if it is a control token, only without `skip_special_tokens`.
          final: no more will come, whatever the reason.

        Returns:
          The text that may be shown now; may be empty.
        """
        if self.ended:
            return ""
        silent = stop_id and not self._include_stop
        shown = self._read(ids[:-1] if silent else ids)
        if self.stopped is None and (final or stop_id):
            shown += self._finish()
        if self.stopped is None:
            self.tokens_used += silent
        if shown:
            self._shown.append(shown)
        return shown

    def _read(self, ids: Sequence[int]) -> str:
        if self._decoder is None or self._stops is None:
            self.tokens_used += len(ids)
            return "" if self._decoder is None else self._decoder.push(ids)
        shown = []
        for token in ids:
            self.tokens_used += 1
            shown.append(self._watch(self._decoder.push((token,))))
            if self.stopped is not None:
                break
        return "".join(shown)

    def _finish(self) -> str:
        last = "" if self._decoder is None else self._decoder.finish()
        if self._stops is not None:
            last = self._watch(last)
            if self.stopped is None:
                last += self._release(self._held_length)
        self.ended = True
        return last

    def _watch(self, piece: str) -> str:
        """What may be shown after a piece of text has come, which is all that no stop text can begin in."""
        stops = self._stops
        if stops is None or not piece:
            return piece
        self._state, match = stops.find(self._state, piece)
        before = self._held_length
        self._held.append(piece)
        self._held_length += len(piece)
        if match is not None and self.tokens_used > self._min_tokens:
            start, index = match
            self.stopped, self.ended = stops.texts[index], True
            return self._release(before + start + (len(self.stopped) if self._include_stop else 0))
        return self._release(self._held_length - stops.open_length(self._state))

    def _release(self, length: int) -> str:
        """The first characters of what is held back, which then no longer is."""
        shown = []
        self._held_length -= length
        while length:
            piece = self._held.popleft()
            if len(piece) > length:
                self._held.appendleft(piece[length:])
                piece = piece[:length]
            shown.append(piece)
            length -= len(piece)
        return "".join(shown)
