"""How well planning foretells: the simulator against the real engine, on plans that nothing was fitted to.

The bundled model answers some prompts; their lengths and acceptance are the workload. Then, again and again, the
profile is measured and every plan is run by the engine, in process, under the load that the simulator assumes: as many
requests as rows, each followed by the next, greedy and with its own number of new tokens. A machine that drifts thus
drifts for both. Prints a table and one JSON line last; the goal is 15 % in throughput and in the token's p99.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import FixedLength
from dvi.hardware import describe_machine
from dvi.planning.measurement import DRAFT_TOKENS, measure_overheads, measure_passes
from dvi.planning.plans import Forecast
from dvi.planning.profile import LatencyProfile
from dvi.planning.simulator import Simulator
from dvi.planning.workload import Workload
from dvi.records import SamplingParams, ServingPlan
from dvi.serving.engine import Engine
from dvi.serving.request import DraftChoice, Request
from dvi.serving.scheduler import SchedulerLimits
from dvi.settings import ModelSettings
from dvi.traffic import read_prompts

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
GOAL = 0.15
SHUFFLES = 3  # of all requests, in a simulation
# Draft tokens, rows, prefill tokens, rounds per prefill: no plan has both of the first two on the measured grid.
HELD_OUT = (
    (3, 1, 200, 1), (0, 3, 96, 1), (3, 6, 256, 1), (6, 6, 96, 4), (3, 12, 200, 1), (1, 12, 384, 8), (3, 24, 512, 1),
)  # fmt: skip


@dataclass
class Measured:
    """What the engine gave: tokens and seconds of the counted stretches, and latencies of the counted requests."""

    num_tokens: int = 0
    seconds: float = 0.0
    token_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)

    def as_forecast(self) -> Forecast:
        quantiles = [np.quantile(values, (0.5, 0.99)).tolist() for values in (self.token_s, self.first_token_s)]
        return Forecast(self.num_tokens / self.seconds, *quantiles[0], *quantiles[1])


def run_engine(
    speculator: SelfSpeculator, plan: ServingPlan, requests: list[tuple[list[int], int]], measured: Measured, *,
    first: int, num_counted: int,
) -> None:
    """Adds a stretch of closed-loop load to `measured`: requests from the first-th on, after twice as many as rows."""
    engine = Engine(
        speculator, SchedulerLimits(
            max_rows=plan.max_rows, prefill_tokens_per_step=plan.prefill_tokens_per_step,
            rounds_per_prefill=plan.rounds_per_prefill,
        ), prefix_positions=0, costs=CostTable(draft_step_s={1: 1.0}, verify_s={1: 1.0}),
    )  # fmt: skip
    num_skipped, num_added, num_left = 2 * plan.max_rows, 0, num_counted
    added_s: dict[int, float] = {}
    first_s: dict[int, float] = {}

    def add() -> None:
        nonlocal num_added
        prompt_ids, num_new = requests[(first + num_added) % len(requests)]
        added_s[num_added] = time.perf_counter()
        engine.add(Request(
            request_id=num_added, prompt_ids=prompt_ids, params=SamplingParams(max_new_tokens=num_new, ignore_eos=True),
            draft=DraftChoice(policy="fixed", num_draft_tokens=plan.num_draft_tokens), arrived_s=added_s[num_added],
        ))  # fmt: skip
        num_added += 1

    for _ in range(plan.max_rows):
        add()
    while num_left:
        is_counted = num_skipped < num_added <= num_skipped + num_counted
        start_s = time.perf_counter()
        result = engine.step()
        now_s = time.perf_counter()
        if is_counted:
            measured.num_tokens += result.report.rounds.new_tokens
            measured.seconds += now_s - start_s
        for output in result.outputs:
            number = output.request_id
            if output.token_ids:
                first_s.setdefault(number, now_s)
            if output.finish_reason is None:
                continue
            if num_skipped <= number < num_skipped + num_counted:
                num_left -= 1
                measured.first_token_s.append(first_s[number] - added_s[number])
                if output.stats.new_tokens > 1:
                    measured.token_s.append((now_s - first_s[number]) / (output.stats.new_tokens - 1))
            add()


def answer(
    speculator: SelfSpeculator, prompts: list[list[int]], *, max_new_tokens: int
) -> tuple[Workload, list[tuple[list[int], int]]]:
    """The workload of the model's own greedy answers, and each prompt with its number of new tokens."""
    results = speculator.generate(
        prompts, SamplingParams(max_new_tokens=max_new_tokens), policy=FixedLength(DRAFT_TOKENS[-1]),
        keep_transitions=False,
    )  # fmt: skip
    with Progress(console=CONSOLE, transient=True) as progress:
        results = list(progress.track(results, total=len(prompts), description="answers"))
    workload = Workload.of_counts([result.stats for result in results], split_layer=speculator.split.split_layer)
    return workload, [(prompts[result.index], result.stats.new_tokens) for result in results]


def _plan(text: str) -> tuple[int, ...]:
    """Draft tokens, rows, prefill tokens and rounds per prefill of a plan."""
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers such as 4,16,256,1, got {text!r}")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ModelSettings.path)
    parser.add_argument("--adapter", default="checkpoints/reference-11m-drafter")
    parser.add_argument("--prompts", default="configs/demo/prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--num-requests", type=int, default=96, help="counted, of each plan and repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--plan", type=_plan, action="append", metavar="T,ROWS,PREFILL,ROUNDS", help="in place of the held-out plans",
    )
    parser.add_argument("--profile-s", type=float, default=4.0, help="seconds for the passes, each repetition")
    parser.add_argument("--num-threads", type=int, default=int(os.environ.get("DVI_THREADS", 1)))
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)

    speculator = SelfSpeculator.from_pretrained(args.model, adapter=args.adapter)
    layer = speculator.split.split_layer
    plans = [ServingPlan(layer, *plan) for plan in args.plan or HELD_OUT]
    texts = read_prompts([args.prompts], limit=args.num_prompts, shuffle_seed=0)
    prompts = [speculator.encode_request(text, max_new_tokens=args.max_new_tokens)[0] for text in texts]
    workload, requests = answer(speculator, prompts, max_new_tokens=args.max_new_tokens)
    predicted, measured = {plan: [] for plan in plans}, {plan: Measured() for plan in plans}
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task("profile and plans in turn", total=args.repeats * (len(plans) + 1))
        for repeat in range(args.repeats):
            profile = LatencyProfile(
                {(layer, 1): measure_passes(speculator, layer, budget_s=args.profile_s)}, measure_overheads(speculator)
            )
            simulator = Simulator(profile, workload, num_requests=SHUFFLES * len(requests))
            progress.advance(task)
            for plan, forecast in zip(plans, simulator.forecast(plans), strict=True):
                predicted[plan].append(forecast)
                run_engine(
                    speculator, plan, requests, measured[plan], first=repeat * args.num_requests,
                    num_counted=args.num_requests,
                )
                progress.advance(task)
    report(plans, predicted, {plan: found.as_forecast() for plan, found in measured.items()}, args, workload)


def report(
    plans: list[ServingPlan], predicted: dict[ServingPlan, list[Forecast]], measured: dict[ServingPlan, Forecast],
    args: argparse.Namespace, workload: Workload,
) -> None:
    """Predicted over measured, as a table and as a line of JSON; of several predictions the median counts."""
    figures = [field.name for field in fields(Forecast)]
    table = Table(title="predicted / measured; of seconds, and of tokens per second")
    for head in ("T", "rows", "prefill\ntokens", "rounds/\nprefill", *(name.removesuffix("_s") for name in figures)):
        table.add_column(head, justify="right")
    rows = []
    for plan in plans:
        forecast = {name: statistics.median(getattr(one, name) for one in predicted[plan]) for name in figures}
        ratios = {name: forecast[name] / getattr(measured[plan], name) for name in figures}
        rows.append({
            "plan": asdict(plan), "predicted": forecast, "measured": asdict(measured[plan]), "ratios": ratios,
        })  # fmt: skip
        table.add_row(
            str(plan.num_draft_tokens), str(plan.max_rows), str(plan.prefill_tokens_per_step),
            str(plan.rounds_per_prefill), *(f"{ratio:.2f}" for ratio in ratios.values()),
        )
    CONSOLE.print(table)
    worst = {name: max(abs(row["ratios"][name] - 1) for row in rows) for name in ("tokens_per_s", "token_p99_s")}
    CONSOLE.print(f"worst: {worst['tokens_per_s']:.0%} in throughput, {worst['token_p99_s']:.0%} in the token's p99")
    prompt_N, new_N = np.array(workload.lengths).T
    print(json.dumps({
        "benchmark": "simulator", "worst": worst, "is_within_goal": max(worst.values()) <= GOAL, "goal": GOAL,
        "plans": rows, "mean_prompt_tokens": float(prompt_N.mean()), "mean_new_tokens": float(new_N.mean()),
        "num_requests": args.num_requests, "repeats": args.repeats, "model": args.model, "adapter": args.adapter,
        "dtype": "float32", "acceptance": workload.to_json()["acceptance"], "machine": describe_machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
