"""What somebody who waits is told, on a terminal and elsewhere."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from dvi import progress
from dvi.progress import Stage, doing, each, shown_as, shown_on, spoken


def stage(*, total: int | None = 20, done: int = 0, noun: str = "prompts", seconds: Iterator[float] | None = None):
    """A stage whose clock reads a second more at each look, or as `seconds` say."""
    ticks = seconds or map(float, itertools.count())
    return Stage("measuring", total=total, noun=noun, done=done, clock=lambda: next(ticks))


def console(*, is_terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, markup=False, highlight=False)


@pytest.fixture
def slow_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown by itself: what a test sees it has asked for."""
    for period in ("LINE_EVERY_S", "BAR_EVERY_S"):
        monkeypatch.setattr(progress, period, 3600.0)
    monkeypatch.setattr(progress, "LEAST_BAR_S", 0.0)


def test_the_time_left_is_what_the_rest_takes_at_the_pace_so_far():
    """Catches an estimate from nothing, and one that counts what an earlier run had done."""
    fresh = stage(done=10, seconds=iter([0.0, 8.0, 8.0]))
    assert fresh.left_s is None and fresh.time == "8 s so far"
    fresh.advance(2)
    assert fresh.left_s == 8.0 / 2 * 8
    skipped = stage(seconds=iter([0.0, 6.0]))
    skipped.skip(10)
    skipped.advance(2)
    assert skipped.left_s == 6.0 / 2 * 8
    assert stage(total=None).left_s is None


def test_a_line_says_what_how_far_and_how_long_still():
    """Catches a line from which nobody could tell whether to wait."""
    told = stage(total=2400, seconds=iter([0.0, 3.0]))
    told.advance(600, figures="acceptance 0.41")
    assert str(told) == "measuring: 600/2,400 prompts, 9 s left, acceptance 0.41"
    assert str(stage(total=None, noun="", seconds=iter([0.0, 5.0]))) == "measuring, 5 s so far"
    assert str(stage(total=None, done=3, seconds=iter([0.0, 5.0]))) == "measuring: 3 prompts, 5 s so far"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (75, "1 min 15 s"), (1500, "25 min"), (7500, "2 h 5 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str):
    assert spoken(seconds) == text


def test_without_a_place_to_show_it_nothing_is_shown(capfd: pytest.CaptureFixture):
    """Catches a library that writes to its user's streams."""
    with doing("loading", total=2) as under_way:
        under_way.advance(figures="fast")
    assert list(each("ab", "reading", noun="letters")) == ["a", "b"]
    assert capfd.readouterr() == ("", "")


def test_elsewhere_than_on_a_terminal_the_innermost_stage_is_told_of(slow_beat):
    """Catches lines about what waits for something else, and bars in a log."""
    where = console(is_terminal=False)
    with shown_on(where), doing("serving", total=5, noun="requests"):
        with doing("measuring what a round costs"):
            progress._display.tell()
        progress._display.tell()
    told = where.file.getvalue().splitlines()
    assert [line.partition(",")[0] for line in told] == ["measuring what a round costs", "serving: 0/5 requests"]


def test_lines_come_by_themselves_while_nothing_advances(monkeypatch: pytest.MonkeyPatch):
    """Catches a silence as long as the longest unit of work."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    is_told = threading.Event()

    class Ear(io.StringIO):
        def write(self, text: str) -> int:
            if "loading a model" in text:
                is_told.set()
            return len(text)

    with shown_on(Console(file=Ear(), force_terminal=False)), doing("loading a model"):
        assert is_told.wait(timeout=60)


@pytest.mark.parametrize("figures", ["", "acceptance 0.41, MAT 2.31, 123,456 tokens, drafter v12, kl step 42"])
def test_a_bar_keeps_its_count_and_its_time_left_at_80_columns(slow_beat, figures: str):
    """Catches figures that push the estimate off the screen."""
    where = console(is_terminal=True)
    with shown_on(where), doing("measuring the drafter as it is", total=1200, noun="prompts") as under_way:
        under_way.advance(600, figures=figures)
        drawn = where.file.getvalue().splitlines()[-1]
    assert "measuring the drafter as it is" in drawn and "600/1,200" in drawn and " left" in drawn


def test_the_terminal_is_left_as_it_was(slow_beat):
    """Catches a cursor that stays hidden, and bars that stay after an error."""
    where = console(is_terminal=True)
    with pytest.raises(ValueError), shown_on(where), doing("loading"):
        raise ValueError
    written = where.file.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0 and progress._display is None


def test_a_function_is_shown_while_it_runs(slow_beat):
    """Catches a decorator that changes what it decorates, and words that cannot name the arguments."""
    where = console(is_terminal=False)

    @shown_as(lambda name, **_: f"loading {name}")
    def load(name: str, *, look: Callable[[], None]) -> str:
        """Gives the name."""
        look()
        return name

    with shown_on(where):
        assert load("MODEL", look=lambda: progress._display.tell()) == "MODEL"
    assert load.__doc__ == "Gives the name." and where.file.getvalue().startswith("loading MODEL, ")


def test_an_item_counts_when_the_body_has_done_with_it(slow_beat):
    """Catches a count that runs ahead of the work."""
    where = console(is_terminal=False)
    with shown_on(where):
        for _ in each(range(2), "reading", noun="rows"):
            progress._display.tell()
    assert [line.partition(",")[0] for line in where.file.getvalue().splitlines()] == [
        "reading: 0/2 rows", "reading: 1/2 rows",
    ]  # fmt: skip


def test_the_display_of_a_process_is_silent_between_stages(slow_beat):
    """Catches a server whose log fills while it serves."""
    where = console(is_terminal=False)
    with shown_on(where):
        progress._display.tell()
    assert where.file.getvalue() == ""
