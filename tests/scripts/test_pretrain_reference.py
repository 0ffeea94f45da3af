"""The pretraining script, from 200 documents to a folder that transformers loads, in a shape that takes seconds."""

import importlib.util
import json
import lzma
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.support.paths import ROOT

REFERENCE = ROOT / "checkpoints/reference-11m"


def load_script():
    spec = importlib.util.spec_from_file_location("pretrain_reference", ROOT / "scripts/pretrain_reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()

NUM_STEPS = 120
TINY = script.Preset(
    name="tiny",
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    sequence_len=32,
    batch_size=8,
    lr=1e-2,
    max_tokens=32 * 8 * NUM_STEPS,
)
RECIPE = script.Recipe(preset=TINY, seed=3)


def write_corpus(path, num_documents=200):
    """Sums to learn, and some plain text."""
    rng = random.Random(0)
    with lzma.open(path, "wt", encoding="utf-8") as file:
        for index in range(num_documents):
            a, b = rng.randrange(10), rng.randrange(10)
            messages = [["user", f"What is {a} plus {b}?"], ["assistant", f"{a} plus {b} is {a + b}."]]
            if index % 4 == 0:
                messages = [["text", f"The number {a} comes before {a + 1}. Ünïcode, too."]]
            file.write(json.dumps({"d": "text" if index % 4 == 0 else "sums", "m": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl.xz")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(folder, report) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("models") / "reference-tiny"
    return folder, script.pretrain(corpus=corpus, output=folder, recipe=RECIPE, report_every=50)


def start_and_kill(monkeypatch, **arguments):
    """A run that is killed right after it saved its state for the first time."""
    save_state = script.save_state

    def save_and_die(*arguments):
        save_state(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_state", save_and_die)
        script.pretrain(**arguments)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_loss_falls_far_below_that_of_guessing(finished):
    """Catches labels shifted twice, a learning rate stuck at zero, and weights that are not the trained ones."""
    _, report = finished
    # Guessing costs ln(400) = 6.0 nats. The corpus is a template with two free digits: about 0.5 once learned, and the
    # training loss is a mean over the last 100 of 120 steps.
    assert report["train_loss"] < 0.5 * math.log(TINY.vocab_size) and report["heldout_loss"] < 1.5


def test_the_folder_loads_and_writes_in_the_form_of_its_corpus(finished):
    """Catches a tokenizer, a template or a dtype that is lost on the way to the folder."""
    folder, report = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == report["num_parameters"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 plus 2?"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output_ids = model.generate(**inputs, max_new_tokens=16)
    answer = tokenizer.decode(output_ids[0, inputs["input_ids"].shape[1] :])
    assert " is " in answer and answer.endswith(script.EOS)


def test_the_tokenizer_and_template_are_like_the_bundled_reference_model(finished):
    """Catches special tokens with other ids, a template of its own, and text that does not survive the round trip."""
    folder, _ = finished
    assert (folder / "chat_template.jinja").read_text() == (REFERENCE / "chat_template.jinja").read_text()
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(REFERENCE)
    for special in script.SPECIAL_TOKENS:
        assert tokenizer.convert_tokens_to_ids(special) == reference.convert_tokens_to_ids(special)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (script.BOS, script.EOS, script.EOS)
    text = "Ünïcode\n  indented 漢字 plus"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_documents_are_trained_on_as_the_chat_template_writes_them():
    """Catches a packing format that the prompts at serving time never have."""
    messages = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    chat = [{"role": role, "content": text} for role, text in messages]
    assert script.Document("chat", messages).text == tokenizer.apply_chat_template(chat, tokenize=False)
    assert script.Document("plain", (("text", "a"),)).text == "<s>a</s>"


def test_a_killed_run_resumes_to_the_same_weights(corpus, finished, tmp_path, monkeypatch):
    """Catches lost optimizer moments, batches seen twice or left out, and a schedule that starts over."""
    start_and_kill(monkeypatch, corpus=corpus, output=tmp_path, recipe=RECIPE, report_every=50)
    report = script.pretrain(corpus=corpus, output=tmp_path, recipe=RECIPE, report_every=50)
    folder, uninterrupted = finished
    assert report["train_loss"] == uninterrupted["train_loss"] and report["steps"] == NUM_STEPS
    expected = weights(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    assert not (tmp_path / script.STATE_FILE).exists()


def test_a_state_of_other_arguments_is_refused(corpus, tmp_path, monkeypatch):
    """Catches a run that goes on with another seed's weights, or with another budget's schedule."""
    start_and_kill(monkeypatch, corpus=corpus, output=tmp_path, recipe=RECIPE, report_every=2)
    with pytest.raises(ValueError, match=r"same arguments.*choose another --output"):
        script.pretrain(corpus=corpus, output=tmp_path, recipe=replace(RECIPE, seed=4))


def test_a_finished_model_is_not_overwritten(corpus, finished):
    """Catches a mistyped --output that destroys a model."""
    with pytest.raises(ValueError, match="finished model"):
        script.pretrain(corpus=corpus, output=finished[0], recipe=RECIPE)


def test_the_card_tells_tokens_loss_sources_and_samples(finished):
    """Catches a model whose origin nobody can tell later."""
    folder, report = finished
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{report['tokens_seen'] / 1e6:.2f} M" in card and f"{report['heldout_loss']:.3f}" in card
    assert "| sums | 150 |" in card and "| text | 50 |" in card and "Apache-2.0" in card
    assert all(prompt in card for prompt in script.SAMPLE_PROMPTS)


def test_preset_11m_is_the_bundled_reference_model():
    """Catches a preset that drifts from the model it is said to reproduce."""
    theirs = AutoConfig.from_pretrained(REFERENCE).to_dict()
    ours = script.PRESETS["11m"].model_config().to_dict()
    for name in ("architectures", "dtype", "transformers_version", "_name_or_path"):  # of the saved file, not the shape
        ours.pop(name, None)
        theirs.pop(name, None)
    assert ours == theirs


def test_preset_25m_has_about_25_million_parameters_in_small_shards():
    """Catches a shape whose weights outgrow the repository (60 MB in bf16)."""
    preset = script.PRESETS["25m"]
    with torch.device("meta"):
        model = LlamaForCausalLM(preset.model_config())
    assert 24.5e6 < model.num_parameters() < 25.5e6
    assert (preset.vocab_size, preset.context_len) == (8192, 2048) and 12 <= preset.num_layers <= 16
    assert not model.config.tie_word_embeddings


def test_weights_of_the_mix_repeat_thin_and_drop_domains():
    """Catches a weight that is ignored, or one that also moves the other domains."""
    documents = [script.Document(domain, (("text", str(n)),)) for domain in "abcd" for n in range(100)]
    chosen = script.mixed(documents, {"a": 2, "b": 0, "c": 0.5}, seed=0)
    counts = [sum(document.domain == domain for document in chosen) for domain in "abcd"]
    assert counts[0] == 200 and counts[1] == 0 and 30 < counts[2] < 70 and counts[3] == 100


def test_every_sequence_is_seen_once_an_epoch_in_another_order():
    """Catches sampling with replacement, and epochs that repeat their order."""
    tokens_SL = torch.arange(12)[:, None]
    stream = script.batches(tokens_SL, batch_size=4, seed=0, first_step=0)
    first, second = ([int(row) for _ in range(3) for row in next(stream)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    resumed = next(script.batches(tokens_SL, batch_size=4, seed=0, first_step=2))
    assert resumed[:, 0].tolist() == first[8:]


def test_the_learning_rate_rises_then_falls_to_its_floor():
    """Catches a cosine over the wrong span, and a first step at full rate."""
    factors = [script.lr_factor(progress) for progress in (0.0, 0.01, 0.02, 0.51, 1.0, 1.5)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"d": "a"}', "2 must be"),
        ("not json", "2 must be"),
        ('{"d": "a", "m": [["system", "x"]]}', "a role must be one of user, assistant, text, got 'system'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    """Catches a traceback without a line number in a file of a hundred thousand lines."""
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"d": "a", "m": [["text", "x"]]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"corpus.jsonl:{message}|corpus.jsonl:2: {message}"):
        script.read_corpus(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "absent.jsonl"], "--corpus must be a .jsonl or .jsonl.xz file, got absent.jsonl"),
        (["--corpus", "x", "--max-tokens", "0"], "--max-tokens must be > 0, got 0"),
        (["--corpus", "x", "--mix", "math"], "--mix must look like domain=weight, got 'math'"),
        (["--corpus", "x", "--mix", "math=-1"], "a weight of --mix must be >= 0 and finite, got 'math=-1'"),
    ],
)
def test_the_command_refuses_wrong_arguments_with_the_bound(arguments, message, tmp_path, monkeypatch, capsys):
    """Catches a traceback where a sentence is due."""
    command = ["pretrain_reference.py", "--preset", "11m", "--output", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mix_of_unknown_domains_and_too_small_a_corpus_are_refused(tmp_path, corpus):
    """Catches weights that silently apply to nothing, and a tensor error deep in the packing."""
    with pytest.raises(ValueError, match=r"--mix must name domains of the corpus \(sums, text\), got 'math'"):
        script.pretrain(corpus=corpus, output=tmp_path, recipe=replace(RECIPE, mix={"math": 2.0}))
    small = write_corpus(tmp_path / "small.jsonl.xz", num_documents=3)
    with pytest.raises(ValueError, match="must fill at least one sequence of 32 tokens"):
        script.pretrain(corpus=small, output=tmp_path, recipe=RECIPE)
