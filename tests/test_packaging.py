"""What is built and installed: names, extras, the files that travel, and that a wheel works in an empty folder."""

import email
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dvi
from dvi.bundled import bundled, here_or_bundled
from dvi.software import EXTRAS, extra_of, install_extra, requirements, version_of
from tests.support.paths import ROOT

STORIES = str(ROOT / "tests/stories260k")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "dvi", "trainers", "configs")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder on which a wheel of this tree has been unpacked, as pip would."""
    if importlib.util.find_spec("setuptools") is None:  # imported here it would quarrel with a distutils that is there
        pytest.skip("builds a wheel, which takes setuptools")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    result = subprocess.run([sys.executable, "-c", BUILD, source], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built)
    return built


def metadata_of(site):
    (folder,) = site.glob("*.dist-info")
    return email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))


def test_the_wheel_has_the_projects_name_and_the_packages_own_version(site):
    """Catches a version kept in two places, and a name that is somebody else's on the index."""
    found = metadata_of(site)
    assert (found["Name"], found["Version"]) == ("draft-verify-improve", dvi.__version__)
    (folder,) = site.glob("*.dist-info")
    command = PROJECT["project"]["scripts"]["dvi"]
    assert f"dvi = {command}" in (folder / "entry_points.txt").read_text()
    assert callable(metadata.EntryPoint("dvi", command, "console_scripts").load())


def test_the_wheel_holds_every_module_every_configuration_and_the_marks_of_types(site):
    """Catches a package that is missing from pyproject's list, and a file that only a checkout has."""
    ours = [path.relative_to(ROOT) for name in ("dvi", "trainers") for path in (ROOT / name).rglob("*.py")]
    configs = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert len(configs) > 10
    expected = [*ours, *(Path("dvi") / path for path in configs), "dvi/py.typed", "trainers/py.typed"]
    expected += ["dvi/serving/metrics/dashboard.html", "dvi/bench/data/spec_bench/question.jsonl"]
    assert [str(path) for path in expected if not (site / path).is_file()] == []


def test_an_extra_of_the_project_names_the_project_itself():
    """Catches an extra that installs another distribution called dvi from the index."""
    extras = PROJECT["project"]["optional-dependencies"]
    names = {Requirement(line).name for lines in extras.values() for line in lines}
    assert "draft-verify-improve" in names and "dvi" not in names
    assert set(EXTRAS) < set(extras)


def test_the_demo_installs_no_tool_of_the_tests():
    """Catches a browser driver or DeepSpeed in what everybody has to download."""
    extras = PROJECT["project"]["optional-dependencies"]
    names = {Requirement(line).name for line in (*PROJECT["project"]["dependencies"], *extras["serve"])}
    assert not names & {"selenium", "openai", "deepspeed", "pytest", "pytest-xdist", "hypothesis", "scipy", "ruff"}
    demo, dev = (
        subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("demo", "test")
    )
    assert '".[serve]"' in demo and '".[dev]"' in dev


def test_our_version_is_the_packages_own_whatever_is_installed_under_its_name(monkeypatch):
    """Catches the version of a stranger called dvi, or none in a checkout that was never installed."""
    monkeypatch.setattr(metadata, "version", lambda name: "99")
    assert version_of("dvi") == dvi.__version__ and version_of("torch") == "99"

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(metadata, "requires", absent)
    assert version_of("dvi") == dvi.__version__ and version_of("torch") is None and requirements() is None


def test_a_module_of_an_extra_names_the_extra():
    """Catches a bare ModuleNotFoundError where one command would help."""
    assert extra_of("fastapi.responses") == "serve" and extra_of("deepspeed") == "deepspeed"
    assert extra_of("dvi.absent") is None and extra_of(None) is None
    assert install_extra("serve") == "pip install 'draft-verify-improve[serve]'"


def test_a_bundled_file_is_found_from_any_folder_and_the_folders_own_comes_first(tmp_path, monkeypatch):
    """Catches defaults that only the checkout's own folder has, and a user's file that is passed over."""
    monkeypatch.chdir(tmp_path)
    name = "configs/demo/prompts.jsonl"
    assert here_or_bundled(name) == bundled(name) and bundled(name).is_file()
    assert here_or_bundled("configs/absent.yaml") == Path("configs/absent.yaml")
    assert here_or_bundled("demo/prompts.jsonl") == Path("demo/prompts.jsonl")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("{}")
    assert here_or_bundled(name) == Path(name)


@pytest.mark.parametrize("root", [ROOT, None], ids=["checkout", "wheel"])
def test_the_same_files_are_bundled_in_a_checkout_and_in_a_wheel(root, site, tmp_path):
    """Catches configurations that only one of the two can read."""
    code = (
        "import dvi, dvi.config, dvi.traffic; from dvi.settings import ServeConfig\n"
        "dvi.config.load_config('configs/online/serve.yaml', schema=ServeConfig)\n"
        "print(dvi.__file__, len(dvi.traffic.read_prompts(['configs/demo/prompts.jsonl'])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root or site)}, capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str((root or site) / "dvi/__init__.py"), "2490"], result.stderr


def test_a_wheel_works_in_an_empty_folder(site, tmp_path):
    """Catches a verb that reads a file of the checkout it was written in."""
    code = f"""
import sys
from typer.testing import CliRunner
from dvi.bench.questions import BUNDLED_QUESTIONS
from dvi.cli.main import app

def dvi(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (arguments, result.output)
    return result.output

assert "generate" in dvi("-h") and "dvi " in dvi("--version")
dvi("init", "--model", {STORIES!r})
dvi("init", "conf", "--for", "train", "--model", {STORIES!r})
assert "stories260k" in dvi("serve", "serve.yaml", "--print-config")
assert "Once" not in dvi("generate", {STORIES!r}, "Once upon a time", "--max-new-tokens", "4")
assert '"doctor"' in dvi("doctor")
assert "done" in dvi(
    "train", "conf/train.yaml", "data.limit=2", "eval.limit=1", "sampling.max_new_tokens=4", "eval.max_new_tokens=4",
    "output.tensorboard=false", "drafter.anchor_hidden=16", "draft.policy=fixed",
)
assert BUNDLED_QUESTIONS.is_file() and sys.modules["dvi"].__file__.startswith({str(site)!r})
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
