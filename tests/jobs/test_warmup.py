"""A warm-up learns what serving would, leaves an adapter that serving goes on from, and can be stopped anywhere."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import trainers.jobs.warmup as warmup_module
from dvi.config import load_config
from dvi.decode.construction import build_speculator
from dvi.decode.speculator import SelfSpeculator
from dvi.model.adapter_store import load_drafter, read_manifest
from dvi.settings import LearningSettings, WarmupConfig
from dvi.telemetry import read_metrics
from dvi.traffic import AnsweredPrompt
from tests.support.drafter_doubles import small_config
from tests.support.job_interruptions import Crash, after_requests, crash, interrupt
from tests.support.paths import STORIES
from trainers.jobs.run_folder import load_run
from trainers.jobs.train import run_training
from trainers.jobs.warmup import RecordingLearner, encode_text, learn_from_recordings, run_warmup
from trainers.learning.online import OnlineTrainer
from trainers.learning.recordings import decode_answers, record, replay_rounds

PROMPTS = ["Once upon a time", "Lily and Tom went", "One day a bird", "The sun was", "A big bear", "Ben had a"]
ROWS = [
    *({"prompt": text, "answer": f" {text.lower()}. It was a big day and they all liked to play."} for text in PROMPTS),
    {"prompt": "The little dog", "answer": " ran.", "split": "eval"},
]
SETTINGS = LearningSettings(
    lr=5e-3, blocks_per_step=8, schedule="kl_only", budget=1.0, steps_per_publish=1000, steps_per_canary=1000
)
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"


def small_speculator(**options):
    return SelfSpeculator.from_pretrained(STORIES, split_layer=1, drafter=small_config(**options))


def recorded_answers(speculator, prompts=PROMPTS[:4], max_new_tokens=40):
    texts = decode_answers(speculator, [speculator.encode(p) for p in prompts], max_new_tokens=max_new_tokens)
    return [record(speculator.split, token_ids, prompt_len=prompt_len) for token_ids, prompt_len in texts]


# Learning from recordings


def test_a_drafter_that_learnt_from_recordings_serves_better():
    """Catches steps on the wrong blocks, and what was learnt since the last publish left behind."""
    speculator = small_speculator()
    texts = recorded_answers(speculator)
    before = replay_rounds(speculator.drafter, texts, num_draft_tokens=3)
    trainer = OnlineTrainer(speculator, SETTINGS)
    learn_from_recordings(trainer, texts * 3, positions_per_step=4)
    assert replay_rounds(speculator.drafter, texts, num_draft_tokens=3).acceptance_rate > before.acceptance_rate + 0.15
    served, learnt = speculator.drafter.state_dict(), trainer.drafter.state_dict()
    assert all(torch.equal(served[name], learnt[name]) for name in learnt)


def test_steps_follow_the_answers_positions_and_each_is_reported():
    """Catches a cadence that counts prompts or texts, fractions lost between texts, and steps nobody hears of."""
    speculator = small_speculator()
    texts = recorded_answers(speculator)
    reports = []
    num_steps = learn_from_recordings(
        OnlineTrainer(speculator, SETTINGS), texts, positions_per_step=7, on_step=reports.append
    )
    assert num_steps == sum(text.num_answered for text in texts) // 7 == 4 * 40 // 7
    assert [report.step for report in reports] == list(range(1, num_steps + 1))


@pytest.mark.parametrize("max_steps", [0, 1, 13])
def test_no_more_steps_are_made_than_allowed(max_steps):
    """Catches a control arm with more compute than the arm it is held against."""
    speculator = small_speculator()
    trainer = OnlineTrainer(speculator, SETTINGS)
    texts = recorded_answers(speculator)
    assert learn_from_recordings(trainer, texts, positions_per_step=2, max_steps=max_steps) == max_steps
    assert trainer.num_steps == max_steps


def test_steps_wait_for_experience_and_are_made_then():
    """Catches batches of one block again and again, and steps forgotten because they came too early."""
    speculator = small_speculator()
    texts = recorded_answers(speculator, max_new_tokens=12)
    learner = RecordingLearner(OnlineTrainer(speculator, SETTINGS), positions_per_step=4)
    assert [len(list(learner.learn(text))) for text in texts[:2]] == [0, 6]  # 16 positions are two for each block
    assert learner.owed_steps == 0


@pytest.mark.parametrize("learn_from_prompts", [False, True])
def test_prompts_are_learnt_from_only_if_asked(learn_from_prompts):
    """Catches prompts that count as answers, and a setting that is ignored."""
    speculator = small_speculator()
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, learn_from_prompts=learn_from_prompts))
    texts = recorded_answers(speculator)
    learn_from_recordings(trainer, texts, positions_per_step=100)
    expected = sum(len(text.token_ids) if learn_from_prompts else text.num_answered + 2 for text in texts)
    assert len(trainer.replay) == expected


def test_texts_do_not_run_into_each_other():
    """Catches a text stored as if it continued the one before, with another text's state as its anchor."""
    speculator = small_speculator()
    ids = speculator.encode("One day a bird was sad because it had lost its big red ball in the park")
    first, second = (record(speculator.split, ids[:end], prompt_len=start) for start, end in ((2, 10), (12, 30)))
    trainer = OnlineTrainer(speculator, SETTINGS)
    learn_from_recordings(trainer, [first, second], positions_per_step=100)  # the second begins at position 10
    batch = trainer.replay.sample(300, 4, current_version=0, generator=torch.Generator().manual_seed(0))
    firsts = {tuple(hidden_D.tolist()) for hidden_D in first.hidden_SD}
    for hidden_TD, mask_T in zip(batch.hidden_NTD, batch.mask_NT, strict=True):
        is_first_T = [tuple(hidden_D.tolist()) in firsts for hidden_D in hidden_TD[mask_T]]
        assert len(set(is_first_T)) <= 1
    assert batch.mask_NT.any(1).all()


def test_the_head_is_trimmed_on_the_way():
    """Catches a warm-up whose texts are not counted, so that its drafter keeps a vocabulary it does not need."""
    speculator = small_speculator(draft_vocab_size=64)
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, tokens_before_trim=100))
    texts = recorded_answers(speculator)
    learn_from_recordings(trainer, texts, positions_per_step=8)
    kept = set(speculator.drafter.draft_head.draft_token_ids_V.tolist())
    counts_V = torch.zeros(512, dtype=torch.int64)
    for text in texts[:3]:
        counts_V += torch.bincount(torch.tensor(text.token_ids[text.prompt_len - 2 :]), minlength=512)
    assert len(kept) == 64 and set((counts_V > 1).nonzero()[:, 0].tolist()) <= kept


def test_a_cadence_that_never_ends_is_refused():
    """Catches a division by zero, or a run without end."""
    with pytest.raises(ValueError, match="positions_per_step must be above 0, got 0"):
        RecordingLearner(OnlineTrainer(small_speculator(), SETTINGS), positions_per_step=0)


# Texts of the data


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    model = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(STORIES, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return model


def test_a_given_answer_follows_the_prompt_as_serving_would_have_it(chat_model):
    """Catches a second beginning of text between them, a template left out, and an answer that never ends."""
    messages, answer = [{"role": "user", "content": "Lily"}], " was happy."
    for speculator in (small_speculator(), SelfSpeculator.from_pretrained(chat_model, drafter=small_config())):
        has_template = speculator.tokenizer.chat_template is not None
        text = encode_text(speculator, AnsweredPrompt(messages, answer), max_positions=100)
        prompt_ids = speculator.encode(messages if has_template else "Lily")
        assert text.token_ids[: text.prompt_len] == prompt_ids and not text.is_cut
        *answer_ids, last = text.token_ids[text.prompt_len :]
        assert speculator.tokenizer.decode(answer_ids).strip() == "was happy." and {last} == speculator.eos_token_ids
        assert (text.token_ids.count(1) == 1) == (not has_template)  # beginning of text


def test_a_text_that_stands_alone_is_learnt_from_its_first_token_on():
    """Catches a text without a prompt that is read as one."""
    speculator = small_speculator()
    text = encode_text(speculator, AnsweredPrompt([], "Lily was happy."), max_positions=100)
    assert text.prompt_len == 1 and text.token_ids == [*speculator.encode("Lily was happy."), 2]


def test_a_long_text_loses_its_beginning_and_keeps_a_prompt():
    """Catches texts beyond the model's context, and an answer that no longer begins where it did."""
    speculator = small_speculator()
    answered = AnsweredPrompt([{"role": "user", "content": "Lily and Tom went to the park"}], " and had fun")
    whole = encode_text(speculator, answered, max_positions=100)
    num_answered = len(whole.token_ids) - whole.prompt_len
    cut = encode_text(speculator, answered, max_positions=num_answered + 2)
    assert cut.is_cut and cut.prompt_len == 2 and cut.token_ids == whole.token_ids[whole.prompt_len - 2 :]
    shorter = encode_text(speculator, answered, max_positions=4)
    assert shorter.prompt_len == 1 and shorter.token_ids == whole.token_ids[-4:]


# Runs


@pytest.fixture
def settings(tmp_path):
    """Makes settings of a run in tmp_path that learns much from little, reproducibly."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(folder="run", **overrides):
        values = {
            "model.path": str(STORIES), "model.split_layer": 2, "data.prompts": str(prompts), "data.batch_size": 1,
            "output.folder": str(tmp_path / folder), "output.tensorboard": "false", "eval.max_new_tokens": 12,
            "eval.limit": 0, "draft.policy": "fixed", "drafter.anchor_hidden": 16, "drafter.lora_rank": 4,
            "drafter.draft_vocab_size": 0, "warmup.max_new_tokens": 16, "warmup.positions_per_step": 5,
            "train.blocks_per_step": 4, "train.steps_per_canary": 4,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return load_config(None, [f"{name}={value}" for name, value in values.items()], schema=WarmupConfig)

    return make


def run(config):
    return run_warmup(config, console=Console(quiet=True))


def texts_of(folder):
    return [event["index"] for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "request"]


def test_a_run_leaves_everything_it_promises_and_a_drafter_that_serving_goes_on_from(settings, tmp_path):
    """Catches an output that is forgotten, counts that are off, and an adapter that is not what was learnt."""
    config = settings(eval__limit=1, train__steps_per_canary=1000)
    summary = run(config)
    folder = tmp_path / "run"
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "acceptance.png", "drafter", "checkpoints"):
        assert (folder / name).exists(), name
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary
    assert (summary["status"], summary["texts"], summary["cut_texts"], summary["tokens"]) == ("done", 6, 0, 96)
    assert summary["steps"] == 96 // 5 and texts_of(folder) == list(range(6))
    assert summary["reloads_alike"] and summary["before"]["num_mismatches"] == summary["after"]["num_mismatches"] == 0
    # 19 steps, and a publish is due after 32: only the one at the end has come.
    assert summary["before"]["drafter_version"] == 0 and summary["after"]["drafter_version"] == 1
    manifest = read_manifest(folder / "drafter")
    assert manifest.metrics == summary["after"] and manifest.config["warmup"] == dataclasses.asdict(config.warmup)
    assert manifest.drafter_version == summary["drafter_version"]
    online = load_config(None, [
        f"model.path={STORIES}", f"drafter.adapter={folder / 'drafter'}", f"data.prompts={config.data.prompts[0]}",
        f"output.folder={tmp_path / 'online'}", "output.tensorboard=false", "sampling.max_new_tokens=16",
        "train.budget=1", "train.blocks_per_step=4", "train.rounds_per_step=2", "draft.policy=fixed", "eval.limit=0",
    ])  # fmt: skip
    assert run_training(online, console=Console(quiet=True))["drafter_version"] > summary["drafter_version"]


def test_the_texts_are_the_models_own_answers_measured_before_they_are_learnt(settings, tmp_path):
    """Catches acceptance on texts that were learnt just before, which says nothing of serving, and other texts."""
    config = settings(data__shuffle_seed="null", data__limit=1)
    run(config)
    (event,) = (e for e in read_metrics(tmp_path / "run/metrics.jsonl") if e["event"] == "request")
    speculator = build_speculator(config)
    (answer,) = decode_answers(speculator, [speculator.encode(PROMPTS[0])], max_new_tokens=16)
    text = record(speculator.split, answer[0], prompt_len=answer[1])
    expected = replay_rounds(speculator.drafter, [text], num_draft_tokens=4)
    assert (event["rounds"], event["accepted"]) == (expected.num_rounds, expected.num_accepted)
    assert event["prompt_tokens"] == answer[1] and event["new_tokens"] == text.num_answered == 16


@pytest.mark.parametrize("source", ["answers", "texts"])
def test_a_crashed_run_that_is_resumed_ends_with_the_drafter_it_would_have_had(settings, tmp_path, monkeypatch, source):
    """Catches any state a checkpoint forgets, texts learnt twice or never, and answers decoded among other prompts."""
    options = {"warmup__source": source, "data__epochs": 2, "data__batch_size": 2}
    decode, together = warmup_module.decode_answers, []

    def decode_answers(speculator, prompts, **options):
        together.append(prompts)
        return decode(speculator, prompts, **options)

    monkeypatch.setattr(warmup_module, "decode_answers", decode_answers)
    expected = run(settings("whole", **options))
    whole_together, together[:] = list(together), []
    with monkeypatch.context() as patch:
        after_requests(patch, 10, crash)
        with pytest.raises(Crash):
            run(settings("crashed", output__checkpoint_every_s=1e-9, **options))
    summary = run(settings("crashed", output__resume="true", **options))
    for name in ("texts", "tokens", "steps", "drafter_version"):
        assert summary[name] == expected[name], name
    assert texts_of(tmp_path / "whole") == texts_of(tmp_path / "crashed") == list(range(12))
    assert [len(prompts) for prompts in whole_together] == ([8, 4] if source == "answers" else [])
    assert all(prompts in whole_together for prompts in together)
    for name in ("adapter_model.safetensors", "drafter_extra.safetensors"):
        whole, crashed = (load_file(tmp_path / run_name / "drafter" / name) for run_name in ("whole", "crashed"))
        assert whole.keys() == crashed.keys()
        assert all(torch.equal(whole[key], crashed[key]) for key in whole)


def test_a_signal_ends_the_run_between_texts_with_a_checkpoint_that_can_be_exported(settings, tmp_path, monkeypatch):
    """Catches work lost to Ctrl-C, and a checkpoint that only the run itself can read."""
    with monkeypatch.context() as patch:
        after_requests(patch, 2, interrupt)
        summary = run(settings())
    assert (summary["status"], summary["signal"], summary["texts"]) == ("interrupted", signal.SIGINT, 2)
    assert not (tmp_path / "run/drafter").exists()
    speculator, _, config = load_run(tmp_path / "run")
    assert config["warmup"]["max_new_tokens"] == 16 and speculator.split.split_layer == 2
    resumed = run(settings(output__resume="true"))
    assert resumed["texts"] == 6 and texts_of(tmp_path / "run") == list(range(6))
    assert resumed["steps"] == 96 // 5
    saved = load_drafter(tmp_path / "run/drafter", speculator.split)
    assert load_run(tmp_path / "run")[0].drafter.version == saved.version == resumed["drafter_version"]


def test_a_signal_ends_the_run_while_answers_are_decoded(settings, monkeypatch):
    """Catches a Ctrl-C that is heard only minutes later, when a big model has answered."""
    generate, heard = SelfSpeculator.generate, []

    def interrupted_generate(*args, **options):
        results = generate(*args, **options)
        yield next(results)
        heard.append(None)
        interrupt()
        yield from results

    monkeypatch.setattr(SelfSpeculator, "generate", interrupted_generate)
    summary = run(settings())
    assert len(heard) == 1 and (summary["status"], summary["texts"]) == ("interrupted", 0)


def test_a_folder_that_holds_a_run_is_not_overwritten_or_resumed_as_another(settings, monkeypatch):
    """Catches hours of training replaced by a second start, and a checkpoint loaded into other settings."""
    after_requests(monkeypatch, 1, interrupt)
    run(settings())
    with pytest.raises(ValueError, match=r"already holds a run; output\.resume=true continues it"):
        run(settings())
    with pytest.raises(ValueError, match=r"warmup\.source must be 'answers' to resume"):
        run(settings(warmup__source="texts", output__resume="true"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__schedule": "kl_rl"}, r"train\.schedule must be kl_only or lk for a warm-up"),
        ({"train__enabled": "false"}, r"train\.enabled must be true"),
        ({"warmup__answer_field": "reply"}, r"warmup\.answer_field goes with .*, got 'reply'"),
        ({"warmup__source": "texts", "warmup__answer_field": "reply"}, r"warmup\.answer_field goes with"),
        ({"data__prompts": "[]"}, r"data\.prompts or data\.dataset must name the traffic"),
        ({"warmup__max_new_tokens": 511}, r"max_new_tokens, of answers and of eval, must be at most 510"),
    ],
)
def test_settings_that_cannot_work_or_would_be_ignored_are_refused(settings, overrides, message):
    """Catches a warm-up that silently learns nothing, or something else."""
    with pytest.raises(ValueError, match=message):
        run(settings(**overrides))


def test_the_answers_of_a_dataset_are_streamed_and_learnt_from(settings, tmp_path):
    """Catches the wrong column learnt, held-out rows among the texts, and cut texts that nobody counts."""
    replies = [" big" * (108 if prompt == PROMPTS[3] else 8) for prompt in PROMPTS]
    rows = [{"ask": ask, "reply": reply, "whole": ask * 20} for ask, reply in zip(PROMPTS, replies, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {
        "data__prompts": "[]", "data__dataset": str(path), "warmup__source": "texts", "data__shuffle_seed": "null",
        "warmup__text_positions": 64,
    }  # fmt: skip
    summary = run(settings("asked", data__field="ask", warmup__answer_field="reply", eval__limit=1, **options))
    assert (summary["texts"], summary["cut_texts"], summary["source"]) == (5, 1, "texts")
    events = [e for e in read_metrics(tmp_path / "asked/metrics.jsonl") if e["event"] == "request"]
    speculator = small_speculator()
    assert events[0]["prompt_tokens"] == len(speculator.encode(PROMPTS[1]))
    assert [e["new_tokens"] for e in events] == [events[0]["new_tokens"]] * 2 + [63] + [events[0]["new_tokens"]] * 2
    options |= {"data__limit": 2, "eval__limit": 1}
    summary = run(settings("whole", data__field="whole", **options))
    assert summary["texts"] == summary["cut_texts"] == 2 and summary["tokens"] == 2 * 63
    assert summary["after"]["num_prompts"] == 1


def test_texts_too_short_for_a_round_are_learnt_from_without_a_picture(settings):
    """Catches a run that dies at its very end for want of anything to draw."""
    summary = run(settings(warmup__max_new_tokens=3))
    assert summary["picture"] is None and summary["tokens"] == 18 and summary["steps"] == 18 // 5
