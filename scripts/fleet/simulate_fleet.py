"""Plans a fleet of replicas: traffic, synchronisation, what more replicas buy, adapters, failures, by their number.

Costs of one replica come from a file, measured (configs/fleet/cpu_reference.yaml) or derived (h200_derived.yaml). Rates
are planned by closed forms; waits and lost time are then simulated, request by request and replica by replica. Prints
a table and one JSON line last. docs/scaling.md says what is modelled and what follows from it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import fleet_model as fleet
import fleet_queue
import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
NUM_ROUNDS = 200_000  # the line of rounds that ticks fall on: far more than the largest fleet has replicas
REQUESTS_PER_SLOT, FEWEST_REQUESTS = 100, 100_000  # the first half fills the rows and is not counted
OUTER_MEETINGS, VISITS = 20, 20_000  # at least so many of the outermost level, and so many replicas in them


def plan(costs: fleet.Costs, args: argparse.Namespace, num_replicas: int) -> dict:
    """All figures for one number of replicas, as they go into the JSON line."""
    final_steps = max(costs.mat_by_steps)
    mat = fleet.mat_after(costs, final_steps)
    one = fleet.replica(costs, prompt_tokens=args.prompt_tokens, answer_tokens=args.answer_tokens, mat=mat)
    levels, shares = _synchronisation(costs, args, one.round_s, num_replicas)
    shipping = fleet.ship(costs, num_replicas=num_replicas, tokens_per_s=one.tokens_per_s)
    # As if parameters averaged every few steps were worth gradients averaged at every step: the most one can hope for.
    together_s = costs.step_every_s / fleet.batch_gain(costs, num_replicas) / (1 - shares["reduce"])
    node = min(costs.links[0].members, num_replicas)
    # Every hop at the price of the slowest link that the fleet spans.
    tree_s = fleet.tree_s(
        costs.links[len(levels) - 1], num_replicas=num_replicas, fan_out=args.fan_out, num_bytes=costs.update_bytes
    )
    return {
        "num_replicas": num_replicas,
        "serving": {"speed_up": one.speed_up, "replica_tokens_per_s": one.tokens_per_s,
                    **_serving(costs, args, one, num_replicas)},
        "synchronisation": {
            "step_every_s": costs.step_every_s, "levels": [asdict(level) for level in levels],
            "shares": shares, "staleness_s": levels[-1].every * costs.step_every_s,
            "replica_bytes_per_day": sum(level.bytes_per_day for level in levels),
        },
        "learning": {
            "final_mat": mat, "hours_alone": final_steps * costs.step_every_s / 3600,
            "hours_together": final_steps * together_s / 3600,
            "steps_per_s": (1 - shares["reduce"]) / costs.step_every_s,
            "hours_dedicated": final_steps / shipping.steps_per_s / 3600,
            "trained_share": costs.blocks_per_step * costs.block_len / costs.step_every_s / one.tokens_per_s,
        },
        "dedicated": asdict(shipping),
        "adapters": {
            "bytes": costs.update_bytes, "tree_depth": fleet.tree_depth(num_replicas, args.fan_out), "tree_s": tree_s,
            "store_s": fleet.store_s(costs, num_replicas=num_replicas, num_bytes=costs.update_bytes),
            "dedicated_version_every_s": costs.steps_per_publish / shipping.steps_per_s,
            "fleet_bytes_per_version": num_replicas * costs.update_bytes,
        },
        "failures": {"one_job": asdict(fleet.failures(costs, job_replicas=num_replicas)),
                     "job_of_a_node": asdict(fleet.failures(costs, job_replicas=node)), "node": node},
    }  # fmt: skip


def _serving(costs: fleet.Costs, args: argparse.Namespace, one: fleet.Replica, num_replicas: int) -> dict:
    """The largest mean rate whose peak still meets the wait, and the wait that a simulation of one door finds at it."""
    num_doors = math.ceil(num_replicas / args.door)
    num_slots = num_replicas // num_doors * costs.rows
    rate = fleet_queue.largest_rate(slot_s=one.slot_s, num_slots=num_slots, p99_wait_s=args.p99_wait) / args.burst
    rng, num = np.random.default_rng(args.seed), max(REQUESTS_PER_SLOT * num_slots, FEWEST_REQUESTS)
    arrivals_s = fleet_queue.arrivals(rng, rate=rate, num=num, burst=args.burst, burst_s=args.burst_s)
    answers = fleet_queue.sizes(rng, mean=args.answer_tokens, sigma=args.size_sigma, num=num)
    prompts = fleet_queue.sizes(rng, mean=args.prompt_tokens, sigma=args.size_sigma, num=num)
    # A request holds its row in proportion to its own prompt and answer.
    prompt_token_s = costs.rows * costs.prefill_token_s / (1 - costs.budget)
    answer_token_s = (one.slot_s - prompt_token_s * args.prompt_tokens) / args.answer_tokens
    slots_s = prompts * prompt_token_s + answers * answer_token_s
    waits_s = fleet_queue.queue(arrivals_s, slots_s, num_slots=num_slots)[num // 2 :]
    return {
        "num_doors": num_doors, "requests_per_s": num_doors * rate,
        "tokens_per_s": num_doors * rate * args.answer_tokens, "utilisation": rate * one.slot_s / num_slots,
        "simulated_p99_wait_s": float(np.quantile(waits_s, 0.99)),
    }  # fmt: skip


def _synchronisation(
    costs: fleet.Costs, args: argparse.Namespace, round_s: float, num_replicas: int
) -> tuple[list[fleet.Level], dict[str, float]]:
    """The planned levels, and shares of a replica's time.

    Simulated: `reduce`, of the all-reduces, and `standing`, with standing still until the last has come. Planned for
    one meeting of all at every step: `flat_reduce` and `flat_standing`.
    """
    rng = np.random.default_rng(args.seed)
    ends_s = rng.lognormal(math.log(round_s) - costs.round_sigma**2 / 2, costs.round_sigma, NUM_ROUNDS).cumsum()
    levels = fleet.plan_levels(costs, ends_s, num_replicas=num_replicas, share=args.sync_share, seed=args.seed)
    meetings = fleet.simulate_meetings(
        costs, levels, ends_s, num_replicas=num_replicas, seed=args.seed,
        num_outer=max(OUTER_MEETINGS, VISITS // num_replicas),
    )  # fmt: skip
    outer = levels[-1]
    reduce_s = fleet.all_reduce_s(costs.links[len(levels) - 1], members=num_replicas, update_bytes=costs.update_bytes)
    return levels, {
        "reduce": meetings.reduce_share, "standing": meetings.standing_share,
        "flat_reduce": reduce_s / max(costs.step_every_s, outer.wait_s + reduce_s),
        "flat_standing": (outer.wait_s + reduce_s) / max(costs.step_every_s, outer.wait_s + reduce_s),
    }  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if 1e-4 <= share < 0.995 else "< 0.01 %" if share < 1e-4 else f"{100 * share:.0f} %"


def _amount(value: float, unit: str = "") -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


LINES: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("front doors", lambda f: f"{f['serving']['num_doors']:,}"),
    ("requests/s, mean", lambda f: _amount(f["serving"]["requests_per_s"])),
    ("answer tokens/s, mean", lambda f: _amount(f["serving"]["tokens_per_s"])),
    ("rows in use, mean", lambda f: _percent(f["serving"]["utilisation"])),
    ("p99 wait for a row, simulated", lambda f: _seconds(f["serving"]["simulated_p99_wait_s"])),
    ("", str),
    ("steps between meetings, in/out", lambda f: "/".join(str(x["every"]) for x in f["synchronisation"]["levels"])),
    ("time lost to all-reduces", lambda f: _percent(f["synchronisation"]["shares"]["reduce"])),
    ("if replicas stood still to wait", lambda f: _percent(f["synchronisation"]["shares"]["standing"])),
    ("all meet at each step: time lost", lambda f: _percent(f["synchronisation"]["shares"]["flat_reduce"])),
    ("if they stood still", lambda f: _percent(f["synchronisation"]["shares"]["flat_standing"])),
    ("others' steps arrive within", lambda f: _seconds(f["synchronisation"]["staleness_s"])),
    ("sent by a leader in a day", lambda f: _amount(f["synchronisation"]["replica_bytes_per_day"], "B")),
    ("", str),
    ("hours to the last measured MAT, alone", lambda f: f"{f['learning']['hours_alone']:.2g}"),
    ("all together, at best", lambda f: f"{f['learning']['hours_together']:.2g}"),
    ("dedicated learner", lambda f: f"{f['learning']['hours_dedicated']:.2g}"),
    ("its experience shed", lambda f: f"{100 * f['dedicated']['shed_share']:.3g} %"),
    ("received by it, a second", lambda f: _amount(f["dedicated"]["bytes_per_s"], "B")),
    ("", str),
    ("an adapter to all, by tree", lambda f: _seconds(f["adapters"]["tree_s"])),
    ("depth of the tree", lambda f: str(f["adapters"]["tree_depth"])),
    ("an adapter to all, from a store", lambda f: _seconds(f["adapters"]["store_s"])),
    ("bytes of that", lambda f: _amount(f["adapters"]["fleet_bytes_per_version"], "B")),
    ("", str),
    ("failures a day", lambda f: f"{f['failures']['one_job']['per_day']:.2g}"),
    ("not serving, all one job", lambda f: _percent(f["failures"]["one_job"]["serving_share"])),
    ("learning lost, all one job", lambda f: _percent(f["failures"]["one_job"]["learning_share"])),
    ("not serving, a job for each node", lambda f: _percent(f["failures"]["job_of_a_node"]["serving_share"])),
)  # fmt: skip


def print_table(found: list[dict], title: str) -> None:
    table = Table(title=title)
    table.add_column("replicas", no_wrap=True)
    for figures in found:
        table.add_column(f"{figures['num_replicas']:,}", justify="right")
    for label, show in LINES:
        if label:
            table.add_row(label, *(show(figures) for figures in found))
        else:
            table.add_section()
    CONSOLE.print(table)


def plot(found: list[dict], path: Path, *, title: str, sync_share: float) -> None:
    """Writes a PNG: time lost, learning, adapters and failures against the number of replicas."""
    numbers = [figures["num_replicas"] for figures in found]
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    curves = (
        ("Time lost to synchronisation", "share of a replica's time, %", "log", (
            ("all meet at every step", lambda f: 100 * f["synchronisation"]["shares"]["flat_reduce"]),
            ("the same, standing still to wait", lambda f: 100 * f["synchronisation"]["shares"]["flat_standing"]),
            ("hierarchy", lambda f: 100 * f["synchronisation"]["shares"]["reduce"]),
            ("its bound", lambda f: 100 * sync_share))),
        ("Time to the last measured MAT", "hours", "linear", (
            ("one replica alone", lambda f: f["learning"]["hours_alone"]),
            ("all together, at best", lambda f: f["learning"]["hours_together"]),
            ("dedicated learner", lambda f: f["learning"]["hours_dedicated"]))),
        ("One adapter to all replicas", "seconds", "log", (
            ("tree", lambda f: f["adapters"]["tree_s"]), ("object store", lambda f: f["adapters"]["store_s"]))),
        ("Time in which a job does not serve", "share, %", "log", (
            ("one job", lambda f: 100 * f["failures"]["one_job"]["serving_share"]),
            ("a job for each node", lambda f: 100 * f["failures"]["job_of_a_node"]["serving_share"]))),
    )  # fmt: skip
    for axes, (heading, unit, scale, lines) in zip(panels.flat, curves, strict=True):
        for index, (label, value) in enumerate(lines):
            axes.plot(numbers, [value(f) for f in found], "os^D"[index] + "-:"[label == "its bound"], label=label)
        axes.set(title=heading, xlabel="replicas", ylabel=unit, xscale="log", yscale=scale)
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _replicas_for(costs: fleet.Costs, args: argparse.Namespace) -> int:
    """Replicas for the peak of a mean rate; beyond one front door, in the proportion of a full one."""
    one = fleet.replica(
        costs, prompt_tokens=args.prompt_tokens, answer_tokens=args.answer_tokens, mat=max(costs.mat_by_steps.values())
    )
    door_rate = fleet_queue.largest_rate(slot_s=one.slot_s, num_slots=args.door * costs.rows, p99_wait_s=args.p99_wait)
    peak = args.rate * args.burst
    if peak > door_rate:
        return math.ceil(args.door * peak / door_rate)
    return fleet_queue.replicas_for(peak, slot_s=one.slot_s, rows=costs.rows, p99_wait_s=args.p99_wait)


def measured(base: fleet.Costs, args: argparse.Namespace) -> fleet.Costs:
    """`base` with what can be measured here in its place. Imports torch; about a minute."""
    import fleet_measurement

    found = fleet_measurement.measure(args.model, args.adapter or None, args.prompts)
    links = [{**base.links[0].model_dump(), **found.pop("link")}, *base.links[1:]]
    source = f"{args.model} measured, the rest as in {args.costs.name}"
    return fleet.Costs.model_validate({**base.model_dump(), **found, "links": links, "source": source})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, default=Path("configs/fleet/cpu_reference.yaml"))
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64, 512, 1000, 4096, 10_000])
    parser.add_argument("--prompt-tokens", type=float, default=100.0, help="mean")
    parser.add_argument("--answer-tokens", type=float, default=64.0, help="mean")
    parser.add_argument("--size-sigma", type=float, default=1.0, help="of the logarithm of both lengths")
    parser.add_argument("--p99-wait", type=float, default=1.0, help="seconds for a row, at most, 99 times in 100")
    parser.add_argument("--burst", type=float, default=1.5, help="peak over mean rate, 1 to 2; planned for the peak")
    parser.add_argument("--burst-s", type=float, default=20.0, help="seconds of a peak, and of the trough after it")
    parser.add_argument("--door", type=int, default=64, help="replicas behind one front door")
    parser.add_argument("--rate", type=float, help="also say how many replicas so many requests a second need")
    parser.add_argument("--sync-share", type=float, default=0.01, help="of the time, at most, for synchronisation")
    parser.add_argument("--fan-out", type=int, default=8, help="copies that each replica passes on in the tree")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="a PNG")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine first and write costs here")
    parser.add_argument("--model", default="checkpoints/reference-11m", help="for --measure")
    parser.add_argument("--adapter", default="checkpoints/reference-11m-drafter", help="for --measure; may be empty")
    parser.add_argument("--prompts", default="configs/demo/prompts.jsonl", help="for --measure")
    args = parser.parse_args(argv)
    try:
        _check(args)
        costs = fleet.read_costs(args.costs)
        if args.measure:
            costs = measured(costs, args)
            args.measure.write_text(yaml.safe_dump(costs.model_dump(mode="json"), sort_keys=False))
        found = [
            plan(costs, args, number) for number in track(sorted(set(args.replicas)), "simulating", console=CONSOLE)
        ]
    except (ValueError, OSError) as error:
        parser.error(str(error))

    title = f"{args.costs.name}: {costs.source}"
    print_table(found, title)
    report = {"costs": str(args.costs), "source": costs.source, "fleets": found}
    if args.rate:
        report["replicas_for_rate"] = _replicas_for(costs, args)
        CONSOLE.print(f"{args.rate:g} requests/s need {report['replicas_for_rate']:,} replicas")
    if args.figure:
        plot(found, args.figure, title=title, sync_share=args.sync_share)
    print(json.dumps(report, allow_nan=False))


def _check(args: argparse.Namespace) -> None:
    for name, value, low, high in (
        ("--replicas", min(args.replicas), 2, math.inf), ("--burst", args.burst, 1, 2),
        ("--fan-out", args.fan_out, 2, math.inf), ("--door", args.door, 1, math.inf),
        ("--sync-share", args.sync_share, 1e-6, 1),
        ("--prompt-tokens", args.prompt_tokens, 1, math.inf), ("--answer-tokens", args.answer_tokens, 1, math.inf),
        ("--p99-wait", args.p99_wait, 0, math.inf), ("--size-sigma", args.size_sigma, 0, 3),
        ("--burst-s", args.burst_s, 1e-3, math.inf),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low:g}..{high:g}, got {value:g}")


if __name__ == "__main__":
    main()
