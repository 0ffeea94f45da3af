"""The figures of the core, as ratios in one run on one machine: ours plain and speculative against Hugging Face's.

Trains a drafter online from scratch (or takes --adapter), then decodes the same held-out prompts with every arm, each
prompt by all arms before the next, the order turning. Outputs are compared: a prompt whose tokens differ between arms
is left out of the ratios and counted. Prints tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dvi import SamplingParams, SelfSpeculator
from dvi.bench.arms import ArmOptions, plans_of_ours
from dvi.bench.records import Arm, ArmAnswer
from dvi.bench.rivals import rival_plans
from dvi.bench.statistics import median_interval
from dvi.bench.timed_arm import timed
from dvi.config import load_config
from dvi.draft.catalogue import GOODPUT_BUCKETS
from dvi.draft.length_policies import FixedLength
from dvi.draft.measure_costs import measure_costs
from dvi.hardware import describe_machine
from dvi.model.drafter import DrafterConfig
from dvi.records import RoundStats
from dvi.settings import DrafterSettings, DraftSettings, ModelSettings
from dvi.traffic import read_prompts
from trainers import OnlineTrainer

CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """One arm on one prompt. total_s: seconds in all."""

    answer: ArmAnswer
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.answer.token_ids) / self.total_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Without the first step, which is the prompt's."""
        return len(self.answer.token_ids) / self.answer.decode_s


def ask(arm: Arm, ids: list[int], speculator: SelfSpeculator) -> Run:
    (answer,), total_s = timed(arm, [ids], seed=0, device=speculator.split.device)
    return Run(answer, total_s)


def counts(runs: list[Run]) -> RoundStats:
    total = RoundStats()
    for run in runs:
        total.add(run.answer.stats)
    return total


def train(
    speculator: SelfSpeculator, prompts: list, *, minutes: float, max_new_tokens: int, batch_size: int,
    settings: list[str],
) -> dict:
    """Online training from traffic for some minutes of wall-clock time."""
    learning = load_config(None, [f"train.{s}" for s in settings]).train
    trainer, start_s = OnlineTrainer(speculator, learning), time.perf_counter()
    params = SamplingParams(max_new_tokens=max_new_tokens)
    recent, num_prompts, num_tokens = [], 0, 0

    def traffic():
        while time.perf_counter() - start_s < 60 * minutes:
            yield from (p for p in prompts if time.perf_counter() - start_s < 60 * minutes)

    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("training online", total=60 * minutes)
        results = speculator.generate(
            traffic(), params, batch_size=batch_size, learner=trainer, policy=FixedLength(4)
        )
        for result in results:
            num_prompts, num_tokens = num_prompts + 1, num_tokens + len(result.token_ids)
            recent = [*recent[-49:], result.stats.mean_accepted_tokens]
            label = f"training online, MAT {statistics.mean(recent):.2f}"
            progress.update(task, completed=time.perf_counter() - start_s, description=label)
    return {
        "minutes": round((time.perf_counter() - start_s) / 60, 2), "prompts": num_prompts, "tokens": num_tokens,
        "steps": trainer.num_steps, "train_share": round(trainer.train_s / (time.perf_counter() - start_s), 3),
        "rollbacks": trainer.num_rollbacks, "final_mat": round(statistics.mean(recent), 3),
    }


def ratio(runs: dict[str, list[Run]], over: str, under: str, *, of: str) -> dict:
    """Median of the per-prompt speed ratios with a bootstrap 95 % interval."""
    ratios = [getattr(a, of) / getattr(b, of) for a, b in zip(runs[over], runs[under], strict=True)]
    found = median_interval(ratios)
    return {"ratio": round(found.value, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def compare(
    arms: dict[str, Arm], prompts: list[list[int]], speculator: SelfSpeculator
) -> tuple[dict[str, list[Run]], int]:
    """Every arm on every prompt, interleaved; prompts whose outputs disagree are dropped and counted."""
    for arm in arms.values():
        ask(arm, prompts[0], speculator)
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    num_mismatches = 0
    with Progress(console=CONSOLE) as progress:
        for index, ids in enumerate(progress.track(prompts, description="comparing")):
            order = list(arms) if index % 2 == 0 else list(arms)[::-1]
            found = {name: ask(arms[name], ids, speculator) for name in order}
            if len({tuple(run.answer.token_ids) for run in found.values()}) > 1:
                num_mismatches += 1
                continue
            for name, run in found.items():
                runs[name].append(run)
    return runs, num_mismatches


def training_ratio(speculator: SelfSpeculator, prompts: list, *, max_new_tokens: int) -> dict:
    """Serving throughput with the learner beside it (default budget) over without, blocks of prompts interleaved."""
    params, policy = SamplingParams(max_new_tokens=max_new_tokens), FixedLength(4)
    trainer = OnlineTrainer(speculator, load_config(None, ["train.schedule=kl_only"]).train)

    def speed(block: list, learner: OnlineTrainer | None) -> float:
        trainer.restart_clock()
        start_s, count = time.perf_counter(), 0
        for result in speculator.generate(block, params, batch_size=1, learner=learner, policy=policy,
                                          keep_transitions=False):
            count += len(result.token_ids)
        return count / (time.perf_counter() - start_s)

    blocks = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
    speed(blocks[0], trainer)
    ratios = []
    for index, block in enumerate(blocks):
        order = (trainer, None) if index % 2 == 0 else (None, trainer)
        speeds = {learner is not None: speed(block, learner) for learner in order}
        ratios.append(speeds[True] / speeds[False])
    return {"ratio": round(statistics.median(ratios), 3), "blocks": len(ratios), "steps": trainer.num_steps}


def cold_help_s() -> float:
    """Seconds of `dvi --help` in a new process, median of 5."""
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dvi", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start_s)
    return round(statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelSettings.path)
    parser.add_argument("--prompts", default="configs/demo/prompts.jsonl")
    parser.add_argument("--adapter", help="take this drafter instead of training one")
    parser.add_argument("--save", default="runs/bench/drafter", help="where the trained drafter goes")
    parser.add_argument("--train-minutes", type=float, default=9.5)
    parser.add_argument("--train-batch-size", type=int, default=8, help="rows that serve together while learning")
    parser.add_argument(
        "--set", nargs="*", default=["budget=0.7", "rounds_per_step=1", "schedule=kl_only"], metavar="key=value",
        help="learning settings",
    )
    parser.add_argument("--split-layer", type=int, help="default: one layer in sixteen")
    parser.add_argument("--draft-vocab-size", type=int, default=1024)
    parser.add_argument("--drafter", default=DrafterSettings.kind)
    parser.add_argument("--num-draft-tokens", type=int, default=DraftSettings.num_draft_tokens)
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict = {"machine": describe_machine(), "args": vars(args)}

    source: dict = {"adapter": args.adapter}
    if not args.adapter:
        drafter = DrafterConfig(kind=args.drafter, draft_vocab_size=args.draft_vocab_size)
        source = {"split_layer": args.split_layer, "drafter": drafter}
    speculator = SelfSpeculator.from_pretrained(args.model, dtype=args.dtype, **source)
    traffic = list(read_prompts([args.prompts], split="traffic"))
    held_out = [speculator.encode(p) for p in read_prompts([args.prompts], split="eval")]
    held_out = [ids[-512:] for ids in held_out][: args.num_prompts]
    options = ArmOptions(
        max_new_tokens=args.max_new_tokens, num_draft_tokens=args.num_draft_tokens, tells_decode_s=True
    )
    if not args.adapter:
        (untrained,) = plans_of_ours(speculator, options, names=["speculative"])
        arm = untrained.build()
        untrained_stats = counts([ask(arm, ids, speculator) for ids in held_out[:16]])
        report["untrained_mat"] = round(untrained_stats.mean_accepted_tokens, 3)
        report["training"] = train(
            speculator, traffic, minutes=args.train_minutes, max_new_tokens=args.max_new_tokens,
            batch_size=args.train_batch_size, settings=args.set,
        )
        speculator.save_drafter(args.save, metrics=report["training"])
        CONSOLE.print(report["training"])

    t = args.num_draft_tokens
    costs = measure_costs(speculator.split, speculator.drafter, buckets=tuple({*GOODPUT_BUCKETS, t}))
    any_length = dataclasses.replace(options, policy="goodput", num_draft_tokens=GOODPUT_BUCKETS[-1])
    ours = plans_of_ours(speculator, options, names=["plain", "speculative"])
    (goodput,) = plans_of_ours(speculator, any_length, names=["speculative"])
    rivals = rival_plans(
        speculator.model, speculator.tokenizer, options, split_layer=speculator.split.split_layer,
        names=["hf_generate", "hf_early_exit"],
    )
    plans = {plan.name: plan for plan in (*ours, dataclasses.replace(goodput, name="goodput"), *rivals)}
    report["early_exit_layer_calls"] = plans["hf_early_exit"].facts.get("layer_calls")
    for name, plan in plans.items():
        if plan.na_reason is not None:
            CONSOLE.print(f"{name} is left out: {plan.na_reason}")
    arms = {name: plan.build() for name, plan in plans.items() if plan.na_reason is None}
    runs, report["mismatched_prompts"] = compare(arms, held_out, speculator)
    report["compared_prompts"] = len(runs["plain"])

    spec = counts(runs["speculative"])
    report["mean_accepted_tokens"] = round(spec.mean_accepted_tokens, 3)
    report["acceptance_per_depth"] = [round(a, 3) for a in spec.acceptance_per_depth]
    report["goodput_mat"] = round(counts(runs["goodput"]).mean_accepted_tokens, 3)
    report["tokens_per_s"] = {n: round(statistics.median(r.decode_tokens_per_s for r in runs[n]), 1) for n in runs}
    report["ratios"] = {
        f"{over} / {under}": ratio(runs, over, under, of="decode_tokens_per_s")
        for over, under in (
            ("plain", "hf_generate"), ("speculative", "plain"), ("goodput", "plain"), ("speculative", "hf_generate"),
            ("goodput", "hf_generate"), ("speculative", "hf_early_exit"),
        )
        if over in runs and under in runs
    }
    report["ratios_with_prefill"] = {
        f"{over} / {under}": ratio(runs, over, under, of="tokens_per_s")
        for over, under in (("plain", "hf_generate"), ("speculative", "plain"), ("speculative", "hf_generate"))
    }
    plain_s = costs.round_s(1, 0)
    predicted = spec.mean_accepted_tokens * plain_s / costs.round_s(1, t)
    report["speed_law"] = {
        "plain_ms": round(1e3 * plain_s, 3), "draft_step_c": round(costs.draft_step_s[1] / plain_s, 3),
        "verify_v": {n: round(s / plain_s, 3) for n, s in sorted(costs.verify_s.items())},
        "predicted": round(predicted, 3),
        "measured_over_predicted": round(report["ratios"]["speculative / plain"]["ratio"] / predicted, 3),
    }
    report["training_on_over_off"] = training_ratio(speculator, traffic[-96:], max_new_tokens=args.max_new_tokens)
    report["cold_help_s"] = cold_help_s()

    table = Table(title=f"{args.model}, {args.dtype}, batch 1, greedy, T = {t}, {len(runs['plain'])} held-out prompts")
    for column in ("ratio of decode speeds", "median", "95 % interval"):
        table.add_column(column)
    for name, found in report["ratios"].items():
        table.add_row(name, f"{found['ratio']:.2f}", f"{found['low']:.2f} .. {found['high']:.2f}")
    CONSOLE.print(table)
    for name in ("mean_accepted_tokens", "tokens_per_s", "speed_law", "training_on_over_off", "cold_help_s"):
        CONSOLE.print(f"{name}: {report[name]}")
    Path("runs/bench").mkdir(parents=True, exist_ok=True)
    Path("runs/bench/report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
