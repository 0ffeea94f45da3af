"""Measured costs of a round's parts on this machine, for the draft-length rule.

Knows clocks and the split model; decides nothing. A second or two, see `measure_costs`.
"""
# B rows, T drafted tokens, U = T + 1 verified positions.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dvi.draft.costs import CostTable
from dvi.hardware import seconds_of
from dvi.model.drafter import Drafter
from dvi.model.greedy import likeliest
from dvi.model.split import SplitModel
from dvi.progress import shown_as

PROFILE_CONTEXT = 128  # cached positions behind the timed passes
NUM_REPEATS = 7


@torch.no_grad()
@shown_as("measuring what a round costs")
def measure_costs(
    split: SplitModel, drafter: Drafter, *, buckets: tuple[int, ...], rows: tuple[int, ...] = (1,),
    budget_s: float = 2.0,
) -> CostTable:
    """Seconds of a draft step by rows, and of the rest of a round by verified positions (rows times T + 1).

    Medians of interleaved repetitions, so that a busy moment of the machine does not fall on one entry alone. After
    budget_s no further pass is begun, smallest batches first: a slow model gets fewer repetitions, and then fewer
    numbers of rows, which the table extrapolates. The first number of rows is always measured.

    Verified positions are timed as rectangles. A packed pass (`dvi.model.ragged`) of as many took 1.0 to 1.2 times that
    with 4 to 32 rows, T = 4 and 8, PROFILE_CONTEXT positions: its attention still covers its own, wider rectangle.
    """
    passes: list[tuple[str, int, Callable[[], object]]] = []
    for num_rows in sorted(rows):
        cache = filled_cache(split, num_rows)
        passes.append(("draft", num_rows, draft_step(split, drafter, cache, num_rows)))
        for width in sorted({1, *(t + 1 for t in buckets)}):
            passes.append(("verify", num_rows * width, rest_of_round(split, cache, num_rows, width)))
    num_required = len(passes) // len(rows)
    seconds: dict[str, dict[int, list[float]]] = {"draft": {}, "verify": {}}
    deadline_s = time.perf_counter() + budget_s
    for repeat in range(NUM_REPEATS):
        for index, (part, size, run) in enumerate(passes):
            if time.perf_counter() > deadline_s and (repeat or index >= num_required):
                break
            if repeat == 0:
                seconds_of(run, split.device)  # the warm-up
            seconds[part].setdefault(size, []).append(seconds_of(run, split.device))
    medians = {part: {size: statistics.median(times) for size, times in s.items()} for part, s in seconds.items()}
    return CostTable(draft_step_s=medians["draft"], verify_s=medians["verify"])


def filled_cache(split: SplitModel, num_rows: int) -> object:
    """PROFILE_CONTEXT positions of nothing in each row, and room for a pass behind them."""
    cache = split.make_cache(num_rows, PROFILE_CONTEXT + 64)
    for row in range(num_rows):
        cache.open_row(row, PROFILE_CONTEXT + 64)
    cache.commit([PROFILE_CONTEXT] * num_rows, rows=slice(0, num_rows))
    return cache


def draft_step(split: SplitModel, drafter: Drafter, cache: object, num_rows: int) -> Callable[[], object]:
    """One draft step: the shallow layers, the drafter, the token. Commits nothing."""
    rows = slice(0, num_rows)
    token_B1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=split.device)
    state = drafter.begin(torch.zeros(num_rows, split.hidden_size, dtype=split.dtype, device=split.device))

    def run() -> object:
        hidden_B1D = split.shallow(token_B1, cache, cache.place(offset=0, width=1, rows=rows))
        return likeliest(drafter.step(hidden_B1D[:, 0], state, 0))

    return run


def rest_of_round(split: SplitModel, cache: object, num_rows: int, width: int) -> Callable[[], object]:
    """The passes that verify width = T + 1 positions, T = 0 being a plain step, and their tokens on the host."""
    rows = slice(0, num_rows)
    ids_BU = torch.zeros(num_rows, width, dtype=torch.int64, device=split.device)
    hidden_BUD = torch.zeros(num_rows, width, split.hidden_size, dtype=split.dtype, device=split.device)

    def run() -> object:
        # The last position's shallow pass belongs to the rest of the round: plain decoding has it too.
        split.shallow(ids_BU[:, :1], cache, cache.place(offset=width - 1, width=1, rows=rows))
        final_BUD = split.deep(hidden_BUD, ids_BU, cache, cache.place(offset=0, width=width, rows=rows))
        return likeliest(split.head(final_BUD)).tolist()

    return run
