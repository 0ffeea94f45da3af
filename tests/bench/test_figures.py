"""The harness's formulas against a slow second writing of them, and the paired figures beside."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from dvi.bench.answers import Detail, FirstDifference
from dvi.bench.figures import (
    HARNESS_TASKS,
    Served,
    acceptance_over_traffic,
    find_mismatches,
    harness_figures,
    harness_summary,
    mean_accepted_drafts,
    paired_speed,
    round_counts,
    text_token_counter,
)

MT_BENCH_CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


def with_bos(text: str) -> SimpleNamespace:
    """A tokenizer: a token a word, after a BOS."""
    return SimpleNamespace(input_ids=[1] + [7] * len(text.split()))


def without_bos(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[7] * len(text.split()))


def answer(question_id: int, category: str, *, new_tokens, wall_time, accept_lengths=(), turns=("a b c",)) -> dict:
    choice = {"turns": list(turns), "new_tokens": new_tokens, "wall_time": wall_time,
              "accept_lengths": list(accept_lengths)}  # fmt: skip
    return {"question_id": question_id, "category": category, "choices": [choice]}


def slow_harness(answers: list[dict], baseline: list[dict], tokenizer, task: str) -> tuple:
    """The harness's figures in plain loops, from its description alone."""

    def is_wanted(line: dict) -> bool:
        if task == "overall":
            return True
        if task == "mt_bench":
            return line["category"] in MT_BENCH_CATEGORIES
        return line["category"] == task

    rates, entries, baseline_rates = [], [], []
    for line in answers:
        if is_wanted(line):
            first = line["choices"][0]
            rates.append(sum(first["new_tokens"]) / sum(first["wall_time"]))
            entries.extend(first["accept_lengths"])
    for line in baseline:
        if is_wanted(line):
            first = line["choices"][0]
            num_tokens = 0
            for text in first["turns"]:
                num_tokens += len(tokenizer(text).input_ids) - 1
            baseline_rates.append(num_tokens / sum(first["wall_time"]))
    if not rates or not baseline_rates:
        mean = sum(rates) / len(rates) if rates else math.nan
        return mean, sum(baseline_rates) / len(baseline_rates) if baseline_rates else math.nan, math.nan, entries
    mean, baseline_mean = sum(rates) / len(rates), sum(baseline_rates) / len(baseline_rates)
    return mean, baseline_mean, mean / baseline_mean, entries


METHOD = [
    answer(81, "writing", new_tokens=[40, 31], wall_time=[2.0, 1.7], accept_lengths=[5] * 14 + [1]),
    answer(111, "math", new_tokens=[3, 9], wall_time=[0.3, 0.8], accept_lengths=[1] * 12),
    answer(161, "translation", new_tokens=[9], wall_time=[0.7], accept_lengths=[3, 3, 3]),
    answer(401, "math_reasoning", new_tokens=[20], wall_time=[0.9], accept_lengths=[4] * 5),
    answer(481, "rag", new_tokens=[6], wall_time=[1.1], accept_lengths=[2, 4]),
]
BASELINE = [  # no rag, and a translation more: nobody compares the sets
    answer(81, "writing", new_tokens=[71, 71], wall_time=[3.9, 3.1], turns=("w " * 39, "w " * 30)),
    answer(111, "math", new_tokens=[1, 1], wall_time=[0.5, 1.5], turns=("w w", "w " * 8)),
    answer(161, "translation", new_tokens=[1], wall_time=[1.3], turns=("w " * 8,)),
    answer(162, "translation", new_tokens=[1], wall_time=[5.0], turns=("w w w",)),
    answer(401, "math_reasoning", new_tokens=[1], wall_time=[2.0], turns=("w " * 19,)),
]


@pytest.mark.parametrize("task", HARNESS_TASKS)
@pytest.mark.parametrize("tokenizer", [with_bos, without_bos])
def test_harness_figures_equal_a_slow_writing_of_its_formulas(task, tokenizer):
    """Catches total/total in place of a mean of rates, the average of tasks as "overall", turns dropped, MT-bench's
    "math" taken for GSM8K's, the baseline's new_tokens read, and nan left out where a side has no question."""
    found = harness_figures(METHOD, BASELINE, task=task, count_tokens=text_token_counter(tokenizer))

    mean, baseline_mean, speedup, entries = slow_harness(METHOD, BASELINE, tokenizer, task)
    # The two add in another order: a few units in the last place.
    assert found.tokens_per_s == pytest.approx(mean, rel=1e-12, nan_ok=True)
    assert found.baseline_tokens_per_s == pytest.approx(baseline_mean, rel=1e-12, nan_ok=True)
    assert found.speedup == pytest.approx(speedup, rel=1e-12, nan_ok=True)
    assert list(found.accept_lengths) == entries


def test_a_few_harness_figures_by_hand():
    """Catches a mistake that both writings of the formulas would share."""
    found = harness_figures(METHOD, BASELINE, task="translation", count_tokens=text_token_counter(with_bos))

    assert found.tokens_per_s == pytest.approx(9 / 0.7)
    assert found.baseline_tokens_per_s == pytest.approx((8 / 1.3 + 3 / 5.0) / 2)
    assert found.mean_accepted_tokens == 3.0


def test_a_tokenizer_without_bos_costs_the_baseline_one_token_a_turn():
    """Catches a correction of the harness's "- 1", which its figures do not make."""
    inflated = harness_figures(METHOD, BASELINE, task="mt_bench", count_tokens=text_token_counter(without_bos))

    assert inflated.baseline_tokens_per_s == pytest.approx(((39 + 30 - 2) / 7.0 + (2 + 8 - 2) / 2.0) / 2)


def test_accepted_tokens_count_by_steps_and_speed_by_questions():
    """Catches a MAT averaged over questions: a long answer dominates the harness's."""
    found = harness_figures(METHOD, BASELINE, task="mt_bench", count_tokens=text_token_counter(with_bos))

    assert found.mean_accepted_tokens == pytest.approx((14 * 5 + 1 + 12) / 27)


def test_only_the_first_choice_counts():
    """Catches sums over all choices of an answer."""
    doubled = [{**line, "choices": line["choices"] + METHOD[0]["choices"]} for line in METHOD]
    count_tokens = text_token_counter(with_bos)

    assert harness_figures(doubled, BASELINE, task="overall", count_tokens=count_tokens) == harness_figures(
        METHOD, BASELINE, task="overall", count_tokens=count_tokens
    )


def test_tokens_beyond_the_limit_count_as_the_harness_counts_them():
    """Catches a cap on new_tokens: methods that overshoot are paid for it there, and the baseline is not."""
    over = [answer(321, "qa", new_tokens=[1027], wall_time=[10.0], accept_lengths=[13] * 79)]

    found = harness_figures(over, [], task="qa", count_tokens=text_token_counter(with_bos))

    assert found.tokens_per_s == pytest.approx(102.7)
    assert math.isnan(found.speedup)


def test_a_baseline_of_empty_texts_gives_infinite_speedup_without_a_warning():
    """Catches a ZeroDivisionError in the report of a model that says nothing."""
    empty = [answer(321, "qa", new_tokens=[1], wall_time=[1.0], turns=("",))]
    method = [answer(321, "qa", new_tokens=[1], wall_time=[1.0], accept_lengths=[1])]

    found = harness_figures(method, empty, task="qa", count_tokens=text_token_counter(with_bos))

    assert math.isinf(found.speedup)


def test_runs_are_summed_up_by_mean_and_sample_deviation_and_accepted_tokens_over_all_entries():
    """Catches ddof=0, and a MAT that averages the runs: the harness puts all entries of all runs together."""
    long = [answer(1, "qa", new_tokens=[8], wall_time=[2.0], accept_lengths=[2, 2, 2, 2])]
    short = [answer(1, "qa", new_tokens=[5], wall_time=[1.0], accept_lengths=[5])]
    base = [answer(1, "qa", new_tokens=[1], wall_time=[1.0], turns=("w w",))]
    runs = [
        harness_figures(lines, base, task="qa", count_tokens=text_token_counter(with_bos)) for lines in (long, short)
    ]

    summary = harness_summary(runs)

    assert summary.tokens_per_s == (pytest.approx(4.5), pytest.approx(math.sqrt(0.5)))
    assert summary.speedup == (pytest.approx(2.25), pytest.approx(math.sqrt(0.125)))
    assert summary.mean_accepted_tokens == pytest.approx(13 / 5)
    assert harness_summary(runs[:1]).speedup[1] is None


# The paired figures


def served(question_id: int, ids: list[list[int]], seconds: float, *, category="qa", error=None, **detail) -> Served:
    line = answer(question_id, category, new_tokens=[len(i) for i in ids], wall_time=[seconds])
    turns = {"prompt_tokens": [3] * len(ids), "cut_tokens": [0] * len(ids), "token_ids": ids}
    return Served(
        Detail("arm", question_id, **turns, error=error, **detail), None if error else line, category=category
    )


def run(*answers: Served) -> dict[int, Served]:
    return {s.detail.question_id: s for s in answers}


def test_paired_speed_is_the_median_over_questions_of_the_median_over_repetitions():
    """Catches ratios of means, repetitions counted as questions, and a baseline of another repetition."""
    ids = [[5, 6, 7]]
    arm = [run(served(1, ids, s), served(2, ids, s), served(3, ids, 2 * s)) for s in (1.0, 1.0, 1.0)]
    base = [run(served(1, ids, s), served(2, ids, 3.0), served(3, ids, 2.0)) for s in (1.0, 2.0, 9.0)]

    found = paired_speed(arm, base, task="overall", must_match=True)

    assert found.interval.value == 2.0  # of 2.0, 3.0 and 1.0
    assert found.interval.num_samples == 3
    assert (found.interval.low, found.interval.high) == (1.0, 3.0)


def test_paired_speed_counts_token_ids_on_both_sides_alike():
    """Catches the text's count on either side: under sampling the texts differ, and so do their tokens."""
    found = paired_speed(
        [run(served(1, [[5] * 8], 2.0))], [run(served(1, [[6] * 6], 3.0))], task="overall", must_match=False
    )

    assert found.interval.value == pytest.approx((8 / 2.0) / (6 / 3.0))


def test_failed_and_differing_questions_are_left_out_and_counted():
    """Catches a failure scored as an answer, on either side and in any repetition, and a wrong text that was fast."""
    ids, other = [[5, 6]], [[5, 9]]
    good = [run(*(served(i, ids, 1.0) for i in range(1, 5)))] * 2
    arm = [
        run(served(1, ids, 0.5), served(2, ids, 0.1), served(3, other, 0.1), served(4, ids, 0.1)),
        run(served(1, ids, 0.5), served(2, [], 0.1, error="ValueError: no"), served(3, ids, 0.1), served(4, ids, 0.1)),
    ]
    base = [good[0], run(*(served(i, ids, 1.0) for i in range(1, 4)), served(4, [], 1.0, error="ValueError: no"))]

    found = paired_speed(arm, base, task="overall", must_match=True)

    assert (found.interval.value, found.interval.num_samples) == (2.0, 1)
    assert (found.num_failed, found.num_differing) == (2, 1)


def test_paired_speed_of_a_task_holds_its_questions_only():
    """Catches MT-bench's eight categories left out, and a task without questions that raises."""
    ids = [[5]]
    arm = [run(served(1, ids, 1.0, category="stem"), served(2, ids, 1.0))]
    base = [run(served(1, ids, 4.0, category="stem"), served(2, ids, 2.0))]

    assert paired_speed(arm, base, task="mt_bench", must_match=True).interval.value == 4.0
    assert paired_speed(arm, base, task="qa", must_match=True).interval.value == 2.0
    assert paired_speed(arm, base, task="rag", must_match=True).interval is None


def test_the_first_mismatch_names_its_place_and_the_gap_that_was_measured_there():
    """Catches a place in the wrong turn, a text that only ends earlier passed as equal, and another place's gap."""
    base = [run(served(1, [[5, 6], [7, 8, 9]], 1.0), served(2, [[5, 6]], 1.0))]
    gap = FirstDifference(turn=1, position=1, plain_token=8, other_token=4, gap=0.25)
    arm = [run(served(1, [[5, 6], [7, 4, 9]], 1.0, divergence=gap), served(2, [[5]], 1.0, divergence=gap))]

    first, second = find_mismatches(arm, base)

    assert (first.repetition, first.question_id, first.turn, first.position, first.gap) == (1, 1, 1, 1, 0.25)
    assert (second.question_id, second.turn, second.position, second.gap) == (2, 0, 1, None)
    assert find_mismatches(base, base) == []


def counts(rounds: int, drafted: int, accepted: int, drafted_at: list[int], accepted_at: list[int]) -> dict:
    return {"num_rounds": rounds, "num_drafted": drafted, "num_accepted": accepted, "drafted_per_depth": drafted_at,
            "accepted_per_depth": accepted_at}  # fmt: skip


def test_round_counts_add_up_over_questions_and_repetitions():
    """Catches ratios averaged in place of counts, depths cut to the shortest list, and a failed answer's rounds."""
    arm = [
        run(served(1, [[5]], 1.0, **counts(10, 20, 12, [10, 8], [8, 4])),
            served(2, [[5]], 1.0, **counts(5, 5, 1, [5], [1]))),
        run(served(1, [], 1.0, error="RuntimeError: no", **counts(3, 9, 9, [3], [3]))),
    ]  # fmt: skip

    total = round_counts(arm)

    assert (total.num_rounds, total.num_drafted, total.num_accepted) == (15, 25, 13)
    assert (total.drafted_per_depth, total.accepted_per_depth) == ([15, 8], [9, 4])
    assert mean_accepted_drafts(total, 99.0) == pytest.approx(13 / 15)


def test_an_arm_without_counts_has_one_accepted_draft_less_than_tokens_a_step():
    """Catches plain decoding of others shown with accepted drafts."""
    assert round_counts([run(served(1, [[5]], 1.0))]) is None
    assert mean_accepted_drafts(None, 1.0) == 0.0


def test_acceptance_over_traffic_follows_the_order_of_answering():
    """Catches questions sorted by id, and questions without drafts that shift those after them."""
    arm = run(
        served(9, [[5]], 1.0, **counts(2, 4, 1, [2], [1])), served(2, [[5]], 1.0, **counts(2, 0, 0, [], [])),
        served(5, [[5]], 1.0, **counts(2, 4, 3, [2], [1])),
    )  # fmt: skip

    assert acceptance_over_traffic(arm) == [(1, 0.25), (3, 0.75)]
