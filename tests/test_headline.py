"""The first line of dashboard and terminal: does it pay, what does it cost, are the tokens the model's."""

from __future__ import annotations

from dvi.serving.headline import headline


def snapshot(*, now=None, course=(), train_share=None, level="fast", **total):
    return {
        "newest": {"speed_up": now}, "since_start": {"speed_up": list(course)}, "level": level,
        "verify_rule": "margin 0.9" if level == "lossy" else "strict",
        "total": {"speed_up": 1.2, "train_share": train_share, "num_waived": 0, "num_accepted": 0} | total,
    }  # fmt: skip


def test_the_line_tells_speed_now_and_at_first_the_share_of_learning_and_what_is_promised():
    """Catches a line from which nobody can tell whether it pays."""
    assert headline(snapshot(now=1.51, course=[None, 0.98, 1.5], train_share=0.048)) == (
        "1.51x the speed of plain decoding now (estimated), 0.98x at the start; 4.8 % of all time spent learning; "
        "tokens unchanged (fast: the same up to rounding)."
    )
    assert "the same token ids" in headline(snapshot(now=1.0, level="exact"))


def test_without_traffic_no_speed_is_claimed():
    """Catches a figure made up of nothing, and one of long ago that is told as of now."""
    assert headline(snapshot()).startswith("No answers yet")
    assert "1.20x the speed of plain decoding since the start" in headline(snapshot(course=[0.9]))


def test_a_lossy_rule_is_said_in_the_first_line():
    """Catches a speed that is shown without its price."""
    line = headline(snapshot(now=2.0, level="lossy", num_waived=7, num_accepted=90))
    assert "LOSSY: margin 0.9 has let 7 of 90 accepted tokens pass" in line and "unchanged" not in line
