"""Measuring what planning needs to know: what this machine takes, and how well a drafter does on some prompts.

Knows clocks, the split model and the engine; decides nothing. Profiles are kept by fingerprint, see `dvi.planning.profile`.
"""
# B rows, D hidden.

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dvi.bench.machine import describe_machine
from dvi.decoding import PREFILL_CHUNK, RowState, draft_and_verify
from dvi.draft_length import FixedLength
from dvi.exact import ExactSplit
from dvi.placement import is_tensor_parallel
from dvi.planning.profile import (
    LatencyProfile,
    Overheads,
    PassSeconds,
    default_folder,
    read_profile,
    write_profile,
)
from dvi.planning.workload import Workload
from dvi.records import SamplingParams
from dvi.round_costs import CostTable
from dvi.sampling import SamplingBatch
from dvi.serving.engine import Engine
from dvi.serving.request import DraftChoice, Request
from dvi.serving.scheduler import SchedulerLimits
from dvi.speculator import EXACT_WIDTH, Prompt, SelfSpeculator
from dvi.split import SplitModel
from dvi.verification import StrictRule

MAX_ROWS, MAX_DRAFT_TOKENS = 32, 8
ROWS, DRAFT_TOKENS, WIDTHS = (1, 2, 4, 8, 16, 32), (0, 1, 2, 4, 8), (1, 16, 64, 256, PREFILL_CHUNK)
FAR_CONTEXT = 512
NUM_REPEATS = 7
BUDGET_S = 8.0
# Requests whose steps show what the engine adds: enough for a hundred steps alone and as many in company.
OVERHEAD_ROWS, OVERHEAD_PROMPT, OVERHEAD_NEW = (1, 8), 33, 48


def fingerprint_of(speculator: SelfSpeculator) -> dict[str, str | int | float | bool | None]:
    """What a profile depends on: the machine, libraries, model, drafter and how passes are made."""
    machine = describe_machine(speculator.split.device)
    config = speculator.model.config.to_json_string(use_diff=False)
    head = speculator.drafter.draft_head
    return {name: machine[name] for name in ("cpu", "cores", "threads", "capability", "gpu", "torch", "transformers")} | {
        "model": hashlib.sha256(config.encode()).hexdigest()[:16],
        "parameters": sum(p.numel() for p in speculator.model.parameters()), "dtype": str(speculator.split.dtype),
        "mode": speculator.mode, "path": speculator.split.path, "draft_vocab_size": head.vocab_size,
        "drafter": json.dumps(dataclasses.asdict(speculator.drafter.config), sort_keys=True),
    }  # fmt: skip


def obtain_profile(
    speculator: SelfSpeculator, *, split_layers: Sequence[int] = (), folder: Path | None = None,
    remeasure: bool = False, budget_s: float = BUDGET_S, on_part: Callable[[str], None] = lambda part: None,
) -> tuple[LatencyProfile, bool]:
    """The profile of this machine with these split layers (default: the speculator's), and whether anything was measured.

    What an earlier run measured on the same is taken from `folder`; what is missing is measured and added there. Other
    tensor-parallel degrees than the present one are there only if they were measured so.
    on_part: is told what is being measured.
    """
    folder, fingerprint = folder or default_folder(), fingerprint_of(speculator)
    degree, wanted = _degree(speculator), tuple(split_layers) or (speculator.split.split_layer,)
    known = None if remeasure else read_profile(folder, fingerprint)
    missing = [layer for layer in wanted if known is None or (layer, degree) not in known.passes]
    if not missing:
        return known, False
    passes = {}
    for layer in missing:
        on_part(f"rounds and prefill at split layer {layer}")
        passes[layer, degree] = measure_passes(_split_at(speculator, layer), speculator, budget_s=budget_s)
    if known is None:
        known = LatencyProfile({}, fingerprint=fingerprint)
    profile = known.with_passes(passes)
    own = speculator.split.split_layer, degree
    if own in passes:
        on_part("the engine's own work")
        profile = dataclasses.replace(profile, overheads=measure_overheads(speculator, passes[own]))
    write_profile(folder, profile)
    return profile, True


def _degree(speculator: SelfSpeculator) -> int:
    return torch.distributed.get_world_size() if is_tensor_parallel(speculator.model) else 1


def _split_at(speculator: SelfSpeculator, split_layer: int) -> SplitModel | ExactSplit:
    """The speculator's model cut elsewhere, its passes made in the same way."""
    if split_layer == speculator.split.split_layer:
        return speculator.passes
    split = SplitModel(speculator.model, split_layer=split_layer, path=speculator.split.path)
    return ExactSplit(split, width=EXACT_WIDTH) if speculator.mode == "exact" else split


@torch.no_grad()
def measure_passes(
    split: SplitModel | ExactSplit, speculator: SelfSpeculator, *, budget_s: float = BUDGET_S
) -> PassSeconds:
    """Medians of interleaved repetitions of every cell of the grid; after budget_s no more are begun, but all have one.

    Rows are of unequal lengths, as in a batch that people join and leave.
    """
    far = min(FAR_CONTEXT, speculator.max_positions // 2)
    contexts = max(far // 8, 1), far
    widths = tuple(width for width in WIDTHS if width < speculator.max_positions - far)
    drafts = tuple(t for t in DRAFT_TOKENS if t <= MAX_DRAFT_TOKENS)
    runs: dict[tuple, Callable[[], object]] = {}
    for near, context in enumerate(contexts):
        for rows in ROWS:
            start = _RoundStart(split, speculator, rows, context)
            runs |= {("round", near, rows, draft): start.round(draft) for draft in drafts}
        runs |= {("read", near, width): _reading(split, context, width) for width in widths}
    times: dict[tuple, list[float]] = {cell: [] for cell in runs}
    deadline_s = time.perf_counter() + budget_s
    for repeat in range(NUM_REPEATS):
        for cell, run in runs.items():
            if repeat and time.perf_counter() > deadline_s:
                break
            if not repeat:
                run()  # the warm-up
            start_s = time.perf_counter()
            run()
            if split.device.type == "cuda":
                torch.cuda.synchronize()
            times[cell].append(time.perf_counter() - start_s)
    median = {cell: statistics.median(seconds) for cell, seconds in times.items()}
    return PassSeconds(
        contexts=contexts, rows=ROWS, draft_tokens=drafts, widths=widths,
        round_s=tuple(tuple(tuple(median["round", c, r, t] for t in drafts) for r in ROWS) for c in (0, 1)),
        prefill_s=tuple(tuple(median["read", c, w] for w in widths) for c in (0, 1)),
    )


class _RoundStart:
    """Rows that stand before a round, again and again: nothing is committed."""

    def __init__(
        self, split: SplitModel | ExactSplit, speculator: SelfSpeculator, num_rows: int, context: int
    ) -> None:
        self._split, self._drafter = split, speculator.drafter
        capacity = context + 8 + 2 * (MAX_DRAFT_TOKENS + 1)
        self._cache = split.make_cache(num_rows, capacity)
        self._cache.set_lengths([context + row % 7 for row in range(num_rows)])
        self._state = RowState(
            slice(0, num_rows), torch.zeros(num_rows, dtype=torch.int64, device=split.device),
            torch.zeros(num_rows, split.hidden_size, dtype=split.dtype, device=split.device),
            SamplingBatch([SamplingParams()] * num_rows, vocab_size=split.vocab_size, device=split.device), None,
        )

    def round(self, num_draft_tokens: int) -> Callable[[], object]:
        policy, rule = FixedLength(num_draft_tokens), StrictRule()

        def run() -> object:
            return draft_and_verify(
                self._split, self._drafter, self._cache, self._state, policy, num_draft_tokens, rule,
                wants_log_probs=False,
            ).for_host_BH.tolist()

        return run


def _reading(split: SplitModel | ExactSplit, context: int, width: int) -> Callable[[], object]:
    cache = split.make_cache(1, context + width)
    cache.set_lengths([context])
    ids_1Q = torch.zeros(1, width, dtype=torch.int64, device=split.device)

    def run() -> object:
        placement = cache.place(offset=0, width=width)
        return split.deep(split.shallow(ids_1Q, cache, placement), ids_1Q, cache, placement)

    return run


def measure_overheads(speculator: SelfSpeculator, passes: PassSeconds) -> Overheads:
    """What the engine's steps take beyond their passes, from the steps of some requests with it, by least squares."""
    terms, seconds = [], []
    for num_rows in OVERHEAD_ROWS:
        num_draft_tokens = min(speculator.num_draft_tokens, MAX_DRAFT_TOKENS)
        base_R, growth_R = passes.rounds(num_rows, num_draft_tokens)
        read_W, _ = passes.prefill(OVERHEAD_PROMPT)
        engine = Engine(
            speculator, SchedulerLimits(max_rows=num_rows, max_waiting=4 * num_rows), wants_transitions=False,
            costs=CostTable(draft_step_s={1: base_R[1]}, verify_s={1: base_R[1]}),
        )
        num_requests = 2 * num_rows + 1
        for index in range(num_requests):
            engine.add(_request(index, num_draft_tokens, speculator))
        num_ended = 0
        while engine.has_work:
            step = engine.step()
            report = step.report
            num_new = report.rounds.new_tokens
            num_ended += (ended := sum(output.finish_reason is not None for output in step.outputs))
            context = OVERHEAD_PROMPT + OVERHEAD_NEW / 2
            passes_s = base_R[report.num_rows] + growth_R[report.num_rows] * context
            passes_s += report.num_prefill_tokens / (OVERHEAD_PROMPT - 1) * read_W[OVERHEAD_PROMPT - 1]
            terms.append((1.0, report.num_rows, num_new, ended))
            seconds.append(report.seconds - passes_s)
    return Overheads(*_least_squares(np.array(terms, dtype=np.float64), np.array(seconds)))


def _request(index: int, num_draft_tokens: int, speculator: SelfSpeculator) -> Request:
    generator = torch.Generator().manual_seed(index)
    prompt_ids = torch.randint(speculator.split.vocab_size, (OVERHEAD_PROMPT,), generator=generator).tolist()
    return Request(
        request_id=index, prompt_ids=prompt_ids, params=SamplingParams(max_new_tokens=OVERHEAD_NEW, ignore_eos=True),
        draft=DraftChoice(policy="fixed", num_draft_tokens=num_draft_tokens), arrived_s=time.perf_counter(),
    )


def _least_squares(terms_NK: np.ndarray, seconds_N: np.ndarray) -> list[float]:
    """Coefficients >= 0 of least absolute weight on outliers: steps beyond the 95th percentile are interruptions.

    A term whose coefficient comes out negative is left out, the most negative first.
    """
    usual = seconds_N <= np.quantile(seconds_N, 0.95)
    terms_NK, seconds_N = terms_NK[usual], seconds_N[usual]
    kept = list(range(terms_NK.shape[1]))
    found = np.zeros(terms_NK.shape[1])
    while kept:
        solved = np.linalg.lstsq(terms_NK[:, kept], seconds_N, rcond=None)[0]
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return found.tolist()


def measure_workload(
    speculator: SelfSpeculator, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int = 8,
    learner_share: float = 0.0, on_answer: Callable[[], None] = lambda: None,
) -> Workload:
    """Lengths and acceptance of the model's own greedy answers to the prompts, drafted for as deep as plans may go.

    on_answer: called for each answer. Raises ValueError as `SelfSpeculator.generate` does.
    """
    policy = FixedLength(MAX_DRAFT_TOKENS)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    stats = []
    for result in speculator.generate(
        list(prompts), params, batch_size=batch_size, policy=policy, keep_transitions=False
    ):
        stats.append(result.stats)
        on_answer()
    return Workload.of_counts(stats, split_layer=speculator.split.split_layer, learner_share=learner_share)
