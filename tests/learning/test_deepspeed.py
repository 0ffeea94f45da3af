"""Accelerate's configs, and the student that DeepSpeed updates: the same as the plain one, on any number of ranks.

DeepSpeed runs in processes of its own: importing it warns, and it changes how a process talks to others.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvi.distributed import SOLO
from tests.support import deepspeed_ranks
from tests.support.paths import ROOT
from tests.support.random_traffic import serving
from trainers.learning import zero_student
from trainers.learning.student import Student

CONFIGS = ROOT / "configs/accelerate"
TIMEOUT_S = 120
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: make test installs it")
PROBE = "from dvi.distributed import join; p = join(timeout_s=30); print(p.exchange([p.rank, p.num_ranks])); p.leave()"


def run_ranks(*command: str) -> str:
    """What the command printed. Ends its processes, whatever happens."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # a launcher ends its ranks then
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        pytest.fail(f"no end within {TIMEOUT_S} s\n{output}")
    assert process.returncode == 0, output
    return output


def accelerate_launch(config: str, *command: str) -> str:
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / config))
    return run_ranks(*launch, *command)


# Launching


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path):
    """Catches a key that Accelerate does not know, a DeepSpeed file that is not there, and half precision."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision in (None, "no")
    assert config.num_processes >= 2 * config.num_machines
    if config.deepspeed_config:
        settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert f"zero{settings['zero_optimization']['stage']}" in path.stem


@pytest.mark.parametrize("config", ["ddp_2.yaml", pytest.param("cpu_ddp_2.yaml", marks=pytest.mark.slow)])
def test_accelerate_starts_two_ranks_that_find_each_other(config, tmp_path):
    """Catches a config with which Accelerate starts one process, as its own CPU settings do, or two strangers."""
    (tmp_path / "probe.py").write_text(PROBE)
    assert accelerate_launch(config, str(tmp_path / "probe.py")).count("[[0, 2], [1, 2]]") == 2


# ZeRO


@dataclass
class Lesson:
    """What `deepspeed_ranks.lesson` gave on each rank, and what it gives to a plain student with all the data."""

    tensors: list[dict[str, Tensor]]
    facts: list[dict]
    expected: dict[str, Tensor]
    expected_facts: dict
    output: str

    def weights(self, event: str) -> tuple[list[Tensor], Tensor]:
        """All weights after the event as one vector: by rank, and as expected."""
        vectors = [
            torch.cat([t.double().flatten() for name, t in sorted(tensors.items()) if name.startswith(f"{event}/")])
            for tensors in (*self.tensors, self.expected)
        ]
        return vectors[:-1], vectors[-1]


def plain_student() -> Student:
    speculator = serving()
    return Student(speculator.split, speculator.drafter, deepspeed_ranks.CONFIG)


@pytest.fixture(
    scope="module",
    params=["zero2", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("alone", marks=pytest.mark.slow)],
)
def given(request, tmp_path_factory) -> Lesson:
    """A lesson: by two ranks with ZeRO 2 and 1 as Accelerate's configs have them, and by one process."""
    folder = tmp_path_factory.mktemp(request.param)
    other = plain_student()
    deepspeed_ranks.take_step(other, deepspeed_ranks.parts_of_step(9), share=list)
    save_file(deepspeed_ranks.flatten(other.state_dict()), folder / "plain.safetensors")
    ranks = ("-m", "tests.support.deepspeed_ranks", str(folder))
    if request.param == "alone":
        output = run_ranks(*ranks)
    else:
        output = accelerate_launch(f"deepspeed_{request.param}.yaml", *ranks)
    num_ranks = 1 if request.param == "alone" else 2
    expected, expected_facts = deepspeed_ranks.lesson(plain_student(), SOLO, folder)
    return Lesson(
        tensors=[load_file(folder / f"rank{rank}.safetensors") for rank in range(num_ranks)],
        facts=[json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)],
        expected=expected, expected_facts=expected_facts, output=output,
    )  # fmt: skip


@needs_deepspeed
def test_the_engine_is_deepspeeds_and_steps(given):
    """Catches a plugin that was switched off on the way, and updates made beside the engine."""
    for facts in given.facts:
        assert facts["engine"] == "deepspeed.runtime.engine.DeepSpeedEngine"
        assert facts["num_engine_steps"] == 7  # up to the trim, the refused step not among them
        assert facts["num_ranks"] == len(given.facts)


@needs_deepspeed
def test_deepspeed_says_nothing_of_its_own(given):
    """Catches chatter of every rank on stdout, among what a job has to say."""
    num_launchers = int(len(given.facts) > 1)  # which look for a GPU before any code of ours runs
    assert given.output.count("WARNING") <= num_launchers
    assert "INFO" not in given.output and "Warning" not in given.output


@needs_deepspeed
@pytest.mark.parametrize(
    "event",
    [
        "three steps", "one rank without data", "a refused step, a restart and a step", "its own state and a step",
        "another's state and a step", "a trim and a step",
    ],
)  # fmt: skip
def test_the_ranks_share_of_the_rows_give_the_update_of_all_rows(given, event):
    """Catches gradients that are averaged, sent twice or left over, moments that a restart keeps or a load loses.

    The tolerance is that of float32: sums over ranks round otherwise than sums over rows. `deepspeed_ranks.EPS` keeps
    Adam from making more of it.
    """
    ranks, expected = given.weights(event)
    for weights in ranks:
        assert torch.equal(weights, ranks[0])
        assert (weights - expected).norm() <= 1e-6 * expected.norm()


@needs_deepspeed
def test_the_norm_before_clipping_is_that_of_all_rows(given):
    """Catches a norm of one rank's part, and one taken after clipping."""
    for facts in given.facts:
        assert facts["norms"] == pytest.approx(given.expected_facts["norms"], rel=1e-5)
    assert max(given.expected_facts["norms"]) > deepspeed_ranks.CONFIG.clip_norm


@needs_deepspeed
def test_what_one_rank_finds_not_finite_no_rank_takes_for_finite(given):
    """Catches ranks that part: one returns to its best weights, the others go on."""
    for facts in given.facts:
        assert not facts["is_spoilt_norm_finite"]
        assert not facts["is_finite_with_infinite_moment"] and facts["is_finite_after_load"]


@needs_deepspeed
def test_each_rank_keeps_the_moments_of_its_part_alone(given):
    """Catches ZeRO in name only."""
    total = given.expected_facts["num_moments"]
    for facts in given.facts:
        assert total / len(given.facts) <= facts["num_moments"] <= total / len(given.facts) + 16  # padding


@needs_deepspeed
def test_the_state_is_that_of_a_plain_student(given):
    """Catches moments gathered in the wrong order, or of one rank alone: no other number of ranks could go on."""
    names = {name for name in given.expected if name.startswith("state/")}
    for tensors in given.tensors:
        assert {name for name in tensors if name.startswith("state/")} == names
        for name in names:
            expected = given.expected[name]
            # Of the largest entry: the others are sums of terms as large, and rounded like it.
            assert (tensors[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


# Choosing and refusing


def test_the_strategy_and_the_launch_choose_the_student(monkeypatch):
    """Catches a launch with DeepSpeed that learns without it, and a stage that is not the one asked for."""

    def record(kind: str) -> Callable[..., tuple]:
        return lambda split, drafter, config, *, peers, stage=None: (kind, stage)

    monkeypatch.setattr(zero_student, "Student", record("plain"))
    monkeypatch.setattr(zero_student, "ZeroStudent", record("zero"))

    def chosen(strategy: str) -> tuple:
        return zero_student.build_student(None, None, SimpleNamespace(strategy=strategy))

    assert [chosen(name) for name in ("ddp", "zero1", "zero2")] == [("plain", None), ("zero", 1), ("zero", 2)]
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")  # as accelerate launch does
    assert chosen("ddp") == ("zero", None)


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    """Catches a bare ModuleNotFoundError, and a plain student that needs DeepSpeed."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    plain_student()
    with pytest.raises(ValueError, match=r"pip install 'draft-verify-improve\[deepspeed\]'"):
        zero_student.ZeroStudent(serving().split, serving().drafter, deepspeed_ranks.CONFIG, stage=1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"zero_optimization": {"stage": 3}}, "must be 1 or 2 where the model serves, got 3"),
        ({"zero_optimization": {"stage": 0}}, "must be 1 or 2 where the model serves, got 0"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "learns in float32, got bf16"),
    ],
)
def test_a_launch_that_does_not_suit_a_drafter_is_refused(settings, complaint, monkeypatch, tmp_path):
    """Catches a run that serves from weights that ZeRO 3 has taken apart, and weights silently made bfloat16."""
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "settings.json"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ModuleType("deepspeed.ops"))
    sys.modules["deepspeed"].ops = sys.modules["deepspeed.ops"]
    with pytest.raises(ValueError, match=complaint):
        zero_student.ZeroStudent(serving().split, serving().drafter, deepspeed_ranks.CONFIG)
