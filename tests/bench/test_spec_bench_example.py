"""The Spec-Bench example inside a stand-in of the harness, which calls it as the harness's own eval.py does."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dvi.bench.answers import check_answer
from dvi.bench.questions import answer_text, vicuna_prompt
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.records import SamplingParams
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "spec_bench" / "inference_dvi.py"
MODEL = ROOT / "tests" / "stories260k"
MAX_NEW_TOKENS = 24
QUESTIONS = [
    {"question_id": 82, "category": "writing", "turns": ["Once upon a time there was a dog", "And then?"]},
    {"question_id": 81, "category": "qa", "turns": ["Lily and Tom went to the park."]},
    {"question_id": 83, "category": "qa", "turns": ["skipped"]},
]
# FastChat's two functions that the harness uses.
FASTCHAT = '''
import json

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

class Conversation:
    roles, stop_str, stop_token_ids = ("USER", "ASSISTANT"), "</s>", None

    def __init__(self):
        self.messages = []

    def append_message(self, role, text):
        self.messages.append([role, text])

    def get_prompt(self):
        text = SYSTEM + " "
        for (role, message), end in zip(self.messages, [" ", "</s>"] * len(self.messages)):
            text += role + ": " + message + end if message else role + ":"
        return text

def get_conversation_template(name):
    return Conversation()

def load_questions(path, begin, end):
    with open(path) as file:
        return [json.loads(line) for line in file][begin:end]
'''
# As the harness calls a method: warm-ups, inference mode, its clock, the text it makes, and its error handling.
EVAL = '''
import json, os, time
import torch
from fastchat.model import get_conversation_template, load_questions

def run_eval(model, tokenizer, forward_func, model_id, question_file, question_begin, question_end, answer_file,
             max_new_tokens, num_choices, num_gpus_per_model, num_gpus_total, **kwargs):
    questions = load_questions(question_file, question_begin, question_end)
    get_model_answers(model, tokenizer, forward_func, model_id, questions, answer_file, max_new_tokens, num_choices,
                      **kwargs)

def ask(question, model, tokenizer, forward_func, max_new_tokens, kwargs):
    conv = get_conversation_template("vicuna")
    choice = {"turns": [], "decoding_steps": [], "new_tokens": [], "wall_time": [], "accept_lengths": []}
    for text in question["turns"]:
        conv.append_message(conv.roles[0], text)
        conv.append_message(conv.roles[1], None)
        inputs = tokenizer([conv.get_prompt()], return_tensors="pt")
        try:
            start = time.time()
            output_ids, new_token, step, lengths = forward_func(inputs, model, tokenizer, max_new_tokens, **kwargs)
            total_time = time.time() - start
            output = tokenizer.decode(output_ids[0][len(inputs.input_ids[0]):], spaces_between_special_tokens=False)
            if output.find(conv.stop_str) > 0:
                output = output[:output.find(conv.stop_str)]
            for special in tokenizer.special_tokens_map.values():
                output = output.replace(special, "")
            output = output.strip()
        except RuntimeError as error:
            print("ERROR question ID: ", question["question_id"], error)
            output = "ERROR"
        choice["turns"].append(output)
        choice["decoding_steps"].append(int(step))
        choice["new_tokens"].append(int(new_token))
        choice["wall_time"].append(total_time)
        choice["accept_lengths"].extend(lengths)
        conv.messages[-1][-1] = output
    return choice

@torch.inference_mode()
def get_model_answers(model, tokenizer, forward_func, model_id, questions, answer_file, max_new_tokens, num_choices,
                      **kwargs):
    model.eval()
    assert not model.training
    for _ in range(3):
        torch.manual_seed(0)
        ask(questions[0], model, tokenizer, forward_func, max_new_tokens, kwargs)
    for question in questions:
        choices = []
        for i in range(num_choices):
            torch.manual_seed(i)
            choices.append({"index": i, **ask(question, model, tokenizer, forward_func, max_new_tokens, kwargs)})
        os.makedirs(os.path.dirname(answer_file), exist_ok=True)
        with open(answer_file, "a") as file:
            file.write(json.dumps({"question_id": question["question_id"], "category": question["category"],
                                   "answer_id": "x", "model_id": model_id, "choices": choices,
                                   "tstamp": time.time()}) + "\\n")

def reorg_answer_file(answer_file):
    with open(answer_file) as file:
        lines = {json.loads(line)["question_id"]: line for line in file}
    with open(answer_file, "w") as file:
        file.writelines(lines[i] for i in sorted(lines))
'''


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(MODEL, device="cpu")


@pytest.fixture
def checkout(tmp_path) -> Path:
    for path, text in {
        "evaluation/__init__.py": "", "evaluation/eval.py": EVAL,
        "fastchat/__init__.py": "", "fastchat/model.py": FASTCHAT,
        "data/spec_bench/question.jsonl": "".join(json.dumps(q) + "\n" for q in QUESTIONS),
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    shutil.copy(EXAMPLE, tmp_path / "evaluation")
    return tmp_path


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    """The example as a module, its harness a name without content."""
    harness = SimpleNamespace(run_eval=None, reorg_answer_file=None)
    monkeypatch.setitem(sys.modules, "evaluation", ModuleType("evaluation"))
    monkeypatch.setitem(sys.modules, "evaluation.eval", harness)
    spec = importlib.util.spec_from_file_location("inference_dvi", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_texts(speculator: SelfSpeculator, turns: list[str]) -> list[str]:
    """The answers that plain greedy decoding gives to a question's turns."""
    texts: list[str] = []
    for turn in range(len(turns)):
        ids = speculator.tokenizer([vicuna_prompt(tuple(turns[: turn + 1]), texts)])["input_ids"][0]
        [result] = speculator.generate([ids], SamplingParams(max_new_tokens=MAX_NEW_TOKENS), policy=PLAIN, batch_size=1)
        texts.append(answer_text(speculator.tokenizer, result.token_ids, "</s>"))
    return texts


def test_it_runs_in_the_harness_and_learns_under_inference_mode(checkout, speculator):
    """Catches a learner whose tensors were made in inference mode (the harness then writes "ERROR" for answers), a
    changed text, an answer file that breaks the harness's sums, and arguments that do not arrive."""
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.inference_dvi", "--model-path", MODEL, "--model-id", "tiny-dvi", "--online",
         "--max-new-tokens", str(MAX_NEW_TOKENS), "--question-begin", "0", "--question-end", "2",
         "--dtype", "float32", "--num-draft-tokens", "3"],
        cwd=checkout, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    assert "ERROR" not in done.stdout
    num_steps, version = map(int, re.search(r"(\d+) optimizer steps, drafter version (\d+)", done.stdout).groups())
    assert num_steps >= 1
    assert version <= num_steps
    path = checkout / "data" / "spec_bench" / "model_answer" / "tiny-dvi.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82]
    for line in lines:
        check_answer(line, max_new_tokens=MAX_NEW_TOKENS)
        [question] = [q for q in QUESTIONS if q["question_id"] == line["question_id"]]
        assert line["choices"][0]["turns"] == plain_texts(speculator, question["turns"])


def test_an_answer_holds_its_prompt_and_counts_its_target_forwards(example, speculator):
    """Catches ids without the prompt, which the harness would cut off, and lengths that leave out the bonus token."""
    inputs = speculator.tokenizer(["Once upon a time"], return_tensors="pt")

    output_ids, num_tokens, num_steps, lengths = example.dvi_forward(
        inputs, speculator.model, speculator.tokenizer, 20,
        speculator=speculator, learner=None, temperature=0.0, seeds=itertools.count(),
    )  # fmt: skip

    prompt = inputs.input_ids[0].tolist()
    assert output_ids.shape == (1, len(prompt) + num_tokens)
    assert output_ids[0, : len(prompt)].tolist() == prompt
    assert (sum(lengths), len(lengths)) == (num_tokens, num_steps)
    assert num_tokens <= 20 and min(lengths) >= 1


def test_sampled_answers_each_have_their_own_draws(example, speculator):
    """Catches one seed for all answers: the harness gives torch the same one before every question."""
    inputs = speculator.tokenizer(["Once upon a time"], return_tensors="pt")

    def answers(seeds: itertools.count) -> list[list[int]]:
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            output_ids, *_ = example.dvi_forward(
                inputs, speculator.model, speculator.tokenizer, 20,
                speculator=speculator, learner=None, temperature=1.0, seeds=seeds,
            )  # fmt: skip
            found.append(output_ids[0].tolist())
        return found

    first, second = answers(itertools.count())
    assert first != second
    assert answers(itertools.count()) == [first, second]


def test_questions_are_not_spread_over_processes(example, monkeypatch, capsys):
    """Catches several drafters that learn apart, and append to one file, where the user expects one."""
    monkeypatch.setattr(sys, "argv", ["x", "--model-path", "m", "--model-id", "i", "--num-gpus-total", "2"])

    with pytest.raises(SystemExit):
        example.parse_args()

    assert "--num-gpus-total must equal --num-gpus-per-model, got 2 and 1" in capsys.readouterr().err
