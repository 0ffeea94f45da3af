"""`dvi tune`: from a server's settings and a latency bound to the best plan, as settings, tables and a picture.

Ties measurement, simulation and search together; knows files and a console.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console

from dvi.decode.construction import build_speculator
from dvi.decode.precision import settle_dtype
from dvi.hardware import describe_machine
from dvi.planning.frontier import Choice, find_frontier, plans_table, plot_frontier
from dvi.planning.measurement import DRAFT_TOKENS, measure_workload, obtain_profile
from dvi.planning.plans import LatencyBound, PlanSpace
from dvi.planning.search import Evaluator, NoFeasiblePlan, search
from dvi.planning.simulator import Simulator
from dvi.planning.workload import Workload, read_acceptance, read_lengths
from dvi.progress import doing
from dvi.records import ServingPlan
from dvi.serving.scheduler import SchedulerLimits
from dvi.settings import ServeConfig
from dvi.traffic import read_prompts
from dvi.whole_files import write_whole

PLAN_FILE, FRONTIER_FILE, PICTURE_FILE = "plan.yaml", "frontier.json", "frontier.png"
NUM_PROMPTS = 64  # decoded at most; fewer where measure_workload's time is up
CHOICES = {"num_draft_tokens": (0, DRAFT_TOKENS[-1])} | dict.fromkeys(
    ("max_rows", "prefill_tokens_per_step", "rounds_per_prefill"), (1, 4096)
)  # the fields that may be narrowed, and what they may be


@dataclass(frozen=True)
class Sources:
    """What is known beforehand, and what is to be measured.

    prompts     JSONL rows, decoded for their lengths and acceptance unless both are given.
    traffic     JSONL rows with prompt_tokens and new_tokens: lengths of requests.
    acceptance  JSON by split layer, see `read_acceptance`: only a split layer named there is planned beside the own.
    seconds     for measuring the passes of each split layer; remeasure: even those that are known.
    """

    prompts: Path
    traffic: Path | None
    acceptance: Path | None
    seconds: float
    remeasure: bool


def tune(
    config: ServeConfig, bound: LatencyBound, sources: Sources, *, choices: Mapping[str, tuple[int, ...]],
    folder: Path, command: str, console: Console,
) -> dict[str, Any]:
    """Measures, searches and writes; see `report_plan` for what it raises and returns.

    choices  values that fields of the plan may take, in the place of `PlanSpace`'s own and the present one.
    command  starts a server of these settings; followed by the file of the plan it starts one that follows it.
    Servers do not run tensor-parallel, so that is not planned here.
    """
    lengths = None if sources.traffic is None else read_lengths(sources.traffic)
    acceptance = {} if sources.acceptance is None else read_acceptance(sources.acceptance)
    config = settle_dtype(config)
    speculator = build_speculator(config)
    own = speculator.split.split_layer
    split_layers = tuple(sorted({own, *acceptance}))
    is_known = lengths is not None and own in acceptance
    prompts = [] if is_known else read_prompts([sources.prompts], limit=NUM_PROMPTS)
    profile, is_new = obtain_profile(
        speculator, split_layers=split_layers, remeasure=sources.remeasure, budget_s=sources.seconds
    )
    console.print(
        "profile of this machine: measured now, and kept" if is_new else
        "profile of this machine: measured before; --remeasure measures it anew"
    )  # fmt: skip
    learner_share = config.train.budget if config.train.enabled else 0.0
    if is_known:
        workload = Workload(lengths, acceptance, learner_share)
    else:
        max_new_tokens = config.sampling.max_new_tokens
        decoded = measure_workload(
            speculator, [speculator.encode_request(one, max_new_tokens=max_new_tokens)[0] for one in prompts],
            max_new_tokens=max_new_tokens,
        )
        # Texts differ in how well they are drafted for, and the slowest hundredth is made of the hard ones.
        workload = dataclasses.replace(
            decoded if lengths is None else decoded.with_lengths(lengths),
            acceptance={**decoded.acceptance, **acceptance}, learner_share=learner_share,
        )
    console.print(_describe(workload, split_layer=own))
    present = present_plan(config, split_layer=own)
    space = plan_space(
        present, choices, split_layers=split_layers, max_positions=config.serve.max_positions, lengths=workload.lengths
    )
    machine = describe_machine(speculator.split.device)
    dtype = str(speculator.split.dtype).removeprefix("torch.")
    facts = report_plan(
        space, bound, Simulator(profile, workload), config=config, present=present, folder=folder,
        command=f"{command} {folder / PLAN_FILE}", console=console,
        conditions=f"{Path(config.model.path).name}, {dtype}, {machine['gpu'] or machine['cpu']}, "
        f"threads: {machine['threads']}; {len(workload.lengths)} requests",
    )
    return facts | {"is_newly_measured": is_new}


def _describe(workload: Workload, *, split_layer: int) -> str:
    """Traffic in a line."""
    prompts, answers = zip(*workload.lengths, strict=True)
    acceptance = " ".join(f"{a:.2f}" for a in workload.acceptance[split_layer].at(workload.tokens_seen))
    return (
        f"traffic: {len(prompts)} requests, on average {fmean(prompts):.0f} prompt, {fmean(answers):.0f} new tokens; "
        f"acceptance by depth {acceptance}; learning takes {workload.learner_share:.0%} of the time"
    )


def plan_space(
    present: ServingPlan, choices: Mapping[str, tuple[int, ...]], *, split_layers: tuple[int, ...],
    max_positions: int, lengths: Sequence[tuple[int, int]],
) -> PlanSpace:
    """The plans to choose among: the given values, else `PlanSpace`'s own and the present one.

    Of the numbers of rows only those whose requests fit max_positions together, were all as long as the longest.
    Raises ValueError when none does.
    """
    usual = PlanSpace(split_layer=split_layers)
    values = {
        name: choices.get(name) or tuple(sorted({*getattr(usual, name), getattr(present, name)})) for name in CHOICES
    }
    longest = max(map(sum, lengths)) + SchedulerLimits.headroom
    rows = tuple(rows for rows in values["max_rows"] if rows * longest <= max_positions)
    if not rows:
        raise ValueError(
            f"serve.max_positions must be at least {values['max_rows'][0] * longest} for so few rows as "
            f"{values['max_rows'][0]} of this traffic, got {max_positions}"
        )
    return replace(usual, **values | {"max_rows": rows})


def read_choices(name: str, text: str) -> tuple[int, ...]:
    """The values in "4,8,16" for a field of CHOICES, ascending. Raises ValueError for others than it may take."""
    low, high = CHOICES[name]
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not low <= values[0] <= values[-1] <= high:
        raise ValueError(
            f"--{name.replace('_', '-')} must be numbers in {low}..{high} with commas between them, got {text!r}; try "
            f"{','.join(map(str, getattr(PlanSpace((1,)), name)))}"
        )
    return tuple(values)


def present_plan(config: ServeConfig, *, split_layer: int) -> ServingPlan:
    """What a server of these settings follows, its model cut there."""
    serve = config.serve
    return ServingPlan(
        split_layer=split_layer, num_draft_tokens=config.draft.num_draft_tokens, max_rows=serve.max_rows,
        prefill_tokens_per_step=serve.prefill_tokens_per_step, rounds_per_prefill=serve.rounds_per_prefill,
    )


def plan_settings(plan: ServingPlan, config: ServeConfig) -> dict[str, dict[str, Any]]:
    """The settings, section by section, that make a server of `config` follow the plan.

    A length policy of "auto" becomes "fixed", which is what is simulated. Others are kept: the plan's draft tokens are
    then the most that they draft.
    """
    sections: dict[str, dict[str, Any]] = {
        "model": {"split_layer": plan.split_layer},
        "draft": {"num_draft_tokens": plan.num_draft_tokens},
        "serve": {
            "max_rows": plan.max_rows, "prefill_tokens_per_step": plan.prefill_tokens_per_step,
            "rounds_per_prefill": plan.rounds_per_prefill,
        },
    }  # fmt: skip
    if config.draft.policy == "auto":
        sections["draft"]["policy"] = "fixed"
    return sections


def report_plan(
    space: PlanSpace, bound: LatencyBound, evaluator: Evaluator, *, config: ServeConfig, present: ServingPlan,
    folder: Path, command: str, conditions: str, console: Console,
) -> dict[str, Any]:
    """Searches, writes plan.yaml, frontier.json and frontier.png, prints the tables, and returns the figures in JSON.

    present     the plan that the settings follow now, forecast beside the best one.
    command     starts a server that follows the plan.
    conditions  model, machine and traffic in a line.
    Raises NoFeasiblePlan, having written all this for the nearest plan and a bound that it meets.
    """
    refused = None
    with doing(f"searching {len(space):,} plans"):
        try:
            result = search(space, bound, evaluator)
        except NoFeasiblePlan as error:
            refused, result = error, error.nearest
        frontier = find_frontier(space, refused.remedy if refused else bound, evaluator, known=result.simulated)
        [present_forecast] = evaluator.forecast([present])
    chosen = Choice(result.best, result.forecast, "nearest" if refused else "tuned")
    beside = Choice(present, present_forecast, "present")
    ratio, is_present_fit = chosen.forecast.tokens_per_s / present_forecast.tokens_per_s, present_forecast.meets(bound)
    facts = {
        "bound": {"token_ms": _ms(bound.token_s), "first_token_ms": _ms(bound.first_token_s)}, "is_met": not refused,
        "plans": len(space), "simulations": result.num_simulations, "bounds": result.num_bounds,
        "is_proved": result.is_proved, chosen.label: _facts(chosen), "throughput_ratio": ratio,
        "present": _facts(beside) | {"is_met": is_present_fit}, "folder": str(folder),
    }  # fmt: skip
    notes = [*_notes(result.best, config, present=present), f"To use it: {command}"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_plan(folder / PLAN_FILE, chosen, config=config, bound=bound, notes=notes)
    everything = facts | {
        "conditions": conditions, "frontier": [_facts(choice) for choice in frontier.choices],
        "simulated": [_facts(Choice(plan, gives)) for plan, gives in frontier.simulated.items()],
    }  # fmt: skip
    write_whole(folder / FRONTIER_FILE, json.dumps(everything, indent=1, allow_nan=False) + "\n")
    plot_frontier(frontier, [chosen, beside], bound.token_s, folder / PICTURE_FILE, conditions=conditions)

    console.print(f"{len(space)} plans, of which {result.num_simulations} were simulated to find the best")
    console.print(plans_table(frontier.choices, title="The best plan under each bound on the token latency"))
    console.print(plans_table([chosen, beside], title=f"Under {bound}"))
    console.print(
        f"{chosen.label}: {ratio:.2f} times the present throughput, by forecast; the present plan "
        f"{'meets' if is_present_fit else 'does not meet'} the bound"
    )
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(f"written: {', '.join(str(folder / name) for name in (PLAN_FILE, FRONTIER_FILE, PICTURE_FILE))}")
    if refused:
        raise refused
    return facts


def _notes(plan: ServingPlan, config: ServeConfig, *, present: ServingPlan) -> list[str]:
    """What to know before the plan is used."""
    notes = []
    if plan.split_layer != present.split_layer:
        notes.append(
            f"Split layer {plan.split_layer} is not the drafter's, {present.split_layer}: first train one for it, with "
            f"dvi warmup or dvi train and model.split_layer={plan.split_layer}, and name it in drafter.adapter."
        )
    elif config.drafter.adapter is None:
        notes.append(
            "No drafter.adapter is set, so the acceptance is an untrained drafter's. Plan again once it has learnt."
        )
    if config.draft.policy not in ("auto", "fixed") and plan.num_draft_tokens:
        notes.append(
            f"The forecast is for rounds of always {plan.num_draft_tokens} drafts; with draft.policy "
            f"{config.draft.policy} that is the most."
        )
    return notes


def _write_plan(
    path: Path, choice: Choice, *, config: ServeConfig, bound: LatencyBound, notes: Sequence[str]
) -> None:
    gives = choice.forecast
    lines = [
        f"The plan for {bound}." if gives.meets(bound) else f"No plan gives {bound}; this one is nearest.",
        f"Forecast: {gives.tokens_per_s:,.0f} tokens/s; 99 requests of 100 within {1e3 * gives.token_p99_s:.4g} ms a "
        f"token and {1e3 * gives.first_token_p99_s:.4g} ms to the first.",
        *notes,
    ]
    fragment = yaml.safe_dump(plan_settings(choice.plan, config), sort_keys=False)
    write_whole(path, "".join(f"# {line}\n" for line in lines) + fragment)


def _facts(choice: Choice) -> dict[str, Any]:
    return dataclasses.asdict(choice.plan) | dataclasses.asdict(choice.forecast)


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for infinity, for which JSON has no word."""
    return 1e3 * seconds if seconds < math.inf else None
