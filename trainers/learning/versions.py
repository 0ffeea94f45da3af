"""The published versions of a drafter: the record of each, and the weights of the last few and of the best.

Knows states and numbers; knows nothing of learning or publishing.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from dvi.records import DrafterVersion

State = dict[str, Tensor]

# Weights kept of the newest versions, the live one among them, on the drafter's device: what an administrator may want
# back is a few publishes old, and each costs a drafter's memory.
KEPT_VERSIONS = 8
LISTED_VERSIONS = 256  # records kept, a hundred bytes each: the list must not grow with the age of the server


@dataclass(frozen=True)
class Snapshot:
    """A drafter's weights as they once were; nobody writes to `state`. See DrafterVersion for the other fields."""

    state: State
    step: int
    canary_score: float | None = None


class VersionHistory:
    """What was published so far, oldest first. `best` is the snapshot to return to, whether or not it was published."""

    def __init__(self, best: Snapshot) -> None:
        self.best = best
        self._records: list[DrafterVersion] = []
        self._snapshots: dict[int, Snapshot] = {}

    def add(self, version: int, snapshot: Snapshot, source: str) -> None:
        """Notes that `version`, higher than any before, is live from now on."""
        self._records.append(
            DrafterVersion(
                version=version, created_s=time.time(), source=source, step=snapshot.step,
                canary_score=snapshot.canary_score, is_live=True, is_kept=True,
            )
        )  # fmt: skip
        del self._records[:-LISTED_VERSIONS]
        self._snapshots[version] = snapshot
        newest = [record.version for record in self._records[-KEPT_VERSIONS:]]
        self._snapshots = {v: s for v, s in self._snapshots.items() if v in newest or s is self.best}

    def snapshot(self, version: int) -> Snapshot:
        """Raises ValueError when the weights of this version are not kept."""
        if version not in self._snapshots:
            kept = ", ".join(map(str, sorted(self._snapshots)))
            raise ValueError(f"version must be one whose weights are kept, {kept}; got {version}")
        return self._snapshots[version]

    def drop_weights(self) -> None:
        """Forgets every version's weights: they no longer fit the drafter. The records stay."""
        self._snapshots.clear()

    def records(self) -> list[DrafterVersion]:
        live = self._records[-1].version
        return [
            replace(record, is_live=record.version == live, is_kept=record.version in self._snapshots)
            for record in self._records
        ]

    def state_dict(self) -> dict[str, object]:
        """The records and the best weights. Other weights stay out: they would be most of a checkpoint."""
        return {
            "records": [asdict(record) for record in self._records],
            "best": dict(vars(self.best)),
            "best_versions": [v for v, snapshot in self._snapshots.items() if snapshot is self.best],
        }

    def load_state_dict(self, state: dict[str, object], live_state: State) -> None:
        """live_state: the weights of the newest version; of the older ones only those of the best come back."""
        best = state["best"]
        self.best = Snapshot(**best | {"state": {name: tensor.clone() for name, tensor in best["state"].items()}})
        self._records = [DrafterVersion(**record) for record in state["records"]]
        self._snapshots = {version: self.best for version in state["best_versions"]}
        live = self._records[-1]
        self._snapshots.setdefault(live.version, Snapshot(live_state, live.step, live.canary_score))
