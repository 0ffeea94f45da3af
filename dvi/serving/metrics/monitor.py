"""Monitor: what the server does, counted while it does it, for the dashboard, for `dvi top` and for Prometheus.

Written to by the engine's thread, read by any. One lock, held for additions and for taking copies, never while text
is made. Counts are added to by events; what is there now (requests, positions, a version) is asked for when somebody
looks, since no event need come when it changes. Memory does not grow with uptime or with what clients send, and no text
of theirs gets in but domain names.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from dvi.records import UpdateReport
from dvi.serving.metrics.figures import Figures, Labels, Series, Split, printable, ratio, rounded
from dvi.serving.request import Load, Request, RequestOutput, StepReport

NEWEST_S = 30.0  # what "now" means in a figure that must be averaged over something
BIN_S = 2.0
NUM_RECENT_BINS = 150  # five minutes
NUM_BINS_SINCE_START = 180
NUM_VERSIONS = 32
NUM_EVENTS = 50
PUBLISH, ROLLBACK = "publish", "rollback"
SOURCES = {PUBLISH, ROLLBACK, "pin", "resume"}  # events that say where a version comes from


@dataclass
class VersionSplit(Split):
    """What one drafter version has done. started_s: seconds from the server's start; source: the event's kind."""

    version: int = 0
    started_s: float = 0.0
    source: str = ""


@dataclass
class Readings:
    """All counts at one moment. Nobody adds to them any more."""

    uptime_s: float
    total: Figures
    load: Load
    update: UpdateReport | None
    learner: dict[str, float]
    domains: dict[str, Split]
    tenants: dict[str, Split]
    rejected: Counter[str]
    plan: dict[str, float]
    plan_reason: str
    replans: Counter[str]
    versions: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    recent: list[tuple[float, Figures]] = field(default_factory=list)
    since_start: list[tuple[float, Figures]] = field(default_factory=list)
    since_start_bin_s: float = BIN_S


class Monitor:
    """Counts everything since it was made.

    clock: seconds that never go back, the one of `Request.arrived_s`. load: tells what the server holds, on any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, load: Callable[[], Load] = Load) -> None:
        self.load = load
        self._lock = threading.Lock()
        self._clock, self._clock_start_s, self._start_s = clock, clock(), time.time()
        self._total = Figures()
        self._recent = Series(width_s=BIN_S, capacity=NUM_RECENT_BINS, folds=False)
        self._since_start = Series(width_s=BIN_S, capacity=NUM_BINS_SINCE_START, folds=True)
        self._drafter_version = 0  # of the newest step
        self._update: UpdateReport | None = None
        self._learner: dict[str, float] = {}
        self._learner_s = 0.0
        self._domain_names, self._tenant_names, self._reasons, self._kinds = Labels(), Labels(), Labels(), Labels()
        self._domains: dict[str, Split] = {}
        self._tenants: dict[str, Split] = {}
        self._rejected: Counter[str] = Counter()
        self._plan: dict[str, float] = {}
        self._plan_reason = ""
        self._replans: Counter[str] = Counter()
        self._versions: deque[VersionSplit] = deque(maxlen=NUM_VERSIONS)
        self._events: deque[dict] = deque(maxlen=NUM_EVENTS)

    # Written by the engine

    def on_step(self, report: StepReport) -> None:
        """Counts one engine step."""
        with self._lock:
            self._drafter_version = report.drafter_version
            for figures in self._figures():
                figures.count_step(report)
            self._spend("busy_s", report.seconds, over_s=report.seconds)
            self._version(report.drafter_version).count(report.rounds)
            for domain, rounds in report.rounds_by_domain.items():
                self._domains.setdefault(self._domain_names(domain), Split()).count(rounds)

    def on_finish(self, request: Request, output: RequestOutput) -> None:
        """Counts a request that has ended, whatever the reason."""
        with self._lock:
            seconds = self._clock() - request.arrived_s
            for figures in self._figures():
                figures.count_finish(output, num_prompt_tokens=len(request.prompt_ids), seconds=seconds)
            if request.domain:
                self._domains.setdefault(self._domain_names(request.domain), Split()).num_requests += 1
            tenant = self._tenants.setdefault(self._tenant_names(request.tenant), Split())
            tenant.num_requests += 1
            if output.stats is not None:
                tenant.count(output.stats)

    def on_update(self, report: UpdateReport) -> None:
        """Counts one finished optimizer step."""
        with self._lock:
            self._update = report
            for figures in self._figures():
                figures.count_update(report)

    def on_event(self, kind: str, text: str = "", version: int | None = None) -> None:
        """Notes what happened: "publish", "rollback", "pin", "load", "learner_died", "checkpoint_failed" and so on."""
        with self._lock:
            kind = self._kinds(kind)
            for figures in self._figures():
                figures.events[kind] += 1
            if version is not None and kind in SOURCES:
                split = self._version(version)
                split.source = split.source or kind
            # Versions have a list of their own; here they would push out everything else.
            if kind != PUBLISH:
                text = printable(text, max_length=200)
                self._events.append({"time_s": self._start_s + self._now_s(), "kind": kind, "text": text,
                                     "version": version})  # fmt: skip

    def on_rejected(self, reason: str) -> None:
        """Counts a request refused at the door. From any thread."""
        with self._lock:
            self._rejected[self._reasons(reason)] += 1

    def on_learner_stats(self, stats: dict[str, float]) -> None:
        """Takes over `Learner.stats`; the seconds of training since the last time were spent since then."""
        with self._lock:
            # The first figure may hold the seconds of earlier runs.
            train_s = stats.get("train_s", 0.0) - self._learner.get("train_s", math.inf)
            self._learner = dict(stats)
            now_s = self._now_s()
            if train_s > 0:
                self._spend("train_s", train_s, over_s=max(now_s - self._learner_s, train_s))
            self._learner_s = now_s

    def on_plan(self, reason: str, plan: dict[str, float]) -> None:
        """Takes over the numbers of the plan in force, which was made or confirmed for this reason. From any thread."""
        with self._lock:
            self._plan, self._plan_reason = dict(plan), reason
            self._replans[reason] += 1

    def _spend(self, name: str, seconds: float, *, over_s: float) -> None:
        """Counts seconds that were spent, evenly, within the last over_s."""
        list(self._figures())  # so that bins which begin with this know the totals
        setattr(self._total, name, getattr(self._total, name) + seconds)
        for series in (self._recent, self._since_start):
            for figures, part_s in series.spread(over_s, self._now_s()):
                share = part_s / over_s if over_s else 0.0
                setattr(figures, name, getattr(figures, name) + seconds * share)

    def _now_s(self) -> float:
        return self._clock() - self._clock_start_s

    def _figures(self) -> Iterator[Figures]:
        """The records that everything is counted in. The total comes first, and what it has then is known to all."""
        now_s = self._now_s()
        for figures in (self._total, self._recent.at(now_s), self._since_start.at(now_s)):
            figures.tokens_so_far = self._total.rounds.new_tokens
            figures.drafter_version = self._drafter_version
            yield figures

    def _version(self, number: int) -> VersionSplit:
        for split in reversed(self._versions):
            if split.version == number:
                return split
        self._versions.append(VersionSplit(version=number, started_s=self._now_s()))
        return self._versions[-1]

    # Read by anyone

    def snapshot(self) -> dict:
        """Plain JSON: what dashboard and terminal show. Numbers without a value are None; times are since the epoch.

        newest, total     `Figures.summary` of the last NEWEST_S seconds and since the start, with acceptance by depth.
        recent, since_start  the same as columns over time: "time_s" is when each bin ends, "tokens" the tokens
                          generated by then; "swaps" and "rollbacks" count those within it.
        domains, tenants, versions  `Split.summary` of each, with its name or number.
        level, verify_rule  as of `RequestOutput`; "num_waived" of the total's "num_accepted" passed by the rule alone.
        plan, replans     the plan in force and its reason, empty where nobody plans; how often it was looked at, by
                          reason.
        """
        readings = self.readings(with_history=True)
        now_s = readings.uptime_s
        newest, newest_start_s = Figures(), max(0.0, math.ceil((now_s - NEWEST_S) / BIN_S) * BIN_S)
        for start_s, figures in readings.recent:
            if start_s >= newest_start_s:
                newest.add(figures)
        total, load, update = readings.total, readings.load, readings.update
        return {
            "time_s": round(self._start_s + now_s, 1),
            "uptime_s": round(now_s, 1),
            "newest_s": NEWEST_S,
            "running": load.num_running,
            "waiting": load.num_waiting,
            "drafter_version": load.drafter_version,
            "level": load.level,
            "verify_rule": load.verify_rule,
            "cached_positions": load.num_cached_positions,
            "prefix_positions": load.num_prefix_positions,
            "newest": _summary(newest, now_s - newest_start_s),
            "total": _summary(total, now_s)
            | {
                "num_tokens": total.rounds.new_tokens,
                "num_rounds": total.rounds.num_rounds,
                "num_drafted": total.rounds.num_drafted,
                "num_accepted": total.rounds.num_accepted,
                "num_waived": total.rounds.num_waived,
                "num_preempted": total.num_preempted,
                "num_prefill_tokens": total.num_prefill_tokens,
                "cached_share": rounded(ratio(total.num_cached_tokens, total.num_prompt_tokens)),
                "num_updates": total.num_updates,
                "num_skipped": total.num_skipped,
                "num_rollbacks": total.events[ROLLBACK],
            },
            "finished": dict(total.finished),
            "rejected": dict(readings.rejected),
            "plan": readings.plan
            and {"reason": readings.plan_reason} | {name: rounded(value) for name, value in readings.plan.items()},
            "replans": dict(readings.replans),
            "learner": {name: rounded(value) for name, value in readings.learner.items()},
            "update": update
            and {
                "step": update.step,
                "phase": update.phase,
                "grad_norm": rounded(update.grad_norm),
                "skipped_reason": update.skipped_reason,
                "weights": {name: rounded(weight) for name, weight in asdict(update.weights).items() if weight},
            },
            "domains": _splits(readings.domains),
            "tenants": _splits(readings.tenants),
            "versions": readings.versions,
            "events": readings.events,
            "recent": self._columns(readings.recent, BIN_S, now_s),
            "since_start": self._columns(readings.since_start, readings.since_start_bin_s, now_s),
        }

    def readings(self, *, with_history: bool) -> Readings:
        load = self.load()
        with self._lock:
            readings = Readings(
                uptime_s=self._now_s(), total=self._total.copy(), load=load, update=self._update,
                learner=self._learner, rejected=self._rejected.copy(), plan=self._plan, plan_reason=self._plan_reason,
                replans=self._replans.copy(),
                domains={name: split.copy() for name, split in self._domains.items()},
                tenants={name: split.copy() for name, split in self._tenants.items()},
            )  # fmt: skip
            if with_history:
                readings.versions = [
                    {"version": v.version, "time_s": self._start_s + v.started_s, "source": v.source} | v.summary()
                    for v in self._versions
                ]
                readings.events = list(self._events)
                readings.recent, readings.since_start = self._recent.bins(), self._since_start.bins()
                readings.since_start_bin_s = self._since_start.width_s
        return readings

    def _columns(self, bins: list[tuple[float, Figures]], bin_s: float, now_s: float) -> dict:
        if bins and now_s < bins[-1][0] + BIN_S:
            bins = bins[:-1]  # so new that its ratios would be of next to nothing
        # The newest bin has lasted only until now.
        ends_s = [min(start_s + bin_s, now_s) for start_s, _ in bins]
        rows = [figures.summary(end_s - start_s) for (start_s, figures), end_s in zip(bins, ends_s, strict=True)]
        losses = [figures.mean_losses() for _, figures in bins]
        names = list(dict.fromkeys(name for row in losses for name in row))
        return {
            "bin_s": bin_s,
            "time_s": [round(self._start_s + end_s, 1) for end_s in ends_s],
            "tokens": [figures.tokens_so_far for _, figures in bins],
            "phase": [figures.phase for _, figures in bins],
            "version": [figures.drafter_version for _, figures in bins],
            "swaps": [figures.events[PUBLISH] for _, figures in bins],
            "rollbacks": [figures.events[ROLLBACK] for _, figures in bins],
            "losses": {name: [rounded(row.get(name)) for row in losses] for name in names},
            **{name: [row[name] for row in rows] for name in (rows[0] if rows else ())},
        }


def _summary(figures: Figures, seconds: float) -> dict:
    by_depth = [rounded(share) for share in figures.rounds.acceptance_per_depth]
    losses = {name: rounded(loss) for name, loss in figures.mean_losses().items()}
    return figures.summary(seconds) | {"acceptance_per_depth": by_depth, "losses": losses}


def _splits(splits: dict[str, Split]) -> list[dict]:
    return [{"name": name} | split.summary() for name, split in splits.items()]
