"""Compare drafters on equal experience: acceptance by depth and mean accepted tokens against prompts seen.

Greedy output does not depend on the drafter, so the text is decoded once and every drafter is trained on it in the same
order, seen once, exactly as it would be online; rounds are then replayed from the recorded states. Prints a table and
one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvi.autotune import measure_costs
from dvi.config import LearningSettings, load_config
from dvi.decoding import PREFILL_CHUNK
from dvi.drafter import DrafterConfig, build_drafter
from dvi.records import RoundStats, SamplingParams, Transitions
from dvi.speculator import PLAIN, SelfSpeculator
from dvi.split import SplitModel
from trainers import OnlineTrainer

TOKENS_PER_STEP = 8  # committed tokens between optimizer steps: 4 rounds at two tokens a round, the trainer's default


def read_chats(path: Path, split: str, limit: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [row for row in rows if row["split"] == split][:limit]
    return [[{"role": "user", "content": row["turns"][0]}] for row in chosen]


def decode_texts(
    speculator: SelfSpeculator, chats: list, max_new_tokens: int, label: str
) -> list[tuple[list[int], int]]:
    """(all token ids, prompt length) of each greedy answer, in prompt order."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    prompts = [speculator.encode(chat)[-512:] for chat in chats]
    texts: list = [None] * len(prompts)
    with Progress(console=Console(stderr=True)) as progress:
        for result in progress.track(
            speculator.generate(prompts, params, batch_size=8, policy=PLAIN, keep_transitions=False),
            total=len(prompts), description=label,
        ):
            prompt = prompts[result.index]
            texts[result.index] = (prompt + result.token_ids, len(prompt))
    return texts


@torch.no_grad()
def states(split: SplitModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """h_k and h_L [S, D] of every position of a text."""
    ids_1S = torch.tensor([ids])
    cache = split.make_cache(1, len(ids))
    hidden, final = [], []
    for chunk in ids_1S.split(PREFILL_CHUNK, dim=1):
        placement = cache.place(offset=0, width=chunk.shape[1])
        hidden.append(split.shallow(chunk, cache, placement))
        final.append(split.deep(hidden[-1], chunk, cache, placement))
        cache.commit([chunk.shape[1]])
    return torch.cat(hidden, 1)[0], torch.cat(final, 1)[0]


@torch.no_grad()
def replay_rounds(split: SplitModel, drafter, texts: list, num_draft_tokens: int) -> RoundStats:
    """The rounds that greedy speculative decoding of these texts would make with this drafter."""
    stats = RoundStats()
    for ids, prompt_len in texts:
        hidden_SD, final_SD = states(split, ids)
        last = len(ids) - 1 - num_draft_tokens
        if last < prompt_len:
            continue
        start_N = torch.arange(prompt_len - 1, last)
        block_NT = start_N[:, None] + torch.arange(num_draft_tokens)
        anchor_ND = final_SD[start_N - 1]
        drafted_NT = drafter.draft_head.to_token_ids(drafter(hidden_SD[block_NT], anchor_ND).argmax(-1))
        agrees_NT = drafted_NT == torch.tensor(ids)[block_NT + 1]
        accepted_N = agrees_NT.long().cumprod(1).sum(1).tolist()
        position = 0
        while position < len(accepted_N):
            stats.count_round(num_drafted=num_draft_tokens, num_accepted=accepted_N[position])
            position += accepted_N[position] + 1
    return stats


class _Parts:
    """What OnlineTrainer asks of a speculator."""

    def __init__(self, split: SplitModel, drafter) -> None:
        self.split, self.drafter = split, drafter


def train_and_score(
    split: SplitModel, config: DrafterConfig, learning: LearningSettings, texts: list, held_out: list, *,
    num_draft_tokens: int, checkpoints: list[int], progress: Progress, label: str,
) -> dict:
    torch.manual_seed(learning.seed)
    drafter = build_drafter(split, config)
    drafter.publish(drafter, version=0)
    trainer = OnlineTrainer(_Parts(split, drafter), learning)
    scores, owed, start_s = {}, 0.0, time.perf_counter()
    for index, (ids, prompt_len) in enumerate(progress.track(texts, description=label), start=1):
        hidden_SD, final_SD = states(split, ids)
        first = 0 if learning.learn_from_prompts else max(prompt_len - 2, 0)
        count = len(ids) - first
        trainer.replay.add(Transitions(
            request_id=index, start_position=first, token_ids_W=torch.tensor(ids[first:]), hidden_WD=hidden_SD[first:],
            target_hidden_WD=final_SD[first:], num_drafted=0, num_accepted=0,
            draft_token_ids_W=torch.full((count,), -1), draft_log_probs_W=torch.zeros(count), drafter_version=0,
        ))
        owed += (len(ids) - prompt_len) / TOKENS_PER_STEP
        while owed >= 1 and len(trainer.replay) >= 2 * learning.blocks_per_step:
            trainer.step()
            owed -= 1
        if index in checkpoints or index == len(texts):
            stats = replay_rounds(split, trainer._drafter, held_out, num_draft_tokens)
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
    parser.add_argument("--model", default="checkpoints/reference-11m")
    parser.add_argument("--prompts", type=Path, default=Path("configs/demo/prompts.jsonl"))
    parser.add_argument(
        "--drafters", nargs="+", help="kind:split_layer[:rank[:anchor_hidden]]",
        default=["lora_head:1", "lora_head:2", "lora_head:4", "anchored:0", "anchored:1", "anchored:2", "anchored:1:8",
                 "recurrent:0", "recurrent:1"],
    )
    parser.add_argument("--num-prompts", type=int, default=420)
    parser.add_argument("--num-held-out", type=int, default=72)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
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
