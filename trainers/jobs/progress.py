"""What a person sees of a run: how far it is and how well it goes, and a table at the end.

Knows figures and how progress is shown (`dvi.progress`); computes only sums over the newest requests.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack

from rich.table import Table

from dvi import progress
from dvi.records import RoundStats, UpdateReport
from trainers.jobs.evaluation import Measurement

WINDOW = 50  # newest requests that the shown acceptance is of


class RunDisplay:
    """Context manager around a run's traffic. num_requests is None when nobody knows how many will come.

    doing, noun: what is done, and to what.
    """

    def __init__(
        self, *, num_requests: int | None, num_done: int, doing: str = "serving", noun: str = "requests"
    ) -> None:
        self._window: deque[RoundStats] = deque(maxlen=WINDOW)
        self._num_tokens = 0
        self._stage_settings = {"total": num_requests, "noun": noun, "done": num_done}
        self._doing, self._exits = doing, ExitStack()

    def __enter__(self) -> RunDisplay:
        self._stage = self._exits.enter_context(progress.doing(self._doing, **self._stage_settings))
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.__exit__(*error)

    def finish_request(
        self, stats: RoundStats, report: UpdateReport | None, *, speed_up: float | None, drafter_version: int
    ) -> None:
        """Shows the run after one more request. report: the newest update; speed_up: against plain decoding."""
        self._window.append(stats)
        self._num_tokens += stats.new_tokens
        recent = RoundStats()
        for one in self._window:
            recent.add(one)
        figures = [f"acceptance {recent.acceptance_rate:.2f}", f"MAT {recent.mean_accepted_tokens:.2f}"]
        if speed_up is not None:
            figures.insert(0, f"{speed_up:.2f}x plain with learning")
        if recent.num_waived:
            figures.append(f"{recent.num_waived / recent.num_accepted:.0%} of the accepted by a lossy rule")
        figures += [f"{self._num_tokens:,} tokens", f"drafter v{drafter_version}"]
        if report is not None:
            losses = " ".join(f"{name} {value:.3f}" for name, value in report.losses.items() if _counts(report, name))
            figures.append(f"{report.phase} step {report.step}: {losses}")
        self._stage.advance(figures=", ".join(figures))


def comparison_table(before: Measurement, after: Measurement) -> Table:
    """Held-out figures before and after, side by side."""
    table = Table(
        title=f"{after.num_prompts} held-out requests: speed with policy {after.policy} at batch 1, "
        f"acceptance with {after.num_draft_tokens} drafts a round"
    )
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name, form in (
        ("drafter version", "drafter_version", "d"),
        ("acceptance", "acceptance", ".3f"),
        ("mean accepted tokens", "mean_accepted_tokens", ".2f"),
        ("tokens/s", "tokens_per_s", ".0f"),
        ("plain tokens/s", "plain_tokens_per_s", ".0f"),
        ("speed against plain", "speed_up", ".2f"),
    ):
        table.add_row(label, *(format(getattr(measurement, name), form) for measurement in (before, after)))
    for depth in range(max(len(before.acceptance_per_depth), len(after.acceptance_per_depth))):
        shares = [m.acceptance_per_depth[depth : depth + 1] for m in (before, after)]
        table.add_row(f"acceptance at depth {depth + 1}", *(f"{s[0]:.2f}" if s else "-" for s in shares))
    return table


def _counts(report: UpdateReport, name: str) -> bool:
    """Whether a loss term has weight now."""
    return getattr(report.weights, name, 0.0) > 0
