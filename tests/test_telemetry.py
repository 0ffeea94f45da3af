"""Metrics survive crashes and bad numbers; the picture shows what was measured."""

import json
import math

import pytest

from dvi.telemetry import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, read_metrics, running_mean


def request(tokens_seen, acceptance):
    return {
        "event": "request",
        "tokens_seen": tokens_seen,
        "acceptance": acceptance,
        "mean_accepted_tokens": 1 + 3 * acceptance,
    }


def test_an_event_is_readable_before_the_writer_is_closed(tmp_path):
    """Catches buffered lines, lost when the process is killed."""
    writer = MetricsWriter(tmp_path)
    writer.write("update", step=3, losses={"forward_kl": 1.25})
    (event,) = read_metrics(tmp_path / METRICS_FILE)
    assert event.pop("time_s") > 0
    assert event == {"event": "update", "step": 3, "losses": {"forward_kl": 1.25}}
    writer.close()


def test_a_second_writer_appends_after_a_torn_line(tmp_path):
    """Catches a resumed run that truncates the file, or glues its first event to the killed run's last."""
    (tmp_path / METRICS_FILE).write_text('{"event": "update", "step": 1}\n{"event": "upd', encoding="utf-8")
    writer = MetricsWriter(tmp_path)
    writer.write("update", step=2)
    writer.close()
    assert [event["step"] for event in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]


@pytest.mark.parametrize("replaces", [False, True], ids=["removed", "replaced"])
def test_a_folder_that_goes_missing_is_made_again(tmp_path, replaces):
    """Catches events that go on to a file which no name leads to any more, and one that is gone with its folder."""
    folder = tmp_path / "run"
    writer = MetricsWriter(folder)
    writer.write("update", step=1)
    folder.rename(tmp_path / "away")
    if replaces:
        folder.mkdir()
        (folder / METRICS_FILE).write_text('{"event": "upd', encoding="utf-8")
    for step in (2, 3):
        writer.write("update", step=step)
    writer.close()
    assert [event["step"] for event in read_metrics(folder / METRICS_FILE)] == [2, 3]
    assert [event["step"] for event in read_metrics(tmp_path / "away" / METRICS_FILE)] == [1]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """Catches NaN and Infinity in the file, which strict JSON readers refuse."""
    writer = MetricsWriter(tmp_path)
    writer.write("update", step=1, losses={"kl": math.nan}, norms=[math.inf, 2.0])
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    event = json.loads((tmp_path / METRICS_FILE).read_text(encoding="utf-8"), parse_constant=refuse)
    assert event["losses"] == {"kl": None} and event["norms"] == [None, 2.0]


def test_tensorboard_holds_every_number_of_a_request_over_tokens_and_of_an_update_over_steps(tmp_path):
    """Catches dropped nested losses, strings sent as scalars, and a horizontal axis that only counts calls."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write("update", step=7, phase="kl", losses={"forward_kl": 1.5})
    writer.write("request", tokens_seen=120, acceptance=0.25)
    writer.write("note", text="not a curve")
    writer.close()
    board = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    board.Reload()
    points = {tag: [(point.step, point.value) for point in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert points == {
        "update/step": [(7, 7.0)],
        "update/losses/forward_kl": [(7, 1.5)],
        "request/tokens_seen": [(120, 120.0)],
        "request/acceptance": [(120, 0.25)],
    }


def test_the_running_mean_covers_the_window_and_what_exists_of_it_at_the_start():
    """Catches an off-by-one window and a first value divided by the whole window."""
    assert running_mean([2.0, 4.0, 6.0, 0.0], 3) == pytest.approx([2.0, 3.0, 4.0, 10 / 3])  # sums in float64
