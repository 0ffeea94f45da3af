"""The monitor's counts in Prometheus' text format, under names parallel to vLLM's with `dvi:` before them.

Knows names and help texts; computes no ratios. Those are for queries, such as acceptance over five minutes:
rate(dvi:spec_decode_num_accepted_tokens_total[5m]) / rate(dvi:spec_decode_num_draft_tokens_total[5m]).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dvi.serving.metrics.figures import Split
from dvi.serving.metrics.monitor import Monitor, Readings


def exposition(monitor: Monitor) -> bytes:
    """The text of one scrape; its content type is `prometheus_client.CONTENT_TYPE_LATEST`."""
    registry = CollectorRegistry()
    registry.register(_Scrape(monitor.readings(with_history=False)))
    return generate_latest(registry)


class _Scrape:
    """A collector of one moment's counts: they are kept once, by the monitor, and not again by the library."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def describe(self) -> list[Metric]:
        return []  # spares the registry a first collection that would only look for names

    def collect(self) -> Iterator[Metric]:
        yield from _speculation(self._readings)
        yield from _requests(self._readings)
        yield from _learning(self._readings)
        yield from _planning(self._readings)
        yield from _splits("domain", self._readings.domains)
        yield from _splits("tenant", self._readings.tenants)


def _speculation(readings: Readings) -> Iterator[Metric]:
    total, rounds = readings.total, readings.total.rounds
    yield _counter(
        "spec_decode_num_drafts",
        "Rounds: one draft and one verify pass of one request, those that drafted nothing included. Each commits its "
        "accepted tokens and one recovered or bonus token; mean accepted tokens (MAT), with that token counted, is "
        "generation_tokens / num_drafts.",
        rounds.num_rounds,
    )
    yield _counter("spec_decode_num_draft_tokens", "Drafted tokens.", rounds.num_drafted)
    yield _counter(
        "spec_decode_num_accepted_tokens",
        "Drafted tokens that the verifier accepted and an answer has; recovered and bonus tokens are not among them.",
        rounds.num_accepted,
    )
    yield _counter(
        "spec_decode_num_tokens_past_end", "Tokens that verdicts gave behind the ends of answers; nobody got them.",
        rounds.num_accepted_past_end,
    )  # fmt: skip
    yield _counter(
        "spec_decode_num_waived_tokens", "Accepted tokens that a lossy verify rule alone let pass.", rounds.num_waived
    )
    yield _counter(
        "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by position in the draft, from 0.",
        label="position", by=_by_position(rounds.accepted_per_depth),
    )  # fmt: skip
    yield _counter(
        "spec_decode_num_draft_tokens_per_pos",
        "Drafted tokens that the verifier came to, by position in the draft: up to the first rejection or the end.",
        label="position", by=_by_position(rounds.drafted_per_depth),
    )  # fmt: skip
    yield _counter("spec_decode_decode_seconds", "Seconds of rounds whose plain cost is known.", total.timed_decode_s)
    yield _counter(
        "spec_decode_plain_seconds_estimate",
        "Seconds that plain decoding would have taken for the same tokens, estimated from measured costs; divided by "
        "spec_decode_decode_seconds it is the speed-up.",
        total.plain_s,
    )
    yield _gauge("drafter_version", "Version of the default drafter that drafts now.", readings.load.drafter_version)
    yield _gauge("verify_rule", "1 for the verify rule in force.", label="rule", by={readings.load.verify_rule: 1})
    yield _gauge(
        "level", "1 for what is promised of the tokens: exact, fast or lossy.", label="level",
        by={readings.load.level: 1},
    )  # fmt: skip


def _requests(readings: Readings) -> Iterator[Metric]:
    total, load = readings.total, readings.load
    yield _gauge("uptime_seconds", "Seconds since the server's start.", readings.uptime_s)
    yield _gauge("num_requests_running", "Requests that decode or prefill.", load.num_running)
    yield _gauge("num_requests_waiting", "Requests in the queue.", load.num_waiting)
    yield _gauge("kv_cache_positions", "Cached positions of running requests.", load.num_cached_positions)
    yield _gauge("prefix_cache_positions", "Positions held for reuse.", load.num_prefix_positions)
    yield _counter("num_preemptions", "Requests put back into the queue to make room.", total.num_preempted)
    yield _counter("engine_busy_seconds", "Seconds of engine steps.", total.busy_s)
    yield _counter("prompt_tokens", "Prefilled positions, again after a preemption.", total.num_prefill_tokens)
    yield _counter("generation_tokens", "Generated tokens.", total.rounds.new_tokens)
    yield _counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", total.num_prompt_tokens)
    yield _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", total.num_cached_tokens)
    yield _counter(
        "request_success", "Requests that ended, by reason; not all of them well.", label="finished_reason",
        by=total.finished,
    )  # fmt: skip
    yield _counter("requests_rejected", "Requests refused at the door.", label="reason", by=readings.rejected)
    for name, histogram, text in (
        ("request_queue_time_seconds", total.queue, "From arrival to admission."),
        ("time_to_first_token_seconds", total.first_token, "From arrival to the first new token."),
        ("request_time_per_output_token_seconds", total.per_token, "A request's decoding time per new token."),
        ("e2e_request_latency_seconds", total.whole_request, "From arrival to the end."),
    ):
        buckets = [("+Inf" if math.isinf(bound_s) else f"{bound_s:.6g}", n) for bound_s, n in histogram.up_to()]
        yield HistogramMetricFamily(f"dvi:{name}", text, buckets=buckets, sum_value=histogram.total_s)


def _learning(readings: Readings) -> Iterator[Metric]:
    total, update = readings.total, readings.update
    yield _counter("learner_steps", "Optimizer steps of this process, skipped ones included.", total.num_updates)
    yield _counter("learner_steps_skipped", "Steps whose result was not finite.", total.num_skipped)
    yield _counter("learner_seconds", "Seconds of training.", total.train_s)
    yield _counter("events", "Publishes, rollbacks, pins and other events.", label="kind", by=total.events)
    if update is not None:
        yield _gauge("learner_loss", "Each term's unweighted value at the newest step.", label="term", by=update.losses)
        yield _gauge("learner_phase", "1 for the phase of the loss schedule.", label="phase", by={update.phase: 1})
    # The learner's own counts, which go on after a resume: replay positions and capacity, steps, rollbacks ...
    for name, value in readings.learner.items():
        yield _gauge(f"learner_state_{name}", f"{name} as the learner counts it, resumed runs included.", value)


def _planning(readings: Readings) -> Iterator[Metric]:
    if readings.plan:
        yield _counter("replans", "Plans made, or confirmed, by what had changed.", label="reason", by=readings.replans)
    for name, value in readings.plan.items():
        yield _gauge(f"plan_{name}", f"{name} of the plan in force, see docs/planning.md.", value)


def _splits(label: str, splits: Mapping[str, Split]) -> Iterator[Metric]:
    for name, attribute in (
        ("rounds", "num_rounds"), ("draft_tokens", "num_drafted"), ("accepted_tokens", "num_accepted"),
        ("generation_tokens", "new_tokens"),
    ):  # fmt: skip
        by = {key: getattr(split.rounds, attribute) for key, split in splits.items()}
        yield _counter(f"{label}_{name}", f"{name.replace('_', ' ')} by {label}.".capitalize(), label=label, by=by)
    yield _counter(
        f"{label}_requests", f"Ended requests by {label}.", label=label,
        by={key: split.num_requests for key, split in splits.items()},
    )  # fmt: skip


def _by_position(counts: Iterable[int]) -> dict[str, int]:
    return {str(position): count for position, count in enumerate(counts)}


def _counter(name: str, text: str, value: float | None = None, *, label: str = "",
             by: Mapping[str, float] | None = None) -> Metric:
    family = CounterMetricFamily(f"dvi:{name}", text, value=value, labels=[label] if label else None)
    for key, count in (by or {}).items():
        family.add_metric([key], count)
    return family


def _gauge(name: str, text: str, value: float | None = None, *, label: str = "",
           by: Mapping[str, float] | None = None) -> Metric:
    family = GaugeMetricFamily(f"dvi:{name}", text, value=value, labels=[label] if label else None)
    for key, number in (by or {}).items():
        family.add_metric([key], number)
    return family
