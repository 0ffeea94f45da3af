"""The paper's experiment as one command: its settings as they are shipped, dry-run on a small real model."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from dvi.bench.session import bench_paper
from dvi.config import load_config, to_yaml
from dvi.model.adapter_store import read_manifest
from dvi.settings import PaperConfig
from dvi.telemetry import read_metrics
from tests.support.job_interruptions import after_requests, interrupt
from tests.support.paths import ROOT
from trainers import OnlineTrainer
from trainers.jobs.paper_run import run_paper

CONFIGS = {name: ROOT / f"configs/bench/paper_vicuna_7b{name}.yaml" for name in ("", "_anchored")}
OPENINGS = ("Once upon a time", "Lily and Tom went", "One day a bird", "The sun was", "A big bear")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Makes the shipped settings with a small model, a few prompts and little to decode."""
    prompts = tmp_path_factory.mktemp("data") / "sharegpt.jsonl"
    rows = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]} for text in OPENINGS
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(folder, name="", **overrides):
        values = {
            "model.path": str(ROOT / "tests/stories260k"), "model.dtype": "float32", "model.device": "cpu",
            "data.dataset": str(prompts), "data.limit": 4, "eval.limit": 1, "eval.max_new_tokens": 8,
            "sampling.max_new_tokens": 16, "train.rounds_per_step": 4, "train.blocks_per_step": 4,
            "output.folder": str(folder), "output.tensorboard": "false", "bench.limit": 1,
        } | {key.replace("__", "."): value for key, value in overrides.items()}  # fmt: skip
        return load_config(CONFIGS[name], [f"{key}={value}" for key, value in values.items()], schema=PaperConfig)

    return make


class Bench:
    """A benchmark that only remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, config, adapter):
        assert (adapter / "dvi_manifest.json").is_file()
        self.calls.append((config, adapter))
        return {"questions": 6}


def run(config, bench):
    return run_paper(config, run_bench=bench, console=Console(quiet=True))


def served(folder):
    return sorted(e["index"] for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "request")


def test_the_shipped_settings_are_the_papers():
    """Catches a key that is misspelt, a default that moved under them, and one of the two edited alone."""
    paper, anchored = (load_config(path, schema=PaperConfig) for path in CONFIGS.values())
    assert (paper.drafter.kind, paper.model.split_layer) == ("lora_head", 2)
    assert (paper.draft.policy, paper.draft.num_draft_tokens, paper.sampling.temperature) == ("fixed", 4, 0.0)
    assert (paper.data.limit, paper.data.epochs, paper.data.field) == (2000, 1, "conversations")
    assert (paper.train.schedule, paper.train.warmup_steps, paper.train.ramp_steps) == ("kl_rl", 400, 600)
    assert (paper.bench.template, paper.bench.max_new_tokens, paper.bench.limit) == ("vicuna", 1024, 0)
    assert anchored.drafter == dataclasses.replace(paper.drafter, kind="anchored")
    assert anchored.output.folder != paper.output.folder
    same = dataclasses.replace(anchored, drafter=paper.drafter, output=paper.output)
    assert same == paper


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """A folder in which the paper's run has ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(settings(folder), Bench())
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(("name", "kind"), [("", "lora_head"), ("_anchored", "anchored")])
def test_the_run_trains_the_drafter_it_says_and_benchmarks_that_one(settings, tmp_path, name, kind):
    """Catches settings that never reach the drafter, and a benchmark of another drafter or of none."""
    config, bench = settings(tmp_path, name), Bench()
    found = run(config, bench)
    assert found["status"] == "done" and found["bench"] == {"questions": 6}
    assert found["training"]["requests"] == 4 and found["training"]["steps"] > 0
    assert served(tmp_path) == list(range(4))
    assert bench.calls == [(config, tmp_path / "drafter")]
    manifest = read_manifest(tmp_path / "drafter")
    assert (manifest.drafter.kind, manifest.drafter.lora_rank, manifest.split_layer) == (kind, 32, 2)
    assert manifest.drafter_version == found["training"]["drafter_version"] > 0


def test_a_second_start_only_benchmarks(settings, folder):
    """Catches hours of training thrown away, or added to, because the benchmark was stopped."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bench = Bench()
    found = run(settings(folder), bench)
    assert found["training"] == json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert len(bench.calls) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_interrupted_training_is_not_benchmarked_and_goes_on(settings, tmp_path, monkeypatch):
    """Catches a benchmark of a drafter half learnt, and prompts seen twice."""
    config, bench = settings(tmp_path), Bench()
    with monkeypatch.context() as patch:
        after_requests(patch, 1, interrupt)
        found = run(config, bench)
    assert (found["status"], found["bench"], bench.calls) == ("interrupted", None, [])
    assert served(tmp_path) == [0]
    assert run(config, bench)["status"] == "done" and len(bench.calls) == 1
    assert served(tmp_path) == list(range(4))


def test_a_summary_cut_short_does_not_pass_for_a_finished_run(settings, folder):
    """Catches a crash on half a file, and requests served again because of it."""
    summary = folder / "summary.json"
    summary.write_text(summary.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert run(settings(folder), Bench())["status"] == "done"
    assert served(folder) == list(range(4))


def test_a_folder_of_other_settings_is_refused_by_name(settings, folder):
    """Catches one experiment's drafter benchmarked under another's name."""
    with pytest.raises(ValueError, match=r"train\.lr must be 0\.001 to go on with the run in .*, got 0\.01"):
        run(settings(folder, train__lr=0.01), Bench())
    with pytest.raises(ValueError, match=r"drafter\.kind must be 'lora_head'"):
        run(settings(folder, "_anchored"), Bench())


def test_the_benchmarks_own_settings_and_the_machine_may_change(settings, folder):
    """Catches a benchmark on another device, or of more questions, that asks for training anew."""
    bench = Bench()
    assert run(settings(folder, bench__limit=2, model__device="auto"), bench)["status"] == "done"
    assert bench.calls[0][0].bench.limit == 2


def test_an_unknown_rival_is_refused_before_anything_is_trained(settings, tmp_path):
    """Catches a typo found out after hours."""
    with pytest.raises(ValueError, match=r"bench\.rivals\.0 must be 'hf_generate'.*got 'hf_generat'"):
        settings(tmp_path, bench__rivals="hf_generat")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_run_with_the_real_benchmark(settings, tmp_path, name):
    """Catches a benchmark that does not take the trained adapter, or is given what it cannot read."""
    console = Console(quiet=True)
    config = settings(tmp_path, name, bench__max_new_tokens=8, bench__repetitions=1)

    def run_bench(config, adapter):
        return bench_paper(
            config, adapter, make_learner=lambda speculator: OnlineTrainer(speculator, config.train), console=console
        )

    found = run_paper(config, run_bench=run_bench, console=console)
    assert found["status"] == "done"
    described = json.loads((tmp_path / "spec_bench/run.json").read_text(encoding="utf-8"))
    assert described["settings"]["adapter"] == str(tmp_path / "drafter")
    answers = list((tmp_path / "spec_bench/run_1/model_answer").glob("*speculative*.jsonl"))
    assert len(answers) == 1 and len(answers[0].read_text(encoding="utf-8").splitlines()) == 6  # one of each task
    assert (tmp_path / "spec_bench/report.md").is_file()


FRESH_PROCESS = """
import gc, sys, weakref
from rich.console import Console
from dvi.config import load_config
from dvi.settings import PaperConfig
from trainers.jobs import train
from trainers.jobs.paper_run import run_paper

build, models = train.build_speculator, []
def build_and_remember(config):
    speculator = build(config)
    models.append(weakref.ref(speculator.model))
    return speculator
train.build_speculator = build_and_remember
gc.disable()  # it may come by itself, or not when it matters
run_paper(load_config(sys.argv[1], schema=PaperConfig), console=Console(quiet=True),
          run_bench=lambda *_: print("alive" if models[0]() else "gone") or {})
"""


@pytest.mark.slow
def test_the_trained_model_is_gone_when_the_benchmark_loads_its_own(settings, tmp_path):
    """Catches two 7B models on one card. Only the first run of a process leaves its model behind: hence a new one."""
    prompts, config = tmp_path / "prompts.jsonl", tmp_path / "config.yaml"
    prompts.write_text('{"prompt": "One day"}\n', encoding="utf-8")
    made = settings(tmp_path / "run", data__dataset="null", data__prompts=prompts, eval__limit=0)
    config.write_text(to_yaml(made), encoding="utf-8")
    command = [sys.executable, "-c", FRESH_PROCESS, str(config)]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout == "gone\n"


def test_several_ranks_are_refused_before_anything_is_begun(monkeypatch, tmp_path):
    """Catches ranks that all run the benchmark, into the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = dataclasses.replace(PaperConfig(), output=dataclasses.replace(PaperConfig().output, folder=str(tmp_path)))
    with pytest.raises(ValueError, match="one process, got 2 ranks"):
        run_paper(config, run_bench=None, console=Console(quiet=True))
    assert not any(tmp_path.iterdir())
