"""The sweep: what a cell measures, what a second start leaves alone, and what the report makes of it."""

import json

import pytest
from matplotlib.image import imread
from rich.console import Console

from dvi.config import load_config
from dvi.decode.construction import build_speculator
from tests.support.paths import STORIES
from trainers.experiments import sweep as sweep_module
from trainers.experiments.sweep import measure_live, run_sweep, speed_law
from trainers.experiments.sweep_report import make_report, pick, plot_sweep, to_markdown, verdict

ROWS = [
    {"prompt": text}
    for text in ("Once upon a time", "Lily and Tom went", "One day a bird", "The sun was", "A big bear", "Ben had a")
] + [{"prompt": "The little dog", "split": "eval"}, {"prompt": "Mia saw a", "split": "eval"}]
GRID = {"split_layers": [0, 1], "draft_lengths": [3, 1], "ranks": [4], "draft_vocab_sizes": [64]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Makes settings of a sweep that takes seconds."""
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(**overrides):
        values = {
            "model.path": STORIES, "model.device": "cpu", "data.prompts": prompts, "drafter.anchor_hidden": 16,
            "sampling.max_new_tokens": 24, "eval.limit": 2, "eval.max_new_tokens": 16, "train.schedule": "kl_only",
            "train.blocks_per_step": 4,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return load_config(None, [f"{name}={value}" for name, value in values.items()])

    return make


def sweep(config, folder, **changes):
    return run_sweep(config, **(GRID | changes), folder=folder, console=Console(quiet=True))


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """A finished sweep of two cells: its folder and its report."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(settings(), folder)


def row(value, *, low=None, high=None, split_layer=1, length=4, rank=32, size=0):
    """A row as a report has it; value None: nothing could be measured."""
    measured = None if value is None else {"value": value, "low": low or value, "high": high or value, "num_samples": 9}
    return {
        "split_layer": split_layer, "rank": rank, "draft_vocab_size": size, "num_draft_tokens": length,
        "measured": measured, "measured_over_predicted": None if value is None else value / 1.25, "predicted": 1.25,
        "mean_accepted_tokens": 2.0, "acceptance_per_depth": [0.6, 0.4], "verify_v": 1.2, "num_mismatches": 0,
    }  # fmt: skip


def canned_cell(rows, **place):
    machine = {"cpu": "a CPU", "cores": 2, "date": "2026-01-01", "load": 0.5}
    cell = {"steps": 9, "train_s": 1.0, "plain_ms": 2.0, "draft_step_c": 0.1, "machine": machine}
    return cell | place | {"lengths": [{k: v for k, v in one.items() if k not in place} for one in rows]}


CONDITIONS = {
    "model": "a-model", "num_layers": 16, "dtype": "float32", "mode": "fast", "drafter": "anchored", "lr": 1e-3,
    "schedule": "kl_only", "seed": 0, "training_prompts": 6, "training_tokens": 144, "held_out_prompts": 2,
    "held_out_tokens": 32, "batch": 1, "sampling": "greedy", "command": "dvi bench sweep a.yaml",
}  # fmt: skip


def test_the_speed_law_is_what_one_computes_by_hand():
    """Catches drafts that are paid for once a round, or verification that is free."""
    # 2.4 tokens for 4 draft steps of a quarter and a verification of 1.4 plain steps: 2.4 / (4 * 0.25 + 1.4)
    assert speed_law(2.4, num_draft_tokens=4, draft_step_c=0.25, verify_v=1.4) == 1.0
    assert speed_law(1.0, num_draft_tokens=0, draft_step_c=0.25, verify_v=1.0) == 1.0


def test_every_cell_learns_is_trimmed_and_is_measured_at_every_length(done):
    """Catches a grid with holes, a cell that never made a step, and an acceptance of other drafts than it says."""
    folder, report = done
    places = {(found["split_layer"], found["num_draft_tokens"]) for found in report["rows"]}
    assert places == {(0, 1), (0, 3), (1, 1), (1, 3)} and len(report["rows"]) == 4
    assert sorted(path.name for path in (folder / "cells").glob("*.json")) == [
        "split0_rank4_vocab64.json", "split1_rank4_vocab64.json"
    ]
    for found in report["rows"]:
        assert found["steps"] > 0 and found["num_mismatches"] == 0
        assert len(found["acceptance_per_depth"]) <= found["num_draft_tokens"]
        assert 1 <= found["mean_accepted_tokens"] <= found["num_draft_tokens"] + 1
        assert found["predicted"] == speed_law(
            found["mean_accepted_tokens"], num_draft_tokens=found["num_draft_tokens"],
            draft_step_c=found["draft_step_c"], verify_v=found["verify_v"],
        )
        assert found["measured_over_predicted"] == found["measured"]["value"] / found["predicted"]
        assert found["measured"]["num_samples"] == 2
    assert report["conditions"]["training_prompts"] == 6 and report["conditions"]["held_out_prompts"] == 2


def test_a_second_start_measures_only_what_is_missing(settings, done, monkeypatch):
    """Catches finished cells and decoded texts thrown away, and a report without the old cells."""
    folder, report = done
    cells = {path: path.read_bytes() for path in (folder / "cells").glob("*.json")}
    filled, fill = [], sweep_module._fill
    monkeypatch.setattr(sweep_module, "decode_answers", None)
    monkeypatch.setattr(sweep_module, "_fill", lambda *args, **rest: filled.append(args) or fill(*args, **rest))
    again = sweep(settings(), folder)
    assert not filled and again["rows"] == report["rows"]
    wider = sweep(settings(), folder, split_layers=[0, 1, 2])
    assert len(filled) == 1 and len(wider["rows"]) == 6
    assert all(path.read_bytes() == content for path, content in cells.items())


def test_a_folder_of_other_settings_is_refused(settings, done):
    """Catches a heat map whose cells learnt from different texts or with different blocks."""
    with pytest.raises(ValueError, match=r"train\.lr = 0\.001, now it is 0\.01"):
        sweep(settings(train__lr=0.01), done[0])
    with pytest.raises(ValueError, match=r"draft_lengths = \[1, 3\], now it is \[2\]"):
        sweep(settings(), done[0], draft_lengths=[2])


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"split_layers": [0, 5]}, {}, r"split layers must be in 0\.\.4 for this model, got \[0, 5\]"),
        ({"draft_vocab_sizes": [600]}, {}, r"draft vocabularies must be in 0\.\.512"),
        ({"draft_lengths": [0, 2]}, {}, r"draft lengths must be in 1\.\.16, got \[0, 2\]"),
        ({"ranks": []}, {}, "must each name at least one"),
        ({}, {"sampling__temperature": 1.0}, "sampling.temperature=0"),
        ({}, {"eval__limit": 0}, "eval.limit must be at least 1"),
        ({}, {"eval__max_new_tokens": 3}, "longer than the longest draft of 3"),
        ({"split_layers": [0]}, {"train__blocks_per_step": 4096}, "data must hold enough answers"),
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(settings, tmp_path, changes, overrides, message):
    """Catches a sweep that fails at its last cell, and one that reports drafters which learnt nothing."""
    with pytest.raises(ValueError, match=message):
        sweep(settings(**overrides), tmp_path, **changes)


def test_outputs_that_differ_from_plain_decoding_are_left_out_and_counted(settings, monkeypatch):
    """Catches a ratio over different texts, which says nothing."""
    speculator = build_speculator(settings())
    prompts = [speculator.encode(text) for text in ("Once upon a time", "The sun was")]
    found = measure_live(speculator, prompts, [2], max_new_tokens=8)[2]
    assert found.num_mismatches == 0 and found.speed_up.num_samples == 2
    generate = speculator.generate

    def wrong_with_drafts(prompts, params, *, policy, **options):
        for result in generate(prompts, params, policy=policy, **options):
            if policy.buckets[0]:
                result.token_ids[-1] += 1
            yield result

    monkeypatch.setattr(speculator, "generate", wrong_with_drafts)
    found = measure_live(speculator, prompts, [2], max_new_tokens=8)[2]
    assert (found.num_mismatches, found.speed_up) == (2, None)


def test_the_pick_is_the_fastest_and_within_the_noise_the_shallowest_then_the_shortest():
    """Catches a default chosen by luck where a cheaper one is as fast, and one that is cheap and slower."""
    fastest = row(1.5, low=1.4, high=1.6, split_layer=2, length=6)
    as_fast, shorter = row(1.45, length=4), row(1.41, length=2)
    slower = row(1.39, split_layer=0, length=2)
    assert pick([fastest, slower]) == fastest
    assert pick([slower, as_fast, fastest]) == as_fast
    assert pick([slower, as_fast, shorter, fastest]) == shorter
    assert pick([row(None)]) is None


def test_the_report_sorts_by_measured_speed_and_holds_the_pick_against_the_default():
    """Catches a table by predicted speed, unmeasured rows at its top, and a default of another rank."""
    cells = [
        canned_cell([row(1.2, length=2), row(None, length=4)], split_layer=0, rank=32, draft_vocab_size=0),
        canned_cell([row(1.3, length=2), row(1.25, length=4)], split_layer=1, rank=32, draft_vocab_size=0),
        canned_cell([row(1.1, length=4)], split_layer=1, rank=8, draft_vocab_size=0),
    ]
    report = make_report(cells, conditions=CONDITIONS)
    assert [found["measured"] and found["measured"]["value"] for found in report["rows"]] == [1.3, 1.25, 1.2, 1.1, None]
    assert report["picked"]["measured"]["value"] == 1.3
    assert report["default"]["measured"]["value"] == 1.25  # one layer in sixteen, four tokens, at the pick's rank
    first, second = verdict(report)
    assert "split layer 1, 2 drafted tokens, rank 32, vocabulary whole: 1.30x [1.30, 1.30] plain" in first
    assert "at the same rank and vocabulary: 1.25x" in second
    page = to_markdown(report)
    assert page.index("| 1 | 2 | 32 | whole | 2.00 |") < page.index("| 0 | 2 | 32 | whole |")
    assert "dvi bench sweep a.yaml" in page and "| n/a | n/a | n/a |" in page and "a CPU" in page


def test_a_grid_without_the_default_says_so():
    """Catches a comparison with a cell that nobody measured."""
    report = make_report(
        [canned_cell([row(1.2, length=2)], split_layer=0, rank=8, draft_vocab_size=64)], conditions=CONDITIONS
    )
    assert report["default"] is None and verdict(report)[1].endswith("is not in this grid")


def test_the_picture_is_drawn_also_where_nothing_could_be_measured(tmp_path):
    """Catches a colour scale of no values."""
    report = make_report(
        [canned_cell([row(None)], split_layer=0, rank=8, draft_vocab_size=64)], conditions=CONDITIONS
    )
    plot_sweep(report, tmp_path / "sweep.png")
    assert imread(tmp_path / "sweep.png").shape[0] > 200
