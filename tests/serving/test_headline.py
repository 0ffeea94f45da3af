"""The first line of dashboard and terminal: does it pay, what does it cost, are the tokens the model's."""

from __future__ import annotations

from dvi.serving.metrics.headline import headline


def snapshot(*, now=None, course=(), train_share=None, level="fast", **total):
    """A server's after ten minutes; course: its speed-ups, a value every ten seconds since the start."""
    return {
        "time_s": 1600.0, "newest_s": 30.0, "newest": {"speed_up": now},
        "since_start": {"bin_s": 10.0, "time_s": [1010.0 + 10 * at for at in range(len(course))],
                        "speed_up": list(course)},
        "level": level, "verify_rule": "margin 0.9" if level == "lossy" else "strict",
        "total": {"speed_up": None, "train_share": train_share, "num_waived": 0, "num_accepted": 0} | total,
    }  # fmt: skip


def line(*, has_learner=True, **figures):
    return headline(snapshot(**figures), has_learner=has_learner)


def test_the_line_tells_speed_now_and_at_first_the_share_of_learning_and_what_is_promised():
    """Catches a line from which nobody can tell whether it pays, and a start that is one noisy moment."""
    assert line(now=1.51, course=[None, 0.9, 1.0, 1.1, 1.5], train_share=0.048) == (
        "Now 1.51x as fast as plain decoding, 1.00x at first (estimated); 4.8 % of time spent learning; "
        "tokens unchanged up to rounding."
    )
    assert line(now=1.0, level="exact").endswith("; tokens unchanged.")


def test_without_traffic_no_speed_is_claimed():
    """Catches a figure made up of nothing, and one of long ago that is told as of now."""
    assert line() == (
        "No answers yet to compare with plain decoding; learning begins with traffic; tokens unchanged up to rounding."
    )
    assert "Since the start 1.20x as fast as plain decoding, 0.90x at first" in line(speed_up=1.2, course=[0.9])


def test_a_start_that_is_still_now_is_not_told_twice():
    """Catches two averages over the same seconds that pass for progress."""
    young = snapshot(now=1.2, course=[1.0, 1.3]) | {"time_s": 1025.0}
    assert "Now 1.20x as fast as plain decoding (estimated);" in headline(young, has_learner=True)


def test_a_server_that_does_not_learn_says_so():
    """Catches a promise of learning where there is none."""
    assert "; learning is off; " in line(has_learner=False, now=1.0)


def test_a_lossy_rule_is_said_in_the_first_line():
    """Catches a speed that is shown without its price."""
    text = line(now=2.0, level="lossy", num_waived=7, num_accepted=90)
    assert "LOSSY: margin 0.9 has let 7 of 90 accepted tokens pass" in text and "unchanged" not in text
