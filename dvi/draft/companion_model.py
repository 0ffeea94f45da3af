"""A companion that is a model of its own: a small language model with the verifier's tokenizer.

Knows token ids and the rows' texts, nothing of drafters but their vocabulary. It keeps a cache beside the batch's, row
by row, that catches up with what each round has committed.
"""
# B rows, D hidden, Q positions of one pass, V the drafter's vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvi.draft.companions import Row
from dvi.model.devices import load_model
from dvi.model.drafter import MAX_DEPTH, Drafter
from dvi.model.pretrained import read_config, read_tokenizer
from dvi.model.split import SplitModel
from dvi.model.transfers import to_device, to_host

PREFILL_CHUNK = 512  # positions of one pass, as for the verifier
# A round leaves a row one token behind at most, plain rounds one each; what lacks more is read in a pass of its own.
MAX_RAGGED = 4
MAX_BATCHES = 2  # that may share one policy: rows that sample by rejection, and rows that share Gumbel noise
PROBE_TEXTS = ("The quick brown fox, 1234.5!", "def f(x):\n\treturn x ** 2\n", "Übergröße naïve 東京 🙂")


class ModelCompanion:
    """Logits of an external model at every drafted position. Rows are told apart by their requests' numbers."""

    def __init__(self, split: SplitModel) -> None:
        """split: the model, cut at layer 0; several companions may share it."""
        self._split = split
        self._drafter: Drafter | None = None
        self._batches: list[_CompanionRows] = []  # the one followed last at the end

    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        self._drafter = drafter
        request_ids = {row.request_id for row in rows}
        batch = next((b for b in self._batches if b.has_any(request_ids)), None)
        if batch is not None:
            self._batches.remove(batch)
        elif len(self._batches) == MAX_BATCHES:
            batch = self._batches.pop(0)
        else:
            batch = _CompanionRows(self._split)
        self._batches.append(batch)
        batch.follow(rows)

    def begin(self, anchor_BD: Tensor) -> _CompanionRows:
        batch = self._batches[-1]
        batch.catch_up()
        return batch

    def step(
        self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: _CompanionRows, depth: int
    ) -> Tensor:
        return self._drafter.draft_head.gather_logits(state.step(token_B, depth))


class _CompanionRows:
    """The rows of one batch: row b of the cache is row b of the batch, and holds all of its text but the newest token.

    Host bookkeeping in `follow`, at every round; passes in `catch_up`, only where something is drafted.
    """

    def __init__(self, split: SplitModel) -> None:
        self._split = split
        self._cache = split.make_cache(1, 0)
        # As of the newest `follow`, and what steps have fed since: the texts' newest tokens, then drafts.
        self._request_ids: list[int] = []
        self._texts: list[list[int]] = []
        self._fed: list[Tensor] = []

    def follow(self, rows: Sequence[Row]) -> None:
        texts, lengths = {row.request_id: row.text_ids for row in rows}, list(self._cache.lengths)
        # A round has ended, so nothing waits for this. What was not fed, another policy's rounds decoded.
        fed = to_host(torch.stack(self._fed, 1)).tolist() if self._fed else [[]] * len(self._texts)
        for row, (request_id, old, tokens) in enumerate(zip(self._request_ids, self._texts, fed, strict=True)):
            new = texts.get(request_id, [])
            if new[: len(old)] == old:
                lengths[row] += _num_equal(tokens, new[len(old) - 1 : -1])
            else:
                lengths[row] = 0
        self._cache.set_lengths(lengths)
        for row, request_id in enumerate(texts):
            self._seat(row, request_id)
        del self._request_ids[len(texts) :]
        self._texts, self._fed = list(texts.values()), []

    def _seat(self, row: int, request_id: int) -> None:
        """Puts the request's row there, an empty one if it has none. Rows before are seated already."""
        if request_id not in self._request_ids:
            self._cache.open_row(len(self._request_ids), 0)
            self._request_ids.append(request_id)
        source = self._request_ids.index(request_id)
        if source != row:
            self._cache.swap_rows(row, source)
            self._request_ids[source] = self._request_ids[row]
            self._request_ids[row] = request_id

    def has_any(self, request_ids: set[int]) -> bool:
        return not request_ids.isdisjoint(self._request_ids)

    def catch_up(self) -> None:
        """Reads what the texts have that the cache lacks, but for their newest tokens."""
        self._make_room(max(len(text) for text in self._texts) + MAX_DEPTH)
        for row, text in enumerate(self._texts):
            while len(text) - 1 - self._cache.lengths[row] > MAX_RAGGED:
                start = self._cache.lengths[row]
                self._read([text[start : len(text) - 1][:PREFILL_CHUNK]], slice(row, row + 1))
        pairs = zip(self._texts, self._cache.lengths, strict=False)
        if any(missing := [text[length:-1] for text, length in pairs]):
            self._read(missing, slice(0, len(missing)))

    def _make_room(self, num_positions: int) -> None:
        if num_positions > self._cache.capacity:
            lengths = list(self._cache.lengths)
            self._cache.open_row(0, num_positions)
            self._cache.set_lengths(lengths)

    def _read(self, token_ids: list[list[int]], rows: slice) -> None:
        """One pass over rows of unequal width; what fills up the shorter ones is not committed."""
        widths = [len(ids) for ids in token_ids]
        filled = [ids + [0] * (max(widths) - len(ids)) for ids in token_ids]
        self._final(to_device(filled, self._split.device), rows, offset=0)
        self._cache.commit(widths, rows=rows)

    def step(self, token_B: Tensor, depth: int) -> Tensor:
        """Logits [B, V of the model] after each row's text and the drafts before this depth, of which this is the last.

        At depth 0 the token is the text's newest.
        """
        self._fed.append(token_B.clone())  # the first is a buffer that the round rewrites
        return self._split.head(self._final(token_B[:, None], slice(0, len(token_B)), offset=depth))[:, 0]

    def _final(self, token_ids_BQ: Tensor, rows: slice, *, offset: int) -> Tensor:
        placement = self._cache.place(offset=offset, width=token_ids_BQ.shape[1], rows=rows)
        hidden_BQD = self._split.shallow(token_ids_BQ, self._cache, placement)
        return self._split.deep(hidden_BQD, token_ids_BQ, self._cache, placement)


def _num_equal(one: list[int], other: list[int]) -> int:
    """Of their leading tokens."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def load_companion(
    name_or_path: str | Path, *, split: SplitModel, tokenizer: PreTrainedTokenizerBase | None, max_positions: int
) -> SplitModel:
    """The companion of a verifier with this split and tokenizer, in its dtype and on its device.

    max_positions: the verifier's context. Raises ValueError when the two do not fit: another vocabulary, a shorter
    context.
    """
    config = read_config(name_or_path)
    text = config.get_text_config(decoder=True)
    if text.vocab_size != split.vocab_size:
        raise ValueError(
            f"companion_model must have the model's vocabulary of {split.vocab_size} tokens, got {text.vocab_size} in "
            f"{name_or_path}; try a smaller model of the same family, or companion='self'"
        )
    context = getattr(text, "max_position_embeddings", None) or max_positions
    if context < max_positions:
        raise ValueError(
            f"companion_model must have the model's context of {max_positions} positions, got {context} in "
            f"{name_or_path}; try a model with a longer one, or companion='self'"
        )
    if tokenizer is not None:
        theirs = read_tokenizer(name_or_path)
        differing = [t for t in PROBE_TEXTS if theirs(t)["input_ids"] != tokenizer(t)["input_ids"]]
        if differing or theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"companion_model must have the model's tokenizer; that of {name_or_path} has other tokens or ids"
                + (f", as for {differing[0]!r}" if differing else "") + "; try a smaller model of the same family"
            )
    model = load_model(name_or_path, config, placement="single", device=str(split.device), dtype=split.dtype)
    return SplitModel(model, split_layer=0)
