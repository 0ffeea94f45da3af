"""The `dvi bench` verbs as their users call them: what arrives, what is written, what is refused."""

from __future__ import annotations

import json

import pytest

from dvi.bench.rivals import RIVAL_ARMS
from dvi.bench.session import ARM_OF_MODE
from dvi.decode.speculator import SelfSpeculator
from dvi.settings import BENCH_MODES, RIVALS
from tests.cli.test_main import STORIES, dvi_command
from tests.support.exact_doubles import self_check_left_out

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Tell me of a dog.", "And of a cat?"]},
    {"question_id": 2, "category": "qa", "turns": ["Who was Lily?"]},
]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "drafter"
    SelfSpeculator.from_pretrained(STORIES, split_layer=1).save_drafter(folder)
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, drafter):
    """A small spec-bench through the command line: its folder, and the JSON of the last line."""
    folder = tmp_path_factory.mktemp("bench")
    questions = folder / "question.jsonl"
    questions.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    with self_check_left_out():  # plain_padded has answers on any processor
        code, facts, _, stderr = dvi_command(
            "bench", "spec-bench", "--model", STORIES, "--adapter", drafter, "--output", folder / "out", "--questions",
            questions, "--repetitions", 1, "--max-new-tokens", 6, "--modes", "frozen,online", "--rivals",
            "hf_generate,medusa", "--plain-padded", "train.blocks_per_step=2", "train.budget=1",
        )  # fmt: skip
    assert code == 0, stderr
    return folder / "out", facts


def test_spec_bench_writes_answers_of_every_arm_and_a_report(finished_run):
    """Catches an arm that was asked for and left out, and an n/a row without its reason."""
    folder, facts = finished_run
    arms = {arm["name"]: arm["na_reason"] for arm in json.loads((folder / "run.json").read_text())["arms"]}
    assert list(arms) == ["plain", "plain_padded", "speculative", "online", "hf_generate", "medusa"]
    assert [name for name, reason in arms.items() if reason] == ["medusa"]
    answers = [path.read_text().splitlines() for path in (folder / "run_1" / "model_answer").iterdir()]
    assert [len(lines) for lines in answers] == [2] * 5
    assert facts["command"] == "bench spec-bench" and {"report.md", "report.json"} <= set(facts["files"])
    assert (folder / "speedups.png").stat().st_size > 10_000


def test_report_of_a_finished_run_is_the_same_again(finished_run):
    """Catches figures that depend on more than the files."""
    folder, facts = finished_run
    code, again, _, stderr = dvi_command("bench", "report", folder)
    assert code == 0, stderr
    assert again | {"command": None} == facts | {"command": None}


def test_every_mode_and_rival_that_the_help_names_exists():
    """Catches a list in the help that the arms do not know."""
    assert set(BENCH_MODES) == set(ARM_OF_MODE) and set(RIVALS) == set(RIVAL_ARMS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "{tmp}"], "run.json"),
        (["spec-bench", "--model", STORIES, "--output", "{tmp}", "--rivals", "gpt"], "--rivals must list some of"),
        (["spec-bench", "--model", STORIES, "--output", "{tmp}", "--modes", "warm"], "--modes must list some of"),
        (["spec-bench", "--model", STORIES, "--output", "{tmp}", "--spec-bench-dir", "{tmp}"], "speed.py"),
        (["spec-bench", "--model", STORIES, "--output", "{tmp}", "train.lr=-1"], "train.lr"),
        (["ablation", "configs/bench/ablation.yaml", "--output", "{tmp}", "--seeds", "one"], "--seeds must be numbers"),
        (["ablation", "configs/bench/ablation.yaml", "--output", "{tmp}", "--arm", "kl_maybe"], "kl_maybe"),
        (["drift", "configs/bench/drift.yaml", "--output", "{tmp}", "--stream", "maths"], "maths"),
        (["sweep", "configs/bench/sweep.yaml", "--output", "{tmp}", "--ranks", "8;32"], "--ranks must be numbers"),
        (["paper", "no.yaml"], "no.yaml"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, message, tmp_path):
    """Catches tracebacks, and settings that are found wrong after minutes of work."""
    code, facts, _, stderr = dvi_command("bench", *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2 and facts is None
    assert message in stderr.splitlines()[-1] and "Traceback" not in stderr
