"""The figures of several ranks are ratios of like with like, and the program that makes them runs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
bench = importlib.import_module("bench_ranks")

TIMEOUT_S = 240


def replica(tokens_per_s: float, *, cpu_ms_per_token: float = 1.0, **facts: float) -> object:
    values = {"num_tokens": 1000, "wall_s": 1000 / tokens_per_s, "serving_s": 10.0, "num_steps": 50} | facts
    return bench.Replica(cpu_s=cpu_ms_per_token, **values)


def turn(ranks: list, alone: list, beside: list) -> dict[str, list]:
    return {bench.RANKS: ranks, bench.ALONE: alone, bench.BESIDE: beside}


def test_throughput_is_compared_core_by_core_and_turn_by_turn():
    """Catches ratios of medians, in which a faster core or a slower hour would count, and sums over replicas."""
    turns = [
        turn([replica(95), replica(180)], [replica(100), replica(200)], [replica(96), replica(190)]),
        turn([replica(48), replica(93)], [replica(50), replica(100)], [replica(48), replica(96)]),
    ]
    assert bench.throughput_ratios(turns, bench.ALONE)["tokens_per_s"] == pytest.approx((0.93 + 0.95) / 2)
    assert bench.throughput_ratios(turns, bench.BESIDE)["tokens_per_s"] > 0.96


def test_processor_time_is_that_of_a_token():
    """Catches a process that looks cheap because it did less."""
    short = replica(100, cpu_ms_per_token=0.55, num_tokens=500)  # 1.1 ms a token
    turns = [turn([short, short], [replica(100), replica(100)], [replica(100), replica(100)])]
    assert bench.throughput_ratios(turns, bench.ALONE)["cpu_per_token"] == pytest.approx(1.1)


def test_acceptance_is_compared_seed_by_seed():
    """Catches a good seed that hides a bad one."""
    pair = lambda two, one: tuple(  # noqa: E731
        replica(1, acceptance=value / 4, mean_accepted_tokens=value) for value in (two, one)
    )
    ratios = bench.acceptance_ratios([pair(1.8, 2.0), pair(2.2, 2.0)])
    assert ratios["mean_accepted_tokens"] == pytest.approx(1.0)
    assert ratios["lowest_mean_accepted_tokens"] == ratios["lowest_acceptance"] == pytest.approx(0.9)


def test_synchrony_is_a_share_of_serving_and_bytes_of_one_rank():
    """Catches waits or start-up in the share, and the bytes of all ranks taken for one's."""
    ranks = [replica(1, sync_s=0.2, sync_bytes=5000), replica(1, sync_s=0.2, sync_bytes=5000)]
    turns = [turn(ranks, [replica(1)] * 2, [replica(1)] * 2)]
    assert bench.synchrony(turns) == {"sync_share": pytest.approx(0.02), "bytes_per_update": 100}


def test_two_processes_do_not_share_a_core(capsys):
    """Catches a benchmark of how an operating system divides a core."""
    core = min(os.sched_getaffinity(0))
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--cores", str(core), str(core)])
    assert "--cores must be two different ones" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_short_run_measures_every_figure():
    """Catches arms that do not run the job, or that get other traffic."""
    command = [
        sys.executable, "scripts/bench_ranks.py", "--repeats", "1", "--requests", "3", "--uncounted", "1",
        "--seeds", "2", "--learn-requests", "8", "--held-out", "2", "--max-tokens", "16", "--adapter", "none",
        "model.path=tests/stories260k", "model.split_layer=2", "drafter.anchor_hidden=16", "train.rounds_per_step=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors
    line = json.loads(output.splitlines()[-1])
    (found,), (seed,) = line["turns"], line["seeds"][1:]
    for arm in bench.ARMS:
        assert [one["num_tokens"] for one in found[arm]] == [one["num_tokens"] for one in found[bench.ALONE]]
        assert all(one["wall_s"] > 0 and one["cpu_s"] > 0 and one["num_steps"] > 0 for one in found[arm])
        assert all((one["sync_bytes"] > 0) == (arm == bench.RANKS) for one in found[arm])
    assert seed["two"]["mean_accepted_tokens"] >= 1 and seed["one"]["mean_accepted_tokens"] >= 1
    assert line["results"]["acceptance"].keys() >= {"mean_accepted_tokens", "acceptance"}
    assert set(line["results"]["throughput"]) == {bench.ALONE, bench.BESIDE}
