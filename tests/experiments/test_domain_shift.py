"""Drift between domains: which prompts a stream serves, what its phases' figures say, and that nothing is lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import trainers.experiments.domain_shift as domain_shift
import trainers.experiments.streams as streams
import trainers.jobs.evaluation
from dvi.config import load_config, to_yaml
from dvi.records import GenerationResult, RoundStats, SamplingParams
from tests.support.paths import ROOT
from trainers.experiments.cell_folder import CellFolder, with_one_mode
from trainers.experiments.domain_shift import DEFAULT_STREAMS, VARIANTS, run_drift, varied
from trainers.experiments.domain_shift_report import goals, phase_figures
from trainers.experiments.streams import domain_files, parse_stream, read_phases
from trainers.jobs.evaluation import SpeedProbe

QUIET = Console(quiet=True)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two domains of 12 rows to serve and 2 held out, in place of the bundled ones."""
    monkeypatch.setattr(streams, "BUNDLED", tmp_path / "domains")
    (tmp_path / "domains").mkdir()
    for domain, opening in (("cats", "Once upon a time a cat"), ("dogs", "The big dog went")):
        rows = [
            {"turns": [f"{opening} {index}"], "domain": domain, "split": "traffic" if index < 12 else "eval"}
            for index in range(14)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "domains" / f"{domain}.jsonl").write_text(text, encoding="utf-8")
    return domain_files(None)


# Streams


def served(text: str, files: dict[str, Path], *, phase_requests: int, seed: int | None = 0) -> list[list[str]]:
    stream = parse_stream(text, phase_requests=phase_requests, domains=files)
    return [[row[0]["content"] for row in phase] for phase in read_phases(stream, files, shuffle_seed=seed)]


def test_a_domain_that_returns_goes_on_with_prompts_that_were_not_served(files):
    """Catches a second phase that measures memory of its own prompts."""
    first, other, second = served("cats, dogs,cats", files, phase_requests=5)
    assert [len(first), len(other), len(second)] == [5, 5, 5] and len({*first, *second}) == 10
    assert all("cat" in prompt for prompt in (*first, *second)) and all("dog" in prompt for prompt in other)
    assert first == served("cats", files, phase_requests=5)[0] != served("cats", files, phase_requests=5, seed=1)[0]


def test_a_mixed_stream_is_three_phases_long_and_shuffled_even_without_a_seed(files):
    """Catches one domain after the other under the name of a mixture."""
    for seed in (None, 0):
        (prompts,) = served("mixed", files, phase_requests=6, seed=seed)
        assert len(prompts) == len(set(prompts)) == 18
        assert {"cat" in prompt for prompt in prompts[:9]} == {True, False}


@pytest.mark.parametrize(
    ("text", "phase_requests", "words"),
    [
        ("cats,birds", 3, "cats, dogs, got 'birds' in 'cats,birds'"),
        ("cats,mixed", 3, "got 'mixed'"),
        ("cats,dogs,cats", 7, "domain cats must have at least 14 traffic rows for stream cats-dogs-cats, got 12"),
        ("mixed", 9, "domain mixed must have at least 27 traffic rows"),
    ],
)
def test_a_stream_that_cannot_be_served_is_refused_with_what_there_is(files, text, phase_requests, words):
    """Catches a phase that is silently shorter, and one that serves its prompts again."""
    with pytest.raises(ValueError, match=words):
        served(text, files, phase_requests=phase_requests)


def test_domains_of_a_folder_come_beside_the_bundled_ones_and_win(files, tmp_path):
    """Catches --data that replaces everything, or is ignored."""
    (tmp_path / "own").mkdir()
    for domain in ("dogs", "law"):
        (tmp_path / "own" / f"{domain}.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    found = domain_files(tmp_path / "own")
    assert {name: path.parent.name for name, path in found.items()} == {"cats": "domains", "dogs": "own", "law": "own"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without any"):
        domain_files(tmp_path / "empty")


def test_the_default_streams_can_be_served_with_the_settings_beside_them():
    """Catches a preset that asks for more prompts than are shipped, also where a domain runs alone."""
    config = load_config(ROOT / "configs/bench/drift.yaml")
    files = domain_files(None)
    for text in DEFAULT_STREAMS:
        stream = parse_stream(text, phase_requests=config.data.limit, domains=files)
        for domain in stream.domains:
            alone = stream.alone(domain)
            assert sum(map(len, read_phases(alone, files, shuffle_seed=0))) == stream.num_requests


# Figures


def check(requests: int, *, drifts: int = 0, steps: int = 0, **accepted: tuple[int, int]) -> dict:
    """A look at two held-out prompts of each domain, 10 rounds of 4 drafts each."""
    return {
        "requests": requests, "steps": steps, "drifts": drifts, "is_settled": False,
        "rounds": {name: [10, 10] for name in accepted},
        "accepted": {name: list(two) for name, two in accepted.items()},
    }  # fmt: skip


def cell(*phases: tuple[str, int], checks: list[dict], windows: tuple = ()) -> dict:
    return {
        "stream": "s", "variant": "full", "num_draft_tokens": 4, "checks": checks,
        "phases": [{"domain": domain, "num_requests": count} for domain, count in phases],
        "windows": [{"phase": phase, "requests": 0, "speed_ratio": ratio} for phase, ratio in windows],
    }  # fmt: skip


def alone(domain: str, *accepted: int) -> dict:
    return cell((domain, 100), checks=[check(0, **{domain: (0, 0)}), check(100, **{domain: accepted})])


def test_the_figures_of_a_phase_are_those_of_their_definitions():
    """Catches counts from the stream's start, ratios the wrong way up, and a phase judged by its neighbour's looks."""
    checks = [
        check(0, math=(0, 0), code=(0, 0)),
        check(25, math=(17, 18), code=(2, 2), steps=40, drifts=1),
        check(50, math=(18, 18), code=(4, 4), steps=70, drifts=1),
        check(75, math=(16, 12), code=(10, 10), steps=90, drifts=2),
        check(100, math=(12, 15), code=(19, 18), steps=95, drifts=3),
    ]
    windows = ((0, 0.5), (0, 0.9), (1, 1.2), (1, 1.1))
    found = phase_figures(
        cell(("math", 50), ("code", 50), checks=checks, windows=windows),
        {"math": alone("math", 22, 22), "code": alone("code", 20, 20)},
    )
    assert [phase.requests_to_follow for phase in found] == [None, 50]  # 0.9 of 44 is 39.6, and of 40 it is 36
    assert [phase.converged for phase in found] == [0.55, 0.5]
    assert [(phase.at_start, phase.at_end) for phase in found] == [(0.0, 0.45), (0.1, 37 / 80)]
    assert found[0].kept is None and found[1].kept.num_samples == 2
    # The interval ends at the prompts one by one: 12 of 18, 15 of 18.
    kept = (found[1].kept.value, found[1].kept.low, found[1].kept.high)
    assert kept == pytest.approx((27 / 36, 12 / 18, 15 / 18))
    assert [phase.lowest_speed for phase in found] == [0.5, 1.1]
    assert [(phase.num_drifts, phase.num_steps) for phase in found] == [(1, 70), (2, 25)]
    assert goals(found) == {"follows": False, "keeps": False, "never_slower": False}


def test_a_phase_that_begins_where_its_domain_ends_has_nothing_to_follow():
    """Catches a first look that is taken only after requests."""
    checks = [check(0, math=(19, 19)), check(25, math=(20, 20))]
    (found,) = phase_figures(cell(("math", 25), checks=checks), {"math": alone("math", 20, 20)})
    assert found.requests_to_follow == 0 and found.lowest_speed is None
    assert goals([found]) == {"follows": True, "keeps": None, "never_slower": None}


def test_a_mixture_is_judged_by_the_prompts_of_all_its_domains():
    """Catches a mean of means, and a stream that is compared with another one than itself."""
    checks = [check(0, math=(0, 0), code=(0, 0)), check(25, math=(20, 20), code=(0, 40))]
    run = cell(("mixed", 25), checks=checks)
    (found,) = phase_figures(run, {"mixed": run})
    assert found.converged == found.at_end == 0.5 and found.requests_to_follow == 25 and found.kept is None


# Runs


@pytest.fixture
def config(files):
    """Settings that learn a little in seconds, the same every time."""
    return load_config(None, [
        f"model.path={ROOT / 'tests/stories260k'}", "model.split_layer=2", "draft.policy=fixed",
        "draft.num_draft_tokens=3", "drafter.anchor_hidden=16", "drafter.lora_rank=4", "sampling.max_new_tokens=12",
        "data.limit=4", "data.batch_size=2", "train.budget=1", "train.rounds_per_step=2", "train.blocks_per_step=4",
        "train.schedule=kl_only", "train.lr=5e-3", "eval.limit=2", "eval.max_new_tokens=12",
    ])  # fmt: skip


def run(
    config, folder: Path, *, stream: str = "cats,dogs", variants: tuple[str, ...] = ("full",), console: Console = QUIET
) -> dict:
    return run_drift(config, streams=[stream], variants=list(variants), folder=folder, data=None, console=console)


def cells_of(folder: Path) -> dict[str, dict]:
    """What was seen in each cell, without what clocks say."""
    clocks = {"windows", "serving_s", "train_s", "machine"}
    return {
        path.stem: {key: value for key, value in json.loads(path.read_text()).items() if key not in clocks}
        for path in sorted((folder / "cells").glob("*.json"))
    }


def test_a_run_leaves_its_report_and_a_second_start_runs_only_what_is_missing(config, tmp_path, monkeypatch):
    """Catches outputs that are forgotten, cells that are run again, and a run that cannot be repeated."""
    monkeypatch.setattr(domain_shift, "REQUESTS_PER_CHECK", 2)
    monkeypatch.setattr(domain_shift, "REQUESTS_PER_WINDOW", 2)
    monkeypatch.setattr(domain_shift, "WINDOW_PLAIN_TOKENS", 8)
    shown = Console(record=True, width=200, file=io.StringIO())
    report = run(config, tmp_path / "out", variants=("full", "no_wakeup"), console=shown)
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "report.md", "drift-cats-dogs.png", "config.yaml", "provenance.json", "cells"
    }  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == report
    before = cells_of(folder)
    assert set(before) == {
        "cats-dogs-full", "cats-dogs-no_wakeup", "converged-cats-8-full", "converged-dogs-8-full"
    }  # fmt: skip
    found = before["cats-dogs-full"]
    assert [look["requests"] for look in found["checks"]] == [0, 2, 4, 6, 8]
    assert [request["phase"] for request in found["traffic"]] == [0] * 4 + [1] * 4
    assert found["checks"][-1]["steps"] > found["checks"][2]["steps"] > 0
    # The learner moved what is looked at; and here nothing settled, so the variants did the same.
    assert found["checks"][0]["accepted"] != found["checks"][-1]["accepted"]
    assert found["checks"] == before["cats-dogs-no_wakeup"]["checks"]
    windows = json.loads((folder / "cells" / "cats-dogs-full.json").read_text())["windows"]
    assert [(window["phase"], window["requests"]) for window in windows] == [(0, 2), (0, 4), (1, 6), (1, 8)]
    assert all(window["speed_ratio"] > 0 for window in windows)
    text = (folder / "report.md").read_text()
    assert "drift-cats-dogs.png" in text and "never settled" in text and "| 2 dogs |" in text
    assert "cats-dogs, full: 90% within 300 requests" in shown.export_text()

    (folder / "cells" / "cats-dogs-full.json").unlink()
    done, run_cell = [], domain_shift.run_cell
    monkeypatch.setattr(domain_shift, "run_cell", lambda *args: done.append(args[1].name) or run_cell(*args))
    run(config, folder, variants=("full", "no_wakeup"))
    assert done == ["cats-dogs-full"]
    assert cells_of(folder) == before


def test_a_run_that_is_broken_off_keeps_the_cells_it_finished(config, tmp_path, monkeypatch):
    """Catches results that are written only at the end."""
    run_cell = domain_shift.run_cell

    def break_off(settings, cell, *rest):
        if cell.variant == "no_reservoir":
            raise KeyboardInterrupt
        return run_cell(settings, cell, *rest)

    monkeypatch.setattr(domain_shift, "run_cell", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, stream="cats", variants=("full", "no_reservoir"))
    assert set(cells_of(tmp_path)) == {"cats-full"} and not (tmp_path / "report.json").exists()


def test_cells_of_other_settings_are_refused_before_anything_runs(config, tmp_path, monkeypatch):
    """Catches a table of cells that do not belong together."""
    run(config, tmp_path, stream="cats")
    monkeypatch.setattr(domain_shift, "run_cell", pytest.fail)
    other = load_config(tmp_path / "config.yaml", ["train.lr=1e-3"])
    with pytest.raises(ValueError, match=r"cats-full\.json was made with train = .*give another folder"):
        run(other, tmp_path, stream="cats")
    elsewhere = load_config(tmp_path / "config.yaml", ["model.num_threads=1", "output.folder=x"])
    run(elsewhere, tmp_path, stream="cats")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.prompts=x.jsonl"], "data.prompts and data.dataset must not be given"),
        (["sampling.temperature=1"], "greedy"),
        (["train.enabled=false"], "train.enabled must be true"),
        (["eval.limit=0"], "eval.limit must be at least 1"),
        (["eval.max_new_tokens=3"], r"answer of domain cats must be longer than draft.num_draft_tokens = 3"),
        (["sampling.max_new_tokens=511"], "context"),
    ],
)
def test_settings_that_a_drift_run_cannot_have_are_refused(config, tmp_path, overrides, words):
    """Catches settings that are ignored, and figures of nothing."""
    (tmp_path / "base.yaml").write_text(to_yaml(config), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        run(load_config(tmp_path / "base.yaml", overrides), tmp_path, stream="cats")


def test_every_variant_changes_what_its_name_says(config):
    """Catches variants that are alike, and a changed key that no longer exists."""
    changed = {name: varied(config, name) for name in VARIANTS}
    assert changed["full"] == config
    assert changed["no_reservoir"].train.reservoir_fraction == 0 and not changed["no_wakeup"].train.drift_wakeup
    assert changed["full_auto"].draft.policy == "auto" and changed["full_auto"].train.budget < 1
    assert len(set(changed.values())) == len(VARIANTS)


def test_cells_of_before_there_was_mode_auto_are_gone_on_with():
    """Catches a day of cells refused because the default has another name, and a promise dropped that was asked for."""
    assert with_one_mode(load_config(None)).model.mode == "fast"
    assert with_one_mode(load_config(None, ["model.mode=exact"])).model.mode == "exact"


def test_a_cell_that_another_process_works_on_is_left_to_it_and_then_read(tmp_path):
    """Catches two processes that do the same work, and one that goes on without waiting for the other's result."""
    ours, theirs = CellFolder(tmp_path), CellFolder(tmp_path)
    with theirs.claim("a", wait=False) as is_theirs:
        with ours.claim("a", wait=False) as is_ours, ours.claim("b", wait=False) as is_free:
            assert is_theirs and not is_ours and is_free
        theirs.write("a", {"seed": 0}, {"x": 1})
    with ours.claim("a", wait=True) as is_ours:
        assert is_ours and ours.read("a", {"seed": 0}) == {"settings": {"seed": 0}, "x": 1}
    assert ours.read("b", {"seed": 0}) is None
    with pytest.raises(ValueError, match=r"a\.json was made with seed = 0, now it is 1"):
        ours.read("a", {"seed": 1})


def test_a_speed_is_of_the_serving_alone_and_of_its_own_window(monkeypatch):
    """Catches pauses that count as serving, and a window that carries the last one's tokens."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers.jobs.evaluation, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def result(*, new_tokens: int, decode_s: float, prefill_s: float = 0.0) -> GenerationResult:
        stats = RoundStats(new_tokens=new_tokens, decode_s=decode_s, prefill_s=prefill_s)
        return GenerationResult(0, 0, "", [0] * new_tokens, "length", stats, 0, "fast")

    def generate(prompts, params, **_):
        clock.now += 3.0
        return [result(new_tokens=params.max_new_tokens, decode_s=0.8) for _ in prompts]  # two rows: 20 tokens/s

    probe = SpeedProbe(
        SimpleNamespace(generate=generate), SamplingParams(), batch_size=2, requests_per_probe=2, probe_tokens=8
    )
    ratios = []
    for _ in range(4):
        clock.now += 1.5
        ratios.append(probe.observe([1], result(new_tokens=20, decode_s=1.0, prefill_s=0.5)))
        clock.now += 7.0
        probe.leave_out(7.0)
    assert ratios == [None, 1.0, None, 1.0]  # 20 tokens/s both
