"""Sums of serving's raw counts in bounded memory: over everything, by stretch of time, and by label.

Knows counts and seconds; knows no clock, thread or output format. Everything here is added to and merged, so that a
longer stretch is the sum of shorter ones, and ratios are taken last.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from dvi.records import RoundStats, UpdateReport
from dvi.serving.request import RequestOutput, StepReport

MAX_LABELS = 32  # names that clients may choose: the later ones share one
OTHER = "other"
NEWEST_DRAFTED = 2000  # drafted tokens over which a label's newest acceptance is averaged

FLOOR_S = 1e-4
BUCKETS_PER_OCTAVE = 8
NUM_OCTAVES = 23  # to 839 s; the last bucket also holds everything beyond


class Histogram:
    """Durations by logarithmic bucket: bucket i reaches up to FLOOR_S * 2^(i / 8), so a quantile is right to 5 %."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        octaves = math.log2(max(seconds, FLOOR_S) / FLOOR_S)
        self.counts[min(math.ceil(octaves * BUCKETS_PER_OCTAVE), NUM_OCTAVES * BUCKETS_PER_OCTAVE + 1)] += 1
        self.total_s += seconds

    def add(self, other: Histogram) -> None:
        self.counts.update(other.counts)
        self.total_s += other.total_s

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the durations does not exceed; None of none."""
        rank = share * self.counts.total()
        for bucket, count in sorted(self.counts.items()):
            rank -= count
            if rank <= 0:
                return FLOOR_S * 2 ** ((bucket - 0.5) / BUCKETS_PER_OCTAVE)
        return None

    def up_to(self) -> list[tuple[float, int]]:
        """(bound in seconds, durations up to it), once per octave and at last for infinity."""
        bounds = [(octave * BUCKETS_PER_OCTAVE, FLOOR_S * 2**octave) for octave in range(NUM_OCTAVES + 1)]
        return [
            (bound_s, sum(count for bucket, count in self.counts.items() if bucket <= last))
            for last, bound_s in (*bounds, (math.inf, math.inf))
        ]


@dataclass
class Figures:
    """Raw counts of one stretch of time.

    busy_s                  seconds of engine steps; train_s of the learner. `Monitor` puts them where they were spent.
    timed_decode_s, plain_s seconds of decoding whose cost by plain decoding is known, and that cost.
    max_running, max_waiting the most after any step.
    num_prompt_tokens, num_cached_tokens  of requests that were admitted and ended; those found in the prefix cache.
    loss_sums, loss_counts  of each term over the updates that were not skipped.
    events, finished        counts by kind, and of ended requests by reason.
    phase, drafter_version, tokens_so_far  as they were last; the tokens are those of all traffic since the start.
    """

    rounds: RoundStats = field(default_factory=RoundStats)
    busy_s: float = 0.0
    train_s: float = 0.0
    timed_decode_s: float = 0.0
    plain_s: float = 0.0
    num_prefill_tokens: int = 0
    num_preempted: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_updates: int = 0
    num_skipped: int = 0
    max_running: int = 0
    max_waiting: int = 0
    loss_sums: Counter[str] = field(default_factory=Counter)
    loss_counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    per_token: Histogram = field(default_factory=Histogram)
    whole_request: Histogram = field(default_factory=Histogram)
    phase: str | None = None
    drafter_version: int = 0
    tokens_so_far: int = 0
    _summary: tuple[float, dict] | None = field(default=None, init=False, repr=False, compare=False)

    def count_step(self, report: StepReport) -> None:
        self.rounds.add(report.rounds)
        if report.plain_s > 0:
            self.timed_decode_s += report.rounds.decode_s
            self.plain_s += report.plain_s
        self.num_prefill_tokens += report.num_prefill_tokens
        self.num_preempted += report.num_preempted
        self.max_running = max(self.max_running, report.num_running)
        self.max_waiting = max(self.max_waiting, report.num_waiting)

    def count_finish(self, output: RequestOutput, *, num_prompt_tokens: int, seconds: float) -> None:
        """One ended request; seconds since it arrived."""
        self.finished[output.finish_reason or ""] += 1
        self.whole_request.observe(seconds)
        if output.queue_s is not None:
            self.queue.observe(output.queue_s)
            self.num_prompt_tokens += num_prompt_tokens
            self.num_cached_tokens += output.num_cached_tokens
        if output.first_token_s is not None:
            self.first_token.observe(output.first_token_s)
        # A request that was given up has tokens, but its decoding was not timed.
        if output.stats is not None and output.stats.new_tokens and output.stats.decode_s > 0:
            self.per_token.observe(output.stats.decode_s / output.stats.new_tokens)

    def count_update(self, report: UpdateReport) -> None:
        self.num_updates += 1
        self.phase = report.phase
        if report.skipped_reason is not None:
            self.num_skipped += 1
            return
        finite = {name: value for name, value in report.losses.items() if math.isfinite(value)}
        self.loss_sums.update(finite)
        self.loss_counts.update(finite.keys())

    def add(self, later: Figures) -> None:
        """Adds the stretch that follows this one."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in _MERGED:
            getattr(self, name).add(getattr(later, name))
        for name in _COUNTERS:
            getattr(self, name).update(getattr(later, name))
        self.max_running = max(self.max_running, later.max_running)
        self.max_waiting = max(self.max_waiting, later.max_waiting)
        self.phase = later.phase or self.phase
        self.drafter_version, self.tokens_so_far = later.drafter_version, later.tokens_so_far

    def copy(self) -> Figures:
        copied = Figures()
        copied.add(self)
        return copied

    def mean_losses(self) -> dict[str, float]:
        return {name: self.loss_sums[name] / count for name, count in self.loss_counts.items()}

    def summary(self, seconds: float) -> dict:
        """Ratios of this stretch, which lasted so long; None where there is nothing to divide by.

        speed_up is an estimate: the decoding's own seconds against measured costs of plain decoding.
        Worked out once: nobody may add to a stretch afterwards.
        """
        if self._summary is None or self._summary[0] != seconds:
            rounds = self.rounds
            summary = {
                "acceptance": ratio(rounds.num_accepted, rounds.num_drafted),
                "mean_accepted_tokens": ratio(rounds.new_tokens, rounds.num_rounds),
                "tokens_per_s": ratio(rounds.new_tokens, seconds),
                "speed_up": ratio(self.plain_s, self.timed_decode_s),
                "train_share": ratio(self.train_s, seconds),
                "busy_share": ratio(self.busy_s, seconds),
                "max_running": self.max_running,
                "max_waiting": self.max_waiting,
                "queue_p99_s": self.queue.quantile(0.99),
            }
            for name in ("first_token", "per_token"):
                for percent in (50, 99):
                    summary[f"{name}_p{percent}_s"] = getattr(self, name).quantile(percent / 100)
            self._summary = seconds, {name: rounded(value) for name, value in summary.items()}
        return self._summary[1]


_SUMS = (
    "busy_s", "train_s", "timed_decode_s", "plain_s", "num_prefill_tokens", "num_preempted", "num_prompt_tokens",
    "num_cached_tokens", "num_updates", "num_skipped",
)  # fmt: skip
_MERGED = ("rounds", "queue", "first_token", "per_token", "whole_request")
_COUNTERS = ("loss_sums", "loss_counts", "events", "finished")


class Series:
    """Figures in bins of equal width, at most `capacity` of them; bins in which nothing happened are left out.

    folds: when they are too many the bins double their width, so that they reach back to the start however long ago
    that was; otherwise the oldest are dropped. Only the newest bin is ever added to.
    """

    def __init__(self, *, width_s: float, capacity: int, folds: bool) -> None:
        self.width_s = width_s
        self._capacity, self._folds = capacity, folds
        self._bins: deque[tuple[int, Figures]] = deque()

    def at(self, time_s: float) -> Figures:
        """The bin to add to now. Times never go back."""
        index = int(time_s / self.width_s)
        if not self._bins or self._bins[-1][0] < index:
            self._bins.append((index, Figures()))
            while len(self._bins) > self._capacity:
                self._fold() if self._folds else self._bins.popleft()
        return self._bins[-1][1]

    def spread(self, seconds: float, end_s: float) -> list[tuple[Figures, float]]:
        """The bins in which these seconds up to end_s were spent, each with its part of them.

        A step may be longer than a bin: counted where it ended, it would fill that bin more than wholly.
        """
        parts, newest = [], self.at(end_s)
        index = int(end_s / self.width_s)
        part = min(seconds, end_s - index * self.width_s)
        while (seconds := seconds - part) > 0 and index > 0:
            parts.append((index, part))
            index, part = index - 1, min(seconds, self.width_s)
        parts.append((index, part + max(seconds, 0.0)))
        return [(newest if number == 0 else self._reopened(index), part) for number, (index, part) in enumerate(parts)]

    def _reopened(self, index: int) -> Figures:
        """A bin of the past to add to: a copy in its place, as a reader may hold the old one, or a new one."""
        at = next((at for at in reversed(range(len(self._bins))) if self._bins[at][0] <= index), -1)
        if at >= 0 and self._bins[at][0] == index:
            figures = self._bins[at][1].copy()
            self._bins[at] = (index, figures)
            return figures
        figures = Figures()
        if at >= 0:
            before = self._bins[at][1]
            figures.phase, figures.drafter_version = before.phase, before.drafter_version
            figures.tokens_so_far = before.tokens_so_far
        if at >= 0 or self._folds or len(self._bins) < self._capacity:  # else it is older than all that is kept
            self._bins.insert(at + 1, (index, figures))
        return figures

    def _fold(self) -> None:
        self.width_s *= 2
        folded: deque[tuple[int, Figures]] = deque()
        for index, figures in self._bins:
            if folded and folded[-1][0] == index // 2:
                # A new record: a reader may still hold the old one.
                merged = folded.pop()[1].copy()
                merged.add(figures)
                folded.append((index // 2, merged))
            else:
                folded.append((index // 2, figures))
        self._bins = folded

    def bins(self) -> list[tuple[float, Figures]]:
        """(start in seconds, figures), oldest first, which stay as they are while more is added here."""
        bins = [(index * self.width_s, figures) for index, figures in self._bins]
        return [*bins[:-1], *((start_s, figures.copy()) for start_s, figures in bins[-1:])]


@dataclass
class Split:
    """Counts of one label (a domain, an API key's name) or of one drafter version.

    newest_*  the same counts with older ones fading out, so that about the newest NEWEST_DRAFTED drafted tokens count.
    """

    rounds: RoundStats = field(default_factory=RoundStats)
    num_requests: int = 0
    newest_drafted: float = 0.0
    newest_accepted: float = 0.0

    def count(self, rounds: RoundStats) -> None:
        self.rounds.add(rounds)
        kept = max(0.0, 1 - rounds.num_drafted / NEWEST_DRAFTED)
        self.newest_drafted = self.newest_drafted * kept + rounds.num_drafted
        self.newest_accepted = self.newest_accepted * kept + rounds.num_accepted

    def copy(self) -> Split:
        rounds = RoundStats()
        rounds.add(self.rounds)
        return Split(rounds, self.num_requests, self.newest_drafted, self.newest_accepted)

    def summary(self) -> dict:
        return {
            "num_requests": self.num_requests,
            "num_tokens": self.rounds.new_tokens,
            "num_drafted": self.rounds.num_drafted,
            "acceptance": rounded(ratio(self.rounds.num_accepted, self.rounds.num_drafted)),
            "newest_acceptance": rounded(ratio(self.newest_accepted, self.newest_drafted)),
            "mean_accepted_tokens": rounded(ratio(self.rounds.new_tokens, self.rounds.num_rounds)),
        }


class Labels:
    """Names that outsiders choose, made harmless and few: the first MAX_LABELS stand for themselves."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        known = self._known.get(name)
        if known is not None:
            return known
        if len(self._known) >= MAX_LABELS:
            return OTHER
        return self._known.setdefault(name, printable(name))


def printable(text: str, *, max_length: int = 64) -> str:
    """The text on one short line: what would move a cursor, turn the writing round or not encode is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:max_length])


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None of nothing."""
    return part / whole if whole > 0 else None


def rounded(number: float | None) -> float | None:
    """Four digits, enough for a picture and short in JSON, which has no word for NaN or infinity: None."""
    if number is None or not math.isfinite(number):
        return None
    return int(number) if number == int(number) else float(f"{number:.4g}")
