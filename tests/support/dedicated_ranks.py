"""A job of three processes, one that learns and two that serve random tensors; each leaves a JSON file behind."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dvi.distributed import PeerLostError
from tests.support.random_traffic import SETTINGS, serving, stretch
from trainers.learning.online import OnlineTrainer
from trainers.ranks.channel import GlooChannel
from trainers.ranks.dedicated import DedicatedLearner
from trainers.ranks.shipping import ShippingLearner

NUM_RANKS = 3
LAST_VERSION = 12  # a rank has served its traffic when it has come so far
TIMEOUT_S = 4.0  # of the channels
# More than one step may be owed: how many rounds one look at the channels finds is a matter of the clock.
LEARNING = dataclasses.replace(SETTINGS, budget=0.5)
# One process imports torch, and the ranks are its forks: that takes a third of the time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.dedicated_ranks"])


def run_ranks(folder: Path, fate: dict[int, str], *, limit_s: float) -> tuple[list[int], list[dict]]:
    """Exit codes and reports of all ranks; {} of a rank that left none. Kills what still runs after limit_s.

    fate: what becomes of a rank in the middle of the job: "dies", or "hangs" until the others have ended.
    """
    ranks = [CONTEXT.Process(target=_run, args=(rank, folder, fate.get(rank))) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    deadline_s = time.monotonic() + limit_s
    try:
        for rank, process in enumerate(ranks):
            if fate.get(rank) != "hangs":
                process.join(max(deadline_s - time.monotonic(), 0))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    paths = [folder / f"{rank}.json" for rank in range(NUM_RANKS)]
    reports = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    return [process.exitcode for process in ranks], reports


def hash_of(drafter: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _run(rank: int, folder: Path, fate: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=NUM_RANKS)
    report: dict = {"hashes": {}, "saves": [], "error": None}
    try:
        (_learn if rank == 0 else _serve)(rank, report, fate, folder)
    except PeerLostError as error:
        report["error"] = str(error)
    report["num_threads"] = threading.active_count()
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def _learn(_rank: int, report: dict, fate: str | None, _folder: Path) -> None:
    speculator = serving()
    trainer = OnlineTrainer(speculator, LEARNING)

    def note(_update: object) -> None:
        report["hashes"][str(speculator.drafter.version)] = hash_of(speculator.drafter)
        if trainer.num_steps == 8:
            _meet(fate)

    channels = {other: GlooChannel(other, timeout_s=TIMEOUT_S) for other in range(1, NUM_RANKS)}
    learner = DedicatedLearner(
        trainer, speculator, channels, checkpoint_every_s=0.05, on_save=report["saves"].append, on_report=note
    )
    report["ending"] = learner.run()
    report |= {"version": speculator.drafter.version, "stats": learner.stats()}


def _serve(rank: int, report: dict, fate: str | None, folder: Path) -> None:
    speculator = serving()
    learner = ShippingLearner(
        speculator, GlooChannel(0, timeout_s=TIMEOUT_S), LEARNING, outbox_positions=256,
        on_save=report["saves"].append,
    )
    try:
        for index in itertools.count():
            if speculator.drafter.version >= LAST_VERSION or learner.lost is not None:
                break
            learner.observe([stretch(index % 50)])
            version = speculator.drafter.version
            learner.step_if_due()
            if speculator.drafter.version != version:
                report["hashes"][str(speculator.drafter.version)] = hash_of(speculator.drafter)
            if speculator.drafter.version >= LAST_VERSION // 2:
                _meet(fate)
        report["ending"] = learner.finish()
    finally:
        # Like a server, that has no reason to leave: the learner, if it lives, must come to its end all the same.
        while learner.ending is None and "lost rank 0" not in str(learner.lost) and not (folder / "0.json").exists():
            time.sleep(0.01)
        learner.leave()
        report |= {"version": speculator.drafter.version, "last_hash": hash_of(speculator.drafter)}
        report["stats"] = learner.stats()


def _meet(fate: str | None) -> None:
    if fate == "dies":
        os._exit(9)
    if fate == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
