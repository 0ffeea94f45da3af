"""Measured costs of a round's parts on this machine, for the draft-length rule.

Knows clocks and the split model; decides nothing. A few hundred milliseconds for a small model.
"""
# B rows, T drafted tokens, U = T + 1 verified positions.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dvi.draft_length import CostTable
from dvi.drafter import Drafter
from dvi.split import SplitModel

PROFILE_CONTEXT = 128  # cached positions behind the timed passes
NUM_REPEATS = 7


@torch.no_grad()
def measure_costs(
    split: SplitModel, drafter: Drafter, *, buckets: tuple[int, ...], rows: tuple[int, ...] = (1,)
) -> CostTable:
    """Seconds of a draft step by rows, and of the rest of a round by verified positions (rows times T + 1).

    Medians of interleaved repetitions, so that a busy moment of the machine does not fall on one entry alone.
    """
    actions: dict[tuple[str, int], Callable[[], object]] = {}
    for num_rows in rows:
        actions["draft", num_rows] = _draft_step(split, drafter, num_rows)
        for num_draft_tokens in sorted({0, *buckets}):
            width = num_draft_tokens + 1
            actions["verify", num_rows * width] = _verify(split, num_rows, width)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in actions}
    for repeat in range(NUM_REPEATS + 1):
        for key, action in actions.items():
            start = time.perf_counter()
            action()
            if split.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is the warm-up
                seconds[key].append(time.perf_counter() - start)

    def table(part: str) -> dict[int, float]:
        return {size: statistics.median(times) for (name, size), times in seconds.items() if name == part}

    return CostTable(draft_step_s=table("draft"), verify_s=table("verify"))


def _context(split: SplitModel, num_rows: int) -> object:
    cache = split.make_cache(num_rows, PROFILE_CONTEXT + 64)
    for row in range(num_rows):
        cache.open_row(row, PROFILE_CONTEXT + 64)
    cache.commit([PROFILE_CONTEXT] * num_rows, rows=slice(0, num_rows))
    return cache


def _draft_step(split: SplitModel, drafter: Drafter, num_rows: int) -> Callable[[], object]:
    cache, rows = _context(split, num_rows), slice(0, num_rows)
    token_B1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=split.device)
    state = drafter.begin(torch.zeros(num_rows, split.hidden_size, dtype=split.dtype, device=split.device))

    def run() -> object:
        hidden_B1D = split.shallow(token_B1, cache, cache.place(offset=0, width=1, rows=rows))
        return drafter.step(hidden_B1D[:, 0], state, 0).argmax(-1)

    return run


def _verify(split: SplitModel, num_rows: int, width: int) -> Callable[[], object]:
    cache, rows = _context(split, num_rows), slice(0, num_rows)
    ids_BU = torch.zeros(num_rows, width, dtype=torch.int64, device=split.device)
    hidden_BUD = torch.zeros(num_rows, width, split.hidden_size, dtype=split.dtype, device=split.device)

    def run() -> object:
        # The last position's shallow pass belongs to the rest of the round: plain decoding has it too.
        split.shallow(ids_BU[:, :1], cache, cache.place(offset=width - 1, width=1, rows=rows))
        final_BUD = split.deep(hidden_BUD, ids_BU, cache, cache.place(offset=0, width=width, rows=rows))
        return split.head(final_BUD).argmax(-1).tolist()

    return run
