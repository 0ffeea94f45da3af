"""What a machine takes for the parts of a serving step: seconds measured once, and kept by the machine's fingerprint.

Knows seconds, grids and a JSON file; measures nothing and imports no torch, see `dvi.planning.measurement`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi.measured import cache_folder, measured_path
from dvi.whole_files import write_whole

FORMAT = 1
Grid = tuple  # nested tuples of seconds, as they lie in JSON

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassSeconds:
    """Medians of what passes took, cut at one split layer and run by one number of processes.

    contexts       two numbers of positions that were cached before the passes began, ascending.
    rows, draft_tokens  of the rounds, ascending; draft_tokens begins with 0.
    round_s        [contexts][rows][draft_tokens]: one whole round, from the first draft to the committed tokens.
    widths         positions of one prefill pass, ascending; more are read in several of the widest.
    prefill_s      [contexts][widths]: of one row.
    Between measurements linear, and beyond the last as from the last but one to the last.
    """

    contexts: tuple[int, int]
    rows: tuple[int, ...]
    draft_tokens: tuple[int, ...]
    round_s: Grid
    widths: tuple[int, ...]
    prefill_s: Grid

    def __post_init__(self) -> None:
        for name in ("contexts", "rows", "draft_tokens", "widths"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must ascend, got {values}")
        for name, shape in (
            ("round_s", (len(self.contexts), len(self.rows), len(self.draft_tokens))),
            ("prefill_s", (len(self.contexts), len(self.widths))),
        ):
            seconds = np.array(getattr(self, name), dtype=np.float64)
            if seconds.shape != shape or not (seconds > 0).all() or not np.isfinite(seconds).all():
                raise ValueError(f"{name} must hold positive seconds in a grid of {shape}, got one of {seconds.shape}")

    def rounds(self, max_rows: int, num_draft_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a round by rows 0..max_rows with nothing cached, and what each cached position adds, both [B + 1].

        More rows never take less: where they were measured so, that was noise.
        """
        near_CB = np.array([
            [_line(num_draft_tokens, self.draft_tokens, by_length) for by_length in by_rows] for by_rows in self.round_s
        ])
        return self._at_no_context([_line(np.arange(1, max_rows + 1), self.rows, by_rows) for by_rows in near_CB])

    def prefill(self, max_width: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds to read 0..max_width positions of a row with nothing cached, and what each cached position adds."""
        widest = self.widths[-1]
        base_W, growth_W = self._at_no_context(
            [_line(np.arange(1, widest + 1), self.widths, by_width) for by_width in self.prefill_s]
        )
        num_full, rest = np.divmod(np.arange(max_width + 1), widest)
        behind = widest * growth_W[widest] * num_full * (num_full - 1) / 2 + widest * num_full * growth_W[rest]
        return num_full * base_W[widest] + base_W[rest] + behind, num_full * growth_W[widest] + growth_W[rest]

    def _at_no_context(self, seconds_CX: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """[X + 1] seconds at context 0, and seconds per cached position, of nothing, 1 .. X; neither ever falls."""
        few, many = self.contexts
        growth_X = np.maximum.accumulate(np.maximum((seconds_CX[1] - seconds_CX[0]) / (many - few), 0.0))
        # Growth that leaves nothing of the pass is noise.
        base_X = np.maximum.accumulate(np.maximum(seconds_CX[0] - few * growth_X, seconds_CX[0] / 2))
        return np.append(0.0, base_X), np.append(0.0, growth_X)


def _line(x: np.ndarray | int, measured: tuple[int, ...], seconds: np.ndarray) -> np.ndarray:
    """`seconds` at x, linear between and beyond the measured places; a single one serves everywhere."""
    if len(measured) == 1:
        return np.full(np.shape(x), seconds[0], dtype=np.float64)
    slope = max((seconds[-1] - seconds[-2]) / (measured[-1] - measured[-2]), 0.0)
    return np.interp(x, measured, seconds) + slope * np.maximum(np.asarray(x) - measured[-1], 0)


@dataclass(frozen=True)
class Overheads:
    """Seconds that a step of the engine takes beside its passes: of each step, decoding row, new token and request."""

    step_s: float = 0.0
    row_s: float = 0.0
    token_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True)
class LatencyProfile:
    """What passes take, by (split layer, tensor-parallel degree), and what the engine adds.

    fingerprint  what it was measured on, see `dvi.planning.measurement.fingerprint_of`; another one measures anew.
    """

    passes: Mapping[tuple[int, int], PassSeconds]
    overheads: Overheads = Overheads()
    fingerprint: Mapping[str, str | int | float | bool | None] = dataclasses.field(default_factory=dict)

    @property
    def split_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.passes}))

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(sorted({degree for _, degree in self.passes}))

    def of(self, split_layer: int, tensor_parallel: int) -> PassSeconds:
        """Raises ValueError for a pair that was not measured."""
        if (split_layer, tensor_parallel) not in self.passes:
            known = ", ".join(f"{layer} with {degree}" for layer, degree in sorted(self.passes))
            raise ValueError(
                f"split_layer {split_layer} with tensor_parallel {tensor_parallel} must be measured first; there are "
                f"{known or 'none'}"
            )
        return self.passes[split_layer, tensor_parallel]

    def with_passes(self, passes: Mapping[tuple[int, int], PassSeconds]) -> LatencyProfile:
        """The same with more passes, or newer ones."""
        return dataclasses.replace(self, passes={**self.passes, **passes})

    def to_json(self) -> dict[str, object]:
        return {
            "format": FORMAT, "fingerprint": dict(self.fingerprint), "overheads": dataclasses.asdict(self.overheads),
            "passes": [
                {"split_layer": layer, "tensor_parallel": degree, **dataclasses.asdict(seconds)}
                for (layer, degree), seconds in sorted(self.passes.items())
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict) -> LatencyProfile:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        if data["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {data['format']}")
        passes = {}
        for entry in data["passes"]:
            key = entry.pop("split_layer"), entry.pop("tensor_parallel")
            passes[key] = PassSeconds(**{name: _frozen(value) for name, value in entry.items()})
        return cls(passes, Overheads(**data["overheads"]), data["fingerprint"])


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


# The cache


def default_folder() -> Path:
    """Where profiles are kept if nobody says."""
    return cache_folder("profiles")


def profile_path(folder: Path, fingerprint: Mapping[str, object]) -> Path:
    return measured_path(folder, fingerprint)


def read_profile(folder: Path, fingerprint: Mapping[str, object]) -> LatencyProfile | None:
    """The profile that was measured on the same; None where there is none, or, with a warning, where it is damaged."""
    path = profile_path(folder, fingerprint)
    try:
        profile = LatencyProfile.from_json(json.loads(path.read_text(encoding="utf-8")))
        if profile.fingerprint != fingerprint:
            raise ValueError("it is of another machine or model")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is no profile (%s: %s); it is measured anew", path, type(error).__name__, error)
        return None
    return profile


def write_profile(folder: Path, profile: LatencyProfile) -> Path:
    """Writes it where `read_profile` finds it, whole or not at all. Raises OSError when the disk refuses."""
    path = profile_path(folder, profile.fingerprint)
    write_whole(path, json.dumps(profile.to_json(), indent=1, allow_nan=False))
    return path
