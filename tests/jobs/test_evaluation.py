"""Measurements beside training: what a drafter is held against, the sentence a run ends with, and its picture."""

import dataclasses

import pytest
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.records import RoundStats, SamplingParams
from dvi.telemetry import MetricsWriter, read_metrics
from tests.support.tiny_models import tiny_model
from trainers.jobs.evaluation import HeldOutRequests, Measurement, headline
from trainers.jobs.held_out_curve import HeldOutCurve
from trainers.jobs.picture import plot_run, speed_ratios

PROMPTS = [[5, 9, 3, 1], [7, 7, 2], [11, 4, 30, 8, 1]]
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def speculator():
    model = tiny_model("llama", dtype=torch.float64)
    made = SelfSpeculator(model, None, split_layer=2, policy="fixed", num_draft_tokens=3)
    with torch.no_grad():  # the head's own guess: some of it is accepted
        made.drafter.draft_head.lora_B.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    made.drafter.publish(made.drafter, 0)
    return made


def measurement(**values) -> Measurement:
    base = Measurement(24, 4, 0, 0.25, [0.3, 0.2], 1.3, 31.0, 21.0, 1.476, 1, "auto")
    return dataclasses.replace(base, **values)


def test_acceptance_is_that_of_real_rounds_although_they_are_replayed(speculator):
    """Catches an anchor or a position off by one, and rounds cut off at an answer's end that count as rejected."""
    found = HeldOutRequests(speculator, PROMPTS, PARAMS, num_draft_tokens=3).measure()
    assert found.num_mismatches == 0 and (found.num_prompts, found.policy) == (3, "fixed")
    # Long answers: what replaying leaves out at an end weighs little.
    params = dataclasses.replace(PARAMS, max_new_tokens=400)
    held_out, real = HeldOutRequests(speculator, PROMPTS, params, num_draft_tokens=3), RoundStats()
    for result in speculator.generate(PROMPTS, params, policy=FixedLength(3), keep_transitions=False):
        real.add(result.stats)
    rounds = held_out.replay()
    assert 0 < real.acceptance_rate < 1
    assert abs(rounds.num_rounds - real.num_rounds) <= 4 * len(PROMPTS)  # of the last four positions
    assert rounds.mean_accepted_tokens == pytest.approx(real.mean_accepted_tokens, rel=0.02)  # of the ends alone


def test_a_later_drafter_is_judged_without_decoding_again(speculator, monkeypatch):
    """Catches a curve that costs as much as serving, and one that shows the drafter of the beginning."""
    held_out = HeldOutRequests(speculator, PROMPTS, PARAMS, num_draft_tokens=3)
    before = held_out.measure()
    monkeypatch.setattr(SelfSpeculator, "generate", lambda *_, **__: pytest.fail("decoded again"))
    assert held_out.replay().acceptance_rate == before.acceptance
    kept = speculator.drafter.draft_head.lora_B.detach().clone()
    with torch.no_grad():
        speculator.drafter.draft_head.lora_B.normal_(std=2.0, generator=torch.Generator().manual_seed(2))
    assert held_out.replay().acceptance_rate != before.acceptance
    with torch.no_grad():
        speculator.drafter.draft_head.lora_B.copy_(kept)


def test_a_second_measurement_does_not_judge_by_what_the_first_has_learnt_of_another_drafter(speculator):
    """Catches a drafter that learnt, served by a length rule that still thinks of it as it was."""
    learning = SelfSpeculator(speculator.model, None, split_layer=2, policy="goodput", num_draft_tokens=3)
    held_out, rules = HeldOutRequests(learning, PROMPTS, PARAMS, num_draft_tokens=3), []
    for _ in range(2):
        assert held_out.measure().policy == "goodput"
        rules += held_out.speculator._policies.values()
    assert len(rules) == 2 and rules[0] is not rules[1] and learning._policies == {}


def test_the_curve_looks_once_at_each_version_and_not_where_nothing_can_be_replayed(speculator, tmp_path):
    """Catches a look at every request, which would cost more than serving, and a curve of sampled answers."""
    with_answers = HeldOutRequests(speculator, PROMPTS, PARAMS, num_draft_tokens=3)
    sampled = HeldOutRequests(
        speculator, PROMPTS, dataclasses.replace(PARAMS, temperature=1.0), num_draft_tokens=3
    )  # fmt: skip
    metrics, version = MetricsWriter(tmp_path), speculator.drafter.version
    curves = [HeldOutCurve(held_out, metrics, share=1.0) for held_out in (with_answers, sampled)]
    try:
        for speculator.drafter.version in (version, version + 1, version + 1):
            for curve in curves:
                curve.update(num_tokens=7)
    finally:
        speculator.drafter.version = version
    metrics.close()
    (event,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (event["event"], event["tokens_seen"], event["drafter_version"]) == ("held_out", 7, version + 1)
    assert event["mean_accepted_tokens"] == with_answers.replay().mean_accepted_tokens


@pytest.mark.parametrize("speed_up, says", [
    (1.476, "1.48x faster than plain decoding (31 against 21 tokens/s)"),
    (1.003, "as fast as plain decoding"), (0.94, "0.94 of plain decoding's speed"),
])  # fmt: skip
def test_the_headline_says_what_was_measured_also_where_it_is_no_success(speed_up, says):
    """Catches a sentence that only knows success."""
    sentence = headline(measurement(speed_up=0.98, mean_accepted_tokens=1.0), measurement(speed_up=speed_up))
    assert sentence.startswith(says) and "it was 0.98x before learning" in sentence
    assert "the same tokens in 23 of 24 answers" in sentence and "1.00 -> 1.30" in sentence


def test_speed_is_over_the_faster_plain_decoding_and_the_headline_says_so(speculator, monkeypatch):
    """Catches a gain over a slow dtype that is sold as a gain over plain decoding."""
    monkeypatch.setattr(RoundStats, "decode_tokens_per_s", property(lambda self: 10.0))
    found = HeldOutRequests(speculator, PROMPTS, PARAMS, num_draft_tokens=3, plain_lead=2.0).measure()
    assert (found.tokens_per_s, found.plain_tokens_per_s, found.speed_up) == (10.0, 20.0, 0.5)
    assert "faster at it" in headline(found, found) and "faster at it" not in headline(measurement(), measurement())


def test_the_headline_claims_no_equal_tokens_under_sampling():
    """Catches a promise that sampling does not make."""
    assert "same tokens" not in headline(measurement(), measurement(num_mismatches=None))


def request(index: int, *, tokens_seen: int, serving_s: float, train_s: float, plain: float | None) -> dict:
    return {
        "event": "request", "index": index, "tokens_seen": tokens_seen, "drafted": index % 2, "prefill_s": 0.5,
        "mean_accepted_tokens": 1.2, "serving_s": serving_s, "train_s": train_s, "plain_tokens_per_s": plain,
    }  # fmt: skip


def test_speed_over_plain_leaves_out_prefills_and_on_demand_learning():
    """Catches learning's time hidden in the decoding, and a ratio over a probe that came later or never."""
    # Each request: 10 tokens in 2.5 s, of which 0.5 s of prefill and 1 s of learning; plain decoding 5 tokens/s.
    requests = [
        request(i, tokens_seen=10 * i, serving_s=2.5 * i, train_s=i, plain=5.0 if i > 3 else None) for i in range(9)
    ]
    assert speed_ratios(requests, with_learning=False, window=4) == ([40, 50, 60, 70, 80], [pytest.approx(2.0)] * 5)
    assert speed_ratios(requests, with_learning=True, window=4)[1] == [pytest.approx(1.0)] * 5
    unprobed = [{**r, "plain_tokens_per_s": None} for r in requests]
    assert speed_ratios(unprobed, with_learning=True, window=4) == ([], [])


def test_the_picture_is_a_png_of_whatever_there_is_and_never_an_empty_one(tmp_path):
    """Catches a plot that trips over a run without measurements, probes or drafts, or that opens a window."""
    requests = [request(i, tokens_seen=10 * i, serving_s=2.5 * i, train_s=i, plain=5.0) for i in range(40)]
    curve = {"event": "held_out", "tokens_seen": 100, "mean_accepted_tokens": 1.1, "num_draft_tokens": 4}
    events = [*requests, curve, {"event": "update"}]
    plot_run(events, tmp_path / "a.png", title="a", before=measurement(), after=measurement())
    plot_run([{**r, "drafted": 0, "plain_tokens_per_s": None} for r in requests], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least 1 event"):
        plot_run([curve], tmp_path / "c.png")
