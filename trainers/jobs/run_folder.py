"""A run's folder, and what is read back from it.

It holds config.yaml, provenance.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end acceptance.png,
drafter/ and summary.json. Knows the names of files and what a run left in them; knows nothing of how one is run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from dvi.config import load_config
from dvi.decode.construction import build_speculator
from dvi.decode.speculator import SelfSpeculator
from dvi.durable import surviving_folder
from dvi.model.adapter_store import read_manifest
from dvi.settings import RESUMED_KEYS, ServeConfig, TrainConfig, WarmupConfig
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer
from trainers.ranks.shards import CHECKPOINTS

DRAFTER, PICTURE, SUMMARY = "drafter", "acceptance.png", "summary.json"


def load_run(folder: str | Path, *, model: str | None = None) -> tuple[SelfSpeculator, dict, dict]:
    """The speculator of a run with its final drafter, or its newest checkpoint's; the drafter's metrics; the settings.

    The run is one of `dvi train` or `dvi warmup`, or a server's that has ended; a server's metrics say how its drafter
    came about. model: another path of the base model. Raises ValueError when the folder holds neither.
    """
    folder = Path(folder)
    config = _run_config(folder, [] if model is None else [f"model.path={json.dumps(model)}"])
    settings = dataclasses.asdict(config)
    # What the run's machine could promise of tokens is nothing to its drafter.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mode="fast"))
    final = surviving_folder(folder / DRAFTER)
    if final.is_dir():
        config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, adapter=str(final)))
        return build_speculator(config), read_manifest(final).metrics, settings
    with CheckpointStore(folder / CHECKPOINTS) as store:
        saved = store.load_latest()
    if saved is None or saved[0]["trainer"] is None:
        raise ValueError(f"{folder} must hold a drafter or a checkpoint with one; let the run reach its first")
    speculator = build_speculator(config)
    trainer = OnlineTrainer(speculator, config.train)
    trainer.load_state_dict({"replay": trainer.replay.state_dict()} | saved[0]["trainer"])  # a server may have none
    return speculator, saved[0].get("provenance", {}), settings


def _run_config(folder: Path, overrides: Iterable[str] = ()) -> TrainConfig | ServeConfig | WarmupConfig:
    """The settings that a run left in its folder."""
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    schemas = {"serve": ServeConfig, "warmup": WarmupConfig}
    schema = next((schema for section, schema in schemas.items() if f"\n{section}:\n" in text), TrainConfig)
    return load_config(path, overrides, schema=schema)


def check_same_run(config: TrainConfig | WarmupConfig, folder: Path, sections: Iterable[str]) -> None:
    """Raises ValueError when the run in the folder had other settings in one of these sections."""
    earlier = load_config(folder / "config.yaml", schema=type(config))
    # Of eval only the limit: it decides which rows are held out, and so which ones are the traffic.
    for section in (*sections, "eval"):
        now, then = (dataclasses.asdict(getattr(c, section)) for c in (config, earlier))
        for key in {"limit"} if section == "eval" else now.keys() - RESUMED_KEYS:
            if now[key] != then[key]:
                raise ValueError(
                    f"{section}.{key} must be {then[key]!r} to resume the run in {folder}, got {now[key]!r}; "
                    "another output.folder starts afresh"
                )
