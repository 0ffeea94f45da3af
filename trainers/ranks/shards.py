"""The parts of a run that its ranks keep, and how a resumed run, of as many ranks or others, deals them out again.

Knows folders, checkpoints and ranks; of what a checkpoint holds only its replay, its place in the traffic and its
counts. Rank 0 keeps the run's folder, with what all ranks have alike; rank 3 keeps ranks/rank-0003 in it, on whatever
machine it is: a machine sees the folders of its own ranks, or of all where they share a disk. A launcher may give the
ranks to the machines in another order than before, so a machine may also see what was once a rank's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from dvi.distributed import SOLO, Peers
from trainers.learning.checkpoint import pack, peek, read_checkpoint, unpack, whole_steps

CHECKPOINTS, RANKS = "checkpoints", "ranks"
_NOTHING = torch.zeros(0, dtype=torch.uint8)


def rank_folder(folder: Path, rank: int) -> Path:
    """Where a rank of the run in `folder` keeps its own."""
    return folder if rank == 0 else folder / RANKS / f"rank-{rank:04d}"


@dataclass
class SavedRun:
    """What a resumed rank starts from.

    state       rank 0's checkpoint without its replay, the same on all ranks.
    own         this rank's checkpoint, where the run had as many ranks and each has its own again; else None.
    replays     else saved replays, (state, part, num_parts): of each every num_parts-th segment from `part` on.
    taken_over  and the trainers' states of the earlier ranks whose counts are this rank's now.
    places      of all earlier ranks: "first_open", "done_ahead" and "counts".
    steps       of all earlier ranks: the number of the checkpoint that was taken; later ones are void.
    """

    state: dict[str, object]
    own: dict[str, object] | None = None
    replays: list[tuple[dict, int, int]] = field(default_factory=list)
    taken_over: list[dict] = field(default_factory=list)
    places: dict[int, dict] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)


def load_saved(folder: Path, peers: Peers, *, is_dedicated: bool = False) -> SavedRun | None:
    """What the earlier run in the folder left, with every rank's part in it; None on all ranks where there was none.

    is_dedicated: rank 0 learns for all, so it alone has use for replays.
    Waits for all ranks, and for each to have opened its store. Raises ValueError when rank 0's part is gone.
    """
    seen = {rank: whole_steps(where / CHECKPOINTS) for rank, where in _rank_folders(folder)}
    num_ranks = {step: peek(folder / CHECKPOINTS, step, "num_ranks") for step in seen.get(0, ())}
    views = peers.exchange({"seen": list(seen.items()), "num_ranks": list(num_ranks.items())})
    steps_by_seer = [dict(map(tuple, view["seen"])) for view in views]
    steps: dict[int, set[int]] = {}
    for rank, numbers in (item for seen in steps_by_seer for item in seen.items() if item[1]):
        steps.setdefault(rank, set()).update(numbers)
    if not steps:
        return None
    if 0 not in steps:
        raise ValueError(
            f"output.folder {folder} holds parts of a run and no machine has that of rank 0; put it back, or choose "
            "another folder"
        )
    chosen = _choose_steps(steps, {step: number for view in views for step, number in view["num_ranks"]})
    # Not all that see a rank's folder see the same one.
    found = {
        rank: [seer for seer, seen in enumerate(steps_by_seer) if step in seen.get(rank, ())]
        for rank, step in chosen.items()
    }

    def read(rank: int) -> dict[str, object]:
        return read_checkpoint(rank_folder(folder, rank) / CHECKPOINTS, chosen[rank])

    mine = {rank: read(rank) for rank in chosen if peers.rank in found[rank]}
    # The first that sees a part tells the others what it says; of rank 0's also all that ranks have alike.
    told = [
        (rank, {key: state.get(key) for key in ("first_open", "done_ahead", "counts")})  # a server has none
        for rank, state in mine.items() if found[rank][0] == peers.rank
    ]  # fmt: skip
    places = {rank: place for told in peers.exchange(told) for rank, place in told}
    is_teller = found[0][0] == peers.rank
    messages = peers.exchange_bytes(pack(_without_replay(mine[0])) if is_teller else _NOTHING)
    saved = SavedRun(unpack(messages[found[0][0]]), places=places, steps=chosen)
    is_same = len(chosen) == peers.num_ranks and all(rank in found[rank] for rank in chosen)
    is_same = is_same and saved.state.get("is_dedicated", False) == is_dedicated
    if is_same and len(set(chosen.values())) == 1:
        saved.own = mine[peers.rank]
        return saved
    for rank, state in mine.items():
        takers = [seer for seer in found[rank] if seer == 0 or not is_dedicated]
        if state["trainer"] is not None and peers.rank in takers:
            part = takers.index(peers.rank)
            if "replay" in state["trainer"]:  # a server may keep it out of its files
                saved.replays.append((state["trainer"]["replay"], part, len(takers)))
            if part == 0:
                saved.taken_over.append(state["trainer"])
    return saved


def load_alike(folder: Path, processes: Peers) -> SavedRun | None:
    """What the earlier run in the first process's folder left, for processes that are one rank together: all of it."""
    if processes.is_alone:
        return load_saved(folder, processes)
    saved = load_saved(folder, SOLO) if processes.is_first else None
    told, *_ = processes.exchange_bytes(_NOTHING if saved is None else pack(vars(saved)))
    return SavedRun(**unpack(told)) if len(told) else None


def _rank_folders(folder: Path) -> list[tuple[int, Path]]:
    numbered = sorted((folder / RANKS).glob("rank-*"))
    return [(0, folder), *((int(path.name.removeprefix("rank-")), path) for path in numbered)]


def _choose_steps(steps: dict[int, set[int]], num_ranks: dict[int, int | None]) -> dict[int, int]:
    """The checkpoint to take of each rank: the newest that all have, else of each its newest."""
    for step in sorted(steps[0], reverse=True):
        ranks = range(num_ranks[step] or 1)  # none in one saved before there were several
        if all(step in steps.get(rank, ()) for rank in ranks):
            return dict.fromkeys(ranks, step)
    newest = max(steps[0])
    return {rank: max(steps[rank]) for rank in range(num_ranks[newest] or 1) if rank in steps}


def _without_replay(state: dict[str, object]) -> dict[str, object]:
    trainer = state["trainer"]
    if trainer is not None:
        trainer = {key: value for key, value in trainer.items() if key != "replay"}
    return state | {"trainer": trainer}
