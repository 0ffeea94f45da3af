"""scripts/gpu_check.py on a machine without a GPU, and the guard that each of its parts runs under.

Both in processes of their own: parts are forks, which a test process with threads should not make.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dvi.bench.guarded import Journal, Skipped
from dvi.model.llama_path import DirectPath
from tests.support.paths import ROOT
from tests.support.pretend_device import DEVICE, PretendDevice
from tests.support.recorded_graphs import capturing

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ODD_PARTS = """
import os, signal, subprocess, sys
from pathlib import Path
from dvi.bench.guarded import Journal, Part, Skipped, run_parts

def fails(box):
    box.result("before", value=1)
    raise KeyError("odd")

def skips(box):
    raise Skipped("not here")

def dies(box):
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(box):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=False)
    box.result("started", pid=child.pid)
    signal.pause()

def ends(box):
    box.result("time", left_s=box.left_s, is_enough=box.has_time(), is_too_little=box.has_time(3600))

parts = [Part(f.__name__, share, f) for f, share in ((fails, 1), (skips, 1), (dies, 1), (hangs, 1), (ends, 30))]
print(run_parts(parts, Journal(Path(sys.argv[1])), total_s=30, say=print))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def odd_parts(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    path = tmp_path_factory.mktemp("guarded") / "found.jsonl"
    return run("-c", ODD_PARTS, str(path)), Journal(path).read()


def test_whatever_becomes_of_a_part_the_next_goes_on(odd_parts):
    """Catches a part that takes the others with it, and time that is lost with one that ended early."""
    ended, lines = odd_parts
    assert ended.returncode == 0, ended.stderr
    outcomes = {"fails": "error", "skips": "skipped", "dies": "error", "hangs": "stopped", "ends": "ok"}
    assert ended.stdout.splitlines()[-1] == str(outcomes)
    assert {line["part"]: line["outcome"] for line in lines if line["event"] == "end"} == outcomes
    [time] = [line for line in lines if line.get("name") == "time"]
    assert time["left_s"] < 30 and time["is_enough"] and not time["is_too_little"]


def test_a_failure_is_recorded_with_its_traceback_and_what_was_found_before(odd_parts):
    """Catches results that are written at a part's end alone, and errors without a place."""
    _, lines = odd_parts
    assert [line["event"] for line in lines if line["part"] == "fails"] == ["begin", "result", "error", "end"]
    error = next(line for line in lines if line["event"] == "error")
    assert error["error"] == "KeyError: 'odd'" and "in fails" in "".join(error["traceback"])
    assert next(line for line in lines if line["event"] == "skipped")["reason"] == "not here"
    assert next(line for line in lines if line["part"] == "dies" and line["event"] == "error")["error"].endswith("-9")


def test_what_a_stopped_part_had_started_is_ended_with_it(odd_parts):
    """Catches a test run that goes on beside the next part's measurements."""
    _, lines = odd_parts
    pid = next(line["pid"] for line in lines if line.get("name") == "started")
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # nobody may be there to reap it


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path):
    """Catches a report that is lost with its last line."""
    journal = Journal(tmp_path / "cut.jsonl")
    journal.write("one", "result", value=1)
    with journal.path.open("a") as file:
        file.write('{"part": "two", "ev')
    assert journal.read() == [{"part": "one", "event": "result", "value": 1}]


@pytest.fixture(scope="module")
def tiny_check(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    path = tmp_path_factory.mktemp("gpu_check") / "found.jsonl"
    ended = run("scripts/gpu_check.py", "--device", "cpu", "--tiny", "--total-s", "100", "--output", str(path))
    return ended, Journal(path).read()


def test_everything_but_cuda_is_tried_on_a_cpu(tiny_check):
    """Catches a check that fails on the one machine where it counts, by what has nothing to do with that machine."""
    ended, lines = tiny_check
    errors = [line for line in lines if line["event"] in ("error", "stopped")]
    assert ended.returncode == 0 and not errors, f"{errors}\n{ended.stderr}"
    skipped = {line["part"]: line["reason"] for line in lines if line["event"] == "skipped"}
    assert list(skipped) == ["tests", "graphs", "compiled"]
    assert all("need a CUDA device, asked for cpu" in reason for reason in skipped.values())
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert list(facts["parts"]) == [
        "machine", "tests", "graphs", "plain", "verify", "rounds", "learner", "rivals", "compiled",
    ]  # fmt: skip
    assert facts["results"] == sum(line["event"] == "result" for line in lines) and "v(33)" in ended.stderr


def test_its_results_are_those_of_every_question(tiny_check):
    """Catches a part that says it is well and has measured nothing."""
    _, lines = tiny_check
    found = {(line["part"], line["name"]): line for line in lines if line["event"] == "result"}
    assert [found["verify", f"v({n})"]["ratio"] > 0 for n in range(1, 34)] == [True] * 33
    assert all(found["graphs", f"torch.float32, T = {t}"]["num_different"] == 0 for t in (0, 1, 4, 8))
    assert 0 < found["graphs", "torch.float32, T = 4"]["acceptance"] < 1
    assert found["plain", "2 rows"]["share_of_bandwidth"] > 0
    assert found["rounds", "1 rows, T = 8, acceptance 0.9"]["of_law"] > 0
    assert found["rounds", "speculative, 2 rows, T = 4"]["mean_accepted"] > 2  # its drafts are accepted
    assert found["learner", "budget 1.0, answer 1"]["num_steps"] > 0
    for arm in ("plain", "hf_generate", "hf_early_exit", "hf_prompt_lookup"):
        assert found["rivals", f"{arm}, 1 rows"]["tokens_per_s"] > 0


def test_its_parts_run_on_a_device_that_is_not_the_cpu():
    """Catches a check that fails on the one machine where it counts, by what only a device that is no CPU shows.

    Graphs are recorded calls, so eager rounds and replays are held against each other as there.
    """
    check, found = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/gpu_check.py"))), {}
    box = SimpleNamespace(left_s=60.0, has_time=lambda: True, result=lambda name, **facts: found.update({name: facts}))
    asked, device = check.Asked(DEVICE, torch.bfloat16, True), PretendDevice()
    generator = torch.Generator  # which the pretended device has none of
    with (
        device, capturing(device) as graphs, mock.patch.object(DirectPath, "supports", lambda model: True),
        mock.patch.object(torch, "Generator", lambda device="cpu": generator()),
    ):  # fmt: skip
        with pytest.raises(Skipped, match="need a CUDA device, asked for lazy"):
            check.check_graphs(asked, box)
        check.check_plain(asked, box)
    assert [found[f"torch.bfloat16, T = {t}"]["num_different"] for t in (0, 1, 4, 8)] == [0] * 4
    assert sum(one.num_replays for one in graphs) > 5
    assert found["2 rows"]["tokens_per_s"] > 0


def test_the_tests_that_need_a_gpu_are_found_where_they_lie():
    """Catches a device whose tests are not run since they moved: without files pytest would collect them all."""
    marked = runpy.run_path(str(ROOT / "scripts/gpu_check.py"))["marked_tests"]()
    assert str(ROOT / "tests/decode/test_verification.py") in marked
    assert str(ROOT / "tests/decode/test_sampling.py") not in marked


def test_one_part_runs_in_its_own_interpreter(tmp_path):
    """What a part falls back on where a forked process cannot use the device."""
    path = tmp_path / "found.jsonl"
    ended = run("scripts/gpu_check.py", "--device", "cpu", "--tiny", "--only", "machine", "--output", str(path))
    assert ended.returncode == 0, ended.stderr
    assert [line["name"] for line in Journal(path).read()] == ["machine", "copy"]


def test_without_a_device_it_says_so():
    """Catches a failure of `make bench-gpu` where there is nothing to measure."""
    ended = run("scripts/gpu_check.py")
    assert ended.returncode == 0 and "none found" in ended.stderr
    assert json.loads(ended.stdout) == {"command": "gpu_check", "skipped": "no CUDA device"}
