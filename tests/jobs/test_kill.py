"""kill -9 at any moment: a server's state is found again, whole, and only what came since its last checkpoint is lost.

Run as a program this file is a fork server: it imports torch once and then forks a learner for every folder it is told,
so that a start costs milliseconds. Learners speak in lines of JSON on its standard output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dvi.settings import LearningSettings
from tests.learning.test_online import serving, stretch
from tests.support.paths import ROOT
from trainers.jobs.serving_learner import ServingLearner
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer

CHECKPOINT_EVERY_S = 0.05
MOST_SAVES = 3  # a learner lives for at most so many saves ...
LONGEST_REST_S = 0.1  # ... and so long after: until any moment of an interval or of the next save
PATIENCE_S = 60.0
SETTINGS = LearningSettings(
    blocks_per_step=4, rounds_per_step=1, budget=1.0, steps_per_publish=2, steps_per_canary=8, replay_positions=256
)


class OutspokenStore(CheckpointStore):
    """Says what it has saved as soon as `save` has promised that it will last."""

    def save(self, state: dict[str, object], step: int, **options: object) -> Path:
        path = super().save(state, step, **options)
        say("saved", state)
        return path


def tensors_of(tree: object) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(item)


def say(event: str, state: dict[str, object]) -> None:
    trainer = state["trainer"]
    digest = hashlib.sha256()
    for tensor in tensors_of([trainer[name] for name in sorted(trainer.keys() - {"replay", "versions"})]):
        digest.update(tensor.numpy().tobytes())
    line = {
        "event": event, "steps": trainer["counts"]["num_steps"], "rounds": state["traffic"]["total"]["num_rounds"],
        "digest": digest.hexdigest(),
    }  # fmt: skip
    os.write(1, json.dumps(line).encode() + b"\n")  # at once, and not torn: shorter than a pipe's buffer


def live(folder: str) -> None:
    """Learns from random rounds until it is killed."""
    store = OutspokenStore(folder)
    learner = ServingLearner(
        OnlineTrainer(serving(), SETTINGS), store, checkpoint_every_s=CHECKPOINT_EVERY_S, save_replay=True
    )
    saved = store.load_latest()
    if saved is not None:
        learner.load_state_dict(saved[0])
    say("started", learner.state_dict())
    while True:
        learner.observe([stretch(learner.traffic.total.num_rounds)])
        learner.step_if_due()


def serve_forks() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody listens any more: end, and let no learner live on
    torch.set_num_threads(1)
    for folder in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                live(folder.strip())
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.write(1, json.dumps({"event": "forked", "pid": pid}).encode() + b"\n")
        os.waitpid(pid, 0)
        os.write(1, json.dumps({"event": "ended"}).encode() + b"\n")


class ForkServer:
    """Starts learners one after the other and hears what they say."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.test_kill"], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._unread = b""

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(PATIENCE_S)

    def hear(self, *, until_s: float) -> dict | None:
        """The next line; None when none has come by then."""
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._process.stdout], [], [], max(until_s - time.monotonic(), 0))
            if not readable:
                return None
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            assert received, "the fork server died"
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def live_and_die(self, folder: Path, *, num_saves: int, rest_s: float) -> list[dict]:
        """What a learner said between its start and kill -9, rest_s after it had told of num_saves."""
        self._process.stdin.write(f"{folder}\n".encode())
        lines: list[dict] = []
        pid, kill_s = 0, math.inf
        while True:
            line = self.hear(until_s=min(kill_s, time.monotonic() + PATIENCE_S))
            if line is None:
                assert kill_s < math.inf, f"nothing for {PATIENCE_S} s after {lines}"
                os.kill(pid, signal.SIGKILL)
                kill_s = math.inf
            elif line["event"] == "forked":
                pid = line["pid"]
            elif line["event"] == "ended":
                return lines
            else:
                lines.append(line)
                if len(lines) == 1 + num_saves:
                    kill_s = time.monotonic() + rest_s


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize("num_kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_learner_killed_at_any_moment_goes_on_from_its_last_promise(tmp_path, fork_server, num_kills) -> None:
    """Catches a checkpoint that is acknowledged too early, mixed of two moments, damaged, or passed over at a start."""
    rng = random.Random(0)
    folder = tmp_path / "state"
    promised = None
    for _ in range(num_kills):
        num_saves = rng.randrange(MOST_SAVES + 1)
        started, *saved = fork_server.live_and_die(
            folder, num_saves=num_saves, rest_s=rng.uniform(0, LONGEST_REST_S)
        )
        assert started["event"] == "started" and len(saved) >= num_saves
        if promised is not None:
            # A save may have ended without a chance to say so; what it said must be there.
            assert started["steps"] >= promised["steps"] and started["rounds"] >= promised["rounds"]
            if started["steps"] == promised["steps"]:
                assert started["digest"] == promised["digest"]
        progress = [line["steps"] for line in (started, *saved)]
        assert progress == sorted(progress)
        promised = saved[-1] if saved else started
    assert promised["steps"] > num_kills
    with CheckpointStore(folder) as store:  # warns of nothing: no checkpoint was found damaged
        state, _ = store.load_latest()
    assert state["trainer"]["counts"]["num_steps"] >= promised["steps"]
    assert all(path.name == ".lock" or path.name.startswith("step-") for path in folder.iterdir())


if __name__ == "__main__":
    serve_forks()
