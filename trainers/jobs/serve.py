"""What a server learns with, from its settings and its folder: alone, or as one of several that learn one drafter.

Knows settings, folders and ranks; knows nothing of HTTP or engines.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
from pathlib import Path

from dvi.config import write_provenance
from dvi.decode.construction import as_built, build_speculator
from dvi.decode.precision import settle_dtype, weights_of_run
from dvi.decode.speculator import SelfSpeculator
from dvi.distributed import SOLO, Peers
from dvi.model.adapter_store import read_manifest
from dvi.model.starting_drafter import adapter_of_run, settle_adapter, with_adapter
from dvi.settings import AUTO_ADAPTER, ServeConfig
from dvi.telemetry import MetricsWriter
from trainers.jobs.replica_learner import ReplicaLearner
from trainers.jobs.serving_learner import ServingLearner
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer
from trainers.ranks.shards import CHECKPOINTS, SavedRun, load_saved, rank_folder

log = logging.getLogger(__name__)


def build_serving(config: ServeConfig, peers: Peers = SOLO) -> tuple[SelfSpeculator, ServingLearner | None]:
    """The speculator of a server and, unless train.enabled is false, its learner, which goes on from output.folder.

    peers: the ranks that learn with it; waits for all of them.
    Raises ValueError when another server holds the folder, when it is a `dvi train` run's, and when what was learnt
    there belongs to another model or drafter; OSError when the folder cannot be written to.
    """
    if not config.train.enabled:
        return build_speculator(config), None
    folder = Path(config.output.folder)
    own_folder = rank_folder(folder, peers.rank)
    with ExitStack() as opened:
        # Before the model: a second server is refused at once, not after it has loaded.
        store = opened.enter_context(CheckpointStore(own_folder / CHECKPOINTS))
        saved = load_saved(folder, peers)
        learnt_with = None if saved is None else saved.state.get("settings")
        config = _settle(config, learnt_with, folder, peers)
        settings = _drafter_settings(config)
        if saved is not None:
            _check_same_drafter(settings, learnt_with, folder)
            store.drop_after(saved.steps.get(peers.rank, -1))
        speculator = build_speculator(config)
        if peers.local_rank == 0:
            write_provenance(folder, as_built(config, speculator))
        options = {
            "checkpoint_every_s": config.output.checkpoint_every_s, "save_replay": config.output.save_replay,
            "metrics": MetricsWriter(own_folder), "settings": settings, "obsolete": _obsolete(folder, saved, peers),
        }  # fmt: skip
        trainer = OnlineTrainer(speculator, config.train, peers=peers)
        if peers.is_alone:
            learner = ServingLearner(trainer, store, **options)
        else:
            first_step = max(peers.exchange(store.next_step))
            learner = ReplicaLearner(
                trainer, store, peers=peers, first_step=first_step, drain_s=config.serve.drain_s, **options
            )
        if saved is not None:
            learner.load(saved)
        opened.pop_all()
    return speculator, learner


def _settle(config: ServeConfig, learnt_with: dict[str, object] | None, folder: Path, peers: Peers) -> ServeConfig:
    """The settings with the adapter and the dtype that "auto" is: those that the folder began with, where it has."""
    learnt_with = learnt_with or {}
    is_auto = config.drafter.adapter == AUTO_ADAPTER
    if is_auto and learnt_with:
        # Checkpoints of earlier versions do not name it.
        named = learnt_with if "drafter.adapter" in learnt_with else {"drafter.adapter": adapter_of_run(folder)}
        config = with_adapter(config, named["drafter.adapter"])
    config = settle_adapter(config)
    if is_auto and len(set(peers.exchange(config.drafter.adapter))) > 1:  # not on every machine
        log.warning("the drafter beside the model is not taken: not all ranks have it; an untrained one starts")
        config = with_adapter(config, None)
    return settle_dtype(config, earlier=learnt_with.get("model.dtype"), earlier_weights=weights_of_run(folder))


def _obsolete(folder: Path, saved: SavedRun | None, peers: Peers) -> list[Path]:
    """Folders here of earlier ranks that are no more; one rank of each machine sees to them."""
    if saved is None or peers.local_rank:
        return []
    gone = [rank_folder(folder, rank) for rank in saved.steps if rank >= peers.num_ranks]
    return [path for path in gone if path.is_dir()]


def _drafter_settings(config: ServeConfig) -> dict[str, object]:
    """What must stay the same for a drafter to go on, by its key; and drafter.adapter, which it started from."""
    settings = {f"model.{name}": getattr(config.model, name) for name in ("path", "split_layer", "dtype")}
    return settings | {f"drafter.{name}": value for name, value in dataclasses.asdict(config.drafter).items()}


def _check_same_drafter(now: dict[str, object], then: dict[str, object] | None, folder: Path) -> None:
    if then is None:
        raise ValueError(
            f"output.folder {folder} holds a run of dvi train; choose another folder, and drafter.adapter={folder}/"
            "drafter to start from what it learnt"
        )
    adapter = now["drafter.adapter"]
    # An adapter has its own shape, whatever the settings of one say or said.
    shape = {} if adapter is None else dataclasses.asdict(read_manifest(adapter).drafter)
    for key, value in now.items():
        allowed = (then.get(key), shape.get(key.removeprefix("drafter."), then.get(key)))
        if key != "drafter.adapter" and value not in allowed:
            raise ValueError(
                f"{key} must be {then.get(key)!r} to go on with what was learnt in {folder}, got {value!r}; "
                "another output.folder starts afresh"
            )
