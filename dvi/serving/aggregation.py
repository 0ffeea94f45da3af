"""The metrics of several servers as those of one: each number reduced by what it means.

Knows Prometheus text and names; knows nothing of HTTP. Counters and histograms add, over processes that have ended too,
so a sum never falls because a server vanished or was started again. Gauges count only while their server answers.
Ratios are left to the reader here as well: accepted / drafted of the sums is the acceptance of all traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

ADDED = {"counter", "histogram"}
LOAD = ("dvi:num_requests_running", "dvi:num_requests_waiting")
UPTIME = "dvi:uptime_seconds"

# How a gauge of several servers becomes one. One that is not listed stays as it is, with its server as a label: a
# version, a loss or a trend says something of one server only.
GAUGES: dict[str, Callable[[Iterable[float]], float]] = {
    **dict.fromkeys((*LOAD, "dvi:kv_cache_positions", "dvi:prefix_cache_positions"), sum),
    UPTIME: min,
    # Each server has a replay of its own ...
    **{f"dvi:learner_state_{name}": sum for name in (
        "replay_positions", "replay_capacity", "replay_bytes", "refused_positions", "train_s", "checkpoints",
        "checkpoints_failed", "checkpoints_skipped",
    )},
    # ... but where they learn together, a step is one step of all.
    **{f"dvi:learner_state_{name}": max for name in ("steps", "skipped", "rollbacks", "noop_swaps", "drifts")},
    "dvi:learner_phase": sum,  # servers in the phase
}  # fmt: skip
_WORDS = {sum: "Sum of the replicas", min: "Least of the replicas", max: "Greatest of the replicas"}

Key = tuple[str, str, tuple[tuple[str, str], ...]]  # names of family and sample, labels


class ServerCounts:
    """What one server has counted, in its present process and in those before it."""

    def __init__(self) -> None:
        self._text = ""
        self._families: list[Metric] | None = None  # of the text, once somebody asks
        self._answered_s = 0.0
        self._ended: Counter[Key] = Counter()  # of processes that are gone

    def take(self, text: str, *, asked_s: float, answered_s: float) -> None:
        """A new scrape, and when it was asked for and answered, by a clock that never goes back.

        A process that is younger than the last scrape is another one: it counts from zero, after what was before.
        """
        uptimes = numbers(text, (UPTIME,))
        if self._text and uptimes and uptimes[0] < asked_s - self._answered_s:
            self._ended = self.added()
        self._text, self._families, self._answered_s = text, None, answered_s

    def families(self) -> list[Metric]:
        """The newest scrape, of the present process alone. Not to be written to."""
        if self._families is None:
            self._families = list(text_string_to_metric_families(self._text))
        return self._families

    def added(self) -> Counter[Key]:
        """Counts of all its processes."""
        counts = self._ended.copy()
        for family in self.families():
            if family.type in ADDED:
                counts.update({_key(family, sample.name, sample.labels): sample.value for sample in family.samples})
        return counts


def combine(servers: Mapping[str, tuple[ServerCounts, bool]]) -> list[Metric]:
    """One family for each name: by server name, its counts and whether it answers now. See `GAUGES`."""
    sums: Counter[Key] = Counter()
    gauges: dict[Key, list[float]] = {}
    combined: dict[str, Metric] = {}
    for server, (counts, is_answering) in servers.items():
        sums.update(counts.added())
        for family in counts.families():
            reduction = GAUGES.get(family.name)
            text = family.documentation if reduction is None else f"{_WORDS[reduction]}: {family.documentation}"
            combined.setdefault(family.name, Metric(family.name, text, family.type))
            if family.type in ADDED or not is_answering:
                continue
            for sample in family.samples:
                labels = sample.labels if reduction is not None else {**sample.labels, "replica": server}
                gauges.setdefault(_key(family, sample.name, labels), []).append(sample.value)
    values = [*sums.items(), *((key, GAUGES.get(key[0], max)(values)) for key, values in gauges.items())]
    for (family_name, name, labels), value in values:
        if family_name in combined:  # else a name that only an ended process had
            combined[family_name].add_sample(name, dict(labels), value)
    return list(combined.values())


def numbers(text: str, names: tuple[str, ...]) -> list[float]:
    """The values of these samples without labels, found without reading the rest of the text."""
    lines = (line for line in text.splitlines() if line.startswith(tuple(f"{name} " for name in names)))
    families = text_string_to_metric_families("\n".join(lines))
    return [sample.value for family in families for sample in family.samples]


def total(families: Iterable[Metric], name: str) -> float:
    """Of all samples of this name; 0 where there are none."""
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def expose(families: Iterable[Metric]) -> bytes:
    """The text of one scrape; its content type is `prometheus_client.CONTENT_TYPE_LATEST`."""
    registry = CollectorRegistry()
    registry.register(_Families(list(families)))
    return generate_latest(registry)


class _Families:
    """A collector of what is there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        return self._families


def _key(family: Metric, name: str, labels: Mapping[str, str]) -> Key:
    return family.name, name, tuple(sorted(labels.items()))
