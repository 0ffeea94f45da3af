"""Prompts are read as they stand, in a repeatable order, and a bad row is named by file and line."""

import json

import pytest

from dvi.traffic import AnsweredPrompt, NoPromptsError, as_answered, as_text, read_dataset, read_prompts

ROWS = [
    {"id": "a", "domain": "math", "split": "traffic", "turns": ["one", "later"]},
    {"id": "b", "domain": "code", "split": "eval", "turns": ["two"]},
    {"prompt": "three"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "four"},
                  {"role": "assistant", "content": "an answer"}]},
]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(prompts):
    return [prompt[-1]["content"] for prompt in prompts]


def test_every_kind_of_row_becomes_chat_messages_that_end_with_the_user(tmp_path):
    """Catches a format that is not understood, a second turn asked without its answer, and an answer left in."""
    prompts = read_prompts([write_rows(tmp_path / "rows.jsonl", ROWS)])
    assert texts(prompts) == ["one", "two", "three", "four"]
    assert [message["role"] for message in prompts[3]] == ["system", "user"]
    assert as_text(prompts[3]) == "be brief\n\nfour"


def test_split_and_domain_choose_rows_and_a_row_that_names_no_split_is_traffic(tmp_path):
    """Catches held-out rows among the traffic, and rows without a split lost to both."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert texts(read_prompts([path], split="traffic")) == ["one", "three", "four"]
    assert texts(read_prompts([path], split="eval")) == ["two"]
    assert texts(read_prompts([path], domains=["math", "code"])) == ["one", "two"]


def test_epochs_hold_the_same_rows_each_in_its_own_repeatable_order(tmp_path):
    """Catches epochs in one order, a limit that changes the set from epoch to epoch, and an unseeded shuffle."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": str(i)} for i in range(30)])

    def read():
        return texts(read_prompts([path], limit=20, shuffle_seed=3, epochs=2))

    first, second = read()[:20], read()[20:]
    assert set(first) == set(second) == {str(i) for i in range(20)}
    assert first != second and read() == first + second


def test_a_limit_takes_alike_from_all_files_and_keeps_their_order(tmp_path):
    """Catches several domains of which only the first is learnt, or measured."""
    paths = [
        write_rows(tmp_path / name, [{"prompt": f"{name}{i}"} for i in range(count)])
        for name, count in (("a", 5), ("b", 1), ("c", 5))
    ]
    assert texts(read_prompts(paths, limit=7)) == ["a0", "a1", "a2", "b0", "c0", "c1", "c2"]
    assert texts(read_prompts(paths, limit=2)) == ["a0", "b0"]
    assert len(read_prompts(paths, limit=100)) == len(read_prompts(paths)) == 11


def test_conversations_as_sharegpt_has_them_are_chat_messages(tmp_path):
    """Catches the commonest chat data refused, or its speakers taken for each other."""
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "ho"), ("human", "and?"), ("gpt", "no more")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    expected = [
        {"role": role, "content": text}
        for role, (_, text) in zip(("system", "user", "assistant", "user"), turns, strict=False)
    ]
    assert read_prompts([path]) == [expected]
    assert list(read_dataset(str(path), split="train", field="conversations")) == [expected]


def test_a_datasets_conversation_without_a_question_is_passed_over_and_told(tmp_path, caplog):
    """Catches a run over public chat data that ends at its first empty row, and rows that vanish unseen."""
    asked, told = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
    path = write_rows(tmp_path / "rows.jsonl", [{"c": turns} for turns in ([asked], [told], [], [asked])])
    assert texts(read_dataset(str(path), split="train", field="c")) == ["hi", "hi"]
    assert caplog.text.count("passed over") == 2
    with pytest.raises(ValueError, match="line 1: messages must hold one by the user"):
        read_prompts([write_rows(tmp_path / "own.jsonl", [{"conversations": [told]}])])


def test_an_answer_is_kept_beside_its_prompt_in_every_kind_of_row():
    """Catches an answer that is dropped as in traffic, or one that is part of its own prompt."""
    hi = [{"role": "user", "content": "hi"}]
    for row in (
        {"turns": ["hi"], "answer": "ho"},
        {"turns": ["hi"], "text": "ho"},
        {"prompt": "hi", "answer": "ho"},
        {"messages": [*hi, {"role": "assistant", "content": "ho"}]},
        {"messages": [*hi, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "thanks"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ):
        assert as_answered(row, where="here") == AnsweredPrompt(hi, "ho"), row
    assert as_answered({"text": "once"}, where="here") == AnsweredPrompt([], "once")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi"}, "a row needs an answer, a text, or messages that hold one; got prompt; warmup.source="),
        ({"prompt": "hi", "answer": ""}, "answer must be a text, got ''"),
        ({"answer": "ho"}, "a row needs one of turns, prompt, messages, conversations; got answer"),
        ({"text": None}, "text must be a text, got None"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages must hold one by the assistant"),
        ({"messages": [{"role": "assistant", "content": "ho"}]}, "an answer needs one by the user before it"),
    ],
)
def test_a_row_without_an_answer_is_refused_where_one_is_needed(row, reason):
    """Catches rows dropped in silence, and errors that do not say what to do."""
    with pytest.raises(ValueError) as caught:
        as_answered(row, where="a.jsonl, line 3")
    assert str(caught.value).startswith(f"a.jsonl, line 3: {reason}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a row must be an object, got [1]"),
        ("{}", "a row needs one of turns, prompt, messages, conversations; got nothing"),
        ('{"turns": []}', "turns must be a list of texts, got []"),
        ('{"turns": [3]}', "turns must be a list of texts, got [3]"),
        ('{"prompt": ""}', "prompt must be a text, got ''"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list of texts with role and content"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "messages must hold one by the user"),
        ('{"conversations": [{"from": "tool", "value": "x"}]}', "conversations must be a list of texts with value and"),
        ('{"conversations": []}', "messages must hold one by the user, got []"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    """Catches rows dropped in silence, and an error that leaves one to search a million lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_prompts([path])
    assert f"rows.jsonl, line 3: {reason}" in str(caught.value)


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    """Catches str.splitlines, which cuts JSON at U+2028."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert texts(read_prompts([path])) == ["a\u2028b"]


def test_filters_that_leave_nothing_name_what_there_is(tmp_path):
    """Catches a run over no traffic because of a mistyped domain."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(NoPromptsError, match=r"split eval and domain maths; there are .*'math'"):
        read_prompts([path], split="eval", domains=["maths"])


def test_a_missing_file_is_named(tmp_path):
    """Catches an error that does not say which of several files is absent."""
    with pytest.raises(FileNotFoundError, match=r"no prompts file .*absent\.jsonl"):
        read_prompts([tmp_path / "absent.jsonl"])


def test_a_dataset_gives_its_rows_after_the_held_out_ones(tmp_path):
    """Catches held-out rows that are also trained on, and a limit that counts them."""
    path = str(write_rows(tmp_path / "rows.jsonl", [{"question": str(i)} for i in range(6)]))
    source = {"split": "train", "field": "question"}
    assert texts(read_dataset(path, limit=2, **source)) == ["0", "1"]
    assert texts(read_dataset(path, skip=2, limit=3, **source)) == ["2", "3", "4"]
    shuffled = texts(read_dataset(path, skip=2, shuffle_seed=0, epochs=2, **source))
    assert sorted(shuffled[:4]) == sorted(shuffled[4:]) == ["2", "3", "4", "5"]


def test_a_dataset_column_may_hold_turns_or_messages(tmp_path):
    """Catches chat datasets read as the text of a Python list."""
    path = str(write_rows(tmp_path / "rows.jsonl", [{"a": ["hi"], "b": [{"role": "user", "content": "ho"}]}]))
    assert texts(read_dataset(path, split="train", field="a")) == ["hi"]
    assert texts(read_dataset(path, split="train", field="b")) == ["ho"]


def test_a_dataset_gives_answers_from_their_own_column_or_whole_texts(tmp_path):
    """Catches the prompt's column taken for the answer's, and a missing answer noticed only by what is learnt."""
    path = str(write_rows(tmp_path / "rows.jsonl", [{"ask": "hi", "reply": "ho"}]))
    options = {"split": "train", "parse": as_answered}
    hi = [{"role": "user", "content": "hi"}]
    assert list(read_dataset(path, field="ask", answer_field="reply", **options)) == [AnsweredPrompt(hi, "ho")]
    assert list(read_dataset(path, field="ask", **options)) == [AnsweredPrompt([], "hi")]
    with pytest.raises(ValueError, match="no column 'answer'; there are ask, reply"):
        next(read_dataset(path, field="ask", answer_field="answer", **options))


def test_a_dataset_without_the_column_is_refused_with_its_columns(tmp_path):
    """Catches a KeyError from deep within."""
    path = str(write_rows(tmp_path / "rows.jsonl", [{"question": "x"}]))
    with pytest.raises(ValueError, match=r"row 0: no column 'prompt'; there are question"):
        next(read_dataset(path, split="train", field="prompt"))
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        next(read_dataset(str(tmp_path / "absent.jsonl"), split="train", field="prompt"))
