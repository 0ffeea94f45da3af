"""Text as it grows: token ids to pieces, without ever printing half a character, and stop strings inside a piece.

Knows a tokenizer; knows nothing of models or rounds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from dvi.model.end_tokens import named_in

REPLACEMENT = "\ufffd"


def check_token_ids(
    token_ids: Iterable[int], *, num_known: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raises ValueError naming the first id that the model has no embedding for.

    num_known: ids below it have one. A tokenizer may have more tokens than its model: an added one, such as a [PAD],
    for which the model was never resized.
    """
    for token_id in token_ids:
        if isinstance(token_id, int) and 0 <= token_id < num_known:
            continue
        is_token = tokenizer is not None and isinstance(token_id, int) and 0 <= token_id < len(tokenizer)
        token = tokenizer.decode([token_id]) if is_token else None
        spelled = "" if token is None else f" ({token!r} of the tokenizer); leave it out of the text"
        raise ValueError(
            f"token ids must be integers in 0..{num_known - 1}, as the model has no others, got {token_id!r}{spelled}"
        )


class TextStream:
    """The text of one growing list of token ids.

    A byte-level token may hold part of a character: such text is held back until the character is complete or the
    stream is closed. Special tokens are not shown, but a stop string may name one, alone or amid other text, and is
    found where the token comes. Cost per token does not grow with the text: only the ids since the last emitted piece,
    and that piece for its context, are decoded.

    offsets   where in the text each token begins, in characters; parts of one character all begin where it does. Behind
              a stop string they are the text's end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop_strings: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._named = named_in(stop_strings, tokenizer)
        self._context_ids: list[int] = []
        self._pending_ids: list[int] = []
        self._num_read = 0
        # With the special tokens that stop strings name as they are written, and (start, length) of each.
        self._written = ""
        self._hidden: list[tuple[int, int]] = []
        self._num_shown = self._num_held = 0  # characters of the text, and whole ones that wait with half a one
        self.offsets: list[int] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """What there is so far, before the stop string that ended it."""
        return self._shown(self._written)

    def push(self, token_id: int) -> bool:
        """Adds one token; True when the text now contains a stop string, which has been cut off with all after it."""
        self.offsets.append(self._num_shown + self._num_held)
        if token_id in self._named:
            word = self._named[token_id]
            self._hidden.append((len(self._written), len(word)))
            self._num_shown -= len(word)
            self._write(word)
            return self.is_stopped
        self._pending_ids.append(token_id)
        piece = self._decode_pending()
        if piece and not piece.endswith(REPLACEMENT):
            self._emit(piece)
        self._num_held = len(piece.rstrip(REPLACEMENT)) if self._pending_ids else 0
        return self.is_stopped

    def close(self) -> None:
        """Emits what was held back as an incomplete character."""
        piece = self._decode_pending() if self._pending_ids and not self.is_stopped else ""
        if piece:
            self._emit(piece)

    def read(self, *, is_final: bool = False) -> str:
        """New text since the last read; keeps back what may yet turn out to be the beginning of a stop string."""
        written = self._written
        if not is_final and not self.is_stopped:
            num_held = max((_overlap(written, stop) for stop in self._stop_strings), default=0)
            written = written[: len(written) - num_held]
        shown = self._shown(written)
        piece, self._num_read = shown[self._num_read :], max(len(shown), self._num_read)
        return piece

    @property
    def num_told(self) -> int:
        """How many tokens begin in what was read so far: the others may yet turn out to be a stop string's."""
        return bisect_left(self.offsets, self._num_read)

    def _shown(self, written: str) -> str:
        """The beginning of what is written without its special tokens."""
        for start, length in reversed(self._hidden):
            written = written[:start] + written[start + length :]
        return written

    def _decode_pending(self) -> str:
        # Decoded with the previous piece in front: some tokenizers drop the space of a text's first word.
        context = self._decode(self._context_ids)
        return self._decode(self._context_ids + self._pending_ids)[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _emit(self, piece: str) -> None:
        self._write(piece)
        self._context_ids, self._pending_ids = self._pending_ids, []

    def _write(self, piece: str) -> None:
        longest = max((len(stop) for stop in self._stop_strings), default=0)
        search_from = max(len(self._written) - longest, 0)
        self._written += piece
        self._num_shown += len(piece)
        found = [self._written.find(stop, search_from) for stop in self._stop_strings]
        if any(at >= 0 for at in found):
            self._written = self._written[: min(at for at in found if at >= 0)]
            self.is_stopped = True
            self._num_shown = len(self.text)
            self.offsets = [min(offset, self._num_shown) for offset in self.offsets]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
