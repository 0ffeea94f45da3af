"""The monitor: figures right, memory bounded, nothing of clients' texts in it, fit for Prometheus and for JSON."""

from __future__ import annotations

import json
import math
import pickle
import random
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dvi.records import LossWeights, RoundStats, SamplingParams, UpdateReport
from dvi.serving.metrics.figures import MAX_LABELS, OTHER, Figures, Histogram, Series
from dvi.serving.metrics.monitor import NEWEST_S, NUM_BINS_SINCE_START, NUM_RECENT_BINS, NUM_VERSIONS, Monitor
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.request import Load, Request, RequestOutput, StepReport

DAY_S = 86400.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def rounds(*outcomes: tuple[int, int], decode_s: float = 0.0) -> RoundStats:
    """Counts of rounds given as (drafted, accepted)."""
    stats = RoundStats(decode_s=decode_s)
    for num_drafted, num_accepted in outcomes:
        stats.count_round(num_drafted=num_drafted, num_accepted=num_accepted)
    return stats


def step(*outcomes: tuple[int, int], decode_s: float = 0.0, **fields: object) -> StepReport:
    return StepReport(seconds=0.01, rounds=rounds(*outcomes, decode_s=decode_s), **fields)


def update(number: int = 1, *, skipped: str | None = None, **losses: float) -> UpdateReport:
    return UpdateReport(number, 1, "kl", losses, LossWeights(forward_kl=1.0), 1.0, 64, 0.1, False, skipped)


def finish(monitor: Monitor, *, tenant: str = "", domain: str = "", reason: str = "stop", **fields: object) -> None:
    request = Request(1, [7, 8, 9], SamplingParams(), tenant=tenant, domain=domain, arrived_s=monitor._clock() - 1.5)
    monitor.on_finish(request, RequestOutput(1, finish_reason=reason, **fields))


def samples(monitor: Monitor) -> dict[tuple[str, tuple], float]:
    """The exposition as a Prometheus server reads it: {(name, labels): value}."""
    families = text_string_to_metric_families(exposition(monitor).decode())
    return {(s.name, tuple(s.labels.items())): s.value for family in families for s in family.samples}


def value(monitor: Monitor, name: str, **labels: str) -> float:
    return samples(monitor)[f"dvi:{name}", tuple(labels.items())]


# Figures


def test_ratios_come_from_sums_and_count_the_recovered_or_bonus_token():
    """Catches a mean of means, and a MAT that leaves out the token after the accepted ones."""
    monitor = Monitor()
    monitor.on_step(step((4, 4), (4, 0), (4, 0)))
    monitor.on_step(step((1, 1)))
    total = monitor.snapshot()["total"]
    assert total["acceptance"] == pytest.approx(5 / 13, abs=1e-4)
    assert total["mean_accepted_tokens"] == pytest.approx(9 / 4)
    # Two of the three rounds that drafted four were rejected at once; all that got further were accepted.
    assert total["acceptance_per_depth"] == [0.5, 1, 1, 1]


def test_figures_of_nothing_are_null_not_zero():
    """Catches an idle server that seems to accept nothing, and a division by zero in a fresh one."""
    total = Monitor().snapshot()["total"]
    assert all(total[name] is None for name in ("acceptance", "mean_accepted_tokens", "speed_up", "first_token_p50_s"))


def test_the_speed_up_leaves_out_steps_whose_plain_cost_is_unknown():
    """Catches seconds of unmeasured steps in the denominator, which make speculation look slow."""
    monitor = Monitor()
    monitor.on_step(step((4, 4), decode_s=100.0, plain_s=0.0))
    monitor.on_step(step((4, 4), decode_s=1.0, plain_s=1.5))
    assert monitor.snapshot()["total"]["speed_up"] == 1.5


def test_the_newest_figures_forget_older_traffic():
    """Catches a "now" that is an average since the start, which would hide a drift for hours."""
    clock = Clock()
    monitor = Monitor(clock)
    monitor.on_step(step(*[(4, 0)] * 1000))
    clock.now_s += NEWEST_S + 10
    monitor.on_step(step((4, 4), (4, 2)))
    snapshot = monitor.snapshot()
    assert snapshot["newest"]["acceptance"] == 0.75
    assert snapshot["total"]["acceptance"] == pytest.approx(6 / 4008, rel=1e-3)


def test_tokens_per_second_are_of_the_clock_not_of_busy_time():
    """Catches a throughput that stays high while nothing is asked for."""
    clock = Clock()
    monitor = Monitor(clock)
    for _ in range(40):
        clock.now_s += 1.0
        monitor.on_step(step((4, 4), (4, 4)))
    assert monitor.snapshot()["newest"]["tokens_per_s"] == pytest.approx(10.0, rel=0.05)
    clock.now_s += 2 * NEWEST_S
    assert monitor.snapshot()["newest"]["tokens_per_s"] == 0


def test_a_step_that_was_skipped_leaves_the_losses_alone():
    """Catches a NaN that, once added, makes a loss NaN for ever."""
    monitor = Monitor()
    monitor.on_update(update(1, forward_kl=2.0))
    monitor.on_update(update(2, skipped="loss or gradient not finite", forward_kl=math.nan))
    monitor.on_update(update(3, forward_kl=1.0, policy_gradient=math.inf))
    total = monitor.snapshot()["total"]
    assert total["losses"] == {"forward_kl": 1.5}
    assert (total["num_updates"], total["num_skipped"]) == (3, 1)


def test_negative_losses_are_averaged_like_others():
    """Catches sums kept in a way that drops what is not positive: a policy gradient term may be negative."""
    monitor = Monitor()
    for loss in (-1.0, -3.0):
        monitor.on_update(update(policy_gradient=loss))
    assert monitor.snapshot()["total"]["losses"] == {"policy_gradient": -2.0}


def test_training_of_earlier_runs_is_not_counted_as_time_spent_now():
    """Catches a resumed server that seems to train for hours in its first second."""
    clock = Clock()
    monitor = Monitor(clock)
    monitor.on_learner_stats({"train_s": 5000.0})
    clock.now_s += 100.0
    monitor.on_learner_stats({"train_s": 5004.0})
    assert monitor.snapshot()["total"]["train_share"] == pytest.approx(0.04)
    assert value(monitor, "learner_seconds_total") == 4.0


def test_a_request_given_up_counts_as_ended_but_not_as_fast():
    """Catches untimed decoding in the latencies: cancelled requests would pull the median to zero."""
    monitor = Monitor()
    finish(monitor, reason="cancelled", stats=rounds((4, 4)), queue_s=0.1)
    finish(monitor, reason="length", stats=rounds((4, 4), decode_s=0.5), queue_s=0.1, first_token_s=0.2)
    snapshot = monitor.snapshot()
    assert snapshot["finished"] == {"cancelled": 1, "length": 1}
    assert snapshot["total"]["per_token_p50_s"] == pytest.approx(0.1, rel=0.05)
    assert value(monitor, "time_to_first_token_seconds_count") == 1


def test_each_version_has_the_rounds_that_it_drafted_and_its_first_origin():
    """Catches rounds put down to the wrong version, and a rollback renamed by a later notice of the same version."""
    monitor = Monitor()
    monitor.on_step(step((4, 0), drafter_version=0))
    monitor.on_event("rollback", "to the best", version=1)
    monitor.on_event("publish", version=1)
    monitor.on_step(step((4, 2), drafter_version=1))
    monitor.on_step(step((4, 4), drafter_version=1))
    first, second = monitor.snapshot()["versions"]
    assert (first["version"], first["acceptance"], first["source"]) == (0, 0, "")
    assert (second["version"], second["acceptance"], second["source"]) == (1, 0.75, "rollback")


def test_domains_and_keys_are_told_apart_and_newer_traffic_outweighs_older():
    """Catches splits that mix, and a "newest" share that a long history holds still."""
    monitor = Monitor()
    for outcome, domain in (((4, 0), "code"), ((4, 4), "chat")):
        for _ in range(1000):
            monitor.on_step(step(outcome, rounds_by_domain={domain: rounds(outcome)}))
    for _ in range(2000):
        monitor.on_step(step((4, 4), rounds_by_domain={"code": rounds((4, 4))}))
    finish(monitor, tenant="alice", domain="chat", stats=rounds((4, 2), decode_s=1.0))
    snapshot = monitor.snapshot()
    code, chat = snapshot["domains"]
    assert (code["acceptance"], chat["acceptance"]) == (pytest.approx(2 / 3, abs=1e-3), 1)
    assert code["newest_acceptance"] > 0.95
    assert (chat["num_requests"], snapshot["tenants"][0]["name"]) == (1, "alice")
    assert value(monitor, "tenant_accepted_tokens_total", tenant="alice") == 2


def test_quantiles_are_within_five_per_cent_of_the_truth():
    """Catches a bucket off by one, or an edge taken for the middle."""
    generator = random.Random(0)
    durations = sorted(generator.lognormvariate(-3, 1.5) for _ in range(2001))
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    for share in (0.5, 0.9, 0.99):
        assert histogram.quantile(share) == pytest.approx(durations[int(share * 2000)], rel=0.05)


# Bounded memory


def test_a_folded_series_covers_all_time_and_loses_no_count():
    """Catches bins dropped or doubled when widths double, and a series that forgets its beginning."""
    series = Series(width_s=1.0, capacity=10, folds=True)
    for second in range(1000):
        series.at(float(second)).busy_s += 1.0
    bins = series.bins()
    assert len(bins) <= 10 and bins[0][0] == 0.0
    assert series.width_s * 10 >= 1000
    assert [figures.busy_s for _, figures in bins[:-1]] == [series.width_s] * (len(bins) - 1)
    assert sum(figures.busy_s for _, figures in bins) == 1000


def test_bins_that_a_reader_holds_do_not_change():
    """Catches a fold, or an addition, that writes into a bin which another thread is reading without the lock."""
    series = Series(width_s=1.0, capacity=4, folds=True)
    for second in range(4):
        series.at(float(second)).busy_s += 1.0
    held = series.bins()
    for second in range(3, 50):
        series.at(float(second)).busy_s += 1.0
    assert [figures.busy_s for _, figures in held] == [1.0] * 4


def test_a_copy_of_figures_has_every_count():
    """Catches a field that was added to Figures and forgotten where stretches are merged."""
    figures = Figures()
    figures.count_step(step((4, 2), decode_s=1.0, plain_s=2.0, num_running=3, num_waiting=2, num_preempted=1,
                            num_prefill_tokens=5))  # fmt: skip
    output = RequestOutput(1, finish_reason="stop", stats=rounds((4, 2), decode_s=1.0), queue_s=0.1, first_token_s=0.2,
                           num_cached_tokens=3)  # fmt: skip
    figures.count_finish(output, num_prompt_tokens=4, seconds=2.0)
    figures.count_update(update(forward_kl=1.0))
    figures.count_update(update(skipped="not finite"))
    figures.busy_s, figures.train_s, figures.drafter_version, figures.tokens_so_far = 4.0, 1.0, 2, 3
    figures.events["publish"] += 1

    def plain(record: object) -> dict:
        counts = {name: count for name, count in vars(record).items() if name != "_summary"}
        return {name: vars(count) if isinstance(count, Histogram) else count for name, count in counts.items()}

    assert plain(figures.copy()) == plain(figures)
    assert all(plain(figures).values()), "the test sets every field, or it would not notice a forgotten one"


def test_a_month_of_traffic_takes_no_more_room_than_a_day():
    """Catches a list that grows with uptime."""
    clock = Clock()
    monitor = Monitor(clock)
    sizes = {}
    for number in range(30 * 200):
        clock.now_s += DAY_S / 200
        monitor.on_step(step((4, number % 5), drafter_version=number))
        monitor.on_event("rollback" if number % 3 else "checkpoint", "x" * 1000, version=number)
        if number in (200, 30 * 200 - 1):
            snapshot = monitor.snapshot()
            sizes[number] = len(json.dumps(snapshot))
    assert len(snapshot["recent"]["time_s"]) <= NUM_RECENT_BINS
    assert len(snapshot["since_start"]["time_s"]) <= NUM_BINS_SINCE_START
    assert len(snapshot["versions"]) == NUM_VERSIONS
    first, last = sizes.values()
    assert last < 1.3 * first  # a day fills the lists already; only the numbers have more digits


def test_ten_thousand_names_become_few_labels():
    """Catches unbounded cardinality: a client could otherwise fill memory, and Prometheus, with names."""
    monitor = Monitor()
    for number in range(10_000):
        name = f"name-{number}"
        monitor.on_step(step((4, 2), rounds_by_domain={name: rounds((4, 2))}))
        monitor.on_rejected(name)
        monitor.on_event(name)
        finish(monitor, tenant=name, domain=name, stats=rounds((4, 2), decode_s=1.0))
    snapshot = monitor.snapshot()
    for splits in (snapshot["domains"], snapshot["tenants"]):
        assert len(splits) == MAX_LABELS + 1 and splits[-1]["name"] == OTHER
        assert sum(split["num_requests"] for split in splits) == 10_000
    assert len(snapshot["rejected"]) == MAX_LABELS + 1
    assert len(exposition(monitor).splitlines()) < 1000


# What is shown


def test_hostile_names_stay_on_one_line_and_parse():
    """Catches control characters, quotes, direction marks and lone surrogates on their way into logs and metrics."""
    monitor = Monitor()
    names = ['a"b\\c', "line\nbreak\r", "\x1b[2Jclear", "\u202eright to left", "half \ud800", "{}#", "x" * 5000]
    for name in names:
        monitor.on_step(step((4, 2), rounds_by_domain={name: rounds((4, 2))}))
        monitor.on_event("load", name)
    labels = {labels[0][1] for (name, labels) in samples(monitor) if name == "dvi:domain_rounds_total"}
    shown = {split["name"] for split in monitor.snapshot()["domains"]}
    assert labels == shown and len(shown) == len(names)
    assert all(label.isprintable() and len(label) <= 64 for label in labels)
    assert all(event["text"].isprintable() for event in monitor.snapshot()["events"])


def test_a_snapshot_is_strict_json_whatever_the_learner_reports():
    """Catches NaN and infinity, for which JSON has no word: a page that parses strictly would stop updating."""
    monitor = Monitor()
    report = update(forward_kl=math.nan, skipped="loss not finite")
    report.grad_norm = math.inf
    monitor.on_update(report)
    monitor.on_learner_stats({"train_s": 1.0, "acceptance_trend": math.nan})
    snapshot = json.loads(json.dumps(monitor.snapshot(), allow_nan=False))
    assert snapshot["update"]["grad_norm"] is None and snapshot["learner"]["acceptance_trend"] is None
    exposition(monitor)


def test_nothing_of_prompts_or_answers_is_kept():
    """Catches text or token ids in metrics, where whoever may see speed could read what others wrote."""
    monitor = Monitor()
    request = Request(1, [987654321], SamplingParams(stop_strings=("CANARY",)), arrived_s=monitor._clock())
    output = RequestOutput(1, text="CANARY", token_ids=[987654321], finish_reason="stop", error="CANARY",
                           stats=rounds((4, 2), decode_s=1.0))  # fmt: skip
    monitor.on_finish(request, output)
    for text in (json.dumps(monitor.snapshot()), exposition(monitor).decode()):
        assert "CANARY" not in text and "987654321" not in text


def test_columns_are_of_equal_length_and_leave_out_the_bin_that_has_just_begun():
    """Catches charts that are out of step, and a rate of a few tokens in no time at all, high above all others."""
    clock = Clock()
    monitor = Monitor(clock)
    for _ in range(100):
        clock.now_s += 0.5
        monitor.on_step(step((4, 4)))
        monitor.on_update(update(forward_kl=1.0))
    for name in ("recent", "since_start"):
        columns = monitor.snapshot()[name]
        lengths = {len(column) for column in columns.values() if isinstance(column, list)}
        assert lengths == {len(columns["losses"]["forward_kl"])} and lengths.pop() > 20
        assert max(columns["tokens_per_s"]) <= 11


def test_the_tokens_axis_never_goes_back_where_nothing_was_served():
    """Catches quiet bins that know no total, which would throw a chart over traffic back to zero."""
    clock = Clock()
    monitor = Monitor(clock)
    for second in range(60):
        clock.now_s += 1.0
        if not 20 < second < 40:
            monitor.on_step(step((4, 4), drafter_version=3))
        monitor.on_learner_stats({"train_s": 0.01 * second})
    for name in ("recent", "since_start"):
        columns = monitor.snapshot()[name]
        assert columns["tokens"] == sorted(columns["tokens"])
        assert set(columns["version"]) == {3}


def test_prometheus_reads_the_names_that_vllm_dashboards_use():
    """Catches a renamed counter: dashboards made for vLLM work with the prefix changed, and only then."""
    monitor = Monitor(load=lambda: Load(num_running=2, num_waiting=7))
    monitor.on_step(step((4, 2), (4, 4)))
    found = samples(monitor)
    expected = {
        "spec_decode_num_drafts_total": 2, "spec_decode_num_draft_tokens_total": 8,
        "spec_decode_num_accepted_tokens_total": 6, "generation_tokens_total": 8, "num_requests_running": 2,
        "num_requests_waiting": 7,
    }  # fmt: skip
    for name, number in expected.items():
        assert found[f"dvi:{name}", ()] == number
    per_position = [value(monitor, "spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(4)]
    assert per_position == [2, 2, 1, 1]
    # MAT as its help text says.
    assert monitor.snapshot()["total"]["mean_accepted_tokens"] == 8 / 2


def test_gauges_are_what_is_there_when_they_are_read():
    """Catches requests, positions or a version that stay as the last step left them, when no other step comes."""
    now = Load(2, 7, 300, 60, 4, "lossy", "margin 0.9")
    monitor = Monitor(load=lambda: now)
    monitor.on_step(step((4, 2), num_running=2, num_waiting=7, drafter_version=4))
    assert value(monitor, "num_requests_running") == 2 and value(monitor, "level", level="lossy") == 1
    now = Load(drafter_version=5)
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_positions", "prefix_cache_positions")
    assert [value(monitor, name) for name in gauges] == [0, 0, 0, 0]
    assert value(monitor, "drafter_version") == 5 and value(monitor, "verify_rule", rule="strict") == 1
    snapshot = monitor.snapshot()
    assert (snapshot["running"], snapshot["waiting"], snapshot["cached_positions"]) == (0, 0, 0)
    assert (snapshot["prefix_positions"], snapshot["drafter_version"], snapshot["level"]) == (0, 5, "fast")
    assert snapshot["newest"]["max_running"] == 2  # what was is told where it belongs


def test_what_came_behind_the_end_of_an_answer_is_in_no_figure_but_its_own():
    """Catches acceptances, a mean and a speed-up of tokens that nobody got."""
    stats = RoundStats(decode_s=1.0)
    stats.count_round(num_drafted=8, num_accepted=1, num_kept=1, num_committed=9)
    monitor = Monitor()
    monitor.on_step(StepReport(seconds=1.0, rounds=stats, plain_s=0.5))
    total = monitor.snapshot()["total"]
    assert (total["mean_accepted_tokens"], total["acceptance"], total["speed_up"]) == (1, 1 / 8, 0.5)
    assert value(monitor, "spec_decode_num_accepted_tokens_total") == 1
    assert value(monitor, "spec_decode_num_tokens_past_end_total") == 8
    assert stats.accepted_per_depth == stats.drafted_per_depth == [1]


def test_histogram_buckets_are_cumulative_and_end_with_all():
    """Catches buckets that are not nested, from which Prometheus computes nonsense quantiles in silence."""
    monitor = Monitor()
    for seconds in (1e-6, 0.003, 0.003, 0.2, 5000.0):
        finish(monitor, first_token_s=seconds)
    name = "dvi:time_to_first_token_seconds_bucket"
    buckets = [(float(labels[0][1]), n) for (n_, labels), n in samples(monitor).items() if n_ == name]
    assert buckets == sorted(buckets) and buckets[-1] == (math.inf, 5)
    for bound_s, number in buckets:
        exact = sum(seconds <= bound_s for seconds in (1e-6, 0.003, 0.003, 0.2, 5000.0))
        assert number == exact


def test_readings_are_not_touched_by_what_is_counted_after_them():
    """Catches a reader that is handed the records themselves, and so sees half of a step."""
    monitor = Monitor()

    def count() -> None:
        monitor.on_step(step((4, 2), rounds_by_domain={"code": rounds((4, 2))}, drafter_version=1))
        monitor.on_update(update(forward_kl=1.0))
        monitor.on_event("publish", version=1)
        monitor.on_learner_stats({"train_s": 1.0})
        monitor.on_rejected("queue_full")
        finish(monitor, tenant="alice", stats=rounds((4, 2), decode_s=1.0), first_token_s=0.1)

    count()
    readings = monitor.readings(with_history=True)
    before = pickle.dumps(readings)
    count()
    assert pickle.dumps(readings) == before


def test_readers_on_other_threads_see_whole_steps_and_disturb_no_count():
    """Catches a read in the middle of an addition, and structures that change while they are walked."""
    monitor = Monitor()
    is_done, failures = threading.Event(), []

    def read() -> None:
        while not is_done.is_set():
            try:
                total = monitor.snapshot()["total"]
                # Every round drafts four and accepts two.
                assert total["num_drafted"] == 4 * total["num_rounds"]
                found = samples(monitor)
                drafts = found["dvi:spec_decode_num_drafts_total", ()]
                assert found["dvi:spec_decode_num_accepted_tokens_total", ()] == 2 * drafts
            except Exception as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(600):
        name = f"name-{number % 50}"
        monitor.on_step(step((4, 2), (4, 2), rounds_by_domain={name: rounds((4, 2))}, drafter_version=number))
        finish(monitor, tenant=name, domain=name, stats=rounds((4, 2), decode_s=1.0))
        monitor.on_event("publish", version=number)
    is_done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert monitor.snapshot()["total"]["num_rounds"] == 1200


def test_no_stretch_of_time_is_more_than_wholly_spent():
    """Catches a long step counted in the bin in which it ended: "time spent" of 250 %."""
    clock = Clock()
    monitor = Monitor(clock)
    monitor.on_learner_stats({"train_s": 0.0})
    for seconds, train_s in ((7.0, 4.0), (1.0, 0.5), (11.0, 3.0), (0.2, 2.7)):
        clock.now_s += seconds
        monitor.on_step(StepReport(seconds=seconds))
        clock.now_s += train_s
        monitor.on_learner_stats({"train_s": monitor._learner["train_s"] + train_s})
    clock.now_s += 4.0
    snapshot = monitor.snapshot()
    for name in ("recent", "since_start"):
        columns = snapshot[name]
        assert max(columns["busy_share"]) <= 1 and max(columns["train_share"]) <= 1
        assert len(columns["time_s"]) > 10 and columns["time_s"] == sorted(columns["time_s"])
        assert sum(columns["busy_share"]) * columns["bin_s"] == pytest.approx(19.2, rel=0.01)
        assert sum(columns["train_share"]) * columns["bin_s"] == pytest.approx(10.2, rel=0.01)
