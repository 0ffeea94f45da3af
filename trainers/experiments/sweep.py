"""Which split layer, draft length, rank and draft vocabulary pay: acceptance, costs, and speed against the speed law.

The answers of the frozen model are decoded once; every drafter learns from the same texts by the trainer's own step,
and is judged on held-out ones. A *cell* is one drafter: a split layer, a rank and a draft vocabulary, with figures for
every draft length. The folder holds texts.json, cells/*.json as they are finished, and at the end report.json,
report.md and sweep.png.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dvi.bench.statistics import Interval, median_interval
from dvi.decode.construction import build_speculator
from dvi.decode.precision import settle_dtype
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.draft.measure_costs import measure_costs
from dvi.hardware import describe_machine
from dvi.model.drafter import MAX_DEPTH, DrafterConfig
from dvi.progress import each
from dvi.records import GenerationResult, SamplingParams
from dvi.settings import TrainConfig
from trainers.experiments.cell_folder import CellFolder, with_one_mode
from trainers.experiments.sweep_report import make_report, write_report
from trainers.jobs.traffic_cursor import read_traffic
from trainers.jobs.warmup import learn_from_recordings
from trainers.learning.online import OnlineTrainer
from trainers.learning.recordings import RecordedText, decode_answers, record, replay_rounds

POSITIONS_PER_ROUND = 2  # a step is owed every train.rounds_per_step rounds; a drafter half learnt commits two tokens


@dataclass(frozen=True)
class LiveSpeed:
    """Speculative over plain decoding of the same prompts: batch 1, greedy, prefill apart.

    speed_up        median of the prompts' ratios of tokens per second; None if no prompt could be compared.
    num_mismatches  prompts whose tokens were not plain decoding's: left out of the ratios.
    """

    speed_up: Interval | None
    num_mismatches: int


def run_sweep(
    config: TrainConfig, *, split_layers: list[int], draft_lengths: list[int], ranks: list[int],
    draft_vocab_sizes: list[int], folder: str | Path, console: Console,
) -> dict[str, object]:
    """Fills the grid and returns what report.json holds: conditions, a row per cell and draft length, and the pick.

    config: the model, the prompts (data, eval), the learning, and of the drafter all but rank and vocabulary, whose
    alpha keeps its ratio to the rank. A second start in the same folder goes on with the cells that are missing; split
    layers, ranks and vocabularies may be others then.
    Raises ValueError for a grid that does not fit the model, texts too short for it, and a folder of other settings.
    """
    folder, draft_lengths = Path(folder), sorted(set(draft_lengths))
    grid = list(itertools.product(*(sorted(set(values)) for values in (split_layers, ranks, draft_vocab_sizes))))
    _check(config, draft_lengths, grid)
    config = with_one_mode(settle_dtype(config))
    common = _common_settings(config, draft_lengths)
    text_folder, cell_folder = CellFolder(folder), CellFolder(folder / "cells")
    texts = text_folder.read("texts", common)
    base = build_speculator(config)
    _check_fits(base, split_layers, draft_vocab_sizes)
    if texts is None:
        texts = _decode_texts(base, config, longest_draft=draft_lengths[-1])
        text_folder.write("texts", common, texts)
    cells, recorded_layer, recorded = [], None, ([], [])
    for split_layer, rank, draft_vocab_size in each(grid, "sweep", noun="cells"):
        name = f"split{split_layer}_rank{rank}_vocab{draft_vocab_size}"
        place = {"split_layer": split_layer, "rank": rank, "draft_vocab_size": draft_vocab_size}
        cell = cell_folder.read(name, common | place)
        if cell is None:
            speculator = _untrained(base, config, **place)
            if split_layer != recorded_layer:  # one layer's states at a time in memory
                recorded_layer = split_layer
                recorded = tuple(_record(speculator, texts[part]) for part in ("training", "held_out"))
            cell = place | _fill(speculator, config, *recorded, draft_lengths=draft_lengths)
            cell_folder.write(name, common | place, cell)
            console.print(f"split layer {split_layer}, rank {rank}, vocabulary {draft_vocab_size or 'whole'}: done")
        cells.append(cell)
    report = make_report(cells, conditions=_conditions(config, texts, num_layers=base.split.num_layers))
    write_report(report, folder, console=console)
    return report


# One cell


def _fill(
    speculator: SelfSpeculator, config: TrainConfig, training: list[RecordedText], held_out: list[RecordedText], *,
    draft_lengths: list[int],
) -> dict[str, object]:
    """Teaches the speculator's drafter the training texts, once, and measures it with every draft length."""
    num_answered = sum(text.num_answered for text in training)
    # Half of the texts choose the vocabulary, the other half is learnt with it.
    tokens_before_trim = min(config.train.tokens_before_trim, max(num_answered // 2, 1))
    learning = dataclasses.replace(
        config.train, block_len=draft_lengths[-1], tokens_before_trim=tokens_before_trim
    )
    trainer = OnlineTrainer(speculator, learning)
    steps = learn_from_recordings(
        trainer, each(training, "learning", noun="texts"),
        positions_per_step=POSITIONS_PER_ROUND * learning.rounds_per_step,
    )
    drafter = speculator.drafter
    if not steps or drafter.draft_head.vocab_size != (drafter.config.draft_vocab_size or speculator.split.vocab_size):
        raise ValueError(
            f"data must hold enough answers to learn from and to trim the vocabulary by, got {num_answered} tokens in "
            f"{len(training)} answers; raise data.limit or sampling.max_new_tokens"
        )
    costs = measure_costs(speculator.passes, drafter, buckets=tuple(draft_lengths))
    plain_s = costs.round_s(1, 0)
    draft_step_c = costs.draft_step_s[1] / plain_s
    prompts = [text.token_ids[: text.prompt_len] for text in held_out]
    live = measure_live(speculator, prompts, draft_lengths, max_new_tokens=config.eval.max_new_tokens)
    lengths = []
    for length in draft_lengths:
        stats = replay_rounds(drafter, held_out, num_draft_tokens=length)
        verify_v = costs.verify_s[length + 1] / plain_s
        predicted = speed_law(
            stats.mean_accepted_tokens, num_draft_tokens=length, draft_step_c=draft_step_c, verify_v=verify_v
        )
        measured = live[length].speed_up
        lengths.append({
            "num_draft_tokens": length, "acceptance_per_depth": stats.acceptance_per_depth,
            "mean_accepted_tokens": stats.mean_accepted_tokens, "verify_v": verify_v, "predicted": predicted,
            "measured": None if measured is None else dataclasses.asdict(measured),
            "measured_over_predicted": None if measured is None else measured.value / predicted,
            "num_mismatches": live[length].num_mismatches,
        })
    return {
        "steps": steps, "train_s": trainer.train_s, "plain_ms": 1e3 * plain_s, "draft_step_c": draft_step_c,
        "machine": describe_machine(speculator.split.device), "lengths": lengths,
    }


def speed_law(mean_accepted_tokens: float, *, num_draft_tokens: int, draft_step_c: float, verify_v: float) -> float:
    """Speed against plain decoding, S = MAT / (T c + v).

    draft_step_c, verify_v: seconds of a draft step, and of the rest of a round that verifies T + 1 positions, each over
    those of a plain decoding step.
    """
    return mean_accepted_tokens / (num_draft_tokens * draft_step_c + verify_v)


def measure_live(
    speculator: SelfSpeculator, prompts: list[list[int]], draft_lengths: list[int], *, max_new_tokens: int
) -> dict[int, LiveSpeed]:
    """Every prompt decoded plainly and with each draft length, in turning order, after one prompt to warm up."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    policies = [PLAIN, *(FixedLength(length) for length in draft_lengths)]

    def decode(prompt: list[int], policy: FixedLength) -> GenerationResult:
        return next(speculator.generate([prompt], params, batch_size=1, policy=policy, keep_transitions=False))

    for policy in each(policies, "warming up", noun="policies"):
        decode(prompts[0], policy)
    ratios = {length: [] for length in draft_lengths}
    for index, prompt in enumerate(each(prompts, "measuring the speed", noun="prompts")):
        first = index % len(policies)
        results = {policy: decode(prompt, policy) for policy in policies[first:] + policies[:first]}
        plain = results[PLAIN]
        for length, policy in zip(draft_lengths, policies[1:], strict=True):
            if results[policy].token_ids == plain.token_ids:
                ratios[length].append(results[policy].stats.decode_tokens_per_s / plain.stats.decode_tokens_per_s)
    return {
        length: LiveSpeed(median_interval(found), num_mismatches=len(prompts) - len(found))
        for length, found in ratios.items()
    }


def _untrained(
    base: SelfSpeculator, config: TrainConfig, split_layer: int, rank: int, draft_vocab_size: int
) -> SelfSpeculator:
    given = config.drafter
    drafter = DrafterConfig(
        kind=given.kind, lora_rank=rank, lora_alpha=rank * given.lora_alpha / given.lora_rank,
        anchor_hidden=given.anchor_hidden, draft_vocab_size=draft_vocab_size,
    )
    return SelfSpeculator(
        base.model, base.tokenizer, split_layer=split_layer, drafter=drafter, mode=config.model.mode,
        path=config.model.path_kind, seed=config.train.seed,
    )


def _record(speculator: SelfSpeculator, texts: list[tuple[list[int], int]]) -> list[RecordedText]:
    return [
        record(speculator.split, token_ids, prompt_len=prompt_len)
        for token_ids, prompt_len in each(texts, "recording the model's states", noun="texts")
    ]


# Texts and settings


def _decode_texts(
    speculator: SelfSpeculator, config: TrainConfig, *, longest_draft: int
) -> dict[str, list[tuple[list[int], int]]]:
    """(token ids of prompt and greedy answer, prompt length) of each text to learn from, and of each held-out one."""
    parts = {}
    for name, prompts, limit in zip(
        ("training", "held_out"), read_traffic(config), (config.sampling.max_new_tokens, config.eval.max_new_tokens),
        strict=True,
    ):
        encoded = [speculator.encode_request(messages, max_new_tokens=limit)[0] for messages in prompts]
        parts[name] = decode_answers(
            speculator, encoded, max_new_tokens=limit, doing=f"decoding answers, {name.replace('_', '-')}"
        )
    if not any(len(token_ids) - prompt_len > longest_draft for token_ids, prompt_len in parts["held_out"]):
        raise ValueError(
            f"a held-out answer must be longer than the longest draft of {longest_draft}, got "
            f"{len(parts['held_out'])} that are not; raise eval.limit or eval.max_new_tokens"
        )
    return parts


def _check(config: TrainConfig, draft_lengths: list[int], grid: list[tuple[int, int, int]]) -> None:
    """Refuses what no model could do, before one is loaded."""
    if not grid or not draft_lengths:
        raise ValueError("split layers, draft lengths, ranks and draft vocabularies must each name at least one")
    if not 1 <= draft_lengths[0] <= draft_lengths[-1] <= MAX_DEPTH:
        raise ValueError(f"draft lengths must be in 1..{MAX_DEPTH}, got {draft_lengths}; try 2,4,6")
    if config.sampling.temperature or config.drafter.adapter is not None:
        raise ValueError("a sweep is greedy and starts untrained; set sampling.temperature=0 and drafter.adapter=null")
    if not config.eval.limit:
        raise ValueError("eval.limit must be at least 1, the held-out prompts that a sweep measures on; try 24")


def _check_fits(base: SelfSpeculator, split_layers: list[int], draft_vocab_sizes: list[int]) -> None:
    """Refuses what this model cannot do, before hours of other cells."""
    for name, values, bound in (
        ("split layers", split_layers, base.split.num_layers - 1),
        ("draft vocabularies", draft_vocab_sizes, base.split.vocab_size),
    ):
        if not 0 <= min(values) <= max(values) <= bound:
            raise ValueError(f"{name} must be in 0..{bound} for this model, got {sorted(values)}")


def _common_settings(config: TrainConfig, draft_lengths: list[int]) -> dict[str, object]:
    """What all cells of a folder share: the config without what the grid sets and without the output."""
    settings: dict[str, object] = {"draft_lengths": draft_lengths}
    for section in ("model", "drafter", "sampling", "data", "train", "eval"):
        values = dataclasses.asdict(getattr(config, section))
        settings |= {f"{section}.{key}": value for key, value in values.items()}
    for key in ("model.split_layer", "drafter.draft_vocab_size"):
        del settings[key]
    return settings


def _conditions(config: TrainConfig, texts: dict[str, list], *, num_layers: int) -> dict[str, object]:
    train = config.train
    return {
        "model": config.model.path, "num_layers": num_layers, "dtype": config.model.dtype, "mode": config.model.mode,
        "drafter": config.drafter.kind, "schedule": train.schedule, "lr": train.lr, "seed": train.seed,
        "training_prompts": len(texts["training"]), "training_tokens": _num_answered(texts["training"]),
        "held_out_prompts": len(texts["held_out"]), "held_out_tokens": _num_answered(texts["held_out"]),
        "batch": 1, "sampling": "greedy", "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _num_answered(texts: list[tuple[list[int], int]]) -> int:
    return sum(len(token_ids) - prompt_len for token_ids, prompt_len in texts)
