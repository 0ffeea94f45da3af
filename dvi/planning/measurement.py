"""Measuring what planning needs to know: what this machine takes, and how well a drafter does on some prompts.

Knows clocks, a speculator and the engine; decides nothing. Profiles are kept by fingerprint: `dvi.planning.profile`.
"""
# B rows.

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dvi.decode.batch import PREFILL_CHUNK
from dvi.decode.prompts import Prompt
from dvi.decode.sequence import Sequence as Row
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import FixedLength
from dvi.hardware import describe_machine, seconds_of
from dvi.model.devices import is_tensor_parallel
from dvi.model.exact import passes_for
from dvi.model.native.library import kernels_version
from dvi.planning.profile import (
    LatencyProfile,
    Overheads,
    PassSeconds,
    default_folder,
    read_profile,
    write_profile,
)
from dvi.planning.workload import Workload
from dvi.progress import doing, each
from dvi.records import SamplingParams
from dvi.serving.engine import Engine
from dvi.serving.request import DraftChoice, Request
from dvi.serving.scheduler import SchedulerLimits

ROWS, DRAFT_TOKENS, WIDTHS = (1, 2, 4, 8, 16, 32), (0, 1, 2, 4, 8), (1, 16, 64, 256, PREFILL_CHUNK)
FAR_CONTEXT = 512
RAGGED = 16  # rows differ in length by up to so many positions: equal ones would take a shorter way
NUM_REPEATS, LOCK_STEP_REPEATS = 7, 3
BUDGET_S = 8.0
# Requests whose steps show what the engine adds, alone and in company, as (rows, requests); prompts that the prefix
# cache keeps a part of.
ENGINE_LOADS, ENGINE_PROMPT, ENGINE_NEW = ((1, 2), (8, 12)), 129, 24
WORKLOAD_S = 20.0


def fingerprint_of(speculator: SelfSpeculator) -> dict[str, str | int | float | bool | None]:
    """What a profile depends on: the machine, libraries, model, drafter and how passes are made."""
    machine = describe_machine(speculator.split.device)
    config = speculator.model.config.to_json_string(use_diff=False)
    drafter = dataclasses.asdict(speculator.drafter.config)
    names = ("cpu", "cores", "threads", "capability", "gpu", "torch", "transformers")
    return {name: machine[name] for name in names} | {
        "model": hashlib.sha256(config.encode()).hexdigest()[:16],
        "parameters": sum(p.numel() for p in speculator.model.parameters()), "dtype": str(speculator.split.dtype),
        "width": speculator.passes.fixed_width, "path": speculator.split.path, "kernels": kernels_version(),
        "lossless": speculator.rule.is_lossless,
        "drafter": json.dumps(drafter, sort_keys=True), "draft_vocab_size": speculator.drafter.draft_head.vocab_size,
    }  # fmt: skip


def obtain_profile(
    speculator: SelfSpeculator, *, split_layers: Sequence[int] = (), folder: Path | None = None,
    remeasure: bool = False, budget_s: float = BUDGET_S,
) -> tuple[LatencyProfile, bool]:
    """The profile of this machine with these split layers (default: the speculator's); whether any was measured now.

    What an earlier run measured on the same is taken from `folder`; what is missing is measured and added there. Other
    tensor-parallel degrees than the present one are there only if a run of theirs has measured them. Of several ranks
    all must call it together; each measures, and rank 0 writes.
    budget_s: of each split layer; every pass is timed once whatever it takes.
    """
    folder, fingerprint = folder or default_folder(), fingerprint_of(speculator)
    degree, rank = _degree_and_rank(speculator)
    known = None if remeasure else read_profile(folder, fingerprint)
    if known is None:
        with doing("measuring the engine's own work"):
            known = LatencyProfile({}, measure_overheads(speculator), fingerprint)
    wanted = split_layers or (speculator.split.split_layer,)
    missing = [layer for layer in wanted if (layer, degree) not in known.passes]
    for layer in missing:
        with doing(f"measuring rounds and prompts at split layer {layer}"):
            known = known.with_passes({(layer, degree): measure_passes(speculator, layer, budget_s=budget_s)})
    if missing and rank == 0:
        write_profile(folder, known)
    return known, bool(missing)


def _degree_and_rank(speculator: SelfSpeculator) -> tuple[int, int]:
    if is_tensor_parallel(speculator.model):
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def measure_passes(speculator: SelfSpeculator, split_layer: int, *, budget_s: float = BUDGET_S) -> PassSeconds:
    """Medians of rounds and of prompts being read, by the batch that serves, with the model cut at this layer.

    Repetitions are interleaved, so that a busy moment of the machine does not fall on one pass alone. After budget_s
    none begins; ranks in lock-step, whose clocks differ, make LOCK_STEP_REPEATS.
    """
    passes = speculator.passes
    if split_layer != speculator.split.split_layer:
        other = speculator.split.cut_at(split_layer)
        passes, _ = passes_for(other, speculator.mode)
    speculator = speculator.afresh(passes=passes)
    far = min(FAR_CONTEXT, speculator.max_positions // 2)
    contexts = max(far // 8, 1), far
    widest = min(speculator.prefill_chunk, speculator.max_positions - far - 2)
    widths = tuple(sorted({min(width, widest) for width in WIDTHS}))
    benches = [_Bench(speculator, context) for context in contexts]
    seconds: dict[tuple[int, ...], list[float]] = {}
    is_lock_step = is_tensor_parallel(speculator.model)
    deadline_s = math.inf if is_lock_step else time.perf_counter() + budget_s
    for repeat in range(LOCK_STEP_REPEATS if is_lock_step else NUM_REPEATS):
        if repeat and time.perf_counter() > deadline_s:
            break
        for index, bench in enumerate(benches):
            for size, run in bench.runs(widths):
                if not repeat:
                    run()  # the warm-up
                seconds.setdefault((index, *size), []).append(seconds_of(run, passes.device))
    median = {cell: statistics.median(times) for cell, times in seconds.items()}
    return PassSeconds(
        contexts=contexts, rows=ROWS, draft_tokens=DRAFT_TOKENS, widths=widths,
        round_s=tuple(tuple(tuple(median[c, r, t] for t in DRAFT_TOKENS) for r in ROWS) for c in range(2)),
        prefill_s=tuple(tuple(median[c, w] for w in widths) for c in range(2)),
    )


class _Bench:
    """A batch whose rounds and readings are timed, always with as many positions cached, of no particular text."""

    def __init__(self, speculator: SelfSpeculator, context: int) -> None:
        self._context = context
        self._batch = speculator.open_batch(max_rows=ROWS[-1], policy=FixedLength(0), wants_transitions=True)

    def runs(self, widths: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Callable[[], object]]]:
        """(rows, draft tokens) with a round, (width,) with a reading; each to be run before the next is asked for."""
        batch = self._batch
        for width in widths:
            yield (width,), lambda width=width: self._read(width)
        for row in range(ROWS[-1]):
            sequence = self._open(self._context + row * 7 % RAGGED, 1)
            batch.prefill(sequence, 1)
        wanted = list(batch.cache.lengths)
        for num_rows in reversed(ROWS):
            while len(batch.sequences) > num_rows:
                batch.remove(batch.sequences[-1])
            for num_draft_tokens in DRAFT_TOKENS:
                batch.policy = FixedLength(num_draft_tokens)

                def round_again() -> None:
                    rows = slice(0, len(batch.sequences))
                    pairs = zip(wanted[rows], batch.cache.lengths[rows], strict=True)
                    batch.cache.commit([want - have for want, have in pairs], rows=rows)
                    batch.round()

                yield (num_rows, num_draft_tokens), round_again
        batch.remove(batch.sequences[0])

    def _read(self, width: int) -> None:
        sequence = self._open(self._context, width)
        self._batch.prefill(sequence, width)
        self._batch.remove(sequence)

    def _open(self, context: int, width: int) -> Row:
        """A row with so many positions cached, and so many left to read."""
        sequence = Row(0, [0] * (context + width + 1), SamplingParams(), lambda token_id: None, max_new_tokens=1)
        self._batch.open(sequence)
        sequence.max_new_tokens = 2**31  # the row has room for one round, which is all that is ever kept
        row = self._batch.row_of(sequence)
        self._batch.cache.commit([context], rows=slice(row, row + 1))
        return sequence


def measure_overheads(speculator: SelfSpeculator) -> Overheads:
    """What the engine's steps take beside rounds and readings, by least squares over the steps of some requests."""
    terms, seconds = [], []
    for num_rows, num_requests in ENGINE_LOADS:
        for num_draft_tokens in (0, DRAFT_TOKENS[-2]):
            engine = Engine(
                speculator, SchedulerLimits(max_rows=num_rows, max_waiting=num_requests),
                costs=CostTable(draft_step_s={1: 1.0}, verify_s={1: 1.0}),  # for figures that nobody reads here
            )
            for index in range(num_requests):
                engine.add(_request(index, num_draft_tokens, speculator))
            while engine.has_work:
                result = engine.step()
                report = result.report
                num_ended = sum(output.finish_reason is not None for output in result.outputs)
                terms.append((1, report.num_rows, report.rounds.new_tokens, num_ended))
                seconds.append(report.seconds - report.rounds.decode_s - report.rounds.prefill_s)
    return Overheads(*_least_squares(np.array(terms, dtype=np.float64), np.array(seconds)))


def _request(index: int, num_draft_tokens: int, speculator: SelfSpeculator) -> Request:
    generator = torch.Generator().manual_seed(index)
    length = min(ENGINE_PROMPT, speculator.max_positions // 2)
    prompt_ids = torch.randint(speculator.split.vocab_size, (length,), generator=generator).tolist()
    return Request(
        request_id=index, prompt_ids=prompt_ids, params=SamplingParams(max_new_tokens=ENGINE_NEW, ignore_eos=True),
        draft=DraftChoice(policy="fixed", num_draft_tokens=num_draft_tokens), arrived_s=time.perf_counter(),
    )


def _least_squares(terms_NK: np.ndarray, seconds_N: np.ndarray) -> list[float]:
    """Coefficients, none below 0; steps beyond the 95th percentile are left out, as interruptions.

    Where one comes out negative, that term is left out, the most negative first.
    """
    is_usual = seconds_N <= np.quantile(seconds_N, 0.95)
    kept, found = list(range(terms_NK.shape[1])), np.zeros(terms_NK.shape[1])
    while kept:
        solved = np.linalg.lstsq(terms_NK[is_usual][:, kept], seconds_N[is_usual], rcond=None)[0]
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return found.tolist()


def measure_workload(
    speculator: SelfSpeculator, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int = 8,
    learner_share: float = 0.0, budget_s: float = WORKLOAD_S,
) -> Workload:
    """Lengths and acceptance of the model's own greedy answers, drafted for as deep as is measured, as the drafter is.

    After budget_s no further prompt is begun. Raises ValueError as `SelfSpeculator.generate` does.
    """
    deadline_s = time.perf_counter() + budget_s

    def in_time() -> Iterator[Prompt]:
        for index, prompt in enumerate(prompts):
            if index and time.perf_counter() > deadline_s:
                return
            yield prompt

    stats = []
    results = speculator.generate(
        in_time(), SamplingParams(max_new_tokens=max_new_tokens), batch_size=batch_size,
        policy=FixedLength(DRAFT_TOKENS[-1]), keep_transitions=False,
    )  # fmt: skip
    for result in each(results, "decoding prompts", noun="prompts", total=len(prompts)):
        stats.append(result.stats)
    return Workload.of_counts(stats, split_layer=speculator.split.split_layer, learner_share=learner_share)
