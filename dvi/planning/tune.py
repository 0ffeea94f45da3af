"""What `dvi tune` leaves behind: a plan as a fragment of settings, the frontier as table, picture and JSON.

Knows plans, forecasts, settings and files; measures nothing. What it is told of is made by `dvi.planning.profile`,
`workload` and `simulator`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dvi.planning.frontier import Choice, find_frontier, plans_table, plot_frontier
from dvi.planning.plans import LatencyBound, PlanSpace, ServingPlan
from dvi.planning.search import Evaluator, NoFeasiblePlan, search
from dvi.settings import ServeConfig

PLAN_FILE, FRONTIER_FILE, PICTURE_FILE = "plan.yaml", "frontier.json", "frontier.png"


def present_plan(config: ServeConfig, *, split_layer: int, tensor_parallel: int) -> ServingPlan:
    """What a server of these settings follows; the two that depend on model and launcher are given."""
    serve = config.serve
    return ServingPlan(
        split_layer=split_layer, num_draft_tokens=config.draft.num_draft_tokens, max_rows=serve.max_rows,
        prefill_tokens_per_step=serve.prefill_tokens_per_step, rounds_per_prefill=serve.rounds_per_prefill,
        tensor_parallel=tensor_parallel,
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
    if (plan.tensor_parallel > 1) != (config.model.placement == "tensor"):
        sections["model"]["placement"] = "tensor" if plan.tensor_parallel > 1 else "single"
    return sections


def report_plan(
    space: PlanSpace, bound: LatencyBound, evaluator: Evaluator, *, config: ServeConfig, present: ServingPlan,
    folder: Path, command: str, conditions: str, notes: Sequence[str], console: Console,
) -> dict[str, Any]:
    """Searches, writes plan.yaml, frontier.json and frontier.png, prints the tables, and returns the figures in JSON.

    present     the plan that the settings follow now, forecast beside the best one.
    command     how a server is started with the plan.
    conditions  model, machine and traffic in a line.
    notes       what else must be done, or known, before it is.
    Raises NoFeasiblePlan, having written all this for the nearest plan and a bound that it meets.
    """
    refused = None
    with console.status(f"searching {len(space)} plans"):
        try:
            result = search(space, bound, evaluator)
        except NoFeasiblePlan as error:
            refused, result = error, error.nearest
        frontier = find_frontier(space, refused.remedy if refused else bound, evaluator, known=result.simulated)
        [present_forecast] = evaluator.forecast([present])
    chosen = Choice(result.best, result.forecast, "nearest" if refused else "tuned")
    beside = Choice(present, present_forecast, "present")
    facts = {
        "bound": {"token_ms": _ms(bound.token_s), "first_token_ms": _ms(bound.first_token_s)}, "is_met": not refused,
        "plans": len(space), "simulations": result.num_simulations, "bounds": result.num_bounds,
        "is_proved": result.is_proved, chosen.label: _facts(chosen), "present": _facts(beside) | {
            "is_met": present_forecast.meets(bound)
        }, "throughput_ratio": chosen.forecast.tokens_per_s / present_forecast.tokens_per_s,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _write_plan(folder / PLAN_FILE, chosen, config=config, bound=bound, notes=[*notes, f"To use it: {command}"])
    everything = facts | {
        "conditions": conditions, "frontier": [_facts(choice) for choice in frontier.choices],
        "simulated": [_facts(Choice(plan, gives)) for plan, gives in frontier.simulated.items()],
    }  # fmt: skip
    (folder / FRONTIER_FILE).write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot_frontier(frontier, [chosen, beside], bound, folder / PICTURE_FILE, conditions=conditions)
    console.print(plans_table(frontier.choices, title="The best plan under each bound on the token latency"))
    console.print(plans_table([chosen, beside], title=f"Under {bound}"))
    if refused:
        raise refused
    return facts


def _write_plan(
    path: Path, choice: Choice, *, config: ServeConfig, bound: LatencyBound, notes: Sequence[str]
) -> None:
    gives = choice.forecast
    verdict = "Written for" if gives.meets(bound) else "NO plan meets, and this one is nearest to,"
    lines = [
        f"{verdict} {bound}.",
        f"Forecast: {gives.tokens_per_s:,.0f} tokens/s, {LatencyBound(gives.token_p99_s, gives.first_token_p99_s)}.",
        *notes,
    ]
    fragment = yaml.safe_dump(plan_settings(choice.plan, config), sort_keys=False)
    path.write_text("".join(f"# {line}\n" for line in lines) + fragment, encoding="utf-8")


def _facts(choice: Choice) -> dict[str, Any]:
    return dataclasses.asdict(choice.plan) | dataclasses.asdict(choice.forecast)


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for infinity, for which JSON has no word."""
    return 1e3 * seconds if seconds < math.inf else None
