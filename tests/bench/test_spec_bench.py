"""A Spec-Bench run asks every arm the same, counts them the same way, and survives what happens to it."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from dvi import SamplingParams, SelfSpeculator
from dvi.bench.answers import DETAILS_FILE, check_answer, read_answers, read_details
from dvi.bench.questions import Conversation, Question
from dvi.bench.records import ArmAnswer, ArmPlan
from dvi.bench.spec_bench import run_spec_bench
from dvi.bench.timed_arm import count_tokens
from dvi.config import checked
from dvi.decode.speculator import PLAIN
from dvi.draft.length_policies import FixedLength
from dvi.records import RoundStats
from dvi.settings import SpecBenchSettings

EOS = 2
QUESTIONS = [
    Question(81, "writing", ("Tell a story.", "And then?")),
    Question(82, "qa", ("Who is Lily?",)),
    Question(83, "coding", ("Once upon a time", "The end?")),
    Question(84, "rag", ("A dog ran.",)),
]


@pytest.fixture(scope="module")
def speculator():
    return SelfSpeculator.from_pretrained("tests/stories260k", device="cpu")


class Canned:
    """Gives every prompt the same tokens, one a step, and notes in a shared log who was asked what with which seed."""

    def __init__(self, name, log, token_ids=(410, 411, 412)):
        self.name, self.log, self.token_ids = name, log, list(token_ids)

    def answer(self, prompts, *, seed):
        self.log.append((self.name, prompts, seed))
        return [self.say(prompt) for prompt in prompts]

    def say(self, prompt):
        return ArmAnswer(self.token_ids, [1] * len(self.token_ids))


class Decoding:
    """Really decodes."""

    def __init__(self, speculator, policy, *, temperature=0.0, max_new_tokens=12):
        self.speculator, self.policy = speculator, policy
        self.options = {"temperature": temperature, "max_new_tokens": max_new_tokens}

    def answer(self, prompts, *, seed):
        results = self.speculator.generate(
            prompts, SamplingParams(**self.options, seed=seed), batch_size=len(prompts), policy=self.policy,
            keep_transitions=False,
        )
        results = sorted(results, key=lambda result: result.index)
        return [ArmAnswer(r.token_ids, r.accept_lengths, r.stats) for r in results]


class Learning(Canned):
    """Its answers tell how many it has given: one token more each time."""

    num_answered = 0

    def say(self, prompt):
        self.num_answered += 1
        return ArmAnswer([410] * self.num_answered, [1] * self.num_answered)


def raising(error, *, when):
    """A plan's arm that raises at the calls, counted from 1 over the whole run, for which `when` holds."""

    class Raising(Canned):
        num_calls = 0

        def say(self, prompt):
            Raising.num_calls += 1
            if when(Raising.num_calls):
                raise error
            return super().say(prompt)

    return Raising


def plan(name, log=None, arm=Canned, **options):
    flags = {key: options.pop(key) for key in ("is_learning", "batch_one", "na_reason", "facts") if key in options}
    log = [] if log is None else log
    return ArmPlan(name, name.title(), lambda: arm(name, log, **options), **flags)


def settings(**changes):
    defaults = {"model": "tests/stories260k", "max_new_tokens": 12, "repetitions": 1, "warmups": 0}
    return SpecBenchSettings(**(defaults | changes))


@pytest.fixture
def run(speculator, tmp_path):
    """Runs plans in one folder; returns the summary, and what people saw as `run.seen`."""

    def start(*plans, questions=QUESTIONS, **changes):
        console = Console(file=io.StringIO(), width=200)
        try:
            return run_spec_bench(
                list(plans), questions, Conversation(speculator.tokenizer), speculator=speculator, folder=tmp_path,
                settings=settings(**changes), console=console,
            )
        finally:
            start.seen = console.file.getvalue()

    return start


def model_answers(folder, arm, repetition=1):
    model_id = f"stories260k-dvi-{arm}-float32-temp-0.0"
    return read_answers(folder / f"run_{repetition}" / "model_answer" / f"{model_id}.jsonl")


def details(folder, arm, repetition=1):
    return [d for d in read_details(folder / f"run_{repetition}" / DETAILS_FILE) if d.arm == arm]


def run_file(folder):
    return json.loads((folder / "run.json").read_text())


def clear(folder):
    for path in folder.rglob("*.js*"):
        path.unlink()


def timeless(folder):
    """Everything that a run wrote of its answers but times and random ids."""
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("tstamp", None)
            line.pop("answer_id", None)
            for choice in line.get("choices", []):
                choice.pop("wall_time")
        found[str(path.relative_to(folder))] = lines
    return found


def test_a_run_of_real_decoders_leaves_sound_files_in_which_they_agree(run, speculator, tmp_path):
    """Catches any break of the format's invariants end to end, and counts that are not the tokens'."""
    plans = [
        ArmPlan("plain", "Plain", lambda: Decoding(speculator, PLAIN)),
        ArmPlan("speculative", "Speculative", lambda: Decoding(speculator, FixedLength(3))),
    ]
    summary = run(*plans, repetitions=2, warmups=1)
    assert summary.num_questions == 4 and summary.num_repetitions == 2
    for name, arm in summary.arms.items():
        assert (arm.num_answered, arm.num_failed, arm.num_diverged) == (8, 0, 0)
        for repetition in (1, 2):
            lines, found = model_answers(tmp_path, name, repetition), details(tmp_path, name, repetition)
            assert [line["question_id"] for line in lines] == [81, 82, 83, 84] == [d.question_id for d in found]
            for line, detail in zip(lines, found, strict=True):
                check_answer(line, max_new_tokens=12)
                assert line["choices"][0]["new_tokens"] == [len(ids) for ids in detail.token_ids]
                assert detail.divergence is None and detail.error is None
                assert detail.num_rounds == sum(line["choices"][0]["decoding_steps"])
    assert summary.arms["plain"].num_tokens == summary.arms["speculative"].num_tokens > 0
    assert sum(d.num_drafted for d in details(tmp_path, "speculative")) > 0
    assert "failed" not in run.seen


def test_run_json_tells_what_was_run_where_and_how_long_the_prompts_were(run, tmp_path, speculator):
    """Catches figures without their conditions."""
    run(plan("plain", facts={"width": 3}), plan("hf", na_reason="no checkpoint given"))
    found = run_file(tmp_path)
    assert found["settings"]["max_new_tokens"] == 12 and found["template"] == "vicuna" and found["dtype"] == "float32"
    assert found["reference"] == "plain" and found["machine"]["torch"] == torch.__version__
    assert found["arms"] == [
        {"name": "plain", "title": "Plain", "model_id": "stories260k-dvi-plain-float32-temp-0.0", "na_reason": None,
         "is_learning": False, "is_lossy": False, "facts": {"width": 3}},
        {"name": "hf", "title": "Hf", "model_id": "stories260k-dvi-hf-float32-temp-0.0",
         "na_reason": "no checkpoint given", "is_learning": False, "is_lossy": False, "facts": {}},
    ]  # fmt: skip
    lengths = [d.prompt_tokens for d in details(tmp_path, "plain")]
    assert found["prompts"]["per_task"]["qa"] == {"mean": lengths[1][0], "max": lengths[1][0]}
    story = [*lengths[0], *lengths[2]]
    assert found["prompts"]["per_task"]["mt_bench"] == {"mean": sum(story) / 4, "max": max(story)}
    assert set(found["prompts"]["per_task"]) == {"mt_bench", "qa", "rag"}
    assert (found["prompts"]["num_prompts"], found["prompts"]["num_cut"], found["prompts"]["tokens_cut"]) == (6, 0, 0)


def test_arms_take_turns_and_their_order_turns_with_every_question_and_repetition(run):
    """Catches an arm that always runs on a warm cache, or always first."""
    log = []
    run(plan("a", log), plan("b", log), questions=[QUESTIONS[1], QUESTIONS[3]], repetitions=2)
    assert [name for name, _, _ in log] == ["a", "b", "b", "a", "b", "a", "a", "b"]


def test_the_second_turn_is_asked_after_the_arms_own_first_answer(run, speculator):
    """Catches a history taken from another arm, and one without the answer."""
    log = []
    run(plan("a", log, token_ids=[403, EOS]), plan("b", log, token_ids=[471]), questions=QUESTIONS[:1])
    tokenizer = speculator.tokenizer
    for name, token_id in (("a", 403), ("b", 471)):
        first, second = (prompts[0] for asked, prompts, _ in log if asked == name)
        said = tokenizer.decode([token_id]).strip()
        conversation = Conversation(tokenizer)
        assert said and first == conversation.encode(QUESTIONS[0].turns[:1], [], room=512).token_ids
        assert second == conversation.encode(QUESTIONS[0].turns, [said], room=512).token_ids


def test_warm_ups_leave_no_trace_and_a_learning_arm_starts_untaught(run, tmp_path):
    """Catches warm-ups that are recorded, and a learner that has seen the first question before it is asked."""
    log = []
    run(plan("plain", log), plan("online", log, Learning, is_learning=True), warmups=3, repetitions=2)
    assert [name for name, _, _ in log].count("plain") == 2 * (3 * 2 + 6)
    for repetition in (1, 2):
        assert details(tmp_path, "online", repetition)[0].token_ids == [[410], [410, 410]]
        assert len(model_answers(tmp_path, "plain", repetition)) == 4


@pytest.mark.parametrize("call", [1, 3, 5, 8])
def test_an_interrupted_run_goes_on_where_it_was_and_ends_as_if_nothing_had_happened(run, tmp_path, call):
    """Catches questions that are asked twice or lost, an order that shifts, and a file that is not valid meanwhile."""
    run(plan("plain"), plan("other"), repetitions=2)
    whole = timeless(tmp_path)
    clear(tmp_path)
    killed = raising(KeyboardInterrupt(), when=lambda number: number == call)
    with pytest.raises(KeyboardInterrupt):
        run(plan("plain"), plan("other", arm=killed), repetitions=2)
    for path in tmp_path.rglob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    finished = {d.question_id for d in details(tmp_path, "plain")}
    log = []
    summary = run(plan("plain", log), plan("other", log), repetitions=2)
    assert timeless(tmp_path) == whole
    assert summary.arms["other"].num_answered == 8
    turns = {question.question_id: len(question.turns) for question in QUESTIONS}
    assert len(log) == 2 * (2 * 6 - sum(turns[i] for i in finished))
    assert "begins again" not in run.seen


def test_a_finished_run_asks_nobody_again(run):
    """Catches a second start that measures anew, or builds arms for nothing."""
    run(plan("plain"), plan("online", is_learning=True))
    log = []
    summary = run(plan("plain", log), plan("online", log, is_learning=True))
    assert log == [] and summary.arms["online"].num_answered == 4


def test_an_interrupted_repetition_with_a_learner_begins_again_for_all_and_says_so(run, tmp_path):
    """Catches a learner that goes on untaught in the middle, and a finished repetition thrown away with it."""

    class Killed(Learning):
        def say(self, prompt):
            if self.num_answered == 3:
                raise KeyboardInterrupt
            return super().say(prompt)

    plans = plan("plain"), plan("online", arm=Learning, is_learning=True)
    run(*plans)
    first = timeless(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"repetitions": 1', '"repetitions": 2'))
    with pytest.raises(KeyboardInterrupt):
        run(plans[0], plan("online", arm=Killed, is_learning=True), repetitions=2)
    assert [d.question_id for d in details(tmp_path, "plain", 2)] == [81, 82]
    log = []
    run(plan("plain", log), plan("online", log, Learning, is_learning=True), repetitions=2)
    assert "run 2 was interrupted and an arm of it learns: it begins again" in run.seen
    assert len(log) == 2 * 6
    assert details(tmp_path, "online", 2)[0].token_ids == [[410], [410, 410]]
    assert {name: lines for name, lines in timeless(tmp_path).items() if "run_1" in name} == first


def test_answers_of_a_question_that_was_cut_short_never_outlive_its_failure(run, tmp_path):
    """Catches the stale answer: written, then a kill, then the second attempt fails, and the first one is scored."""
    run(plan("plain"), plan("other"))
    path = tmp_path / "run_1" / DETAILS_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    failing = raising(RuntimeError("boom"), when=lambda number: True)
    summary = run(plan("plain"), plan("other", arm=failing))
    assert [line["question_id"] for line in model_answers(tmp_path, "other")] == [81, 82, 83]
    assert summary.arms["other"].num_failed == 1


def test_a_failure_is_recorded_and_neither_scored_nor_tried_again(run, tmp_path):
    """Catches a failed question that keeps its first turn's figures, as the harness does, and one that stops all."""
    failing = raising(RuntimeError("out of [memory]"), when=lambda number: number == 2)
    summary = run(plan("plain"), plan("other", arm=failing))
    assert [line["question_id"] for line in model_answers(tmp_path, "other")] == [82, 83, 84]
    assert [line["question_id"] for line in model_answers(tmp_path, "plain")] == [81, 82, 83, 84]
    found = details(tmp_path, "other")[0]
    assert found.error == "RuntimeError: out of [memory]"
    assert len(found.token_ids) == 1 and len(found.prompt_tokens) == 2
    assert "question 81, other failed: RuntimeError: out of [memory]" in run.seen
    assert (summary.arms["other"].num_answered, summary.arms["other"].num_failed) == (3, 1)
    log = []
    run(plan("plain", log), plan("other", log))
    assert log == []


def test_a_difference_is_recorded_with_its_place_and_the_gap_there(run, tmp_path, speculator):
    """Catches a mismatch that passes as equal, a wrong position, and a gap taken one token off."""
    run(
        plan("plain", token_ids=[410, 411, 412]), plan("other", token_ids=[410, 413]),
        plan("short", token_ids=[410]), plan("same", token_ids=[410, 411, 412]),
    )
    found = details(tmp_path, "other")[1].divergence
    assert (found.turn, found.position, found.plain_token, found.other_token) == (0, 1, 411, 413)
    prompt = Conversation(speculator.tokenizer).encode(QUESTIONS[1].turns, [], room=500).token_ids
    with torch.no_grad():
        top = speculator.model(torch.tensor([[*prompt, 410]])).logits[0, -1].topk(2).values
    assert found.gap == pytest.approx(float(top[0] - top[1]), abs=1e-4)  # two ways of computing it in float32
    short = details(tmp_path, "short")[1].divergence
    assert (short.position, short.plain_token, short.other_token) == (1, 411, None)
    assert all(d.divergence is None for d in details(tmp_path, "same") + details(tmp_path, "plain"))
    assert len(model_answers(tmp_path, "other")) == 4


def test_a_difference_in_the_second_turn_is_placed_there(run, tmp_path):
    """Catches turns compared as one text, or only the first of them."""

    class Differing(Canned):
        num_answered = 0

        def say(self, prompt):
            self.num_answered += 1
            return ArmAnswer([410, 411] if self.num_answered == 1 else [410, 499], [2])

    run(plan("plain", token_ids=[410, 411]), plan("other", arm=Differing), questions=QUESTIONS[:1])
    found = details(tmp_path, "other")[0].divergence
    assert (found.turn, found.position) == (1, 1)


def test_sampled_answers_are_not_compared(run, tmp_path):
    """Catches honest draws that are reported as errors of decoding."""
    run(plan("plain"), plan("other", token_ids=[420]), temperature=0.7)
    assert all(d.divergence is None for d in read_details(tmp_path / "run_1" / DETAILS_FILE))
    assert run_file(tmp_path)["conditions"]["comparison"] == "none under sampling"


def test_all_arms_are_counted_through_the_end_token_and_to_the_limit():
    """Catches an arm that is paid for tokens after its end, or for overshooting."""

    def counted(token_ids, lengths, limit=6):
        found = count_tokens(ArmAnswer(token_ids, lengths), eos_token_ids={EOS, 3}, max_new_tokens=limit)
        return found.token_ids, found.accept_lengths

    assert counted([5, 6, EOS, 7, 8], [1, 3, 1]) == ([5, 6, EOS], [1, 2])
    assert counted([5, 6, EOS, 7, 8], [3, 2]) == ([5, 6, EOS], [3])
    assert counted([5, 3, EOS], [1, 1, 1]) == ([5, 3], [1, 1])
    assert counted([5, 6, 7, 8, 9], [4, 1], limit=3) == ([5, 6, 7], [3])
    assert counted([5, 6, 7, EOS], [4], limit=3) == ([5, 6, 7], [3])
    assert counted([5, 6], [1, 1]) == ([5, 6], [1, 1])


@pytest.mark.parametrize("answer", [ArmAnswer([], []), ArmAnswer([5, 6], [1]), ArmAnswer([5, 6], [2, 0])])
def test_an_answer_whose_steps_do_not_account_for_its_tokens_is_a_failure(run, tmp_path, answer):
    """Catches a mean of accepted tokens that was never counted."""

    class Wrong(Canned):
        def say(self, prompt):
            return answer

    run(plan("plain"), plan("other", arm=Wrong), questions=QUESTIONS[1:2])
    assert "ValueError" in details(tmp_path, "other")[0].error
    assert model_answers(tmp_path, "other") == []


def test_a_missing_answer_is_a_failure(run, tmp_path):
    """Catches answers of a batch that slide to other questions."""

    class Silent(Canned):
        def answer(self, prompts, *, seed):
            return super().answer(prompts[1:], seed=seed)

    run(plan("plain"), plan("other", arm=Silent), batch_size=4)
    assert all("must answer each" in d.error for d in details(tmp_path, "other"))


def test_a_prompt_beyond_the_context_is_cut_from_the_left_and_counted(run, tmp_path):
    """Catches a question that is dropped, or cut in silence, or cut so that no answer fits."""
    log = []
    long = Question(90, "summarization", ("Summarize: " + "the dog ran to the big tree and " * 60,))
    run(plan("plain", log), questions=[long, QUESTIONS[1]])
    found = run_file(tmp_path)
    assert found["context"] == 512 and found["room"] == 500
    detail = details(tmp_path, "plain")[0]
    assert detail.prompt_tokens == [500] and len(log[0][1][0]) == 500
    assert detail.cut_tokens[0] > 0
    assert (found["prompts"]["num_cut"], found["prompts"]["tokens_cut"]) == (1, detail.cut_tokens[0])


def test_an_answer_beyond_the_context_is_a_failure(run, tmp_path):
    """Catches an arm that is timed over tokens where the others had to stop."""
    long = Question(90, "summarization", ("Summarize: " + "the dog ran to the big tree and " * 60,))
    run(plan("plain", token_ids=[5] * 90), questions=[long], max_new_tokens=100)
    assert run_file(tmp_path)["room"] == 512 - 64  # an eighth of the context is enough for an answer
    assert "must end at the model's context of 512" in details(tmp_path, "plain")[0].error


def test_a_batch_is_decoded_together_turn_by_turn_and_shares_its_time(run, tmp_path, monkeypatch):
    """Catches a batch whose time counts once per question, a turn asked of a question that has none, and lost order."""
    log, clock = [], itertools.count(step=6.0)
    monkeypatch.setattr("dvi.bench.timed_arm.time.perf_counter", lambda: next(clock))  # 6 s between two looks
    run(plan("plain", log), batch_size=3)
    assert [len(prompts) for _, prompts, _ in log] == [3, 2, 1]
    lines = {line["question_id"]: line["choices"][0] for line in model_answers(tmp_path, "plain")}
    assert [lines[i]["wall_time"] for i in (81, 82, 83, 84)] == [[2, 3], [2], [2, 3], [6]]
    prompts = [len(prompt) for prompt in log[0][1]]
    assert prompts == [d.prompt_tokens[0] for d in details(tmp_path, "plain")[:3]]


def test_a_batch_gives_what_single_questions_give(run, speculator, tmp_path):
    """Catches answers that land at another question of the batch."""
    plans = [ArmPlan("plain", "Plain", lambda: Decoding(speculator, PLAIN))]
    run(*plans)
    alone = [d.token_ids for d in details(tmp_path, "plain")]
    clear(tmp_path)
    run(*plans, batch_size=4)
    assert [d.token_ids for d in details(tmp_path, "plain")] == alone


def test_an_arm_of_one_prompt_at_a_time_is_not_available_in_batches(run, tmp_path):
    """Catches a row that is measured alone and shown beside batches."""
    summary = run(plan("plain"), plan("early", batch_one=True), batch_size=2)
    assert list(summary.arms) == ["plain"]
    assert run_file(tmp_path)["arms"][1]["na_reason"] == "decodes one prompt at a time, batch_size is 2"


def test_the_same_seed_gives_the_same_answers(run, speculator, tmp_path):
    """Catches draws that hang on the clock or on what ran before; other repetitions must draw otherwise."""
    arm = ArmPlan("plain", "Plain", lambda: Decoding(speculator, FixedLength(2), temperature=1.0))
    questions = QUESTIONS[:2]
    run(arm, questions=questions, temperature=1.0, repetitions=2)
    first = timeless(tmp_path)
    clear(tmp_path)
    run(arm, questions=questions, temperature=1.0, repetitions=2, warmups=1)
    assert timeless(tmp_path) == first
    drawn = [[d.token_ids for d in details(tmp_path, "plain", repetition)] for repetition in (1, 2)]
    assert drawn[0] != drawn[1]


def test_all_arms_draw_with_one_seed_that_no_other_question_turn_or_repetition_has(run):
    """Catches shared draws: requests that draw alike are not independent."""
    log = []
    run(plan("a", log), plan("b", log), repetitions=2)
    seeds = {name: [seed for asked, _, seed in log if asked == name] for name in "ab"}
    assert sorted(seeds["a"]) == sorted(seeds["b"]) and len(set(seeds["a"])) == 12
    assert seeds["a"][:2] == [100_000_081, 101_000_081]


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"max_new_tokens": 13}, "max_new_tokens 12, asked for 13"), ({"batch_size": 2}, "batch_size 1"),
     ({"questions": QUESTIONS[:2]}, "questions")],
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused_by_the_first_key(run, changes, key):
    """Catches two runs mixed in one folder."""
    run(plan("plain"))
    with pytest.raises(ValueError, match=f"holds a run with {key}"):
        run(plan("plain"), **changes)


def test_a_folder_of_other_arms_or_of_another_machine_is_refused(run, tmp_path):
    """Catches arms that are not interleaved, a drafter that changed between starts, and times of two machines."""
    run(plan("plain", facts={"drafter_version": 1}))
    with pytest.raises(ValueError, match="holds a run with arm other None"):
        run(plan("plain", facts={"drafter_version": 1}), plan("other"))
    with pytest.raises(ValueError, match=r"holds a run with arm plain .*'drafter_version': 1"):
        run(plan("plain", facts={"drafter_version": 2}))
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"cores": ', '"cores": 9'))
    with pytest.raises(ValueError, match="holds a run with cores 9"):
        run(plan("plain", facts={"drafter_version": 1}))


def test_plans_that_make_no_run_are_refused(run):
    """Catches files that overwrite each other, and a run of nothing."""
    with pytest.raises(ValueError, match="must be unique and of"):
        run(plan("a"), plan("a"))
    with pytest.raises(ValueError, match="must be unique and of"):
        run(plan("A/b"))
    with pytest.raises(ValueError, match="needs an arm that can run here, got hf: no checkpoint"):
        run(plan("hf", na_reason="no checkpoint"))
    with pytest.raises(ValueError, match="repetitions must be greater than or equal to 1, got 0; the default is 3"):
        checked({"repetitions": 0}, SpecBenchSettings)


def test_a_limit_per_task_is_met_by_the_run(run):
    """Catches a setting that is written down and not followed."""
    assert run(plan("plain"), limit=1).num_questions == 3


def test_counts_of_rounds_are_summed_over_the_turns(run, tmp_path):
    """Catches raw counts of the last turn alone."""

    class Counting(Canned):
        def say(self, prompt):
            stats = RoundStats()
            stats.count_round(num_drafted=3, num_accepted=2)
            return ArmAnswer([5, 6, 7], [3], stats)

    run(plan("plain", arm=Counting), plan("hf"), questions=QUESTIONS[:1])
    found = details(tmp_path, "plain")[0]
    assert (found.num_rounds, found.num_drafted, found.num_accepted) == (2, 6, 4)
    assert (found.drafted_per_depth, found.accepted_per_depth) == ([2, 2, 2], [2, 2, 0])
    assert details(tmp_path, "hf")[0].num_rounds is None


def test_run_json_keeps_the_names_that_earlier_folders_have(run, tmp_path):
    """Catches a renamed setting: no folder that was begun before could be gone on with."""
    run(plan("plain"), limit=1)
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["settings"]
    assert kept == {
        "model": "tests/stories260k", "adapter": None, "num_draft_tokens": 4, "policy": "fixed", "limit_per_task": 1,
        "max_new_tokens": 12, "temperature": 0.0, "batch_size": 1, "repetitions": 1, "warmups": 0,
    }  # fmt: skip
