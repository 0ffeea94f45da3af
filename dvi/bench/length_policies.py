"""Length policies side by side: one process, one stream of prompts, batches that stay full, turns A B B A.

Knows speculators, policies and the folder of a run; `dvi.bench.length_report` makes figures of it. At each batch size
every policy has rows of its own, and they are always full: where an answer ends, the stream's next prompt begins.
Policies take turns by *slices*, stretches of so many tokens, and a slice's speed is compared with that of the fixed
length's slice of the same stretch. The clock runs in rounds only; what a policy measures, asks its companion or works
out between two rounds is in it, prefills are not. A policy that learns goes on learning from slice to slice.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dvi.bench.length_report import FIXED, PLAIN_DECODING, Line, make_report
from dvi.bench.questions import BUNDLED_QUESTIONS
from dvi.bench.records import written
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.catalogue import GOODPUT_BUCKETS, goodput_buckets
from dvi.draft.companion_length import CompanionLength
from dvi.draft.length_policies import LengthPolicy
from dvi.draft.measure_costs import measure_costs
from dvi.hardware import describe_machine, wait_for
from dvi.inspect.audit import find_divergence, logits_in_blocks
from dvi.progress import Stage, doing
from dvi.records import RoundStats, SamplingParams
from dvi.settings import LengthSettings
from dvi.traffic import NoPromptsError, read_prompts
from dvi.whole_files import write_whole

RUN_FILE, RESULTS_FILE = "run.json", "results.jsonl"
# Answers of a slice, or one for each row where there are more: a slice of one answer would follow its text.
ANSWERS_PER_SLICE = 8
COSTS_BUDGET_S = 20.0  # enough for every number of rows: a table that extrapolates would judge the policy for it


def check_lengths(settings: LengthSettings) -> None:
    """Raises ValueError for settings that cannot make a run."""
    for name, least in (("max_new_tokens", 1), ("repetitions", 1), ("warmups", 0), ("limit", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be >= {least}, got {getattr(settings, name)}")
    most, sizes = GOODPUT_BUCKETS[-1], settings.batch_sizes
    if not 1 <= settings.num_draft_tokens <= most:
        raise ValueError(f"num_draft_tokens must be in 1..{most}, got {settings.num_draft_tokens}; try 4")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch sizes must be >= 1, got {sizes}; try 1,2,4")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"batch sizes must differ, got {sizes}")
    if ("model" in settings.companions) != (settings.companion_model is not None):
        raise ValueError(
            "companions 'model' and companion_model, its folder or hub id, go together, got "
            f"{', '.join(settings.companions) or 'none'} and {settings.companion_model}"
        )
    _sampling(settings, seed=0)  # checks the temperature


def _num_answers(settings: LengthSettings, batch_size: int) -> int:
    """Of a slice of all policies."""
    num_companions = len(settings.companions) if "companion" in settings.policies else 0
    num_policies = 2 + len(set(settings.policies) - {"companion"}) + num_companions
    return num_policies * max(batch_size, ANSWERS_PER_SLICE)


def _sampling(settings: LengthSettings, *, seed: int) -> SamplingParams:
    return SamplingParams(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, seed=seed)


def bench_lengths(settings: LengthSettings, folder: Path, *, console: Console) -> dict[str, Any]:
    """`run_lengths` with the speculator that the settings name. Raises ValueError where they cannot make a run."""
    check_lengths(settings)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    speculator = SelfSpeculator.from_pretrained(
        settings.model, adapter=settings.adapter, split_layer=settings.split_layer, dtype=settings.dtype,
        device=settings.device, num_draft_tokens=settings.num_draft_tokens,
        companion="self" if settings.companion_model is None else "model", companion_model=settings.companion_model,
    )
    return run_lengths(speculator, settings, folder, console=console)


def run_lengths(
    speculator: SelfSpeculator, settings: LengthSettings, folder: Path, *, console: Console
) -> dict[str, Any]:
    """Measures what was asked and is not in `folder` yet, and returns the report's dict. Leaves in the folder:

    run.json       settings, machine, command
    results.jsonl  one line for each policy, batch size and repetition
    report.json    figures, and lengths.png: see `dvi.bench.length_report`

    Raises ValueError for a folder that holds a run of other settings, and prompts that do not fit.
    """
    prompts = _encode_prompts(speculator, settings)
    run = _open(folder, _describe(speculator, settings))
    path = folder / RESULTS_FILE
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    num_slices = settings.warmups + settings.repetitions
    num_answers = sum(_num_answers(settings, batch_size) * num_slices for batch_size in settings.batch_sizes)
    console.print(f"about {num_answers:,} answers to come; how long they take shows after the first", soft_wrap=True)
    with doing("lengths", total=num_answers, noun="answers") as stage:
        for batch_size in settings.batch_sizes:
            num_done = sum(line["batch_size"] == batch_size and line["policy"] == FIXED for line in lines)
            stage.name(f"batch {batch_size}")
            if num_done == settings.repetitions:
                stage.skip(_num_answers(settings, batch_size) * num_slices)
                continue
            stage.skip(_num_answers(settings, batch_size) * num_done)
            for new_lines in _measure(
                speculator, prompts, settings, batch_size=batch_size, num_done=num_done, stage=stage
            ):
                if new_lines:
                    lines += new_lines
                    write_whole(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return make_report(folder, run, lines, console=console)


def make_policies(
    speculator: SelfSpeculator, settings: LengthSettings, *, batch_size: int
) -> dict[str, LengthPolicy]:
    """Fresh policies for so many rows by the names they are shown under, plain decoding and the fixed length first.

    Those that weigh costs weigh the same ones.
    """
    rows = (*(r for r in (1, 2, 4, 8, 16) if r < batch_size), batch_size)
    measured = measure_costs(
        speculator.passes, speculator.drafter, buckets=goodput_buckets(settings.num_draft_tokens), rows=rows,
        budget_s=COSTS_BUDGET_S,
    )
    policies: dict[str, LengthPolicy] = {PLAIN_DECODING: PLAIN}
    for name in (FIXED, *settings.policies):
        for kind in settings.companions if name == "companion" else (None,):
            twin = speculator.afresh(companion=kind)
            shown = name if kind is None else f"{name}:{kind}"
            policies[shown] = twin.new_policy(name, settings.num_draft_tokens, costs=lambda: measured)
    return policies


class Stream:
    """One policy's rows, always full, fed from the same prompts in the same order as every other policy's.

    answers  new tokens of the prompts that are finished, by their place in the stream, where a prompt comes again.
    """

    def __init__(
        self, speculator: SelfSpeculator, policy: LengthPolicy, prompts: list[list[int]], settings: LengthSettings, *,
        batch_size: int, first: int = 0,
    ) -> None:
        """first: the place in the stream to begin at."""
        self.policy = policy
        self.answers: dict[int, list[int]] = {}
        self._speculator, self._prompts, self._settings = speculator, prompts, settings
        self._places = itertools.count(first)
        self._tokens_ahead = 0  # tokens beyond the slices that were asked for: a round gives several
        self._batch = speculator.open_batch(max_rows=batch_size, policy=policy, wants_transitions=False)

    def decode(self, num_tokens: int) -> RoundStats:
        """Counts of a slice of so many tokens, those that the last one had too many included; decode_s is of rounds.

        Raises ValueError where the model's states are not finite: its answers would never fill a slice.
        """
        stats = RoundStats()
        while self._tokens_ahead + stats.new_tokens < num_tokens:
            self._fill()
            start_s = time.perf_counter()
            self._batch.round()
            stats.decode_s += time.perf_counter() - start_s
            for outcome in self._batch.outcomes:
                outcome.add_to(stats)
            for sequence in self._batch.take_finished():
                if sequence.finish_reason == "error":
                    raise ValueError("the model's states must be finite, got NaN or infinity; try another dtype")
                self.answers[sequence.request_id] = sequence.token_ids
        self._tokens_ahead += stats.new_tokens - num_tokens
        return stats

    def _fill(self) -> None:
        """Gives every free row the next prompt."""
        if not self._batch.has_room:
            return
        while self._batch.has_room:
            place = next(self._places)
            sequence, _ = self._speculator.new_sequence(
                self._prompts[place % len(self._prompts)], _sampling(self._settings, seed=place), request_id=place
            )
            self._batch.admit(sequence)
        wait_for(self._speculator.split.device)  # the prefills are not the next round's


def _measure(
    speculator: SelfSpeculator, prompts: list[list[int]], settings: LengthSettings, *, batch_size: int,
    num_done: int, stage: Stage,
) -> Iterator[list[Line]]:
    """The lines of each slice after the first num_done that count; nothing for one that warms up."""
    answers_per_slice = max(batch_size, ANSWERS_PER_SLICE)
    first = num_done * answers_per_slice  # not the texts again that were counted before an interruption
    streams = {
        name: Stream(speculator, policy, prompts, settings, batch_size=batch_size, first=first)
        for name, policy in make_policies(speculator, settings, batch_size=batch_size).items()
    }
    for repetition in range(num_done - settings.warmups, settings.repetitions):
        order = list(streams) if repetition % 2 == 0 else list(streams)[::-1]
        found = {}
        for name in order:
            found[name] = streams[name].decode(answers_per_slice * settings.max_new_tokens)
            stage.advance(answers_per_slice)
        if repetition < num_done:
            yield []
            continue
        yield [
            {"batch_size": batch_size, "policy": name, "repetition": repetition, "stats": asdict(found[name])}
            | _compare(speculator, prompts, streams[PLAIN_DECODING], streams[name], settings, policy=name)
            | {"companion": _calibration(streams[name].policy)}
            for name in streams
        ]


def _calibration(policy: LengthPolicy) -> dict[str, Any] | None:
    figures = policy.estimate.figures() if isinstance(policy, CompanionLength) else None
    return None if figures is None else asdict(figures)


def _compare(
    speculator: SelfSpeculator, prompts: list[list[int]], plain: Stream, other: Stream, settings: LengthSettings, *,
    policy: str,
) -> dict[str, Any]:
    """How many greedy answers both have finished since the last comparison, and where their tokens part."""
    split, divergences = speculator.split, []
    if not settings.is_greedy or other is plain:
        return {"num_compared": 0, "divergences": []}

    def in_blocks(ids: list[int], start: int) -> Tensor:
        return logits_in_blocks(split, ids, start=start, width=settings.num_draft_tokens + 1)

    places = sorted(plain.answers.keys() & other.answers.keys())
    for place in places:
        divergence = find_divergence(
            split, prompts[place % len(prompts)], plain.answers[place], other.answers[place], index=place, arm=policy,
            other_logits=in_blocks,
        )
        if divergence is not None:
            divergences.append(asdict(divergence))
        del other.answers[place]
    return {"num_compared": len(places), "divergences": divergences}


def _encode_prompts(speculator: SelfSpeculator, settings: LengthSettings) -> list[list[int]]:
    """The stream's prompts, with room for an answer."""
    path = BUNDLED_QUESTIONS if settings.prompts is None else Path(settings.prompts)
    try:
        rows = read_prompts([path], split="eval", shuffle_seed=0)
    except NoPromptsError:
        rows = read_prompts([path], shuffle_seed=0)
    rows = rows[: settings.limit or None]
    return [speculator.encode_request(row, max_new_tokens=settings.max_new_tokens)[0] for row in rows]


def _describe(speculator: SelfSpeculator, settings: LengthSettings) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "settings": written(settings), "is_greedy": settings.is_greedy,
        "dtype": str(speculator.split.dtype).removeprefix("torch."),
        "drafter_version": speculator.drafter.version, "machine": describe_machine(speculator.split.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _open(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds, written now where there is none. Raises ValueError where it describes another run."""
    path, run = folder / RUN_FILE, json.loads(json.dumps(run))
    if not path.exists():
        write_whole(path, json.dumps(run, indent=1) + "\n")
        return run
    old = json.loads(path.read_text(encoding="utf-8"))
    for key, value in _identity(run).items():
        if _identity(old).get(key) != value:
            raise ValueError(
                f"{folder} holds a run with {key} {_identity(old).get(key)!r}, asked for {value!r}; give the same to "
                "go on with it, or another folder"
            )
    return old


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for results to stand in one folder; the hour may differ."""
    machine = {name: value for name, value in run["machine"].items() if name not in ("date", "load")}
    return run["settings"] | machine | {name: run[name] for name in ("dtype", "drafter_version")}
