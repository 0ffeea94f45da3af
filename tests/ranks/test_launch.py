"""Jobs of several ranks as people start them: by torchrun and by accelerate, on one machine or two, and again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.rank_jobs import job_settings, saved, served
from tests.support.ranks import free_port
from trainers.ranks.shards import CHECKPOINTS, rank_folder

PATIENCE_S = 180
POLL_S = 0.05
TRAIN = ("-m", "dvi", "train", "configs/online/reference.yaml")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")


class Launch:
    """A started command with all its processes, which do not outlive the block."""

    def __init__(self, *command: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            return [*launcher.children(recursive=True), launcher]
        return []

    def worker(self, local_rank: int = 0) -> psutil.Process:
        """The process of a rank of this machine."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.environ().get("LOCAL_RANK") == str(local_rank):
                    return process
        raise AssertionError(f"local rank {local_rank} does not run")

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        output, errors = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, output, errors

    def is_running(self) -> bool:
        return self._process.poll() is None


def summary_of(launch: Launch) -> dict:
    """The one line that a job which went well prints."""
    exit_code, output, errors = launch.end()
    assert exit_code == 0, errors[-3000:]
    # Where no GPU is, accelerate's launcher lets DeepSpeed say so there.
    (line,) = [line for line in output.splitlines() if not line.startswith("[")]
    return json.loads(line)


def wait_for_save(folder: Path, rank: int, launch: Launch) -> None:
    while not list((rank_folder(folder, rank) / CHECKPOINTS).glob("step-*")):
        assert launch.is_running(), launch.end()
        time.sleep(POLL_S)


def check_run(folder: Path, summary: dict, *, num_requests: int, num_ranks: int = 2) -> None:
    """All that a finished run of several ranks on one disk must have left."""
    assert summary["status"] == "done" and summary["requests"] == num_requests and summary["reloads_alike"]
    assert summary["steps"] > 0 and len(summary["ranks"]) == num_ranks
    assert (folder / "drafter").is_dir() and (folder / "config.yaml").is_file()
    states = [saved(folder, rank) for rank in range(num_ranks)]
    assert len({state[-1]["step"] for state in states}) == 1
    assert sorted(index for rank in range(num_ranks) for index in served(folder, rank)) == list(range(num_requests))


@pytest.mark.slow
def test_torchrun_runs_one_job_on_two_ranks(tmp_path):
    """Catches a rank that prints or writes what is rank 0's, and two processes that each do the whole job."""
    settings = job_settings(tmp_path, num_requests=8, num_tokens=24)
    with Launch(*TORCHRUN, "--nproc_per_node", "2", *TRAIN, *settings) as launch:
        check_run(tmp_path / "run", summary_of(launch), num_requests=8)
    assert not (rank_folder(tmp_path / "run", 1) / "drafter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp_2", "deepspeed_zero1", "deepspeed_zero2"])
def test_accelerate_launch_runs_the_reference_job_on_two_ranks(tmp_path, config):
    """Catches a launcher's settings that are not understood: one process, another engine, another precision."""
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = tmp_path / "run"
    settings = [
        f"output.folder={folder}", "data.limit=8", "eval.limit=0", "sampling.max_new_tokens=24", "data.shuffle_seed=1",
        "train.blocks_per_step=16", "train.budget=1", "output.tensorboard=false",
    ]  # fmt: skip
    with Launch(*ACCELERATE, f"configs/accelerate/{config}.yaml", *TRAIN, *settings) as launch:
        check_run(folder, summary_of(launch), num_requests=8)


class TwoMachines:
    """Two agents of torchrun with a rank and a folder each, which meet over TCP. A context manager."""

    def __init__(self, tmp_path: Path, *settings: str, options: tuple[str, ...] = ()) -> None:
        self.folders = [tmp_path / f"machine-{number}" for number in range(2)]
        port = free_port()
        self.launches = [
            Launch(
                *TORCHRUN, "--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1", "--rdzv_id", "a-job",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", *options, *TRAIN, *settings,
                f"output.folder={folder}",
            )
            for number, folder in enumerate(self.folders)
        ]  # fmt: skip

    def __enter__(self) -> TwoMachines:
        return self

    def __exit__(self, *_: object) -> None:
        for launch in self.launches:
            launch.__exit__()

    def wait_for_saves(self) -> None:
        """Until both ranks have a checkpoint; which is on which machine is torchrun's to say."""
        while not all(any(folder.glob("**/step-*/SHA256SUMS")) for folder in self.folders):
            assert all(launch.is_running() for launch in self.launches), [launch.end() for launch in self.launches]
            time.sleep(POLL_S)

    def ends(self) -> list[tuple[int, str, str]]:
        return [launch.end() for launch in self.launches]

    def check_run(self, *, num_requests: int) -> None:
        """All that a finished run must have left."""
        ends = self.ends()
        assert [exit_code for exit_code, _, _ in ends] == [0, 0], [errors[-3000:] for _, _, errors in ends]
        (line,) = [line for _, output, _ in ends for line in output.splitlines()]
        summary = json.loads(line)
        assert summary["status"] == "done" and summary["requests"] == num_requests
        assert (Path(summary["folder"]) / "drafter").is_dir()
        assert self.served() == list(range(num_requests))

    def served(self) -> list[int]:
        return sorted(index for folder in self.folders for rank in range(2) for index in served(folder, rank))


@pytest.mark.slow
def test_two_machines_run_a_job_and_go_on_after_an_interruption(tmp_path):
    """Catches a rank that needs another machine's files, and a signal that ends one machine and not the other."""
    settings = job_settings(tmp_path, num_requests=80, num_tokens=24)
    with TwoMachines(tmp_path, *settings) as machines:
        machines.wait_for_saves()
        machines.launches[1].worker().send_signal(signal.SIGTERM)
        for exit_code, _, errors in machines.ends():
            assert exit_code != 0 and "lost another rank" not in errors, errors[-3000:]
        assert 0 < len(machines.served()) < 80
    with TwoMachines(tmp_path, *settings, "output.resume=true") as machines:
        machines.check_run(num_requests=80)


@pytest.mark.slow
def test_torchrun_starts_a_job_again_on_all_machines_when_a_rank_of_one_is_killed(tmp_path):
    """Catches a machine whose own rank was well, that does not resume, and one that hears of the loss too late."""
    settings = job_settings(tmp_path, num_requests=80, num_tokens=24)
    with TwoMachines(tmp_path, *settings, options=("--max_restarts", "2")) as machines:
        machines.wait_for_saves()
        machines.launches[0].worker().kill()
        machines.check_run(num_requests=80)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_job_again_when_a_rank_is_killed(tmp_path, rank):
    """Catches a restart that begins anew or refuses the folder it left, and requests lost or served twice."""
    settings, folder = job_settings(tmp_path, num_requests=80, num_tokens=24), tmp_path / "run"
    with Launch(*TORCHRUN, "--nproc_per_node", "2", "--max_restarts", "2", *TRAIN, *settings) as launch:
        for other in range(2):
            wait_for_save(folder, other, launch)
        launch.worker(rank).kill()
        check_run(folder, summary_of(launch), num_requests=80)


@pytest.mark.slow
def test_without_restarts_the_loss_of_a_rank_is_the_job_s_named_error(tmp_path):
    """Catches a job that ends well, or without a word, when a rank was killed."""
    settings = job_settings(tmp_path, num_requests=80, num_tokens=24)
    with Launch(*TORCHRUN, "--nproc_per_node", "2", *TRAIN, *settings) as launch:
        wait_for_save(tmp_path / "run", 1, launch)
        launch.worker(1).kill()
        exit_code, output, errors = launch.end()
    assert exit_code != 0 and output == ""
    assert "rank 0 of 2 lost another rank" in errors
