"""Does learning help: `dvi bench ablation`, loss schedules against each other and against learning offline.

Knows arms and folders: how a cell is run is `ablation_cells`' concern, what it says `ablation_figures`', how that is
shown `ablation_report`'s.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

from rich.console import Console

from dvi.config import load_config, write_provenance
from dvi.decode.precision import dtype_of_run, settle_dtype, weights_of_run
from dvi.progress import doing
from dvi.settings import LearningSettings, SamplingSettings, TrainConfig
from trainers.experiments.ablation_cells import NUM_BLOCKS, AblationArm, CellRunner
from trainers.experiments.ablation_figures import BASELINE, OFFLINE, Cell, read_cell
from trainers.experiments.ablation_report import write_report
from trainers.experiments.cell_folder import CellFolder, with_one_mode
from trainers.learning.loss_schedule import PRESETS

DEFAULT_ARMS = ("kl_only", "kl_pg", "pg_only", "ce_only", "kl_ce", "kl_rl", "lk", *OFFLINE)
RESERVED = ("enabled", "schedule", "budget", "seed")  # fixed by an arm's name, by the seeds, or by the comparison


def parse_arm(name: str, settings: LearningSettings) -> AblationArm:
    """The arm "kind" or "kind:key=value,key=value": settings with the kind's schedule and these changes.

    Steps follow rounds alone, without a budget of time, so that a run can be repeated.
    Raises ValueError for an unknown kind, key or value.
    """
    kind, _, overrides = name.partition(":")
    if kind not in DEFAULT_ARMS:
        raise ValueError(f"an arm must be one of {', '.join(DEFAULT_ARMS)}, alone or with :key=value, got {name!r}")
    changes = [part.strip() for part in overrides.split(",") if part.strip()]
    for change in changes:
        if change.partition("=")[0] in RESERVED:
            raise ValueError(f"an arm must leave {', '.join(RESERVED)} alone, got {name!r}; its name is its schedule")
    fixed = {"enabled": True, "budget": 1.0, "schedule": kind if kind in PRESETS else BASELINE}
    base = [f"{key}={json.dumps(value)}" for key, value in (dataclasses.asdict(settings) | fixed).items()]
    return AblationArm(name, kind, load_config(None, [f"train.{line}" for line in (*base, *changes)]).train)


def run_ablation(
    config: TrainConfig, *, arms: list[str], seeds: list[int], folder: Path, console: Console
) -> dict[str, object]:
    """Runs every arm with every seed that the folder does not hold yet; what report.json holds then.

    arms: names for `parse_arm`. The report is of all cells in the folder, also of arms and seeds that were asked for
    another time; several processes may fill it at once.
    Leaves cells/, config.yaml, provenance.json, report.json, report.md and ablation.png.
    Raises ValueError for unknown arms, settings that do not fit an ablation, and a folder of other settings.
    """
    if not arms or not seeds or min(seeds) < 0:
        raise ValueError(f"an ablation needs at least 1 arm and 1 seed, none of them negative, got {arms} and {seeds}")
    _check_settings(config)
    config = settle_dtype(config, earlier=dtype_of_run(folder), earlier_weights=weights_of_run(folder))
    config = with_one_mode(config)
    plans = [parse_arm(name, config.train) for name in dict.fromkeys(arms)]
    plans.sort(key=lambda arm: arm.name != BASELINE)  # first: the offline controls make as many steps
    results = _Results(config, folder)
    found = {(cell.arm, cell.seed) for cell in results.read_all()}
    wanted = [(arm, seed) for seed in dict.fromkeys(seeds) for arm in plans]
    missing = [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in found]
    for arm, seed in missing:
        if arm.is_offline and (BASELINE, seed) not in found | {(a.name, s) for a, s in wanted}:
            raise ValueError(f"{arm.name} makes as many steps as {BASELINE} of its seed {seed}; ask for {BASELINE} too")
    write_provenance(folder, config)
    if len(missing) < len(wanted):
        console.print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {folder} already")
    if missing:
        _run_cells(config, missing, results, console)
    return write_report(results.read_all(), config, folder, order=DEFAULT_ARMS, console=console)


class _Results:
    """The folder's cells, each bound to the settings that it was made with."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._config = config
        self.store = CellFolder(folder / "cells")

    def name(self, arm: str, seed: int) -> str:
        return f"{re.sub('[^A-Za-z0-9_.=-]', '+', arm)}-{seed}"

    def read(self, arm: str, seed: int) -> Cell | None:
        """None while it is not finished. Raises ValueError for one of other settings."""
        content = self.store.read(self.name(arm, seed), self._settings(arm, seed))
        return None if content is None else read_cell(content)

    def read_all(self) -> list[Cell]:
        settings = [json.loads(path.read_text())["settings"] for path in sorted(self.store.folder.glob("*.json"))]
        return [self.read(one["arm"], one["seed"]) for one in settings]

    def write(self, cell: Cell) -> None:
        settings = self._settings(cell.arm, cell.seed)
        self.store.write(self.name(cell.arm, cell.seed), settings, dataclasses.asdict(cell))

    def _settings(self, arm: str, seed: int) -> dict[str, object]:
        """What the cell's figures depend on; not where it runs or writes, nor what its seed decides."""
        sections = dataclasses.asdict(self._config)
        del sections["output"]
        sections["train"] = dataclasses.asdict(parse_arm(arm, self._config.train).settings)
        flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        for key in ("model.device", "model.num_threads", "train.seed", "data.shuffle_seed", "sampling.seed"):
            del flat[key]
        return {"arm": arm, "seed": seed, "num_blocks": NUM_BLOCKS} | flat


def _run_cells(
    config: TrainConfig, missing: list[tuple[AblationArm, int]], results: _Results, console: Console
) -> None:
    """Runs what no other process works on, then waits for what others do work on."""
    runner = CellRunner(config)
    with doing("ablation", total=len(missing), noun="cells") as stage:
        for is_waiting in (False, True):
            for arm, seed in missing:
                with results.store.claim(results.name(arm.name, seed), wait=is_waiting) as is_ours:
                    if is_ours and results.read(arm.name, seed) is None:
                        _run_cell(runner, arm, seed, results, console)
                        stage.advance(results.read(arm.name, seed) is not None)


def _run_cell(runner: CellRunner, arm: AblationArm, seed: int, results: _Results, console: Console) -> None:
    """Runs and stores a cell, unless it needs another that is not finished yet."""
    start_s = time.monotonic()
    if arm.is_offline:
        baseline = results.read(BASELINE, seed)
        if baseline is None:
            return  # another process works on it: later
        cell = runner.run_offline(arm, seed, baseline.num_steps)
    else:
        cell = runner.run_online(arm, seed)
    results.write(cell)
    console.print(
        f"{arm.name}, seed {seed}: {cell.num_steps} steps, held-out acceptance {cell.after.acceptance:.3f}, MAT "
        f"{cell.after.mean_accepted_tokens:.3f}, {time.monotonic() - start_s:.0f} s",
        soft_wrap=True,
    )


def _check_settings(config: TrainConfig) -> None:
    """Raises ValueError for what would make the arms' data unequal, or leave nothing to compare."""
    free = SamplingSettings(max_new_tokens=config.sampling.max_new_tokens, seed=config.sampling.seed)
    if config.sampling != free:
        raise ValueError(
            "sampling must be greedy, without penalties and stop strings, so that all arms generate the same text, "
            f"got {config.sampling}; set max_new_tokens alone"
        )
    if config.drafter.adapter is not None:
        raise ValueError(f"drafter.adapter must be null: every arm starts untrained, got {config.drafter.adapter!r}")
    if not config.draft.num_draft_tokens or not config.eval.limit:
        raise ValueError(
            "draft.num_draft_tokens and eval.limit must be at least 1, "
            f"got {config.draft.num_draft_tokens} and {config.eval.limit}; try 4 and 48"
        )
    if config.data.dataset is not None and not config.data.limit:
        raise ValueError("data.limit must say how many rows of data.dataset make the traffic, got 0; try 240")
