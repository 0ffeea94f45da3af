"""What dtype "auto" is: by rule where there is one, else by what was measured, once."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from dvi import SelfSpeculator
from dvi.config import load_config
from dvi.decode import precision
from dvi.decode.construction import build_speculator
from dvi.decode.precision import (
    PlainSpeeds,
    choose_dtype,
    dtype_of_run,
    known_dtype,
    obtain_plain_speeds,
    plain_lead,
    settle_dtype,
)
from dvi.model.native.library import SWITCH
from dvi.model.pretrained import read_config
from tests.support import paths
from tests.support.exact_doubles import needs_kernels
from tests.support.tiny_models import tiny_model

STORIES = str(paths.STORIES)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and models of any size worth measuring."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "MEASURED_PARAMETERS", 0)
    return tmp_path / "cache" / "dvi" / precision.KIND


@pytest.fixture
def races(cache, monkeypatch):
    """Races that are run, each won by bfloat16."""
    run = []

    def race(rounds):
        run.append(sorted(rounds))
        return PlainSpeeds(20.0, 30.0)

    monkeypatch.setattr(precision, "_race", race)
    return run


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"), [(30.0, 20.0, "float32"), (20.0, 30.0, "bfloat16"), (20.0, 19.5, "bfloat16")]
)
def test_the_faster_dtype_is_chosen_and_of_two_alike_bfloat16(cache, monkeypatch, float32, bfloat16, dtype):
    monkeypatch.setattr(precision, "_race", lambda rounds: PlainSpeeds(float32, bfloat16))
    assert choose_dtype(STORIES, device="cpu") == dtype


def test_a_ratio_over_one_plain_becomes_one_over_the_faster():
    speeds = PlainSpeeds(float32=20.0, bfloat16=25.0)
    assert speeds.lead_over("float32") == 1.25 and speeds.lead_over("bfloat16") == 1.0


def test_ratios_in_a_dtype_that_was_asked_for_are_over_the_faster_plain_too(races, monkeypatch):
    """Catches a model that, once loaded, is another to the cache than its folder was, and a lead nobody measures."""
    settings = load_config(None, ["model.device=cpu", f"model.path={STORIES}", "model.dtype=float32"]).model
    config = SelfSpeculator.from_pretrained(STORIES, dtype="float32").model.config
    assert plain_lead(settings, config) == 1.5 and len(races) == 1
    obtain_plain_speeds(STORIES)
    assert plain_lead(dataclasses.replace(settings, dtype="bfloat16"), config) == 1.0 and len(races) == 1
    for nothing in ({"dtype": "float64"}, {"mode": "exact"}, {"device": "auto", "placement": "device_map"}):
        assert plain_lead(dataclasses.replace(settings, **nothing), config) == 1.0
    monkeypatch.setattr(precision, "MEASURED_PARAMETERS", 10**9)
    assert plain_lead(settings, config) == 1.0 and len(races) == 1  # too small to matter


def test_what_was_measured_is_kept_and_asked_again(races, cache):
    first = obtain_plain_speeds(STORIES)
    assert obtain_plain_speeds(STORIES) == first and races == [["bfloat16", "float32"]]
    assert known_dtype(STORIES, load_config(None, ["model.device=cpu"]), read_config(STORIES)) == "bfloat16"
    obtain_plain_speeds(STORIES, remeasure=True)
    obtain_plain_speeds(STORIES, path="views")
    assert len(races) == 3 and len(list(cache.iterdir())) == 2


def test_speeds_of_the_compiled_kernels_are_not_taken_for_those_without_them(monkeypatch):
    config, keys = read_config(STORIES), []
    for version in (None, "one", "another"):
        monkeypatch.setattr(precision, "kernels_version", lambda version=version: version)
        keys.append(precision.fingerprint_of(config, path="auto"))
    assert keys[0] != keys[1] != keys[2]


def test_threads_and_shape_are_part_of_the_key_and_the_name_is_not():
    config, other = read_config(STORIES), read_config(STORIES)
    other.name_or_path, other.dtype = "elsewhere", torch.bfloat16
    key = precision.fingerprint_of(config, path="auto")
    assert key == precision.fingerprint_of(other, path="auto") and key["threads"] == torch.get_num_threads()
    other.num_hidden_layers += 1
    assert key != precision.fingerprint_of(other, path="auto")


@pytest.mark.parametrize("damage", ["{", "[]", '{"float32": 1.0}', '{"float32": -1.0, "bfloat16": 1.0}'])
def test_a_damaged_file_is_measured_anew(races, cache, damage):
    obtain_plain_speeds(STORIES)
    (path,) = cache.iterdir()
    path.write_text(damage)
    assert obtain_plain_speeds(STORIES) == PlainSpeeds(20.0, 30.0) and len(races) == 2
    assert json.loads(path.read_text())["bfloat16"] == 30.0


def test_an_unwritable_cache_only_measures_again(races, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert obtain_plain_speeds(STORIES) == obtain_plain_speeds(STORIES) and len(races) == 2


def test_real_rounds_are_timed_in_turn_until_the_time_is_up(cache, monkeypatch):
    now, order = [0.0], []

    def run(dtype, seconds):
        def round_():
            order.append(dtype)
            now[0] += seconds

        return round_

    speeds = precision._race({"float32": run("a", 0.25), "bfloat16": run("b", 0.125)}, clock=lambda: now[0])
    assert (speeds.float32, speeds.bfloat16) == (4.0, 8.0)
    assert order == ["a", "b"] * 4  # warmed up, and three times: more than a second
    assert obtain_plain_speeds(STORIES).float32 > 0


def test_no_clock_is_asked_where_a_rule_settles_it(races, tmp_path, monkeypatch):
    config = read_config(STORIES)
    assert choose_dtype(STORIES, config, device="cpu", mode="exact") == "float32"
    assert choose_dtype(STORIES, config, device="cuda:0") == "bfloat16"
    assert choose_dtype(STORIES, config, placement="device_map", device="cpu") == "float32"
    SelfSpeculator.from_pretrained(STORIES, dtype="float64").save_drafter(tmp_path / "drafter")
    assert choose_dtype(STORIES, config, device="cpu", adapter=tmp_path / "drafter") == "float64"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_dtype(STORIES, config, device="cpu") == "float32"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(precision, "MEMORY_SHARE", 0.0)
    assert choose_dtype(STORIES, config, device="cpu") == "bfloat16"
    monkeypatch.setattr(precision, "MEASURED_PARAMETERS", 10**6)
    assert choose_dtype(STORIES, config, device="cpu") == "float32"
    assert races == []


@needs_kernels
def test_exact_mode_is_float32_only_where_bfloat16_could_not_be_exact(races, tmp_path, monkeypatch):
    """Catches a promise that doubles the bytes of every step where it costs nothing, and one that cannot be kept."""
    tiny_model("llama", head_dim=32, dtype=torch.float32).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    settings = load_config(None, ["model.device=cpu", "model.mode=exact", f"model.path={tmp_path}"])
    assert choose_dtype(tmp_path, config, device="cpu", mode="exact") == "bfloat16"
    assert known_dtype(tmp_path, settings, config) == "bfloat16"
    assert plain_lead(dataclasses.replace(settings.model, dtype="float32"), config) == 1.5 and len(races) == 1
    assert choose_dtype(tmp_path, config, device="cpu", mode="exact", path="direct") == "float32"
    monkeypatch.setenv(SWITCH, "off")
    assert choose_dtype(tmp_path, config, device="cpu", mode="exact") == "float32"
    assert known_dtype(tmp_path, settings, config) == "float32"
    assert plain_lead(dataclasses.replace(settings.model, dtype="float32"), config) == 1.0 and len(races) == 1


def test_a_model_that_bfloat16_does_not_suit_is_float32(cache, monkeypatch):
    split_model = precision.SplitModel

    def refusing(model, **options):
        if model.dtype == torch.bfloat16:
            raise ValueError("the split differs from the plain model")
        return split_model(model, **options)

    monkeypatch.setattr(precision, "SplitModel", refusing)
    assert choose_dtype(STORIES, device="cpu") == "float32"


def test_the_copy_in_bfloat16_is_what_loading_in_it_gives(tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    wide, narrow = (precision.read_weights(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    copied = precision._in_bfloat16(wide)
    for (name, tensor), other in zip(narrow.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    for (name, tensor), other in zip(narrow.named_buffers(), copied.buffers(), strict=True):
        assert torch.equal(tensor, other), name
    assert wide.dtype == torch.float32


def test_speculators_and_settings_follow(races, tmp_path):
    assert SelfSpeculator.from_pretrained(STORIES, device="cpu").split.dtype == torch.bfloat16
    config = load_config(None, [f"model.path={STORIES}", "model.device=cpu"])
    assert build_speculator(config).split.dtype == torch.bfloat16
    assert settle_dtype(config).model.dtype == "bfloat16"
    assert settle_dtype(config, earlier="float64").model.dtype == "float64"
    explicit = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    assert settle_dtype(explicit, earlier="float64") is explicit


def test_a_run_says_which_dtype_it_has(tmp_path):
    assert dtype_of_run(tmp_path) is None
    for text, dtype in (("model: {dtype: bfloat16}", "bfloat16"), ("model: {dtype: auto}", None), ("- 1", None)):
        (tmp_path / "config.yaml").write_text(text)
        assert dtype_of_run(tmp_path) == dtype
    shutil.rmtree(tmp_path)
    assert dtype_of_run(tmp_path) is None
