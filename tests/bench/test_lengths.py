"""Comparing length policies: figures worked out by hand, streams that stay full and alike, and the verb itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dvi import SelfSpeculator
from dvi.bench.length_policies import Stream, run_lengths
from dvi.bench.length_report import plot_lengths, report_tables, summarise
from dvi.decode.speculator import PLAIN
from dvi.draft.length_policies import FixedLength
from dvi.model.drafter import DrafterConfig
from dvi.records import RoundStats
from dvi.settings import COMPANIONS, POLICIES, LengthSettings
from dvi.settings.explained import choices_of, types_of
from dvi.terminal import make_console
from tests.cli.test_main import STORIES, dvi_command
from tests.support.tiny_models import tiny_model

PROMPTS = [[5, 9, 13, 7], [40, 3, 3, 21, 8, 60, 11, 17], [50, 4]]
SETTINGS = LengthSettings(model="tiny", batch_sizes=(2,), num_draft_tokens=3, max_new_tokens=6)
EXPLAINED, UNEXPLAINED = {"is_explained": True}, {"is_explained": False}


def line(policy: str, repetition: int, *, rounds: int, drafted: int, accepted: int, tokens: int, seconds: float,
         compared: int = 4, divergences: tuple[dict, ...] = ()) -> dict:
    stats = RoundStats(
        num_rounds=rounds, num_drafted=drafted, num_accepted=accepted, committed_tokens=accepted + rounds,
        new_tokens=tokens, decode_s=seconds,
    )  # fmt: skip
    return {
        "batch_size": 2, "policy": policy, "repetition": repetition, "stats": dataclasses.asdict(stats),
        "num_compared": compared, "divergences": list(divergences), "companion": None,
    }  # fmt: skip


LINES = [
    line("fixed", 0, rounds=10, drafted=40, accepted=20, tokens=30, seconds=1.0),
    line("goodput", 0, rounds=20, drafted=20, accepted=15, tokens=34, seconds=0.5),
    line("fixed", 1, rounds=10, drafted=40, accepted=10, tokens=20, seconds=1.0),
    line("goodput", 1, rounds=20, drafted=10, accepted=5, tokens=25, seconds=1.0),
    line("fixed", 2, rounds=10, drafted=40, accepted=30, tokens=40, seconds=1.0),
    line("goodput", 2, rounds=20, drafted=30, accepted=10, tokens=30, seconds=1.0),
]


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator(
        tiny_model("llama"), None, split_layer=1, drafter=DrafterConfig(lora_rank=4, anchor_hidden=16)
    )


def test_figures_are_those_worked_out_by_hand():
    """Catches a mean for a median, ratios of sums for sums of ratios, and a share that leaves out the round's +1."""
    fixed, goodput = summarise(LINES)
    assert fixed["tokens_per_s"] == 30 and goodput["tokens_per_s"] == 30  # of 30, 20, 40 and of 68, 25, 30
    assert fixed["relative"] is None
    assert goodput["relative"]["value"] == pytest.approx(1.25)  # of 68 / 30, 25 / 20 and 30 / 40
    assert (goodput["relative"]["low"], goodput["relative"]["high"]) == pytest.approx((0.75, 68 / 30))
    assert fixed["num_wasted"] == 60 and fixed["wasted_share"] == 60 / 150  # of 120 drafted and 30 more
    assert goodput["num_wasted"] == 30 and goodput["wasted_share"] == 30 / 120
    assert fixed["mean_accepted_tokens"] == 90 / 30 and goodput["mean_accepted_tokens"] == 89 / 60  # an end cut one
    assert fixed["verified_per_token"] == 150 / 90 and goodput["verified_per_token"] == 120 / 89


@pytest.mark.parametrize(
    ("policy", "divergences", "void"),
    [("goodput", (EXPLAINED,), []), ("goodput", (EXPLAINED, UNEXPLAINED), ["goodput"]),
     ("fixed", (UNEXPLAINED,), ["fixed", "goodput"])],
)  # fmt: skip
def test_other_tokens_that_rounding_does_not_explain_void_the_speeds(policy, divergences, void):
    """Catches a number that stands although its arm, or the one it is divided by, did other work."""
    lines = [one | {"divergences": list(divergences)} if one["policy"] == policy else one for one in LINES[:2]]
    rows = summarise(lines)
    assert [row["policy"] for row in rows if row["is_void"]] == void
    assert {row["policy"]: row["num_differing"] for row in rows}[policy] == len(divergences)


def test_the_table_names_what_is_void_and_shows_what_a_companion_knows():
    """Catches a void speed that reads like any other, and a gain without its share of the entropy."""
    companion = {
        "num_samples": 512, "acceptance": 0.5, "entropy_bits": 1.0, "gain_of_agreement_bits": 0.125,
        "gain_of_both_bits": 0.25, "ece_of_agreement": 0.02, "ece_of_both": 0.01,
    }  # fmt: skip
    lines = [LINES[0], LINES[1] | {"divergences": [UNEXPLAINED], "companion": companion}]
    run = {
        "settings": dataclasses.asdict(SETTINGS), "is_greedy": True, "dtype": "float32",
        "machine": {"gpu": None, "cpu": "a CPU", "threads": 1},
    }  # fmt: skip
    speeds, calibration = report_tables({"conditions": run, "rows": summarise(lines)})
    assert speeds.rows[0] == ["2 fixed", "30", "1", "3.00", "20 40%", "1.67", "0/4"]
    assert speeds.rows[1] == ["2 goodput VOID", "68", "2.27\n2.27-2.27", "1.70", "5 12%", "1.18", "1/4"]
    assert calibration.rows == [["2 goodput", "512", "50%", "1.000", "0.125 12%", "0.250 25%", "0.020", "0.010"]]


def test_the_picture_stands_with_one_batch_size_and_a_void_row(tmp_path):
    """Catches a chart that needs several points, or that cannot mark what is void."""
    rows = summarise([LINES[0], LINES[1] | {"divergences": [UNEXPLAINED]}])
    plot_lengths(rows, tmp_path / "lengths.png", conditions="a model")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_a_stream_keeps_every_row_full_and_slices_end_where_they_should(speculator):
    """Catches rounds with idle rows under the name of a full batch, and slices that drift by what each overran."""
    stream = Stream(speculator, FixedLength(3), PROMPTS, SETTINGS, batch_size=2)
    outcomes, observe = [], stream.policy.observe
    stream.policy.observe = lambda outcome: (outcomes.append(outcome.num_rows), observe(outcome))
    slices = [stream.decode(9) for _ in range(20)]
    assert set(outcomes) == {2} and len(outcomes) * 2 == sum(one.num_rounds for one in slices)
    total = sum(one.new_tokens for one in slices)
    assert 180 <= total < 180 + 2 * 4  # a round of two rows gives at most four tokens each
    assert all(one.decode_s > 0 for one in slices)


def test_streams_of_any_policy_give_the_same_answers_at_the_same_places(speculator):
    """Catches prompts that reach policies in another order, and seeds that hang on the row."""
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, temperature=1.0)):
        plain, other = (Stream(speculator, PLAIN, PROMPTS, settings, batch_size=rows) for rows in (1, 3))
        for stream in (plain, other):
            stream.decode(60)
        shared = plain.answers.keys() & other.answers.keys()
        assert len(shared) >= 7 and all(plain.answers[place] == other.answers[place] for place in shared)


def test_a_model_gone_nan_is_an_error_and_not_an_endless_slice():
    """Catches a benchmark that never ends."""
    broken = SelfSpeculator(tiny_model("llama"), None, split_layer=1)
    for parameter in broken.model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        Stream(broken, PLAIN, PROMPTS, SETTINGS, batch_size=2).decode(10)


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": text, "split": "eval"} for text in ("Tell me of a dog.", "Who was Lily?", "One day, Tom")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "Learnt."}]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def verb_run(tmp_path_factory):
    """A small run through the command line: its arguments, its folder, the JSON of its last line and its stderr."""
    folder = tmp_path_factory.mktemp("lengths")
    SelfSpeculator.from_pretrained(STORIES, split_layer=1).save_drafter(folder / "drafter")
    arguments = (
        "bench", "lengths", "--model", STORIES, "--adapter", folder / "drafter", "--output", folder / "out",
        "--prompts", write_prompts(folder), "--batches", "1,2", "--num-draft-tokens", 2, "--max-new-tokens", 4,
        "--repetitions", 2, "--warmups", 1,
    )  # fmt: skip
    code, facts, _, stderr = dvi_command(*arguments)
    assert code == 0, stderr
    return arguments, folder / "out", facts, stderr


def test_the_verb_compares_every_policy_at_every_batch_size(verb_run):
    """Catches a policy or a batch size that was asked for and left out, and files that the last line names in vain."""
    _, folder, facts, stderr = verb_run
    names = ["plain", "fixed", "confidence", "goodput", "companion:self", "companion:exit"]
    assert [(row["batch_size"], row["policy"]) for row in facts["rows"]] == [(b, n) for b in (1, 2) for n in names]
    assert all(row["num_repetitions"] == 2 and row["tokens_per_s"] > 0 for row in facts["rows"])
    assert not any(row["is_void"] for row in facts["rows"])
    assert all((row["num_compared"] > 0) == (row["policy"] != "plain") for row in facts["rows"])
    assert [row["companion"] is not None for row in facts["rows"][:6]] == [False] * 4 + [True] * 2
    assert all((folder / name).stat().st_size for name in facts["files"]) and facts["command"] == "bench lengths"
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2 * 6 * 2
    assert "Length policies" in stderr and "companions know" in stderr


def test_a_second_start_measures_only_what_is_missing(verb_run, monkeypatch):
    """Catches a resume that counts slices twice, forgets some, or measures what is there."""
    arguments, folder, facts, _ = verb_run
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-6]))
    slices, decode = [], Stream.decode
    monkeypatch.setattr(Stream, "decode", lambda stream, *given: slices.append(stream) or decode(stream, *given))
    code, again, _, stderr = dvi_command(*arguments)
    assert code == 0, stderr
    assert len(slices) == 6 * 2  # one that warms up and one that counts
    assert [row["num_repetitions"] for row in again["rows"]] == [2] * 12
    assert again["rows"][:6] == facts["rows"][:6] and results.read_text().startswith("".join(lines[:-6]))


def test_a_folder_of_another_run_is_refused(verb_run):
    """Catches slices of other settings in one median."""
    arguments, *_ = verb_run
    code, facts, _, stderr = dvi_command(*arguments, "--temperature", "1")
    assert code == 2 and facts is None
    assert "temperature 0.0, asked for 1.0" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1;2"], "--batches must be numbers"), (["--batches", "0"], "batch sizes must be >= 1"),
        (["--batches", "2,2"], "batch sizes must differ"),
        (["--policies", "best"], "--policies must list some of"), (["--companions", "ema"], "--companions must list"),
        (["--companions", "model"], "companion_model"), (["--num-draft-tokens", "9"], "num_draft_tokens must be in"),
        (["--repetitions", "0"], "repetitions must be >= 1"), (["--temperature", "-1"], "temperature must be"),
        (["--prompts", "{tmp}/none.jsonl"], "none.jsonl"), (["--max-new-tokens", "9999"], "max_new_tokens"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_that_names_it(arguments, message, tmp_path):
    """Catches tracebacks, and settings that are found wrong after minutes of work."""
    arguments = (argument.format(tmp=tmp_path) for argument in arguments)
    code, facts, _, stderr = dvi_command("bench", "lengths", "--model", STORIES, "--output", tmp_path, *arguments)
    assert code == 2 and facts is None
    assert message in stderr.splitlines()[-1] and "Traceback" not in stderr


def test_what_may_be_measured_is_among_all_there_is():
    """Catches a policy or a companion that the speculator has not."""
    assert set(choices_of(types_of(LengthSettings)["policies"])) < set(POLICIES)
    assert set(choices_of(types_of(LengthSettings)["companions"])) < set(COMPANIONS)


def test_under_sampling_nothing_is_compared(speculator, tmp_path):
    """Catches lawful samples that are counted as wrong answers."""
    settings = dataclasses.replace(
        SETTINGS, temperature=1.0, prompts=str(write_prompts(tmp_path)), repetitions=1, warmups=0, policies=(),
    )
    stories = SelfSpeculator.from_pretrained(STORIES, split_layer=1)
    report = run_lengths(stories, settings, tmp_path / "out", console=make_console())
    assert [(row["policy"], row["num_compared"], row["is_void"]) for row in report["rows"]] == [
        ("plain", 0, False), ("fixed", 0, False),
    ]
