"""Whatever a lossy rule touches says so, and what it grants is counted as nobody's merit."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from dvi.bench.arms import ArmOptions, plans_of_ours
from dvi.bench.questions import Conversation, Question
from dvi.bench.report import make_report
from dvi.bench.spec_bench import run_spec_bench
from dvi.config import load_config
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import MarginRule, StrictRule
from dvi.draft.length_policies import FixedLength
from dvi.inspect.audit import audit
from dvi.model.adapter_store import load_drafter, read_manifest, save_drafter
from dvi.records import SamplingParams
from dvi.serving.metrics import dashboard
from dvi.serving.metrics.figures import Figures
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.metrics.terminal_view import show
from dvi.settings import SpecBenchSettings
from dvi.telemetry import read_metrics
from tests.cli.test_main import dvi_command
from tests.support.random_traffic import serving, stretch, trainer_of
from tests.support.serving_doubles import STORIES, client_of, stories_config, stories_loop
from trainers.jobs.evaluation import HeldOutRequests
from trainers.jobs.traffic_counts import TrafficCounts
from trainers.jobs.train import run_training

RULE, NAME = MarginRule(0.3), "margin 0.3"
LOSSY = ("verify.rule=margin", "verify.margin_theta=0.3")


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(STORIES, split_layer=2, device="cpu", rule=RULE)


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lossy():
    """A server by the margin rule that has answered: its loop, a client, and a plain and a streamed response."""
    config = stories_config(*LOSSY, "model.split_layer=4")
    with stories_loop(config) as loop, client_of(loop, config) as client:
        body = {"prompt": "Once upon a time", "max_tokens": 32}
        answers = [client.post("/v1/completions", json=body | more) for more in ({}, {"stream": True})]
        yield SimpleNamespace(loop=loop, client=client, answers=answers)


def test_every_response_says_by_which_rule_it_was_verified(lossy):
    """Catches a client that cannot tell a lossy answer from the model's own, whole or streamed."""
    for answer in lossy.answers:
        assert answer.status_code == 200
        assert (answer.headers["x-dvi-level"], answer.headers["x-dvi-verify-rule"]) == ("lossy", NAME)
    lines = [line for line in lossy.answers[1].text.split("\n\n") if line.startswith("data: {")]
    for content in (lossy.answers[0].json(), json.loads(lines[-1].removeprefix("data: "))):
        counts = content["metrics"]["speculative_decoding"]
        assert (counts["level"], counts["verify_rule"]) == ("lossy", NAME)
        assert 0 < counts["num_waived_draft_tokens"] <= counts["num_accepted_draft_tokens"]


def test_a_strict_servers_responses_say_that_too():
    """Catches a header that only lossy answers have, so that its lack could mean anything."""
    with stories_loop(stories_config()) as loop, client_of(loop) as client:
        answer = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4})
    assert (answer.headers["x-dvi-level"], answer.headers["x-dvi-verify-rule"]) == ("fast", "strict")
    assert answer.json()["metrics"]["speculative_decoding"]["num_waived_draft_tokens"] == 0


def test_metrics_dashboard_and_terminal_show_a_lossy_rule_and_what_it_waived(lossy):
    """Catches figures of a lossy server that look like an honest one's."""
    families = text_string_to_metric_families(lossy.client.get("/metrics").text)
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    waived, accepted = (samples[f"dvi:spec_decode_num_{what}_tokens_total",] for what in ("waived", "accepted"))
    assert 0 < waived <= accepted
    assert samples["dvi:verify_rule", NAME] == samples["dvi:level", "lossy"] == 1
    status = lossy.client.get("/dashboard/data").json()
    assert (status["level"], status["verify_rule"]) == ("lossy", NAME)
    assert (status["total"]["num_waived"], status["total"]["num_accepted"]) == (waived, accepted)
    for is_terminal in (True, False):
        views, console = iter((False, True)), Console(width=200, record=True, force_terminal=is_terminal)
        with console.capture() as capture:
            show(lambda: dashboard.status(lossy.loop), console=console, refresh_s=0.0, until=views.__next__)
        assert "LOSSY" in capture.get() and NAME in capture.get() and f"{waived:.0f} of" in capture.get()


def test_a_lossy_server_says_so_before_its_first_request():
    """Catches a dashboard that is honest only once there is something to show."""
    config = stories_config(*LOSSY)
    with stories_loop(config) as loop:
        assert loop.monitor.snapshot()["level"] == "lossy"
        assert 'dvi:level{level="lossy"} 1.0' in exposition(loop.monitor).decode()


def test_waived_tokens_add_up_over_stretches_of_time():
    """Catches a count that is left out where figures are merged."""
    total, part = Figures(), Figures()
    part.rounds.count_round(num_drafted=4, num_accepted=3, num_waived=2)
    for _ in range(2):
        total.add(part)
    assert (total.rounds.num_accepted, total.rounds.num_waived) == (6, 4)
    assert total.rounds.honest_acceptance_rate == 2 / 8


# --- the command line -------------------------------------------------------------------------------------------------


def test_generate_warns_of_a_lossy_rule_and_counts_what_it_waived():
    """Catches a lossy text without a word, and a theta that does not arrive."""
    arguments = ("generate", STORIES, "Once upon a time", "--policy", "fixed", "--max-new-tokens", 32)
    arguments += ("--split-layer", 4)
    code, facts, text, stderr = dvi_command(*arguments, "--verify-rule", "margin", "--margin-theta", 0.3)
    assert code == 0, stderr
    assert "warning: verify rule margin 0.3 is lossy" in stderr
    assert (facts["level"], facts["verify_rule"]) == ("lossy", NAME) and facts["waived"] > 0
    code, strict, strict_text, stderr = dvi_command(*arguments)
    assert "lossy" not in stderr and strict_text != text
    assert (strict["level"], strict["verify_rule"], strict["waived"]) == ("fast", "strict", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", STORIES, "Once", "--verify-rule", "margin", "--margin-theta", 1.5), "margin_theta must be in"),
        (("generate", STORIES, "Once", "--margin-theta", 0.9), "--margin-theta goes with --verify-rule margin"),
        (("bench", "ablation", "configs/bench/ablation.yaml", "--output", "x", *LOSSY), "must be 'strict'"),
        (("bench", "drift", "configs/bench/drift.yaml", "--output", "x", *LOSSY), "must be 'strict'"),
        (("bench", "sweep", "configs/bench/sweep.yaml", "--output", "x", *LOSSY), "must be 'strict'"),
        (("bench", "paper", "configs/bench/paper_vicuna_7b.yaml", *LOSSY), "must be 'strict'"),
    ],
)
def test_what_a_lossy_rule_would_spoil_is_refused(arguments, message):
    """Catches experiments whose acceptances are partly granted, and settings that are passed over."""
    code, facts, _, stderr = dvi_command(*arguments)
    assert code == 2 and facts is None and message in stderr.splitlines()[-1]


def test_an_audit_of_a_lossy_speculator_is_refused(speculator):
    """Catches `dvi audit` finding fault with differences that were asked for, or explaining them."""
    with pytest.raises(ValueError, match=r"the audit needs the strict rule, got margin 0\.3"):
        audit(speculator, [[1, 2, 3]], max_new_tokens=4)


# --- spec-bench -------------------------------------------------------------------------------------------------------


def test_a_lossy_arm_is_stamped_everywhere_and_compared_with_nobody(tmp_path, speculator, capsys):
    """Catches a lossy arm called void for what it does by design, or named like an honest one in some table or file."""
    strict, lossy = (ArmOptions(max_new_tokens=24, num_draft_tokens=4, rule=rule) for rule in (StrictRule(), RULE))
    plans = plans_of_ours(speculator, strict, names=["plain", "speculative"])
    plans += plans_of_ours(speculator, lossy, names=["speculative"])
    assert [plan.name for plan in plans] == ["plain", "speculative", "speculative_lossy"]
    assert [plan.is_lossy for plan in plans] == [False, False, True]
    run_spec_bench(
        plans, [Question(1, "writing", ("Tell me of a dog.",)), Question(2, "qa", ("Who was Lily?",))],
        Conversation(speculator.tokenizer), speculator=speculator, folder=tmp_path, console=quiet(),
        settings=SpecBenchSettings(model=STORIES, max_new_tokens=24, repetitions=1, warmups=0),
    )  # fmt: skip
    report = make_report(tmp_path, tokenizer=speculator.tokenizer, console=Console(width=200))
    arm = next(arm for arm in report["arms"] if arm["name"] == "speculative_lossy")
    assert arm["is_lossy"] and not arm["is_void"] and arm["num_differing"] == 0 and arm["num_waived"] > 0
    assert arm["facts"]["level"] == "lossy" and arm["facts"]["verify_rule"] == NAME
    assert arm["paired"]["overall"]["interval"]["num_samples"] == 2
    ids = {}
    for line in (tmp_path / "run_1/details.jsonl").read_text().splitlines():
        ids.setdefault(json.loads(line)["arm"], []).append(json.loads(line)["token_ids"])
    assert ids["speculative_lossy"] != ids["plain"] == ids["speculative"]  # not vacuous
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert "lossy: may differ" in text and f"LOSSY ({NAME})" in text and "VOID" not in text
    assert [path for path in (tmp_path / "run_1/model_answer").iterdir() if "speculative_lossy" in path.name]


def test_spec_bench_takes_the_rule_from_its_options(tmp_path):
    """Catches an option that does not arrive at the arms."""
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"question_id": 1, "category": "qa", "turns": ["Who was Lily?"]}\n', encoding="utf-8")
    code, facts, _, stderr = dvi_command(
        "bench", "spec-bench", "--model", STORIES, "--split-layer", 2, "--output", tmp_path / "out", "--questions",
        questions, "--repetitions", 1, "--max-new-tokens", 6, "--verify-rule", "margin", "verify.margin_theta=0.3",
    )  # fmt: skip
    assert code == 0, stderr
    assert [(arm["name"], arm["is_lossy"]) for arm in facts["arms"]] == [("plain", False), ("speculative_lossy", True)]
    assert facts["arms"][1]["facts"]["verify_rule"] == NAME


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_training_run_by_a_lossy_rule_says_so_in_all_that_it_leaves(tmp_path):
    """Catches a summary, a metrics file, a manifest or a model card that passes for a strict run's."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text} for text in ("Once upon a time", "Lily and Tom went", "One day a bird", "The sun was")]
    rows.append({"prompt": "The little dog", "split": "eval"})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def train(folder: str, *overrides: str) -> dict[str, object]:
        return run_training(load_config(None, [
            f"model.path={STORIES}", "model.split_layer=2", f"data.prompts={prompts}", "output.tensorboard=false",
            f"output.folder={tmp_path / folder}", "sampling.max_new_tokens=24", "eval.max_new_tokens=12",
            "eval.limit=1", "draft.policy=fixed", "drafter.anchor_hidden=16", "drafter.lora_rank=4", "train.budget=1",
            "train.rounds_per_step=4", "train.blocks_per_step=4", *overrides,
        ]), console=quiet())  # fmt: skip

    lossy, strict = train("lossy", *LOSSY), train("strict", "eval.limit=0")
    assert (lossy["level"], lossy["verify_rule"]) == ("lossy", NAME) and lossy["waived"] > 0
    assert (strict["level"], strict["verify_rule"], strict["waived"]) == ("fast", "strict", 0)
    events = [e for e in read_metrics(tmp_path / "lossy/metrics.jsonl") if e["event"] == "request"]
    assert sum(event["waived"] for event in events) == lossy["waived"]
    assert {event["level"] for event in events} == {"lossy"}
    for folder, is_lossy in (("lossy", True), ("strict", False)):
        drafter = tmp_path / folder / "drafter"
        assert read_manifest(drafter).has_learnt_lossy is is_lossy
        assert ("lossy verify rule" in (drafter / "README.md").read_text(encoding="utf-8")) is is_lossy
    train("after", f"drafter.adapter={tmp_path / 'lossy/drafter'}", "data.limit=1", "eval.limit=0")
    assert read_manifest(tmp_path / "after/drafter").has_learnt_lossy  # what it has learnt stays in it


def test_held_out_figures_are_the_strict_rules_whatever_the_run_serves_by(speculator):
    """Catches an acceptance that the rule has raised, saved with the drafter as its own."""
    params, prompt = SamplingParams(max_new_tokens=48), speculator.encode("Who was Lily?")
    (served,) = speculator.generate([prompt], params, policy=FixedLength(4))
    assert served.stats.num_waived > 0
    found = HeldOutRequests(speculator, [prompt], params, num_draft_tokens=4).measure()
    assert found.num_mismatches == 0 and found.acceptance < served.stats.acceptance_rate
    assert speculator.rule is RULE


def test_manifests_from_before_there_were_lossy_rules_are_read(tmp_path, speculator):
    """Catches saved drafters that nobody can load any more."""
    save_drafter(tmp_path / "new", speculator.drafter, speculator.split, base_model=STORIES)
    path = tmp_path / "new/dvi_manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("has_learnt_lossy") is False
    path.write_text(json.dumps(manifest))
    assert load_drafter(tmp_path / "new", speculator.split).has_learnt_lossy is False


def granted(index: int, *, num_accepted: int, num_waived: int):
    return dataclasses.replace(stretch(index, num_accepted=num_accepted), num_waived=num_waived)


def test_the_acceptance_that_steers_a_learner_is_the_honest_one():
    """Catches a drift that the rule hides, and a warm-up that ends because the rule is generous."""
    honest, lossy = trainer_of(serving()), trainer_of(serving())
    for index in range(40, 60):
        honest.observe([granted(index, num_accepted=1, num_waived=0)])
        lossy.observe([granted(index, num_accepted=3, num_waived=2)])
    assert lossy.stats()["acceptance_trend"] == honest.stats()["acceptance_trend"]
    rising = trainer_of(serving())
    rising.observe([granted(40, num_accepted=3, num_waived=0)])
    assert rising.stats()["acceptance_trend"] > honest.stats()["acceptance_trend"]


def test_a_drafter_is_marked_when_it_first_serves_what_it_learnt_from_a_lossy_round():
    """Catches a mark that is lost in a checkpoint, or set on a drafter that never saw any."""
    speculator = serving()
    trainer = trainer_of(speculator)
    trainer.step()
    trainer.publish_now()
    assert speculator.drafter.has_learnt_lossy is False
    trainer.observe([granted(40, num_accepted=3, num_waived=1)])
    trainer.step()
    trainer.publish_now()
    assert speculator.drafter.has_learnt_lossy is True
    resumed = serving()
    trainer_of(resumed).load_state_dict(trainer.state_dict())
    assert resumed.drafter.has_learnt_lossy is True


def test_a_servers_counts_keep_waived_tokens_apart(monkeypatch):
    """Catches a provenance in which what was granted is the drafter's merit."""
    monkeypatch.setattr("trainers.jobs.traffic_counts.WINDOW_DRAFTED", 8)
    counts = TrafficCounts()
    counts.count([granted(0, num_accepted=3, num_waived=2), granted(1, num_accepted=1, num_waived=0)])
    assert (counts.total.num_accepted, counts.total.num_waived) == (4, 2)
    assert counts.newest.honest_acceptance_rate == 2 / 8


def test_a_lossy_rule_leaves_the_weights_of_a_kl_learner_alone():
    """The same text, honestly or by a waiver: distillation makes the same step. Catches experience that is dropped."""
    steps = []
    for num_waived in (0, 1):
        trainer = trainer_of(serving(), schedule="kl_only")
        trainer.observe([granted(index, num_accepted=3, num_waived=num_waived) for index in range(40, 60)])
        report = trainer.step()
        steps.append((report.num_positions, len(trainer.replay)))
    assert steps[0] == steps[1]
    assert torch.tensor(steps).min() > 0
