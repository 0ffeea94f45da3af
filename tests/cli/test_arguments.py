"""What stands behind a verb: a model where a file of settings may stand, prompts, and what `dvi init` writes."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from dvi.cli.arguments import MANIFEST_FILE, load_arguments
from dvi.cli.starter import SOURCES, starter, write_starter
from dvi.config import load_config
from dvi.explained_yaml import explained_yaml
from dvi.key_names import SYNONYMS, all_keys
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig
from tests.support.paths import ROOT

STORIES = str(ROOT / "tests/stories260k")
SCHEMAS = {"train": TrainConfig, "warmup": WarmupConfig, "serve": ServeConfig}


def load(verb, *arguments, **options):
    return load_arguments(*arguments[:1], arguments[1:], schema=SCHEMAS[verb], verb=verb, options=options)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_a_model_stands_where_a_file_of_settings_may(verb):
    """Catches a verb that still wants a file, and settings other than the defaults beside the model."""
    config = load(verb, STORIES, "train.lr=0.5")
    assert config.model.path == STORIES and config.train.lr == 0.5
    assert config.output.folder == f"runs/{verb}-stories260k"
    defaults = SCHEMAS[verb]()
    same = ("drafter", "draft", "eval", "data", "sampling", "warmup")
    for section in set(same) & {entry.name for entry in dataclasses.fields(defaults)}:
        assert getattr(config, section) == getattr(defaults, section)


def test_two_models_do_not_meet_in_one_folder_unless_told(tmp_path, monkeypatch):
    """Catches a second model's server that is refused because of the first one's state."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(STORIES, tmp_path / name)
    (tmp_path / "three.Q8_0.gguf").touch()
    one, two, three, hub = (load("serve", name) for name in ("one", "./two/", "three.Q8_0.gguf", "someone/four"))
    folders = [config.output.folder for config in (one, two, three, hub)]
    assert folders == ["runs/serve-one", "runs/serve-two", "runs/serve-three.Q8_0", "runs/serve-four"]
    assert one.serve.adapters_folder == "runs/serve-one/adapters"
    assert load("serve", "one", "output.folder=here").output.folder == "here"


def test_prompts_are_files_behind_the_model_and_take_the_place_of_a_files_own(tmp_path, monkeypatch):
    """Catches prompts that are taken for settings, and the second file that ousts the first."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.txt"):
        Path(name).touch()
    Path("job.yaml").write_text("data: {prompts: other.jsonl, limit: 3}")
    Path("more.yaml").write_text("train: {lr: 0.5}")
    config = load("train", "job.yaml", "a.jsonl", "data.epochs=2", "b.txt", "more.yaml")
    assert config.data.prompts == ("a.jsonl", "b.txt")
    assert (config.data.limit, config.data.epochs, config.train.lr) == (3, 2, 0.5)
    assert load("train", STORIES, "configs/demo/prompts.jsonl").data.prompts == ("configs/demo/prompts.jsonl",)


def test_an_option_comes_last_and_one_not_given_leaves_the_setting(tmp_path):
    """Catches an option that loses to the file, and a default of the option that wins over it."""
    path = tmp_path / "serve.yaml"
    path.write_text("serve: {port: 1, host: localhost}")
    config = load("serve", str(path), "serve.port=2", **{"serve.port": 3, "serve.host": None})
    assert (config.serve.port, config.serve.host) == (3, "localhost")


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("serve", ["./absent"], "there is no model at ./absent; give a model's folder, a hub name or a .gguf file"),
        ("serve", ["a/b/c"], "there is no model at a/b/c"),
        ("serve", ["absent.gguf"], "there is no model at absent.gguf"),
        ("serve", ["some model"], "there is no model at some model"),
        ("serve", ["small"], "there is no model at small; did you mean checkpoints/small?"),
        ("serve", ["absent.yaml"], "config must be a readable YAML file, got absent.yaml"),
        ("serve", ["absent.yaml"], "dvi init writes one"),
        ("serve", ["rows.jsonl"], "rows.jsonl must be a model's folder"),
        ("serve", ["drafter"], "drafter is a drafter; give the model that it was trained with, and --adapter drafter"),
        ("serve", ["checkpoints"], "the folder checkpoints must hold a model"),
        ("serve", [STORIES, "rows.jsonl"], "an override must look like section.key=value, got 'rows.jsonl'"),
        ("train", [STORIES, "absent.jsonl"], "no prompts file absent.jsonl"),
        ("train", [STORIES, "data/absent"], "no prompts file data/absent"),
        ("train", [STORIES, "checkpoints"], "no prompts file checkpoints"),
        ("train", [STORIES, "train.lr"], "an override must look like section.key=value, got 'train.lr'"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(verb, arguments, message, tmp_path, monkeypatch):
    """Catches minutes of loading before a typing error is found, and a wrong kind of file taken for a model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STORIES, "checkpoints/small")
    Path("rows.jsonl").touch()
    Path("drafter").mkdir()
    (Path("drafter") / MANIFEST_FILE).touch()
    with pytest.raises((ValueError, OSError)) as caught:
        load(verb, *arguments)
    assert message in str(caught.value)


def test_the_name_of_a_drafters_manifest_is_the_stores():
    """Catches a drafter that is no longer recognised where a model is expected."""
    from dvi.model import adapter_store

    assert adapter_store.MANIFEST_FILE == MANIFEST_FILE


def test_every_synonym_means_a_key_there_is():
    """Catches a suggestion that is itself refused, after a key was renamed."""
    known = {key for schema in SCHEMAS.values() for key in all_keys(schema)}
    assert not {key for keys in SYNONYMS.values() for key in keys} - known
    assert not set(SYNONYMS) & {key for key in known if "." in key}


@pytest.mark.parametrize(
    ("verb", "key", "hint"),
    [
        ("train", "learning_rate", "did you mean 'train.lr'?"),
        ("train", "train.learning-rate", "did you mean 'train.lr'?"),
        ("train", "batch_size", "did you mean 'data.batch_size'?"),
        ("serve", "batch_size", "did you mean 'serve.max_rows'?"),
        ("serve", "temperature", "did you mean 'sampling.temperature'?"),
        ("serve", "max_tokens", "did you mean 'sampling.max_new_tokens'?"),
        ("train", "seed", "did you mean 'sampling.seed' or 'train.seed'?"),
        ("train", "trian.lr", "did you mean 'train.lr'?"),
        ("train", "temprature", "did you mean 'sampling.temperature'?"),
        ("train", "train.nonsense", "--print-config shows all keys"),
        ("train", "nonsense", "the sections here are model, drafter, draft, verify, sampling, data, train"),
        ("train", "serve.port", "the sections here are model, drafter"),
        ("warmup", "sampling.seed", "the sections here are model, drafter"),
    ],
)
@pytest.mark.parametrize("is_file", [False, True], ids=["argument", "file"])
def test_an_unknown_key_names_what_it_meant_in_a_file_as_on_the_command_line(verb, key, hint, is_file, tmp_path):
    """Catches another tool's name that gets a random neighbour as its remedy, or a key of another verb."""
    path = tmp_path / "settings.yaml"
    section, _, name = key.rpartition(".")
    path.write_text(f"{section}: {{{name}: 1}}" if section else f"{name}: 1")
    with pytest.raises(ValueError, match=r"^unknown key") as caught:
        load(verb, str(path)) if is_file else load(verb, STORIES, f"{key}=1")
    assert repr(key) in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("model=a/b", "model.path=a/b"), ("data=a.jsonl", "data.prompts=a.jsonl"), ("output=x", "output.folder=x")],
)
def test_a_value_for_a_whole_section_names_the_key_it_is_for(given, meant):
    """Catches a list of twenty keys for the commonest first guess."""
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        load("train", STORIES, given)


@pytest.mark.parametrize("verb", SOURCES)
def test_the_file_that_init_writes_is_the_bundled_one_with_the_users_model(verb, tmp_path):
    """Catches a starting file whose settings or comments are others than the documented ones."""
    bundled = ROOT / SOURCES[verb]
    path = write_starter(tmp_path / "new", verb=verb, model="some/model")
    assert path == tmp_path / f"new/{verb}.yaml"
    schema, changed = SCHEMAS[verb], load_config(path, schema=SCHEMAS[verb])
    expected = [{"model": {"path": "some/model"}, "output": {"folder": f"runs/{verb}"}}]
    assert changed == load_config(bundled, expected, schema=schema)
    text = path.read_text(encoding="utf-8")
    assert text.endswith(explained_yaml(changed)) and text.count("#") > 60
    assert text.splitlines()[0].endswith(f"dvi {verb} {path} [section.key=value ...]")


@pytest.mark.parametrize("model", ["a: b", "#1", "null", "007", "C:\\x", "plain/name-1.5"])
def test_any_models_name_survives_the_starting_file(model):
    """Catches a path that YAML reads as a number, a comment or nothing."""
    text = starter("serve", file="x.yaml", model=model)
    assert yaml.safe_load(text)["model"]["path"] == model
    assert "# a folder, a GGUF file or a hub name" in text


def test_init_overwrites_nothing_unasked(tmp_path):
    """Catches hours of settings lost to a second init."""
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 0.5}")
    with pytest.raises(FileExistsError, match=r"mine\.yaml is there already; --force overwrites it"):
        write_starter(path, verb="train")
    assert path.read_text() == "train: {lr: 0.5}"
    assert load_config(write_starter(path, verb="train", overwrite=True)).train.lr != 0.5
