"""The comparison of lossy rules with the strict one: figures from counts that are given, and the verb end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dvi.bench.margin import rules_of
from dvi.bench.margin_quality import final_number, negative_log_likelihood, shared_share
from dvi.bench.margin_report import report_tables, summarise
from dvi.bench.questions import load_questions
from dvi.decode.speculator import SelfSpeculator
from dvi.settings import MarginSettings
from tests.cli.test_main import STORIES, dvi_command

QUESTIONS = [
    {"question_id": 1, "category": "math_reasoning", "turns": ["Ben had 3 dogs and 4 cats. How many?"],
     "reference": ["3+4=<<3+4=7>>7\n#### 7"]},
    {"question_id": 2, "category": "qa", "turns": ["Who was Lily?", "And her cat?"], "reference": ["a girl"]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3+4 = 7\n#### 7", "7"), ("#### 1,000.00 dollars, or 12", "1000"), ("He has 12-5 apples", "5"),
        ("It is -3", "-3"), ("It costs $1,250.50.", "1250.5"), ("2 of 3.", "3"), ("#### none", None), ("none", None),
        ("#### 5\n#### 6", "6"), ("x2 is no number, 0.50 is", "0.5"), ("1000", "1000"),
    ],
)  # fmt: skip
def test_the_final_number_is_found_and_written_one_way(text, number):
    """Catches 1,000 and 1000 taken for two numbers, a minus that takes away taken for a sign, 1E+3 for a thousand."""
    assert final_number(text) == number


def test_every_bundled_math_question_has_a_reference_number():
    """Catches references in a form that is not read: an arm would be scored on fewer questions than it seems."""
    questions = [q for q in load_questions() if q.category == "math_reasoning"]
    assert len(questions) == 80
    assert all(final_number(q.reference[0]) is not None for q in questions)


@pytest.mark.parametrize(
    ("ids", "strict", "share"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 2, 9], [1, 2, 3], 2 / 3), ([1, 2], [1, 2, 3, 4], 0.5), ([9], [1, 2], 0.0)],
)
def test_the_shared_share_is_one_only_for_equal_answers(ids, strict, share):
    """Catches a prefix that counts as the whole answer."""
    assert shared_share(ids, strict) == share


@torch.no_grad()
def test_the_likelihood_is_the_products_of_the_models_own_probabilities():
    """Catches logits one position late, and a prompt that counts as answer."""
    speculator = SelfSpeculator.from_pretrained(STORIES, split_layer=2, device="cpu")
    prompt, answer = [1, 80, 95], [120, 7, 300]
    expected = 0.0
    for count, token in enumerate(answer):
        logits_V = speculator.model(torch.tensor([prompt + answer[:count]])).logits[0, -1]
        expected -= float(logits_V.double().log_softmax(-1)[token])
    assert negative_log_likelihood(speculator, prompt, answer) == pytest.approx(expected, rel=1e-5)


def line(rule: str, question_id: int, ids: list[int], *, repetition: int = 1, **changes: object) -> dict:
    return {
        "verify_rule": rule, "level": "fast" if rule == "strict" else "lossy", "repetition": repetition,
        "question_id": question_id, "token_ids": ids, "decode_s": 1.0, "rounds": 2, "drafted": 8, "accepted": 2,
        "waived": 0, "nll": len(ids) * math.log(2), "reference_number": None, "final_number": None,
    } | changes  # fmt: skip


def test_figures_by_hand():
    """Catches means of ratios for medians of pairs, perplexity per answer, and questions without references scored."""
    lines = [
        line("strict", 1, [1, 2, 3, 4], reference_number="7", final_number="7"),
        line("margin 0.9", 1, [1, 2, 9, 9], decode_s=0.5, waived=1, nll=4 * math.log(8), reference_number="7",
             final_number="8"),
        line("strict", 2, [5, 6]),
        line("margin 0.9", 2, [5, 6], decode_s=0.25),
        line("strict", 1, [1, 2, 3, 4], repetition=2, reference_number="7", final_number=None),
        line("margin 0.9", 1, [1, 2, 3, 4], repetition=2, decode_s=1.0, reference_number="7", final_number="7"),
    ]  # fmt: skip
    strict, lossy = summarise(lines)
    assert (strict["level"], strict["relative"], strict["identical"], strict["perplexity"]) == (
        "fast", None, 1.0, pytest.approx(2)
    )  # fmt: skip
    assert lossy["tokens_per_s"] == (6 + 8) / 2  # the median of 8 and 4, and 8
    assert lossy["relative"]["value"] == (1.5 + 4) / 2  # the median of 2 and 1, and 4
    assert lossy["mean_accepted_tokens"] == 2 and lossy["waived_per_100"] == pytest.approx(100 / 12)
    assert lossy["identical"] == 2 / 3 and lossy["shared"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert lossy["perplexity"] == pytest.approx(2 ** ((4 * 3 + 6) / 10))
    assert (lossy["num_scored"], lossy["num_right"]) == (2, 1) and (strict["num_scored"], strict["num_right"]) == (2, 1)
    assert (lossy["num_with_number"], lossy["num_same_number"]) == (1, 0)
    for table in report_tables([strict, lossy]):
        assert "LOSSY" in table.title and [row[0] for row in table.rows] == ["strict", "margin 0.9 (lossy)"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("margin")
    (folder / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    code, facts, _, stderr = dvi_command(
        "bench", "margin", "--model", STORIES, "--output", folder / "out", "--questions", folder / "question.jsonl",
        "--thetas", "0.3,0.9", "--typical", "--max-new-tokens", 16, "--repetitions", 2,
    )  # fmt: skip
    assert code == 0, stderr
    assert "LOSSY" in stderr and "perplexity" in stderr
    return folder / "out", facts


def test_the_verb_leaves_results_of_every_rule_all_stamped(finished):
    """Catches an arm that is left out, run by another rule, or not called lossy somewhere."""
    folder, facts = finished
    names = ["strict", "margin 0.9", "margin 0.3", "typical 0.3/0.09"]
    lines = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    assert [(one["repetition"], one["question_id"], one["verify_rule"]) for one in lines] == [
        (repetition, question_id, name) for repetition in (1, 2) for question_id in (1, 2) for name in names
    ]
    assert all((one["level"] == "lossy") is (one["verify_rule"] != "strict") for one in lines)
    assert all(one["waived"] == 0 for one in lines if one["verify_rule"] == "strict")
    assert {one["reference_number"] for one in lines} == {"7", None}
    assert facts["command"] == "bench margin" and facts["level"] == "lossy"
    assert [row["verify_rule"] for row in facts["rules"]] == names and facts["rules"][0]["num_scored"] == 2
    assert json.loads((folder / "report.json").read_text()) == {k: v for k, v in facts.items() if k != "command"}
    assert (folder / "report.md").read_text().startswith("# LOSSY verify rules: stories260k")
    assert (folder / "margin.png").stat().st_size > 10_000


def test_greedy_arms_repeat_themselves(finished):
    """Catches a seed, or an arm's state, that reaches greedy answers."""
    lines = [json.loads(text) for text in (finished[0] / "results.jsonl").read_text().splitlines()]
    for one, other in zip(lines[:8], lines[8:], strict=True):
        assert (one["token_ids"], one["waived"], one["nll"]) == (other["token_ids"], other["waived"], other["nll"])


def test_a_folder_with_results_is_left_alone(finished):
    """Catches hours of results that a second start overwrites."""
    code, _, _, stderr = dvi_command("bench", "margin", "--model", STORIES, "--output", finished[0])
    assert code == 2 and "without results.jsonl" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thetas", "a,b"], "--thetas must be numbers"), (["--thetas", "1.5"], "margin_theta must be in (0, 1)"),
        (["--thetas", "0.9,0.9"], "thetas must differ"), (["--thetas", ""], "there must be one or typical"),
        (["--limit", -1], "limit must be >= 0"), (["--repetitions", 0], "repetitions must be >= 1"),
        (["--max-new-tokens", 100_000], "max_new_tokens must leave room"),
        (["--num-draft-tokens", 0], "num_draft_tokens must be in 1..8"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_that_names_it(options, message, tmp_path):
    """Catches tracebacks, and settings that are found wrong after minutes of work."""
    code, facts, _, stderr = dvi_command("bench", "margin", "--model", STORIES, "--output", tmp_path, *options)
    assert code == 2 and facts is None and message in stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_rules_run_from_the_strict_one_to_the_loosest():
    """Catches a picture whose axis jumps to and fro."""
    names = [rule.name for rule in rules_of(MarginSettings(model="m", thetas=(0.8, 0.95), typical=True))]
    assert names == ["strict", "margin 0.95", "margin 0.8", "typical 0.3/0.09"]
