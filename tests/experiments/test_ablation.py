"""Does learning help: figures of hand-made cells, and whole ablations on a tiny real model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dvi.config import load_config
from dvi.records import ReplayBatch
from dvi.settings import LearningSettings
from tests.support.paths import STORIES
from trainers.experiments import ablation_cells
from trainers.experiments.ablation import parse_arm, run_ablation
from trainers.experiments.ablation_cells import CellRunner, count_rewards
from trainers.experiments.ablation_figures import (
    Block,
    BreakEven,
    Cell,
    HeldOut,
    PlainBlock,
    ServedRequest,
    baseline_of,
    best_reward_arm,
    break_even,
    compare,
    read_cell,
    speed_against_plain,
    summarise,
    traffic_acceptance,
)
from trainers.experiments.ablation_report import write_report

NAMES = ("Lily", "Tom", "Ben", "Sue", "Max", "Ann", "Sam", "Mia", "Tim", "Amy", "Leo", "Zoe")
ROWS = [{"prompt": f"Once upon a time {name}"} for name in NAMES]
ROWS += [{"prompt": "The little dog", "split": "eval"}, {"prompt": "A big bear", "split": "eval"}]


# Figures


def blocks_of(seconds: list[float], *, tokens: int = 10, plain_s: float = 1.0, train_s: float = 0.0) -> list[Block]:
    """A request a block, its total seconds given, of which train_s are training's; every block plain in plain_s."""
    blocks, serving_s = [], 0.0
    for count, block_s in enumerate(seconds, start=1):
        serving_s += block_s - train_s
        request = ServedRequest(
            drafted=4, accepted=2, tokens=tokens, transitions=tokens * count, serving_s=serving_s,
            train_s=train_s * count,
        )  # fmt: skip
        blocks.append(Block([request], PlainBlock(tokens, plain_s, 0)))
    return blocks


def test_breaking_even_is_staying_ahead_and_not_being_ahead_once():
    """Catches the first crossing taken for the last."""
    # Behind by 1, ahead by 0.5, behind again by 0.5, ahead for good from the fourth request on.
    assert break_even(blocks_of([2.0, -0.5, 2.0, 0.25])) == BreakEven("reached", 40.0)
    assert break_even(blocks_of([2.0, -0.5, 2.0, 0.25], train_s=0.25)) == BreakEven("reached", 40.0)
    assert break_even(blocks_of([0.5, 0.5, 0.5, 0.5])) == BreakEven("reached", 10.0)


def test_a_run_that_ends_behind_is_extrapolated_at_the_speed_of_its_last_quarter():
    """Catches a rate that is taken over the whole run, which the first, slow part spoils."""
    # 3 s behind after 40 tokens; the last quarter gains 0.5 s in 10 tokens: 60 tokens more.
    assert break_even(blocks_of([3.0, 2.0, 1.5, 0.5])) == BreakEven("extrapolated", 100.0)
    assert break_even(blocks_of([3.0, 2.0, 0.5, 1.5])) == BreakEven("never", None)


def test_speed_counts_the_seconds_of_training():
    """Catches a speed that training did not pay for, and a last quarter that is the whole run."""
    blocks = blocks_of([4.0, 2.0, 2.0, 0.5], train_s=0.25)
    assert speed_against_plain(blocks) == pytest.approx(4 / 8.5)
    assert speed_against_plain(blocks, last_quarter=True) == pytest.approx(2.0)


def test_traffic_acceptance_is_a_mean_over_transitions():
    """Catches a mean over requests, in which a short one counts like a long one."""
    short, long = (
        ServedRequest(drafted=4, accepted=accepted, tokens=tokens, transitions=1, serving_s=1, train_s=1)
        for accepted, tokens in ((4, 10), (0, 30))
    )
    assert traffic_acceptance([Block([short], None), Block([long], None)]) == pytest.approx(0.25)


def cell(arm: str, seed: int, mat: float, *, blocks: list[Block] | None = None) -> Cell:
    held_out = [HeldOut(0, 0, 0.0, [0.0], 1.0), HeldOut(8, 40, (mat - 1) / 4, [0.5, 0.25], mat)]
    return Cell(
        arm=arm, seed=seed, num_steps=8, num_transitions=2000, train_s=1.0, num_rollbacks=0, num_skipped=0,
        num_drifts=0, num_sampled=100, num_rewarded=25, num_on_policy=5, num_cut_prompts=0, held_out=held_out,
        blocks=blocks, machine={"cpu": "none", "load": 0.0}, command="dvi bench ablation",
    )  # fmt: skip


def arms_of(**mats: list[float]) -> dict[str, list[Cell]]:
    return {arm: [cell(arm, seed, mat) for seed, mat in enumerate(values)] for arm, values in mats.items()}


@pytest.mark.parametrize(
    ("mats", "outcome"),
    [
        ([2.11, 2.21, 2.31], "beats"),
        ([1.89, 1.99, 2.09], "loses to"),
        # Far apart in the mean, but by chance as well: 0.2 with a standard error of 0.14.
        ([2.5, 2.1, 2.4], "no difference shown"),
        ([2.0, 2.1, 2.2], "no difference shown"),
    ],
)
def test_a_difference_counts_only_beyond_two_standard_errors_of_the_pairs(mats, outcome):
    """Catches a verdict by the means alone, and one that the spread between seeds, which both share, drowns."""
    found = compare(arms_of(kl_only=[2.0, 2.1, 2.2], kl_rl=mats), "kl_rl", "kl_only")
    assert found.outcome == outcome
    assert outcome in str(found)


def test_one_seed_shows_nothing():
    """Catches "beats" out of a single pair, whose error nobody knows."""
    found = compare(arms_of(kl_only=[2.0], kl_rl=[3.0]), "kl_rl", "kl_only")
    assert found.outcome == "one seed"
    assert "beats" not in str(found)


def test_only_seeds_that_both_have_are_compared():
    """Catches pairs by place in the list."""
    arms = arms_of(kl_only=[2.0, 2.5], kl_rl=[2.1])
    arms["kl_rl"] = [dataclasses.replace(arms["kl_rl"][0], seed=1)]
    assert compare(arms, "kl_rl", "kl_only").difference == pytest.approx(-0.4)
    assert compare(arms | {"kl_only": arms["kl_only"][:1]}, "kl_rl", "kl_only") is None


def test_an_arm_is_held_against_kl_only_with_the_same_settings():
    """Catches a longer block, or another learning rate, taken for the reward's doing."""
    arms = ["kl_only", "kl_only:block_len=8", "kl_rl", "kl_rl:block_len=8", "kl_rl:lr=0.01"]
    assert [baseline_of(arm, arms) for arm in arms] == [None, "kl_only", "kl_only", "kl_only:block_len=8", "kl_only"]


def test_the_best_reward_arm_has_a_reward():
    """Catches a verdict on rewards that speaks of an arm without any."""
    arms = arms_of(kl_only=[3.0], lk=[3.0], offline_epochs=[3.0], pg_only=[1.1], kl_ce=[1.9, 2.1], kl_rl=[1.95])
    assert best_reward_arm(arms) == "kl_ce"
    assert best_reward_arm(arms_of(kl_only=[3.0], lk=[3.0])) is None


def test_gains_are_per_thousand_transitions_over_the_untrained_drafter():
    """Catches a gain per transition, and one over nothing."""
    found = summarise([cell("kl_rl", 0, 2.0), cell("kl_rl", 1, 3.0)])["figures"]
    assert found["mat_gain_per_1000_transitions"]["values"] == pytest.approx([0.5, 1.0])
    assert found["held_out_mat"]["mean"] == pytest.approx(2.5)
    assert found["held_out_mat"]["std"] == pytest.approx(0.5**0.5)
    assert found["traffic_acceptance"] is None


def test_seeds_that_never_break_even_are_not_averaged_away(tmp_path):
    """Catches a break-even of the lucky seeds alone."""
    never, reached = blocks_of([3.0, 2.0, 0.5, 1.5]), blocks_of([0.5, 0.5, 0.5, 0.5])
    cells = [cell("kl_only", 0, 2.0, blocks=never), cell("kl_only", 1, 2.0, blocks=reached)]
    config = load_config(None, ["data.prompts=none.jsonl"])
    report = write_report(cells, config, tmp_path, order=["kl_only"], console=Console(quiet=True))
    assert [found["kind"] for found in report["arms"][0]["break_even"]] == ["never", "reached"]
    assert "10 (never at this rate in 1 of 2)" in (tmp_path / "report.md").read_text()


def test_rewards_are_on_policy_only_from_the_version_that_serves():
    """Catches positions of masked blocks, and stale drafts, counted as on-policy."""
    has_reward_NT = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    batch = ReplayBatch(
        **dict.fromkeys((field.name for field in dataclasses.fields(ReplayBatch)), torch.zeros(3, 3))
        | {"mask_NT": torch.tensor([[True] * 3, [True, True, False], [True] * 3]), "has_reward_NT": has_reward_NT,
           "staleness_N": torch.tensor([0, 1, 0])}
    )  # fmt: skip
    assert count_rewards(batch).tolist() == [8, 3, 2]


# Arms


def test_an_arm_changes_the_settings_that_it_names_and_its_schedule():
    """Catches overrides that lose the run's own settings, and a time budget that makes steps depend on the machine."""
    given = LearningSettings(lr=3e-3, schedule="lk", budget=0.05)
    arm = parse_arm("kl_rl:block_len=8,switch_by=acceptance", given)
    assert arm.settings == dataclasses.replace(
        given, block_len=8, switch_by="acceptance", schedule="kl_rl", budget=1.0
    )
    assert parse_arm("offline_epochs", given).settings.schedule == "kl_only"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl", "kl_only, kl_pg, pg_only, ce_only, kl_ce, kl_rl, lk, offline_one_pass, offline_epochs"),
        ("kl_rl:block=8", "did you mean 'train.block_len'"),
        ("kl_rl:lr=-1", "train.lr must be greater than 0"),
        ("kl_rl:budget=0.1", "must leave enabled, schedule, budget, seed alone"),
    ],
)
def test_an_unknown_arm_is_refused_with_what_there_is(name, message):
    """Catches a typing error that runs for an hour as something else."""
    with pytest.raises(ValueError, match=message):
        parse_arm(name, LearningSettings())


# Whole ablations


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def settings(prompts, **overrides):
    values = {
        "model.path": str(STORIES), "model.split_layer": 1, "model.num_threads": 1, "drafter.anchor_hidden": 16,
        "draft.num_draft_tokens": 3, "sampling.max_new_tokens": 12, "data.prompts": str(prompts), "data.batch_size": 2,
        "train.rounds_per_step": 3, "train.lr": 0.01, "train.blocks_per_step": 4, "train.warmup_steps": 2,
        "train.ramp_steps": 4, "train.steps_per_canary": 8, "eval.limit": 2, "eval.max_new_tokens": 24,
    } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
    return load_config(None, [f"{name}={value}" for name, value in values.items()])


def run(prompts, folder, arms, seeds, **overrides):
    return run_ablation(
        settings(prompts, **overrides), arms=arms, seeds=seeds, folder=folder, console=Console(quiet=True)
    )


def cells_in(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))}


@pytest.fixture(scope="module")
def finished(prompts, tmp_path_factory):
    """A folder with kl_only and kl_rl of two seeds, and the offline controls of the first, added later."""
    folder = tmp_path_factory.mktemp("ablation")
    run(prompts, folder, ["kl_rl", "kl_only"], [0, 1])
    run(prompts, folder, ["offline_epochs", "offline_one_pass"], [0])
    return folder


def requests_of(one: dict) -> list[dict]:
    return [request for block in one["blocks"] for request in block["requests"]]


def test_arms_of_a_seed_learn_from_the_same_data(finished):
    """Catches arms that see other prompts, or another order, and a second arm that goes on where the first ended."""
    cells = cells_in(finished)
    for seed in (0, 1):
        arms = [cells[f"{arm}-{seed}"] for arm in ("kl_only", "kl_rl")]
        assert arms[0]["held_out"][0] == arms[1]["held_out"][0]
        tokens = [[sorted(r["tokens"] for r in block["requests"]) for block in one["blocks"]] for one in arms]
        assert tokens[0] == tokens[1]
        for one in arms:
            assert len(requests_of(one)) == len(NAMES)
            plain = [block["plain"] for block in one["blocks"] if block["plain"]]
            assert len(plain) == 4
            assert not any(block["num_mismatches"] for block in plain)
        assert arms[0]["held_out"] != arms[1]["held_out"]
    assert cells["kl_only-0"]["held_out"][0] == cells["offline_epochs-0"]["held_out"][0]


def test_the_totals_of_a_run_only_grow_and_count_every_new_token(finished):
    """Catches clocks that start anew in each block, and prompts among the transitions."""
    one = cells_in(finished)["kl_rl-1"]
    requests = requests_of(one)
    for name in ("transitions", "serving_s", "train_s"):
        totals = [r[name] for r in requests]
        assert totals == sorted(totals)
    assert one["num_transitions"] == requests[-1]["transitions"] == sum(r["tokens"] for r in requests)
    assert 0 < requests[-1]["train_s"] <= one["train_s"]
    assert one["num_sampled"] > one["num_rewarded"] > one["num_on_policy"] > 0


def test_offline_controls_make_the_steps_of_kl_only_over_as_much_text(finished):
    """Catches a control that is given more or less to learn with than what it is held against."""
    cells = cells_in(finished)
    online, one_pass, epochs = (cells[f"{arm}-0"] for arm in ("kl_only", "offline_one_pass", "offline_epochs"))
    for offline in (one_pass, epochs):
        assert offline["num_steps"] == online["num_steps"] > 8
        assert offline["num_transitions"] == online["num_transitions"]
        assert len(offline["held_out"]) == len(online["held_out"]) == 13
        assert offline["num_rewarded"] == 0
    seen, all_seen = ([mark["transitions"] for mark in one["held_out"]] for one in (one_pass, epochs))
    assert seen == sorted(seen)
    assert seen[1] < all_seen[1] == all_seen[-1] == seen[-1]


def copy_cell(source: Path, name: str, target: Path) -> dict:
    (target / "cells").mkdir()
    shutil.copy(source / "cells" / f"{name}.json", target / "cells")
    return cells_in(target)[name]


def test_every_epoch_draws_from_the_whole_corpus(prompts, finished, tmp_path, monkeypatch):
    """Catches a replay too small for the corpus, whose ring has forgotten the first texts at the first step."""
    held, learn = [], ablation_cells._learn_in_epochs

    def watched(trainer, texts, **options):
        texts = list(texts)
        learn(trainer, iter(texts), **options)
        held.append((len(trainer.replay), sum(len(text.transitions(0)) for text in texts)))

    monkeypatch.setattr(ablation_cells, "_learn_in_epochs", watched)
    content = copy_cell(finished, "kl_only-0", tmp_path)
    run(prompts, tmp_path, ["offline_epochs"], [0])
    assert held[0][0] == held[0][1] > 0
    assert content == cells_in(tmp_path)["kl_only-0"]


def test_a_second_start_goes_on_with_what_is_missing_and_finds_the_same(prompts, finished, tmp_path, monkeypatch):
    """Catches cells that are run again, or that depend on which cells the process ran before them."""
    kept = copy_cell(finished, "kl_only-1", tmp_path)
    calls = []
    run_online = CellRunner.run_online

    def counted(self, arm, seed):
        calls.append((arm.name, seed))
        return run_online(self, arm, seed)

    monkeypatch.setattr(CellRunner, "run_online", counted)
    run(prompts, tmp_path, ["kl_rl", "kl_only"], [1])
    assert calls == [("kl_rl", 1)]
    first, again = cells_in(finished)["kl_rl-1"], cells_in(tmp_path)["kl_rl-1"]
    for name in ("held_out", "num_steps", "num_rewarded", "num_on_policy"):
        assert again[name] == first[name]
    assert cells_in(tmp_path)["kl_only-1"] == kept


def test_an_interrupted_ablation_keeps_its_finished_cells(prompts, finished, tmp_path, monkeypatch):
    """Catches results that are written at the end only, and kl_only run after what needs its steps."""
    known = cells_in(finished)["kl_only-0"]

    def interrupted(self, arm, seed):
        if arm.name != "kl_only":
            raise KeyboardInterrupt
        return read_cell(known)

    monkeypatch.setattr(CellRunner, "run_online", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prompts, tmp_path, ["kl_rl", "offline_one_pass", "kl_only"], [0])
    assert cells_in(tmp_path) == {"kl_only-0": known}


def test_the_report_holds_all_cells_of_the_folder_and_says_who_wins(prompts, finished):
    """Catches a report of the last start alone, when several processes have filled the folder."""
    report = run(prompts, finished, ["kl_only"], [1], output__folder="elsewhere")
    assert [arm["arm"] for arm in report["arms"]] == ["kl_only", "kl_rl", "offline_one_pass", "offline_epochs"]
    assert [arm["seeds"] for arm in report["arms"]] == [[0, 1], [0, 1], [0], [0]]
    assert report["verdict"].startswith("The best arm with rewards is kl_rl. kl_rl ")
    assert json.loads((finished / "report.json").read_text()) == report
    text = (finished / "report.md").read_text()
    assert report["verdict"] in text
    assert text.count("| kl_rl |") == 2
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_other_settings_is_refused(prompts, finished):
    """Catches cells of two experiments in one average."""
    with pytest.raises(ValueError, match=r"train.lr = 0.01, now it is 0.002"):
        run(prompts, finished, ["kl_only"], [0], train__lr=0.002)


@pytest.mark.parametrize(
    ("arms", "overrides", "message"),
    [
        ([], {}, "at least 1 arm and 1 seed"),
        (["offline_epochs"], {}, "ask for kl_only too"),
        (["kl_only"], {"sampling__temperature": 0.5}, "sampling must be greedy"),
        (["kl_only"], {"drafter__adapter": "x"}, "drafter.adapter must be null"),
        (["kl_only"], {"eval__limit": 0}, "eval.limit must be at least 1"),
        (["kl_only"], {"data__limit": 5}, "at least 12 requests, got 5"),
        (["kl_only"], {"eval__max_new_tokens": 2}, "longer than draft.num_draft_tokens = 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(prompts, tmp_path, arms, overrides, message):
    """Catches an hour spent on arms that would not have equal data."""
    with pytest.raises(ValueError, match=message):
        run(prompts, tmp_path, arms, [0], **overrides)
