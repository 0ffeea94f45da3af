"""Compare drafters on equal experience: acceptance by depth and mean accepted tokens against prompts seen.

Greedy output does not depend on the drafter, so the text is decoded once and every drafter is trained on it in the same
order, seen once, exactly as it would be online; rounds are then replayed from the recorded states. Prints a table and
one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvi.config import load_config
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.measure_costs import measure_costs
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.progress import shown_on
from dvi.settings import DraftSettings, LearningSettings, ModelSettings
from trainers import OnlineTrainer
from trainers.jobs.warmup import RecordingLearner
from trainers.learning.recordings import RecordedText, decode_answers, record, replay_rounds

POSITIONS_PER_STEP = 8  # answer positions for each optimizer step: 4 rounds at two tokens a round, as online


def read_chats(path: Path, split: str, limit: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [row for row in rows if row["split"] == split][:limit]
    return [[{"role": "user", "content": row["turns"][0]}] for row in chosen]


def decode_texts(
    speculator: SelfSpeculator, chats: list, max_new_tokens: int, label: str
) -> list[tuple[list[int], int]]:
    """(all token ids, prompt length) of each greedy answer, in prompt order."""
    prompts = [speculator.encode(chat, max_tokens=512) for chat in chats]
    with shown_on(Console(stderr=True)):
        return decode_answers(speculator, prompts, max_new_tokens=max_new_tokens, doing=label)


def recordings(split: SplitModel, texts: list[tuple[list[int], int]]) -> Iterator[RecordedText]:
    """One at a time: the states of all of them would fill the memory."""
    return (record(split, ids, prompt_len=prompt_len) for ids, prompt_len in texts)


def train_and_score(
    split: SplitModel, config: DrafterConfig, learning: LearningSettings, texts: list, held_out: list, *,
    num_draft_tokens: int, checkpoints: list[int], progress: Progress, label: str,
) -> dict:
    torch.manual_seed(learning.seed)
    drafter = build_drafter(split, config)
    drafter.publish(drafter, version=0)
    trainer = OnlineTrainer(SimpleNamespace(split=split, drafter=drafter), learning)
    learner = RecordingLearner(trainer, positions_per_step=POSITIONS_PER_STEP)
    scores, start_s = {}, time.perf_counter()
    recorded = progress.track(recordings(split, texts), total=len(texts), description=label)
    for index, text in enumerate(recorded, start=1):
        for _ in learner.learn(text):
            pass
        if index in checkpoints or index == len(texts):
            held_out_texts = recordings(split, held_out)
            stats = replay_rounds(trainer.drafter, held_out_texts, num_draft_tokens=num_draft_tokens)
            scores[index] = {
                "mean_accepted_tokens": round(stats.mean_accepted_tokens, 3),
                "acceptance_per_depth": [round(a, 3) for a in stats.acceptance_per_depth],
            }
    costs = measure_costs(split, drafter, buckets=(num_draft_tokens,))
    plain_s, round_s = costs.round_s(1, 0), costs.round_s(1, num_draft_tokens)
    return {
        "scores": scores, "steps": trainer.num_steps, "seconds": round(time.perf_counter() - start_s, 1),
        "draft_step_c": round(costs.draft_step_s[1] / plain_s, 3),
        "predicted_speed_up": round(scores[len(texts)]["mean_accepted_tokens"] * plain_s / round_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelSettings.path)
    parser.add_argument("--prompts", type=Path, default=Path("configs/demo/prompts.jsonl"))
    parser.add_argument(
        "--drafters", nargs="+", help="kind:split_layer[:rank[:anchor_hidden]]",
        default=["lora_head:1", "lora_head:2", "lora_head:4", "anchored:0", "anchored:1", "anchored:2", "anchored:1:8",
                 "recurrent:0", "recurrent:1"],
    )
    parser.add_argument("--num-prompts", type=int, default=420)
    parser.add_argument("--num-held-out", type=int, default=72)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=DraftSettings.num_draft_tokens)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[60, 200])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="learning settings, as in dvi train")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = ["schedule=kl_only", "budget=1.0", *args.set]
    learning = load_config(None, [f"train.{setting}" for setting in settings]).train
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    speculator = SelfSpeculator(model, tokenizer)
    texts, held_out = (
        decode_texts(speculator, read_chats(args.prompts, part, count), args.max_new_tokens, part)
        for part, count in (("traffic", args.num_prompts), ("eval", args.num_held_out))
    )
    num_tokens = sum(len(ids) - prompt_len for ids, prompt_len in texts)

    title = f"T = {args.num_draft_tokens}, {len(texts)} prompts, {num_tokens} generated tokens, seen once"
    rows, table = [], Table(title=title)
    mats = [f"MAT @ {count}" for count in args.checkpoints]
    for column in ("drafter", "split layer", "acceptance by depth", *mats, "MAT", "c", "speed by the law", "s"):
        table.add_column(column)
    with Progress(console=Console(stderr=True)) as progress:
        for spec in args.drafters:
            given = spec.split(":")
            kind, split_layer, rank, width = (*given, *("1", "32", "1024")[len(given) - 1 :])
            split = SplitModel(model, split_layer=int(split_layer))
            config = DrafterConfig(
                kind=kind, lora_rank=int(rank), lora_alpha=float(rank), anchor_hidden=int(width)
            )
            found = train_and_score(
                split, config, learning, texts, held_out, num_draft_tokens=args.num_draft_tokens,
                checkpoints=args.checkpoints, progress=progress, label=spec,
            )
            rows.append({"drafter": spec, **found})
            final = found["scores"][len(texts)]
            mats = [found["scores"].get(count, {}).get("mean_accepted_tokens", "") for count in args.checkpoints]
            table.add_row(
                f"{kind} r={rank}", split_layer, " ".join(f"{a:.2f}" for a in final["acceptance_per_depth"]),
                *map(str, mats), str(final["mean_accepted_tokens"]), str(found["draft_step_c"]),
                str(found["predicted_speed_up"]), str(found["seconds"]),
            )
            progress.console.print(spec, found["scores"], found["predicted_speed_up"])
    Console().print(table)
    summary = {"num_tokens": num_tokens, "num_draft_tokens": args.num_draft_tokens, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
