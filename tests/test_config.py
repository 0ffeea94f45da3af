"""Settings: what wins over what, what is refused, and how it says so."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from dvi.config import load_config, to_yaml, write_provenance
from dvi.settings import DraftSettings, SamplingSettings, ServeConfig, TrainConfig, WarmupConfig
from tests.support.paths import ROOT


def write_yaml(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    """Catches merging in the wrong order, and a section in the file that resets its other keys."""
    path = write_yaml(tmp_path, "train:\n  lr: 0.5\n  weight_decay: 0.25\n")
    train = load_config(path, ["train.lr=0.125"]).train
    assert (train.lr, train.weight_decay, train.clip_norm) == (0.125, 0.25, TrainConfig().train.clip_norm)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1.e-3", "0.001", ".1e-2"])
def test_scientific_notation_is_a_number_in_files_and_overrides(tmp_path, number):
    """Catches YAML 1.1, where 1e-3 without a dot and a sign is a string."""
    assert load_config(None, [f"train.lr={number}"]).train.lr == 0.001
    assert load_config(write_yaml(tmp_path, f"train: {{lr: {number}}}")).train.lr == 0.001


def test_one_value_where_a_list_is_expected_stands_for_a_list_of_one():
    """Catches a path taken apart into letters, and a refusal of the commonest override."""
    config = load_config(None, ["data.prompts=a.jsonl", "sampling.stop_strings=[x, y]"])
    assert config.data.prompts == ("a.jsonl",) and config.sampling.stop_strings == ("x", "y")


def test_printed_yaml_reads_back_to_the_same_config(tmp_path):
    """Catches tuples, nulls, tiny numbers or odd characters that do not survive --print-config."""
    stop_strings = r'sampling.stop_strings=["\n\n", "é: #"]'
    overrides = ["train.lr=1e-5", "model.path='007'", stop_strings]
    schemas = {
        TrainConfig: "data.shuffle_seed=null", ServeConfig: "serve.keys_file=keys.yaml",
        WarmupConfig: "warmup.answer_field=answer",
    }  # fmt: skip
    for schema, own in schemas.items():
        given = overrides if schema is not WarmupConfig else overrides[:2]  # it has no sampling
        config = load_config(None, [*given, own], schema=schema)
        assert load_config(write_yaml(tmp_path, to_yaml(config)), schema=schema) == config != schema()


def test_an_empty_file_and_an_empty_section_set_nothing(tmp_path):
    """Catches a crash on a section whose every key is commented out."""
    assert load_config(write_yaml(tmp_path, "")) == load_config(write_yaml(tmp_path, "train:\n")) == TrainConfig()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.lrr=1", "train.lr"),
        ("lr=1", "train.lr"),
        ("draft.lora_rank=8", "drafter.lora_rank"),
        ("sampling.temprature=1", "sampling.temperature"),
        ("trian.lr=1", "train.lr"),
        ("outputs=1", "output"),
    ],
)
def test_an_unknown_key_fails_and_names_the_nearest(override, nearest):
    """Catches a mistyped setting that is silently ignored for hours."""
    with pytest.raises(ValueError, match=r"unknown key .* in the command line; did you mean") as caught:
        load_config(None, [override])
    assert str(caught.value).endswith(f"{nearest!r}?")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    """Catches an error that leaves one to guess which of two places holds the typo."""
    path = write_yaml(tmp_path, "train:\n  lrr: 1\n")
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        load_config(path, ["train.lr=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=-1", "train.lr must be greater than 0, got -1; the default is 0.001"),
        ("train.lr=fast", "train.lr must be a valid number, got 'fast'; the default is 0.001"),
        ("train.budget=1.5", "train.budget must be less than or equal to 1, got 1.5; the default is 0.5"),
        ("model.split_layer=1.5", "model.split_layer must be a valid integer, got 1.5; the default is None"),
        ("model.split_layer=true", "model.split_layer must be a valid integer, got True; the default is None"),
        ("train.enabled=1", "train.enabled must be a valid boolean, got 1; the default is True"),
        ("sampling.temperature=.nan", "sampling.temperature must be a finite number, got nan; the default is 0.0"),
        ("draft.policy=long", "draft.policy must be 'auto', 'fixed', 'confidence', 'goodput' or 'companion', got"),
        ("data.prompts=[a, 1]", "data.prompts.1 must be a valid string, got 1; the default is ()"),
        ("train=3", "train must hold keys: one of enabled, lr"),
        ("train.lr", "must look like section.key=value, got 'train.lr'; try"),
        ("train.lr={", "train.lr={ must be valid YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_key_bound_value_and_remedy(override, message):
    """Catches silent coercion (true to 1, 1.5 to 1) and errors that do not say what to change."""
    with pytest.raises(ValueError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_all_wrong_values_are_reported_at_once():
    """Catches the one-error-per-start game."""
    with pytest.raises(ValueError, match=r"train\.lr .*\nsampling\.top_p |sampling\.top_p .*\ntrain\.lr "):
        load_config(None, ["train.lr=0", "sampling.top_p=0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.device=cpu", "model.placement=tensor"], "model.device must be 'auto' with placement 'tensor'"),
        (["data.prompts=a", "data.dataset=b"], "data.prompts and dataset must not both be given"),
        (["sampling.stop_strings=['']"], "sampling.stop_strings must be non-empty"),
        (["train.replay_positions=3"], "train.replay_positions must be at least block_len = 4, got 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, message):
    """Catches one of two settings being ignored in silence."""
    with pytest.raises(ValueError) as caught:
        load_config(None, overrides)
    assert str(caught.value).startswith(message)


def test_a_missing_file_is_refused_by_name(tmp_path):
    """Catches falling back to the defaults when the path is mistyped."""
    with pytest.raises(ValueError, match=r"readable YAML file, got .*absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("temperature", [-0.1, 0.0, 2.5]),
        ("top_k", [-1, 0, 50]),
        ("top_p", [0.0, 0.5, 1.0, 1.1]),
        ("min_p", [-0.1, 0.0, 0.99, 1.0]),
        ("repetition_penalty", [0.0, 0.5, 2.0]),
        ("presence_penalty", [-1.0, 0.0, 3.0]),
        ("frequency_penalty", [-1.0, 0.0, 3.0]),
        ("seed", [-1, 0, 2**62 - 1, 2**62]),
        ("max_new_tokens", [0, 1]),
    ],
)
def test_sampling_settings_have_the_bounds_of_sampling_params(key, values):
    """Catches a setting that passes here and fails at the first request, or one that is refused without need."""
    from dvi.records import SamplingParams

    def accepts(make):
        try:
            make()
        except ValueError:
            return False
        return True

    here = [accepts(lambda value=value: load_config(None, [f"sampling.{key}={value}"])) for value in values]
    there = [accepts(lambda value=value: SamplingParams(**{key: value})) for value in values]
    assert here == there


def test_default_sampling_settings_are_the_default_sampling_params():
    """Catches two disagreeing sets of defaults, and a key that SamplingParams does not know."""
    from dvi.records import SamplingParams

    assert SamplingParams(**dataclasses.asdict(SamplingSettings())) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "schema"),
    [("online/reference", TrainConfig), ("online/serve", ServeConfig), ("warmup/reference", WarmupConfig)],
)
def test_a_bundled_configuration_holds_only_what_differs_and_files_that_exist(name, schema):
    """Catches a default that is written down a second time, and a first command that cannot run as it stands."""
    path = ROOT / f"configs/{name}.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    config, defaults = load_config(path, schema=schema), schema()
    for section, keys in written.items():
        ours, theirs = getattr(config, section), getattr(defaults, section)
        assert [key for key in keys or () if getattr(ours, key) == getattr(theirs, key)] == []
    prompts = getattr(getattr(config, "data", None), "prompts", ())
    assert all((ROOT / file).is_file() for file in prompts) and bool(prompts) == (schema is not ServeConfig)
    assert (ROOT / config.model.path / "config.json").is_file()


def test_the_bundled_configurations_of_traffic_teach_on_traffic_alone():
    """Catches a first run, or a warm-up, that learns from what is held out, and one open to the network."""
    for name, schema in (("online", TrainConfig), ("warmup", WarmupConfig)):
        assert load_config(ROOT / f"configs/{name}/reference.yaml", schema=schema).data.split == "traffic"
    assert load_config(ROOT / "configs/online/serve.yaml", schema=ServeConfig).serve.host == "127.0.0.1"


def test_a_warm_up_needs_room_for_a_prompt_beside_the_answer():
    """Catches texts that would be all answer, noticed only when they are cut."""
    narrow = ["warmup.max_new_tokens=64", "warmup.text_positions=64"]
    with pytest.raises(ValueError, match=r"^warmup\.text_positions must be above max_new_tokens = 64, got 64"):
        load_config(None, narrow, schema=WarmupConfig)
    assert load_config(None, [*narrow, "warmup.source=texts"], schema=WarmupConfig).warmup.text_positions == 64


def test_a_server_and_a_run_have_their_own_keys_and_defaults():
    """Catches a section that falls back to another schema's defaults once one of its keys is set."""
    config = load_config(None, ["train.lr=0.5", "drafter.lora_rank=4"], schema=ServeConfig)
    assert config.train == dataclasses.replace(ServeConfig().train, lr=0.5) != TrainConfig().train
    assert config.drafter.draft_vocab_size == ServeConfig().drafter.draft_vocab_size != 0
    with pytest.raises(ValueError, match=r"unknown key 'serve.prot' .* did you mean 'serve.port'"):
        load_config(None, ["serve.prot=1"], schema=ServeConfig)
    with pytest.raises(ValueError, match=r"serve.port must be less than or equal to 65535, got 70000.* is 8000"):
        load_config(None, ["serve.port=70000"], schema=ServeConfig)
    for key, schema in (("data.prompts", ServeConfig), ("sampling.seed", ServeConfig), ("serve.port", TrainConfig)):
        with pytest.raises(ValueError, match="unknown key"):
            load_config(None, [f"{key}=1"], schema=schema)


def test_every_loss_schedule_can_be_chosen_and_no_other():
    """Catches a preset added to the schedules only, or a choice that fails when training starts."""
    from trainers.learning.loss_schedule import PRESETS

    for preset in PRESETS:
        assert load_config(None, [f"train.schedule={preset}"]).train.schedule == preset
    with pytest.raises(ValueError) as caught:
        load_config(None, ["train.schedule=none"])
    assert str(caught.value).count("'") == 2 * (len(PRESETS) + 2)  # each choice, the value and the default, quoted


def test_demo_prompts_are_distinct_and_held_out_rows_are_not_in_the_traffic():
    """Catches training on what is measured, rows counted twice, and a domain that is missing from either split."""
    lines = (ROOT / "configs/demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len({tuple(row["turns"]) for row in rows}) == len(rows)
    counts = Counter((row["domain"], row["split"]) for row in rows)
    domains = ("math", "code", "roleplay", "shell", "geography", "assistant")
    assert counts == {(domain, split): n for domain in domains for split, n in (("traffic", 400), ("eval", 15))}


def test_provenance_is_written_beside_the_output_even_outside_git(tmp_path, monkeypatch):
    """Catches a run that cannot be repeated, and one that dies for want of git."""
    monkeypatch.setenv("PATH", "")
    config = load_config(None, ["train.lr=0.5"])
    write_provenance(tmp_path / "run", config)
    assert load_config(tmp_path / "run/config.yaml") == config
    provenance = json.loads((tmp_path / "run/provenance.json").read_text(encoding="utf-8"))
    assert provenance["argv"] == sys.argv and provenance["git_sha"] is None and provenance["date"]
    assert provenance["versions"]["python"] == sys.version.split()[0]
    assert set(provenance["versions"]) == {"python", "dvi", "torch", "transformers", "peft", "accelerate"}


def test_importing_the_configuration_imports_no_heavy_library():
    """Catches an import that makes `dvi --help` wait for torch, or for pydantic."""
    code = "import sys, dvi.config; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_settings_cannot_be_changed_after_loading():
    """Catches code that edits a setting midway, so that config.yaml no longer says what ran."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().train.lr = 1.0


@pytest.mark.parametrize("policy", ["confidence", "companion"])
def test_a_policy_that_asks_the_drafter_is_refused_where_lookups_propose(policy):
    """Catches a setting that is silently ignored."""
    with pytest.raises(ValueError, match=f"policy '{policy}' asks the drafter, but source 'lookup'"):
        DraftSettings(source="lookup", policy=policy)
    assert DraftSettings(source="lookup", policy="goodput").max_nodes == 16
