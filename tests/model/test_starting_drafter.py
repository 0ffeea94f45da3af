"""drafter.adapter auto: the drafter beside the model, where it fits the model and what else is set, and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvi import SelfSpeculator
from dvi.config import load_config, setting_of_run
from dvi.decode.construction import build_speculator
from dvi.decode.precision import settle_dtype
from dvi.inspect.machine import describe_model
from dvi.model.adapter_store import MANIFEST_FILE
from dvi.model.starting_drafter import adapter_of_run, drafter_beside, settle_adapter
from dvi.settings import ServeConfig
from tests.support.drafter_doubles import small_config
from tests.support.paths import ROOT
from trainers.jobs import serve
from trainers.jobs.serve import build_serving
from trainers.learning.memory import learner_memory

STORIES = ROOT / "tests/stories260k"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder with a drafter beside it: lora_head of rank 4, from layer 2, in float32."""
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    make_drafter(folder)
    return folder


def make_drafter(model: Path, kind: str = "lora_head", dtype: torch.dtype = torch.float32) -> Path:
    speculator = SelfSpeculator.from_pretrained(model, split_layer=2, drafter=small_config(kind), dtype=dtype)
    folder = model.with_name("model-drafter")
    speculator.save_drafter(folder)
    return folder


def settings(model: Path, **overrides: object) -> ServeConfig:
    values = {"model.path": model, "output.folder": model.with_name("state"), "draft.policy": "fixed"}
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(None, [f"{name}={value}" for name, value in values.items()], schema=ServeConfig)


def settled(model: Path, **overrides: object) -> str | None:
    return settle_adapter(settings(model, **overrides)).drafter.adapter


def test_a_server_starts_from_the_drafter_beside_its_model(model, caplog):
    """Catches a bundled drafter that nobody uses, or that is built in another dtype or cut than its own."""
    speculator = build_speculator(settings(model))
    assert (speculator.drafter.config, speculator.split.split_layer) == (small_config("lora_head"), 2)
    bundled = ROOT / "checkpoints/reference-11m"
    assert settled(bundled) == f"{bundled}-drafter"
    assert caplog.messages == []


def test_it_is_found_however_the_folder_is_written(model, monkeypatch):
    monkeypatch.chdir(model)
    beside = str(model.with_name("model-drafter"))
    assert drafter_beside(".") == drafter_beside(f"{model}/") == beside
    assert drafter_beside("../model") == "../model-drafter"


def test_where_none_lies_an_untrained_one_starts_without_a_word(tmp_path, caplog):
    """Catches a default that insists on what few have, and a hub's name that is taken for a folder."""
    assert settled(STORIES) is None and settled(Path("some/model")) is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model-drafter").mkdir()  # of something else
    assert settled(tmp_path / "model") is None and caplog.messages == []


def test_what_is_named_is_taken_as_it_is_named(model):
    config = settings(model, drafter__adapter="mine")
    assert settle_adapter(config) is config and settled(model, drafter__adapter="null") is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model__split_layer": 1}, "it drafts from layer 2, model.split_layer is 1"),
        ({"model__dtype": "float64"}, "it was trained in float32, model.dtype is float64"),
        ({"drafter__kind": "recurrent"}, "its kind is lora_head, drafter.kind is recurrent"),
        ({"drafter__lora_rank": 8}, "its lora_rank is 4, drafter.lora_rank is 8"),
    ],
)
def test_one_that_is_not_what_the_settings_ask_for_is_left_with_a_line(model, caplog, overrides, reason):
    """Catches a refusal by a default, and a setting that is silently overridden."""
    assert settled(model, **overrides) is None
    [line] = caplog.messages
    assert line.endswith(f"model-drafter is not taken: {reason}; an untrained one starts")


def test_settings_that_agree_with_it_do_not_stand_against_it(model, caplog):
    same = {"model__split_layer": 2, "model__dtype": "float32", "drafter__kind": "lora_head", "drafter__lora_rank": 4}
    assert settled(model, **same) is not None and caplog.messages == []


def test_one_of_other_weights_is_left_with_a_line(model, caplog):
    """Catches a server that cannot start because its model was trained on since."""
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert settled(model) is None
    assert "it was trained with other weights than" in caplog.text
    assert build_speculator(settings(model)).drafter.config.kind == "anchored"


def test_one_of_another_shape_or_that_cannot_be_told_is_left_with_a_line(model, caplog):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert settled(model) is None and "it was trained with 5 layers of LlamaForCausalLM" in caplog.text
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").unlink()
    assert settled(model) is None and "does not tell whether it fits" in caplog.text
    (model.with_name("model-drafter") / MANIFEST_FILE).write_text("{")
    assert settled(model) is None and "is damaged" in caplog.text


def test_the_dtype_follows_it_unless_the_mode_forbids(model, caplog, monkeypatch):
    make_drafter(model, dtype=torch.bfloat16)
    assert settle_dtype(settings(model)).model.dtype == "bfloat16"
    config = settle_dtype(settings(model, model__mode="exact"))
    assert (config.model.dtype, config.drafter.adapter) == ("float32", None)
    assert "trained in bfloat16, model.mode is exact" in caplog.text
    monkeypatch.setattr("dvi.model.starting_drafter.may_be_exact", lambda *_, **__: True)  # as of a model with kernels
    assert settle_dtype(settings(model, model__mode="exact")).model.dtype == "bfloat16"


def test_inspect_shows_the_cut_and_the_drafter_that_a_server_has(model):
    facts = describe_model(str(model), settings(Path("elsewhere")), learner_memory=learner_memory)
    assert (facts["split_layer"], facts["dtype"]) == (2, "float32")
    own = describe_model(str(model), settings(model, drafter__adapter="null"), learner_memory=learner_memory)
    assert facts["parameters"]["drafter"] < own["parameters"]["drafter"]


def test_a_folder_goes_on_with_the_drafter_that_it_began_with(model, caplog):
    """Catches a server that refuses its own folder, or forgets what it learnt, when a drafter comes to lie beside."""
    beside = model.with_name("model-drafter")
    beside.rename(model.with_name("away"))
    small = {"drafter__anchor_hidden": 16, "drafter__lora_rank": 4, "train__budget": 1}
    learner = build_serving(settings(model, **small))[1]
    learner.checkpoint()
    learner.close()
    assert adapter_of_run(model.with_name("state")) is None
    model.with_name("away").rename(beside)
    speculator, learner = build_serving(settings(model, **small))
    assert speculator.drafter.config.kind == "anchored" and learner.state_dict()["settings"]["drafter.adapter"] is None
    learner.close()
    assert caplog.messages == []


def test_a_folder_that_began_with_a_drafter_has_its_shape_whatever_is_set(model):
    """Catches settings that an adapter overrides and that are compared all the same."""
    beside, state = str(model.with_name("model-drafter")), model.with_name("state")
    learner = build_serving(settings(model))[1]
    learner.checkpoint()
    learner.close()
    assert setting_of_run(state, "drafter", "adapter") == beside
    for same in ({}, {"drafter__lora_rank": 4}, {"drafter__adapter": beside, "drafter__kind": "lora_head"}):
        speculator, learner = build_serving(settings(model, **same))
        assert speculator.drafter.config == small_config("lora_head")
        learner.close()
    with pytest.raises(ValueError, match=r"drafter\.lora_rank must be 32 to go on .* got 8"):
        build_serving(settings(model, drafter__lora_rank=8))


def test_a_folder_of_before_adapters_were_remembered_goes_on(model, monkeypatch):
    """Catches a server of an earlier version whose folder is refused by this one."""
    whole = serve._drafter_settings

    def without(config: ServeConfig) -> dict[str, object]:
        return {key: value for key, value in whole(config).items() if key != "drafter.adapter"}

    monkeypatch.setattr(serve, "_drafter_settings", without)
    learner = build_serving(settings(model, drafter__adapter=model.with_name("model-drafter")))[1]
    learner.checkpoint()
    learner.close()
    monkeypatch.undo()
    speculator, learner = build_serving(settings(model))
    assert speculator.drafter.config == small_config("lora_head")
    learner.close()


def test_ranks_of_which_one_has_no_such_drafter_start_alike(model, caplog):
    """Catches one drafter on this machine and another on the next, which are then averaged."""
    peers = SimpleNamespace(exchange=lambda adapter: [adapter, None])
    config = serve._settle(settings(model), None, model.with_name("state"), peers)
    assert config.drafter.adapter is None and "not all ranks have it" in caplog.text


def test_a_model_with_fewer_tokens_than_the_usual_draft_vocabulary_is_served():
    """Catches a default that refuses the model."""
    config = settings(STORIES)
    speculator = build_speculator(config)
    assert config.drafter.draft_vocab_size > speculator.split.vocab_size == speculator.drafter.draft_head.vocab_size
