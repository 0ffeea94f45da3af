"""The one line that a dashboard opens with, for somebody who asks only whether it pays.

Knows the monitor's snapshot; measures nothing.
"""

from __future__ import annotations

from typing import Any


def headline(snapshot: dict[str, Any], *, has_learner: bool) -> str:
    """How much faster than plain decoding, now and when traffic began; what learning takes; what becomes of tokens."""
    return f"{_speed(snapshot)}; {_learning(snapshot, has_learner=has_learner)}; {_tokens(snapshot)}."


def _speed(snapshot: dict[str, Any]) -> str:
    now, when = snapshot["newest"]["speed_up"], "Now"
    if now is None:
        now, when = snapshot["total"]["speed_up"], "Since the start"
    if now is None:
        return "No answers yet to compare with plain decoding"
    first = _at_first(snapshot)
    at_first = "" if first is None else f", {first:.2f}x at first"
    return f"{when} {now:.2f}x as fast as plain decoding{at_first} (estimated)"


def _at_first(snapshot: dict[str, Any]) -> float | None:
    """The mean over as much time as "now" is averaged over, from the first answers on; None where both overlap."""
    course, newest_s = snapshot["since_start"], snapshot["newest_s"]
    known = [(end_s, value) for end_s, value in zip(course["time_s"], course.get("speed_up", ()), strict=False)
             if value is not None]  # fmt: skip
    if not known:
        return None
    end_s = max(known[0][0] - course["bin_s"] + newest_s, known[0][0])
    if end_s > snapshot["time_s"] - newest_s:
        return None
    first = [value for time_s, value in known if time_s <= end_s]
    return sum(first) / len(first)


def _learning(snapshot: dict[str, Any], *, has_learner: bool) -> str:
    if not has_learner:
        return "learning is off"
    share = snapshot["total"]["train_share"]
    return f"{100 * share:.1f} % of time spent learning" if share else "learning begins with traffic"


def _tokens(snapshot: dict[str, Any]) -> str:
    total = snapshot["total"]
    if snapshot["level"] == "lossy":
        return (
            f"LOSSY: {snapshot['verify_rule']} has let {total['num_waived']} of {total['num_accepted']} accepted "
            "tokens pass that the model would not have chosen"
        )
    return "tokens unchanged" if snapshot["level"] == "exact" else "tokens unchanged up to rounding"
