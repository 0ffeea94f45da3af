"""Spec-Bench's questions as they are, and prompts as the harness would make them."""

import hashlib
import json

import pytest
from transformers import AutoTokenizer

from dvi.bench.questions import (
    BUNDLED_QUESTIONS,
    TASKS,
    Conversation,
    answer_text,
    load_questions,
    select,
    task_of,
    vicuna_prompt,
)
from dvi.model.chat_templates import VICUNA_SYSTEM, VICUNA_TEMPLATE

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained("tests/stories260k")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_bundled_questions_are_spec_bench_unchanged():
    """Catches an edited or truncated file: figures over other questions compare with nothing."""
    assert hashlib.sha256(BUNDLED_QUESTIONS.read_bytes()).hexdigest() == (
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04"
    )
    questions = load_questions()
    assert [question.question_id for question in questions] == list(range(81, 561))
    tasks = [task_of(question.category) for question in questions]
    assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 80)
    assert {len(q.turns) for q in questions if task_of(q.category) == "mt_bench"} == {2}
    assert {len(q.turns) for q in questions if task_of(q.category) != "mt_bench"} == {1}


def test_reasoning_and_math_are_of_mt_bench_and_math_reasoning_is_a_task():
    """Catches GSM8K's questions counted as MT-bench's, whose categories have nearly the same names."""
    assert [task_of(c) for c in ("reasoning", "math", "math_reasoning")] == ["mt_bench", "mt_bench", "math_reasoning"]
    with pytest.raises(ValueError, match=r"category must be one of .*rag, got 'mt_bench'"):
        task_of("mt_bench")


def test_a_limit_takes_as_many_of_each_task_and_all_categories_of_mt_bench():
    """Catches a limit that takes the first ones: of MT-bench those are all one category."""
    chosen = select(load_questions(), 8)
    tasks = [task_of(question.category) for question in chosen]
    assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 8)
    assert len({question.category for question in chosen}) == 8 + 5
    ids = [question.question_id for question in chosen]
    assert ids == sorted(ids)


@pytest.mark.parametrize("limit", [0, 80, 1000])
def test_a_limit_of_zero_or_beyond_a_task_takes_every_question(limit):
    """Catches a question lost by rounding, and 0 read as none."""
    assert select(load_questions(), limit) == load_questions()


@pytest.mark.parametrize("limit", [1, 3, 7, 79])
def test_a_limit_that_does_not_divide_a_task_is_met_exactly(limit):
    """Catches one question too many or too few."""
    assert len(select(load_questions(), limit)) == 6 * limit


def test_a_negative_limit_is_refused():
    """Catches a slice from the end."""
    with pytest.raises(ValueError, match="limit_per_task must be >= 0"):
        select(load_questions(), -1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question_id": 1, "category": "qa"}, "line 3: turns: Field required"),
        ({"question_id": 1, "category": "qa", "turns": []}, "line 3: .*at least one text"),
        ({"question_id": 1, "category": "poetry", "turns": ["x"]}, "line 3: .*got 'poetry'"),
        ({"question_id": 7, "category": "qa", "turns": ["x"]}, "line 3: question_id 7 is there twice"),
        ('{"question_id": 1, "categ', "line 3: not JSON"),
        ({"question_id": 1, "category": "qa", "turns": ["a \ud83d"]}, r"line 3: .*turns\[0\] holds half"),
        ("[1]", "line 3: .*dictionary or an instance"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, reason):
    """Catches a question that is dropped in silence: the figures would be of another benchmark."""
    good = {"question_id": 7, "category": "qa", "turns": ["a \u2028 b"], "reference": [["a list"]]}
    path = write(tmp_path / "question.jsonl", good, "", row)
    with pytest.raises(ValueError, match=reason):
        load_questions(path)


def test_a_separator_within_a_text_ends_no_line(tmp_path):
    """Catches str.splitlines, which cuts JSON at U+2028."""
    path = tmp_path / "question.jsonl"
    path.write_text('{"question_id": 7, "category": "qa", "turns": ["a \u2028 b"]}\n', encoding="utf-8")
    assert load_questions(path)[0].turns == ("a \u2028 b",)


def test_vicuna_prompts_are_fastchats():
    """Catches a blank or an end mark too many: the model would see text it was not trained on."""
    assert vicuna_prompt(("Hi?",), []) == f"{VICUNA_SYSTEM} USER: Hi? ASSISTANT:"
    assert vicuna_prompt(("Hi?", "And?"), ["Yes."]) == (
        f"{VICUNA_SYSTEM} USER: Hi? ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    )
    assert vicuna_prompt(("Hi?", "And?"), [""]) == f"{VICUNA_SYSTEM} USER: Hi? ASSISTANT:USER: And? ASSISTANT:"


def test_the_tokenizer_adds_the_beginning_of_a_vicuna_prompt(tokenizer):
    """Catches a prompt without BOS, and one with two."""
    conversation = Conversation(tokenizer, "vicuna")
    ids = conversation.encode(("Once",), [], room=512).token_ids
    assert ids == tokenizer(vicuna_prompt(("Once",), []))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_the_chat_template_is_the_models_own_with_one_beginning(chat_tokenizer):
    """Catches BOS added twice, and a history whose roles are mixed up."""
    prompt = Conversation(chat_tokenizer, "chat").encode(("one", "two"), ["said"], room=512)
    text = "<s>[user] one [assistant] said [user] two [assistant]"
    assert prompt.token_ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.token_ids.count(chat_tokenizer.bos_token_id) == 1


def test_the_default_template_is_chat_where_the_tokenizer_has_one(tokenizer):
    """Catches a chat model asked in Vicuna's words, and a forced template that is ignored."""
    assert Conversation(tokenizer).template == "vicuna"
    tokenizer.chat_template = CHAT_TEMPLATE
    assert Conversation(tokenizer).template == "chat"
    assert Conversation(tokenizer, "vicuna").template == "vicuna"


def test_templates_that_do_not_exist_are_refused(tokenizer):
    """Catches a fallback nobody asked for."""
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(tokenizer, "chat")
    with pytest.raises(ValueError, match="must be one of auto, vicuna, chat, got 'alpaca'"):
        Conversation(tokenizer, "alpaca")


def test_a_long_prompt_loses_its_beginning_and_says_how_much(tokenizer):
    """Catches the question itself cut off, and a cut that nobody hears of."""
    conversation = Conversation(tokenizer)
    whole = conversation.encode(("Once upon a time",), [], room=512)
    cut = conversation.encode(("Once upon a time",), [], room=10)
    assert whole.num_cut == 0
    assert cut.token_ids == whole.token_ids[-10:]
    assert cut.num_cut == len(whole.token_ids) - 10


def test_an_answer_is_cut_at_the_stop_string_unless_it_begins_with_it(tokenizer):
    """Catches an end mark in the next turn's history, and the harness's quirk lost: at index 0 nothing is cut."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Once", "upon"))
    assert answer_text(tokenizer, [*one, eos, *two], "</s>") == "Once"
    assert answer_text(tokenizer, [eos, *two], "</s>") == "upon"
    assert answer_text(tokenizer, [*one, eos, bos, *two], None).split() == ["Once", "upon"]


def test_the_chat_template_of_vicuna_writes_what_the_harness_writes(tokenizer):
    """Catches a drafter that learns from prompts of another form than it will be asked in."""
    tokenizer.chat_template = VICUNA_TEMPLATE
    messages = [
        {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "So?"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.bos_token + vicuna_prompt(("Hi?", "And?", "So?"), ["Yes.", ""])
