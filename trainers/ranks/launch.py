"""Where a job runs: among which processes, in which folder, on which device.

Knows settings, ranks and folders; knows nothing of models, traffic or learning.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from dvi.distributed import SOLO, join
from dvi.settings import TrainConfig, WarmupConfig
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.zero_student import is_launched_with_deepspeed
from trainers.ranks.shards import CHECKPOINTS, rank_folder


class Launch:
    """Where a job runs: among which ranks, on which device, in which folder, and where its words go. A context manager.

    config         the settings with this rank's device, and resuming where torchrun has started the job again.
    processes      all that were started together.
    is_lock_step   they are one rank together: each has a part of the model, and does what all do.
    peers          the ranks; of those in lock-step each is alone.
    is_dedicated   rank 0 only learns, and the others only serve.
    keeps_files    whether files written here outlast the run; of ranks in lock-step only the first's do.
    folder         this rank's own.
    Raises ValueError when the ranks' settings differ or do not go with so many, PeerLostError when they do not find
    each other.
    """

    def __init__(self, config: TrainConfig | WarmupConfig, console: Console) -> None:
        self.processes = join(timeout_s=config.train.peer_timeout_s)
        self.is_lock_step = config.model.placement == "tensor" and not self.processes.is_alone
        self.peers = SOLO if self.is_lock_step else self.processes
        self.is_dedicated = config.train.learner == "dedicated"
        self.keeps_files = self.processes.is_first or not self.is_lock_step
        self._check(config)
        self.processes.check_alike("the settings", _shared_settings(config))
        # After a rank was lost torchrun starts all of them again, with the same command.
        # Each machine counts its own restarts.
        is_restart = any(self.processes.exchange(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0))
        self.config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, device=self.processes.device(config.model.device)),
            output=dataclasses.replace(config.output, resume=config.output.resume or is_restart),
        )
        self.console = console if self.processes.is_first else Console(quiet=True)
        self.run_folder = Path(config.output.folder)
        self._scratch = None if self.keeps_files else TemporaryDirectory(prefix="dvi-")
        self.folder = Path(self._scratch.name) if self._scratch else rank_folder(self.run_folder, self.peers.rank)
        self.store = CheckpointStore(self.folder / CHECKPOINTS)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        if self._scratch:
            self._scratch.cleanup()
        self.processes.leave()

    def _check(self, config: TrainConfig | WarmupConfig) -> None:
        train = config.train
        if not self.peers.is_alone and not train.enabled:
            raise ValueError("train.enabled must be true with several ranks, got false: start single processes instead")
        if self.is_dedicated and self.peers.is_alone:
            raise ValueError(
                "train.learner 'dedicated' needs 2 ranks or more, one to learn and the others to serve, each with the "
                "whole model, got 1; start it with torchrun --nproc_per_node 2, or leave train.learner=shared"
            )
        is_alone_among_others = self.is_dedicated or self.is_lock_step
        if is_alone_among_others and (train.strategy != "ddp" or is_launched_with_deepspeed()):
            raise ValueError(
                "DeepSpeed must be left out where a rank learns by itself, with train.learner 'dedicated' or "
                "model.placement 'tensor'; set train.strategy=ddp and start the job with torchrun"
            )


def _shared_settings(config: TrainConfig | WarmupConfig) -> dict[str, object]:
    """What must be alike on all ranks: all but each machine's own."""
    settings = dataclasses.asdict(config)
    for section, key in (("model", "device"), ("model", "num_threads"), ("output", "folder")):
        del settings[section][key]
    return json.loads(json.dumps(settings))


