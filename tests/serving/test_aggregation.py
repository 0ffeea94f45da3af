"""Metrics of several servers together: each number reduced by what it means, and no sum that falls."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dvi.records import RoundStats
from dvi.serving.aggregation import GAUGES, ServerCounts, combine, expose, numbers, total
from dvi.serving.metrics.monitor import Monitor
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.request import Load, Request, RequestOutput, StepReport
from tests.support.serving_doubles import stories_config
from trainers.jobs.serve import build_serving


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def busy_monitor(*, drafted, accepted, running=0, version=0, seconds=0.1, domain="maths"):
    """A monitor that has seen one step, one request of so many seconds, and one learner's figures."""
    clock = Clock()
    load = Load(num_running=running, num_cached_positions=10, drafter_version=version)
    monitor = Monitor(clock, load=lambda: load)
    rounds = RoundStats(
        num_rounds=3, num_drafted=drafted, num_accepted=accepted, new_tokens=accepted + 3, committed_tokens=accepted + 3
    )
    monitor.on_step(StepReport(
        seconds=0.5, rounds=rounds, num_running=running, drafter_version=version, rounds_by_domain={domain: rounds},
    ))  # fmt: skip
    clock.now_s += seconds
    request = Request(1, prompt_ids=[1, 2], params=None, arrived_s=100.0, domain=domain)
    monitor.on_finish(request, RequestOutput(1, finish_reason="length", stats=rounds, queue_s=seconds / 2))
    monitor.on_learner_stats({"steps": 7.0, "replay_positions": 100.0, "acceptance_trend": accepted / drafted})
    return monitor


def counts_of(text, at_s=0.0, counts=None):
    counts = counts or ServerCounts()
    counts.take(text.decode() if isinstance(text, bytes) else text, asked_s=at_s, answered_s=at_s)
    return counts


def together(**servers):
    """(by name and labels, families) of servers that all answer."""
    families = combine({name: (counts_of(exposition(monitor)), True) for name, monitor in servers.items()})
    return values_of(families), families


def values_of(families):
    parsed = text_string_to_metric_families(expose(families).decode())
    samples = [sample for family in parsed for sample in family.samples]
    values = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples), "a sample stands twice in one scrape"
    return values


def test_acceptance_of_the_sums_is_accepted_over_drafted():
    """Catches a mean of rates: 10 of 100 and 9 of 10 are 19 of 110, and not one half."""
    _, families = together(a=busy_monitor(drafted=100, accepted=10), b=busy_monitor(drafted=10, accepted=9))
    accepted = total(families, "dvi:spec_decode_num_accepted_tokens_total")
    assert accepted / total(families, "dvi:spec_decode_num_draft_tokens_total") == pytest.approx(19 / 110)


def test_counters_and_histograms_add_label_by_label():
    """Catches buckets that are averaged or lost, and labels that only one server has."""
    values, _ = together(
        a=busy_monitor(drafted=10, accepted=1, seconds=0.01), b=busy_monitor(drafted=10, accepted=1, seconds=3.0),
        c=busy_monitor(drafted=10, accepted=4, seconds=3.0, domain="code"),
    )  # fmt: skip
    assert values["dvi:request_success_total", ("finished_reason", "length")] == 3
    assert values["dvi:domain_accepted_tokens_total", ("domain", "maths")] == 2
    assert values["dvi:domain_accepted_tokens_total", ("domain", "code")] == 4
    assert values["dvi:e2e_request_latency_seconds_count",] == 3
    assert values["dvi:e2e_request_latency_seconds_sum",] == pytest.approx(6.01)
    buckets = {labels[0][1]: value for (name, *labels), value in values.items()
               if name == "dvi:e2e_request_latency_seconds_bucket"}  # fmt: skip
    assert buckets["+Inf"] == 3 and buckets["0.0128"] == 1 and list(buckets.values()) == sorted(buckets.values())


def test_gauges_are_reduced_by_their_meaning():
    """Catches versions that are added, uptimes of the oldest, and steps of one common learner counted twice."""
    monitors = {"a": busy_monitor(drafted=10, accepted=5, running=2, version=4),
                "b": busy_monitor(drafted=10, accepted=1, running=3, version=5, seconds=9.0)}  # fmt: skip
    values, _ = together(**monitors)
    assert values["dvi:num_requests_running",] == 5 and values["dvi:kv_cache_positions",] == 20
    assert values["dvi:drafter_version", ("replica", "a")] == 4
    assert values["dvi:drafter_version", ("replica", "b")] == 5
    assert values["dvi:uptime_seconds",] == pytest.approx(0.1)
    assert values["dvi:learner_state_steps",] == 7 and values["dvi:learner_state_replay_positions",] == 200
    assert values["dvi:learner_state_acceptance_trend", ("replica", "a")] == 0.5


def test_every_gauge_of_the_table_is_one_that_a_server_has(tmp_path):
    """Catches a name that is spelt otherwise here than where it is counted, and is then reduced by the default."""
    config = stories_config("train.enabled=true", f"output.folder={tmp_path}")
    _, learner = build_serving(config)
    monitor = Monitor()
    monitor.on_learner_stats(learner.stats())
    names = {family.name for family in text_string_to_metric_families(exposition(monitor).decode())}
    learner.close()
    assert set(GAUGES) <= names | {"dvi:learner_phase"}


def test_a_server_that_is_gone_keeps_its_counts_and_loses_its_gauges():
    """Catches a rate that turns negative when a replica vanishes, and requests that run on a dead machine."""
    a, b = (counts_of(exposition(busy_monitor(drafted=10, accepted=5, running=2))) for _ in range(2))
    values = values_of(combine({"a": (a, True), "b": (b, False)}))
    assert values["dvi:spec_decode_num_draft_tokens_total",] == 20 and values["dvi:num_requests_running",] == 2
    assert ("dvi:drafter_version", ("replica", "b")) not in values


TEXT = "# TYPE dvi:uptime_seconds gauge\ndvi:uptime_seconds {up}\n# TYPE dvi:x_total counter\ndvi:x_total {x}\n"


def test_a_server_started_again_counts_on():
    """Catches a sum that falls at a restart, even where the new process has counted more than the one before it."""
    counts = counts_of(TEXT.format(up=50, x=10), at_s=50)
    counts_of(TEXT.format(up=60, x=12), at_s=60, counts=counts)
    assert total(combine({"a": (counts, True)}), "dvi:x_total") == 12
    counts_of(TEXT.format(up=3, x=1), at_s=70, counts=counts)
    assert total(combine({"a": (counts, True)}), "dvi:x_total") == 13
    counts_of(TEXT.format(up=1, x=9), at_s=80, counts=counts)
    assert total(combine({"a": (counts, True)}), "dvi:x_total") == 22
    counts_of(TEXT.format(up=11, x=9), at_s=90, counts=counts)
    assert total(combine({"a": (counts, True)}), "dvi:x_total") == 22


def test_a_label_that_only_an_ended_process_had_stays():
    """Catches a count that vanishes until the new process has something to count under the same label."""
    head, uptime = "# TYPE dvi:x_total counter\n", "# TYPE dvi:uptime_seconds gauge\ndvi:uptime_seconds {}\n"
    counts = counts_of(head + 'dvi:x_total{kind="a"} 4\n' + uptime.format(50), at_s=50)
    counts_of(head + uptime.format(1), at_s=60, counts=counts)
    assert values_of(combine({"a": (counts, True)}))["dvi:x_total", ("kind", "a")] == 4


def test_counts_of_zero_are_there():
    """Catches a counter that appears only with its first count, so that an alarm on its rate never sees the rise."""
    values, _ = together(a=Monitor(), b=Monitor())
    assert values["dvi:learner_steps_total",] == 0 and values["dvi:e2e_request_latency_seconds_count",] == 0


def test_one_server_alone_is_exposed_as_it_is():
    """Catches counts changed on the way through: with one server nothing is reduced but labels."""
    text = exposition(busy_monitor(drafted=10, accepted=5, running=2))
    before = {(s.name, *sorted(s.labels.items())): s.value
              for family in text_string_to_metric_families(text.decode()) for s in family.samples}  # fmt: skip
    after = values_of(combine({"a": (counts_of(text), True)}))
    assert {(name, *[pair for pair in labels if pair[0] != "replica"]): value
            for (name, *labels), value in after.items()} == before  # fmt: skip


def test_single_numbers_are_found_without_the_rest():
    """Catches a name that is taken for another that begins like it."""
    text = "dvi:num_requests_running_max 9\ndvi:num_requests_running 2\n# HELP dvi:num_requests_running x\n"
    assert numbers(text, ("dvi:num_requests_running",)) == [2.0] and numbers("", ("dvi:x",)) == []
