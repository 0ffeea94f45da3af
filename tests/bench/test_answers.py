"""Answer files are the harness's to the letter, and a kill loses nothing that was written."""

import json
import re

import pytest

from dvi.bench.answers import (
    AnsweredTurn,
    AnswerFile,
    Detail,
    DetailFile,
    FirstDifference,
    answer_line,
    check_answer,
    read_answers,
    read_details,
)
from dvi.bench.questions import Question

TURNS = [
    AnsweredTurn("one", num_tokens=5, wall_time_s=0.5, accept_lengths=[1, 4]),
    AnsweredTurn("two", num_tokens=3, wall_time_s=0.25, accept_lengths=[3]),
]
DETAIL = Detail(
    arm="speculative", question_id=81, prompt_tokens=[7, 9], cut_tokens=[0, 2], token_ids=[[1, 2], [3]], num_rounds=2,
    num_drafted=8, num_accepted=3, drafted_per_depth=[2, 1], accepted_per_depth=[2, 1],
    divergence=FirstDifference(turn=1, position=0, plain_token=4, other_token=None, gap=0.5),
)


def line_of(question_id=81, turns=TURNS):
    return answer_line(Question(question_id, "writing", ("a", "b")), "tiny-dvi-plain-float32-temp-0.0", turns)


def broken(**changes):
    line = line_of()
    line["choices"][0] |= changes
    return line


def test_a_line_has_the_harnesss_keys_and_shapes():
    """Catches a renamed or nested field: speed.py would raise, or read something else."""
    line = json.loads(json.dumps(line_of()))
    assert list(line) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
    assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{22}", line["answer_id"])
    assert line["choices"] == [{
        "index": 0, "turns": ["one", "two"], "decoding_steps": [2, 1], "new_tokens": [5, 3], "wall_time": [0.5, 0.25],
        "accept_lengths": [1, 4, 3],
    }]  # fmt: skip
    assert isinstance(line["tstamp"], float)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wall_time": [0.5]}, r"question 81, choice 0: wall_time must have one entry a turn \(2\), got 1"),
        ({"decoding_steps": [2, 1, 1]}, "decoding_steps must have one entry a turn"),
        ({"new_tokens": [8]}, "new_tokens must have one entry a turn"),
        ({"accept_lengths": [1, 4]}, r"accept_lengths must sum to new_tokens \(8\), got 5"),
        ({"accept_lengths": [4, 4]}, r"one entry a decoding step \(3\), got 2"),
        ({"accept_lengths": [0, 4, 4]}, "accept_lengths must be >= 1"),
        ({"new_tokens": [7, 1], "accept_lengths": [1, 4, 3]}, r"new_tokens of turn 0 must be in 1..6, got 7"),
        ({"new_tokens": [8, 0]}, "new_tokens"),
        ({"wall_time": [0.5, 0.0]}, "wall_time of turn 1 must be > 0"),
    ],
)
def test_what_breaks_an_invariant_is_not_written(tmp_path, changes, reason):
    """Catches figures computed from lines that cannot be: the error names question and field."""
    file = AnswerFile(tmp_path / "a.jsonl", max_new_tokens=6)
    with pytest.raises(ValueError, match=reason):
        file.append([line_of(80), broken(**changes)])
    assert file.read() == []


def test_a_sound_line_passes():
    """Catches a check that refuses what the harness itself writes."""
    check_answer(line_of(), max_new_tokens=5)


def test_what_was_appended_is_read_back_sorted_with_the_last_line_of_each_question(tmp_path):
    """Catches a question scored twice, or by the line of an earlier attempt."""
    file = AnswerFile(tmp_path / "deep" / "a.jsonl", max_new_tokens=8)
    first, again = line_of(82), line_of(82)
    file.append([line_of(83), first])
    file.append([line_of(81), again])
    assert [line["question_id"] for line in file.read()] == [81, 82, 83]
    assert file.read()[1]["answer_id"] == again["answer_id"] != first["answer_id"]
    assert len(file.path.read_text().splitlines()) == 4
    file.finish()
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == file.read()


def test_finishing_with_chosen_questions_drops_the_others(tmp_path):
    """Catches answers of an interrupted question that survive beside its second attempt."""
    file = AnswerFile(tmp_path / "a.jsonl", max_new_tokens=8)
    file.append([line_of(81), line_of(82)])
    file.finish({82})
    assert [line["question_id"] for line in file.read()] == [82]


def test_a_torn_last_line_is_passed_over_and_swallows_nothing(tmp_path):
    """Catches a reader that raises after a kill, and a next line glued to the torn one."""
    file = AnswerFile(tmp_path / "a.jsonl", max_new_tokens=8)
    file.append([line_of(81), line_of(82)])
    file.path.write_bytes(file.path.read_bytes()[:-30])
    assert [line["question_id"] for line in file.read()] == [81]
    file.append([line_of(83)])
    assert [line["question_id"] for line in read_answers(file.path)] == [81, 83]


def test_details_come_back_as_they_were(tmp_path):
    """Catches a field lost on the way to the report, and None turned into a number."""
    file = DetailFile(tmp_path / "details.jsonl")
    failed = Detail("hf", 81, [7], [0], [], error="RuntimeError: out of memory")
    file.append([DETAIL, failed])
    assert read_details(file.path) == [DETAIL, failed]
    assert set(json.loads(file.path.read_text().splitlines()[1])) == set(Detail.__dataclass_fields__)


def test_the_last_detail_of_an_arm_and_question_counts(tmp_path):
    """Catches an arm's lines mistaken for another's of the same question."""
    file = DetailFile(tmp_path / "details.jsonl")
    old, other, new = (Detail(arm, 81, [n], [0], [[1]]) for arm, n in (("plain", 1), ("hf", 2), ("plain", 3)))
    file.append([old, other])
    file.append([new])
    assert file.read() == [new, other]
    file.keep({80})
    assert file.read() == []


def test_files_that_are_not_there_hold_nothing(tmp_path):
    """Catches a first start that needs files."""
    assert read_answers(tmp_path / "a.jsonl") == read_details(tmp_path / "b.jsonl") == []
