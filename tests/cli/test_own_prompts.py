"""A user's own prompts: some are held out unasked, all are checked before anything runs, few are called few."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dvi.config import load_config
from dvi.decode.construction import build_speculator
from dvi.decode.speculator import SelfSpeculator
from dvi.model.chat_templates import VICUNA_TEMPLATE, render_chat
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig
from tests.support.drafter_doubles import small_config
from tests.support.job_interruptions import after_requests, interrupt
from tests.support.paths import STORIES
from trainers.jobs.evaluation import HeldOutRequests
from trainers.jobs.traffic_cursor import LITTLE_TOKENS, read_traffic, what_to_expect
from trainers.jobs.train import run_training
from trainers.jobs.warmup import run_warmup

QUESTIONS = [f"Once upon a time there were {i} bears" for i in range(30)]
# Takes turns as Mistral's and Gemma's do, and passes over whoever else speaks.
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'user: ' + message.content | trim }}"
    "{% elif message.role == 'assistant' %}{% if loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{{ 'assistant: ' + message.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
)


@pytest.fixture
def settings(tmp_path: Path):
    """Makes settings of a small run over rows of tmp_path / "rows.jsonl"."""

    def make(rows: list[object], *overrides: str, schema: type = TrainConfig):
        prompts = tmp_path / "rows.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = [
            f"model.path={STORIES}", "model.split_layer=2", f"data.prompts={prompts}",
            f"output.folder={tmp_path / 'run'}", "output.tensorboard=false", "eval.max_new_tokens=4",
            "draft.policy=fixed", "drafter.anchor_hidden=16", "drafter.lora_rank=4", "drafter.draft_vocab_size=0",
        ]  # fmt: skip
        if schema is TrainConfig:
            values.append("sampling.max_new_tokens=4")
        return load_config(None, [*values, *overrides], schema=schema)

    return make


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(STORIES, split_layer=1, policy="fixed", drafter=small_config())


def run(config: TrainConfig) -> tuple[dict, str]:
    """The summary, and what a person saw."""
    seen = io.StringIO()
    summary = run_training(config, console=Console(file=seen, width=500))
    return summary, seen.getvalue()


def texts(prompts) -> list[str]:
    return [prompt[-1]["content"] for prompt in prompts]


# Held out


def test_a_tenth_of_thirty_prompts_is_measured_on_and_not_learnt_from(settings):
    """Catches a first run without any figure, and one whose figures are of what it has learnt."""
    said: list[str] = []
    config = settings([{"text": text} for text in QUESTIONS], "data.epochs=2")
    traffic, held_out = read_traffic(config, say=said.append)
    assert len(held_out) == 3 and len(traffic) == 2 * 27
    assert sorted(texts(held_out) + texts(traffic[:27])) == sorted(QUESTIONS)
    assert said == [
        "held out 3 of 30 prompts to measure on, as no row has split: eval; they are the same in every run, and never "
        "learnt from"
    ]
    backwards = settings([{"text": text} for text in QUESTIONS[::-1]], "data.shuffle_seed=7")
    assert texts(read_traffic(backwards)[1]) == texts(held_out)


def test_rows_that_say_eval_are_held_out_and_no_others(settings):
    """Catches a tenth of the traffic lost to whoever has chosen already, or measures nothing."""
    said: list[str] = []
    rows = [{"text": text} for text in QUESTIONS] + [{"text": "asked", "split": "eval"}]
    traffic, held_out = read_traffic(settings(rows), say=said.append)
    assert (len(traffic), texts(held_out), said) == (30, ["asked"], [])
    for override in ("eval.limit=0", "data.split=eval"):
        traffic, held_out = read_traffic(settings(rows, override), say=said.append)
        assert held_out == [] and said == []


def test_a_run_measures_on_what_it_held_out_and_a_resumed_one_on_the_same(settings, monkeypatch, tmp_path):
    """Catches held-out prompts that a resumed run learns from, as it holds out others."""
    config = settings([{"text": text} for text in QUESTIONS[:6]])
    with monkeypatch.context() as patch:
        after_requests(patch, 2, interrupt)
        run(config)
    held, whole = [], HeldOutRequests.measure

    def measure(requests: HeldOutRequests, *arguments, **options):
        held.append(requests.prompts)
        return whole(requests, *arguments, **options)

    monkeypatch.setattr(HeldOutRequests, "measure", measure)
    rows = [{"text": text} for text in QUESTIONS[:6]]
    with pytest.raises(ValueError, match=r"eval\.limit must be 24 to resume the run"):
        run(settings(rows, "output.resume=true", "eval.limit=0"))
    summary, _ = run(settings(rows, "output.resume=true"))
    assert summary["requests"] == 5 and summary["before"]["num_prompts"] == summary["after"]["num_prompts"] == 1
    encode = build_speculator(config).encode
    assert held == [[encode(text) for text in texts(read_traffic(config)[1])]]


# What to expect


def test_little_is_called_little_with_what_was_measured(settings):
    """Catches a person who waits for a drafter that thirty prompts cannot give."""
    summary, seen = run(settings([{"text": text} for text in QUESTIONS[:3]]))
    assert summary["status"] == "done"
    assert "held out 1 of 3 prompts" in seen
    assert "2 prompts of at most 4 new tokens are little for a drafter from scratch, expect little" in seen
    warm = settings([{"text": text} for text in QUESTIONS], "warmup.max_new_tokens=8", schema=WarmupConfig)
    assert "27 prompts of at most 8" in what_to_expect(warm, read_traffic(warm)[0])


@pytest.mark.parametrize(
    "override", ["drafter.adapter=some/folder", "train.enabled=false", f"sampling.max_new_tokens={LITTLE_TOKENS}"]
)
def test_nothing_is_said_where_it_is_enough_or_nothing_is_learnt_from_scratch(settings, override):
    """Catches a warning that everybody learns to pass over."""
    config = settings([{"text": text} for text in QUESTIONS], override)
    assert what_to_expect(config, read_traffic(config)[0]) is None
    assert what_to_expect(settings([{"text": "x"}]), iter(())) is None, "a stream, whose end nobody knows"


# Checked before anything runs


@pytest.mark.parametrize("schema", [TrainConfig, WarmupConfig])
def test_a_bad_row_is_told_before_the_model_is_loaded(settings, monkeypatch, schema):
    """Catches a traceback in the middle of a run, and at the same row of every resume."""
    rows = [{"prompt": "What is 1 plus 3?"}, {"prompt": "Nice \ud83d picture"}, {"prompt": "What is 2 plus 3?"}]
    monkeypatch.setattr(SelfSpeculator, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    run = run_training if schema is TrainConfig else run_warmup
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: prompt holds half a surrogate pair"):
        run(settings(rows, schema=schema), console=Console(quiet=True))


@pytest.mark.parametrize("schema", [TrainConfig, WarmupConfig])
def test_a_row_that_the_template_refuses_or_leaves_out_is_told_before_anything_is_measured(
    settings, monkeypatch, tmp_path, schema
):
    """Catches a run that ends at that row, and a system prompt that everybody believes to be heeded."""
    whole = build_speculator

    def build(config, **options):
        speculator = whole(config, **options)
        speculator.tokenizer.chat_template = STRICT_TEMPLATE
        return speculator

    monkeypatch.setattr("trainers.jobs.job.build_speculator", build)
    monkeypatch.setattr(HeldOutRequests, "measure", lambda *_: pytest.fail("something was measured"))
    run = run_training if schema is TrainConfig else run_warmup
    asked, spoken = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    for messages, reason in (
        ([spoken, asked], "line 2: the model's chat template refuses these messages: the user speaks first"),
        ([{"role": "system", "content": "be brief"}, asked],
         r"line 2: the model's chat template leaves out messages\[0\], whose role is 'system'; put its text into"),
    ):  # fmt: skip
        rows = [{"prompt": f"question {i}"} for i in range(30)]
        rows[1] = {"messages": messages}
        with pytest.raises(ValueError, match=rf"rows\.jsonl, {reason}"):
            run(settings(rows, schema=schema), console=Console(quiet=True))
        assert not (tmp_path / "run/config.yaml").exists() and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_template_may_change_what_it_says_but_leave_out_nobody(speculator, monkeypatch):
    """Catches templates refused that strip blanks, or what an assistant thought."""
    tokenizer = speculator.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", STRICT_TEMPLATE)
    chat = [
        {"role": "user", "content": " hi "}, {"role": "assistant", "content": "<think>well</think>ho"},
        {"role": "user", "content": "and?"},
    ]  # fmt: skip
    assert render_chat(tokenizer, chat) == "user: hiassistant: houser: and?"
    monkeypatch.setattr(tokenizer, "chat_template", VICUNA_TEMPLATE)
    with pytest.raises(ValueError, match=r"leaves out messages\[1\], whose role is 'system'"):
        render_chat(tokenizer, [chat[0], {"role": "system", "content": "be brief"}])


@pytest.mark.parametrize("text", ["half \ud83d", "a\0b"])
def test_a_text_that_no_tokenizer_takes_is_refused_by_its_character(speculator, monkeypatch, text):
    """Catches "TextEncodeInput must be Union[...]" for a string."""
    with pytest.raises(ValueError, match=r"the text holds (half a surrogate pair|a NUL)"):
        speculator.encode(text)
    monkeypatch.setattr(speculator.tokenizer, "chat_template", VICUNA_TEMPLATE)
    with pytest.raises(ValueError, match=r"messages\[1\].content holds"):
        speculator.encode([{"role": "user", "content": "fine"}, {"role": "user", "content": text}])


# One word


def test_the_fields_earlier_name_works_with_a_notice(tmp_path, caplog):
    """Catches settings, and the runs that left them, that no longer load."""
    config = load_config(None, ["data.text_field=question"])
    assert config.data.field == "question" and "data.text_field is now data.field" in caplog.text
    earlier = tmp_path / "config.yaml"
    earlier.write_text("data:\n  text_field: prompt\n", encoding="utf-8")
    assert load_config(earlier).data.field is None, "its default then, which files of rows did not heed"


def test_a_run_gives_half_of_its_time_to_learning_and_a_server_a_twentieth():
    """Catches a training run that makes a tenth of the steps that its prompts would give."""
    assert [schema().train.budget for schema in (TrainConfig, ServeConfig, WarmupConfig)] == [0.5, 0.05, 1.0]
