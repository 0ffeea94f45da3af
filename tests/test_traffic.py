"""Prompts are read as they stand, in a repeatable order, and a bad row is named by file and line."""

import gzip
import json
import random

import pytest

from dvi.traffic import (
    AnsweredPrompt,
    NoPromptsError,
    as_answered,
    as_messages,
    as_text,
    hold_out,
    read_dataset,
    read_prompts,
)

ROWS = [
    {"id": "a", "domain": "math", "split": "traffic", "turns": ["one", "later"]},
    {"id": "b", "domain": "code", "split": "eval", "turns": ["two"]},
    {"prompt": "three"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "four"},
                  {"role": "assistant", "content": "an answer"}]},
    {"text": "five"},
    {"instruction": "six", "input": "", "output": "an answer"},
    {"instruction": "seven", "input": "of", "output": "an answer"},
    {"prompt": [{"role": "user", "content": "eight"}]},
]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(prompts):
    return [prompt[-1]["content"] for prompt in prompts]


def test_every_kind_of_row_becomes_chat_messages_that_end_with_the_user(tmp_path):
    """Catches a format that is not understood, a second turn asked without its answer, and an answer left in."""
    prompts = read_prompts([write_rows(tmp_path / "rows.jsonl", ROWS)])
    assert texts(prompts) == ["one", "two", "three", "four", "five", "six", "seven\n\nof", "eight"]
    assert [message["role"] for message in prompts[3]] == ["system", "user"]
    assert as_text(prompts[3]) == "be brief\n\nfour"


def test_split_and_domain_choose_rows_and_a_row_that_names_no_split_is_traffic(tmp_path):
    """Catches held-out rows among the traffic, and rows without a split lost to both."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert texts(read_prompts([path], split="traffic"))[:4] == ["one", "three", "four", "five"]
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
        {"instruction": "hi", "input": "", "output": "ho", "text": "all of it"},
        {"prompt": "hi", "response": "ho"},
    ):
        assert as_answered(row, where="here") == AnsweredPrompt(hi, "ho"), row
    assert as_answered({"text": "once"}, where="here") == AnsweredPrompt([], "once")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi"}, "a row needs an answer, a text, or messages that hold one; got prompt; warmup.source="),
        ({"prompt": "hi", "answer": ""}, "answer must be a text, got ''"),
        ({"answer": "ho"}, "a row needs one of turns, prompt, messages, conversations, instruction, text; got answer"),
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
        ("{}", "a row needs one of turns, prompt, messages, conversations, instruction, text; got nothing; data.field"),
        ('{"turns": []}', "turns must be a list of texts, got []"),
        ('{"turns": [3]}', "turns must be a list of texts, got [3]"),
        ('{"prompt": ""}', "prompt must be a text, got ''"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content must be a text, got None"),
        ('{"messages": "hi"}', "messages must be a list of texts with content and role, got 'hi'"),
        ('{"messages": ["hi"]}', "messages[0] must have role and content, got 'hi'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "human", "content": "b"}]}',
         "messages[1].role must be one of system, developer, user, assistant, tool, got 'human'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "messages[0].content must be a text, got ['a']"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role must be one of"),
        ('{"messages": [{"role": "user", "content": " "}]}', "messages[0].content must be a text, got ''; it"),
        ('{"prompt": 3}', "prompt must be a text, got 3"),
        ('{"prompt": "  "}', "prompt must be a text, got '  '"),
        ('{"prompt": {"a": 1}}', "prompt must be a text, got {'a': 1}"),
        ('{"instruction": "x", "input": 3}', "input must be a text, got 3"),
        ('{"text": null}', "text must be a text, got None"),
        (r'{"prompt": "a \ud83d b"}', r"prompt holds half a surrogate pair, '\ud83d' at character 2: write the whole"),
        (r'{"prompt": "a\u0000b"}', "prompt holds a NUL at character 1: take it out"),
        (r'{"turns": ["\udc00"]}', "turns holds half a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\udfff"}]}', "messages[0].content holds half a surrogate pair"),
        ('{"prompt": "x", "split": "train"}', "split must be one of traffic, eval, got 'train'; or leave it out"),
        ('{"prompt": "x", "split": ["eval"]}', "split must be one of traffic, eval, got ['eval']"),
        ('{"prompt": "x", "domain": ["math"]}', "domain must be a text, got ['math']"),
        ("[" * 100_000, "nested too deep to be a row"),
        ('{"prompt": ' + "9" * 5000 + "}", "not a row (Exceeds the limit"),
        ('"text"', "a row must be an object, got 'text'"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "messages must hold one by the user"),
        ('{"conversations": [{"from": "tool", "value": "x"}]}', "conversations[0].from must be one of system, human,"),
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
    with pytest.raises(ValueError, match="no field 'answer'; there are ask, reply"):
        next(read_dataset(path, field="ask", answer_field="answer", **options))


def test_a_dataset_without_the_column_is_refused_with_its_columns(tmp_path):
    """Catches a KeyError from deep within."""
    path = str(write_rows(tmp_path / "rows.jsonl", [{"question": "x"}]))
    with pytest.raises(ValueError, match=r"row 0: no field 'prompt'; there are question"):
        next(read_dataset(path, split="train", field="prompt"))
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        next(read_dataset(str(tmp_path / "absent.jsonl"), split="train", field="prompt"))


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_plain_text_rows_and_lists_are_read_packed_or_not(tmp_path, suffix):
    """Catches a kind of file that is refused, a byte-order mark in the first prompt, and line ends in the others."""
    text = write(tmp_path / f"a.txt{suffix}", b"\xef\xbb\xbfone\r\n\n  \ntwo {not json}\nthree")
    assert texts(read_prompts([text])) == ["one", "two {not json}", "three"]
    assert [prompt.where for prompt in read_prompts([text])] == [f"{text}, line {number}" for number in (1, 4, 5)]
    rows = write(tmp_path / f"a.jsonl{suffix}", b'{"text": "one"}\n{"prompt": "two"}\n')
    assert texts(read_prompts([rows])) == ["one", "two"]
    listed = write(tmp_path / f"a.json{suffix}", b'[\n  {"instruction": "one"},\n  {"prompt": "two"}\n]\n')
    assert texts(read_prompts([listed])) == ["one", "two"]
    assert read_prompts([listed])[1].where == f"{listed}, row 2"
    assert texts(read_prompts([text, rows, listed], limit=3)) == ["one", "one", "one"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "a.jsonl must hold a prompt, got none"),
        ("a.txt", b"\n \n", "a.txt must hold a prompt, got none"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe9"}\n', "a.jsonl, line 2: must be UTF-8"),
        ("a.txt", "h\u00e9".encode("utf-16"), "a.txt, line 1: must be UTF-8"),
        ("a.txt", b"fine\na\0b\n", "a.txt, line 2: prompt holds a NUL at character 1"),
        ("a.json", b'[{"prompt": "x"}, 3]', "a.json, row 2: a row must be an object, got 3"),
        ("a.json", b'[{"prompt": "x"}', "a.json: not JSON"),
    ],
)
def test_a_file_that_is_none_is_refused_at_its_line(tmp_path, name, content, reason):
    """Catches a traceback of a codec, and a run over no prompts at all."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_prompts([tmp_path / name])
    assert reason in str(caught.value)


def test_a_gzip_file_that_is_cut_or_none_and_a_folder_are_refused(tmp_path):
    """Catches a download that broke off and lost its last prompts in silence."""
    rng = random.Random(0)
    lines = b"".join(b"%d\n" % rng.getrandbits(200) for _ in range(2000))
    whole = gzip.compress(lines)
    for content in (whole[: len(whole) // 2], whole[:-3], b"plain text\n", whole[:200] + b"\0" * 50 + whole[250:]):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.txt.gz, line \d+: the gzip file is damaged .*; fetch it again"):
            read_prompts([tmp_path / "a.txt.gz"])
    with pytest.raises(ValueError, match="is a folder; give a file of it"):
        read_prompts([tmp_path])


def test_another_field_is_read_by_its_name_in_files_and_datasets(tmp_path):
    """Catches a field that is heeded in one of the two, and one that is not there taken for an empty prompt."""
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "hi", "answer": "ho", "prompt": "no"}, {"q": ["one", "two"]}])
    assert texts(read_prompts([path], field="q")) == ["hi", "one"]
    assert texts(read_dataset(str(path), split="train", field="prompt", limit=1)) == ["no"]
    (answered, *_) = read_prompts([write_rows(tmp_path / "b.jsonl", [{"q": "hi", "answer": "ho"}])], field="q",
                                  parse=as_answered)  # fmt: skip
    assert answered == AnsweredPrompt([{"role": "user", "content": "hi"}], "ho")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: no field 'x'; there are answer, prompt, q"):
        read_prompts([path], field="x")


def test_a_dataset_is_read_by_the_usual_names_and_broken_characters_are_passed_over(tmp_path, caplog):
    """Catches a setting that must be given for the commonest data, and a stream that ends at one broken row."""
    rows = [{"instruction": "a", "input": "b"}, {"instruction": "x\0", "input": ""}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert texts(read_dataset(str(path), split="train")) == ["a\n\nb"]
    assert "row 1: instruction holds a NUL at character 1: take it out: passed over" in caplog.text


def test_a_tenth_is_held_out_the_same_in_any_order_and_never_in_the_traffic(tmp_path):
    """Catches rows that are measured on and learnt from, and others held out on resume or on another rank."""
    rows = [{"prompt": f"question {i}"} for i in range(40)]
    prompts = [as_messages(row, where="here") for row in rows]
    held = hold_out(prompts, limit=24)
    assert len(held) == 4 and texts(held) == texts(hold_out(prompts[::-1], limit=24))
    assert hold_out(prompts, limit=2) == held[:2] and len(hold_out(prompts[:9], limit=24)) == 1
    assert hold_out(prompts[:1], limit=24) == hold_out([], limit=24) == hold_out(prompts[:1] * 3, limit=24) == []
    # A second copy of a held-out question, and one more epoch.
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"turns": [held[0][0]["content"], "and?"]}])
    traffic = read_prompts([path], leave_out=held, epochs=2, shuffle_seed=0)
    assert len(traffic) == 2 * 36 and not any(prompt in held for prompt in traffic)
    one = AnsweredPrompt(prompts[0], "an answer")
    assert hold_out([one, AnsweredPrompt(prompts[0], "another")], limit=24) == [], "one question, and so nothing left"
