"""The one line that a dashboard opens with, for somebody who asks only whether it pays.

Knows the monitor's snapshot; measures nothing.
"""

from __future__ import annotations

from typing import Any


def headline(snapshot: dict[str, Any]) -> str:
    """How much faster than plain decoding, now and when traffic began; what learning takes; what becomes of tokens."""
    return f"{_speed(snapshot)}; {_learning(snapshot)}; {_tokens(snapshot)}."


def _speed(snapshot: dict[str, Any]) -> str:
    now, first = snapshot["newest"]["speed_up"], _first(snapshot["since_start"].get("speed_up", []))
    if now is None and first is None:
        return "No answers yet to compare with plain decoding"
    if now is None:
        now, when = snapshot["total"]["speed_up"], "since the start"
    else:
        when = "now"
    at_first = "" if first is None else f", {first:.2f}x at the start"
    return f"{now:.2f}x the speed of plain decoding {when} (estimated){at_first}"


def _learning(snapshot: dict[str, Any]) -> str:
    share = snapshot["total"]["train_share"]
    return "no time spent learning" if not share else f"{100 * share:.1f} % of all time spent learning"


def _tokens(snapshot: dict[str, Any]) -> str:
    total = snapshot["total"]
    if snapshot["level"] == "lossy":
        return (
            f"LOSSY: {snapshot['verify_rule']} has let {total['num_waived']} of {total['num_accepted']} accepted "
            "tokens pass that the model would not have chosen"
        )
    promise = "the same token ids" if snapshot["level"] == "exact" else "the same up to rounding"
    return f"tokens unchanged ({snapshot['level']}: {promise})"


def _first(values: list[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)
