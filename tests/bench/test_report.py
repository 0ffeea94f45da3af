"""The report, made of a run that canned arms left behind and whose clock is rewritten to known seconds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from dvi.bench.charts import AcceptanceCurve, plot_acceptance_over_questions
from dvi.bench.harness import load_speed, unmodified_figures
from dvi.bench.questions import Conversation, Question
from dvi.bench.records import ArmAnswer, ArmPlan
from dvi.bench.report import compare_with_harness, make_report, read_results, summarise
from dvi.bench.spec_bench import run_spec_bench
from dvi.bench.tables import ReportTable, report_tables
from dvi.decode.speculator import SelfSpeculator
from dvi.records import RoundStats
from dvi.settings import SpecBenchSettings
from tests.support.paths import STORIES

MODEL = STORIES
QUESTIONS = [
    Question(81, "writing", ("Once upon a time", "And then?")),
    Question(161, "translation", ("Translate German to English: Es war einmal",)),
    Question(321, "qa", ("who was it",)),
    Question(322, "qa", ("who was it not",)),
]
SECONDS = {"plain": 2.0, "twice": 1.0, "wrong": 0.1, "failing": 0.5}  # a turn
NUM_TOKENS = 8
# The harness's figures in plain loops, as the description of its speed.py has them.
SPEED_PY = '''
import json
import numpy as np
from transformers import AutoTokenizer

MT = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]

def lines_of(path, task):
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        is_mt = task == "mt_bench" and line["category"] in MT
        if task == "overall" or is_mt or line["category"] == task:
            yield line["choices"][0]

def speed(answers, baseline, tokenizer, task=None, report=True):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    rates, entries, base = [], [], []
    for choice in lines_of(answers, task):
        rates.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
        entries += choice["accept_lengths"]
    for choice in lines_of(baseline, task):
        num_tokens = sum(len(tokenizer(text).input_ids) - 1 for text in choice["turns"])
        base.append(num_tokens / sum(choice["wall_time"]))
    mean, other = np.array(rates).mean(), np.array(base).mean()
    if report:
        print(mean)
    return mean, other, mean / other, entries
'''


class CannedArm:
    """Eight tokens that depend on the prompt alone, `step` of them a round, of which `wrong_at` is another."""

    def __init__(self, step: int, *, wrong_at: int | None = None, fails_at: int | None = None) -> None:
        self.step, self.wrong_at, self.fails_at, self.num_asked = step, wrong_at, fails_at, 0

    def answer(self, prompts: list[list[int]], *, seed: int) -> list[ArmAnswer]:
        self.num_asked += 1
        if self.num_asked == self.fails_at:
            raise RuntimeError("out of [memory]")
        [prompt] = prompts
        ids = [300 + (sum(prompt) + i) % 90 for i in range(NUM_TOKENS)]
        if self.wrong_at is not None and self.num_asked == 2:
            ids[self.wrong_at] = 299
        stats = RoundStats()
        for _ in range(NUM_TOKENS // self.step):
            stats.count_round(num_drafted=2 * (self.step - 1), num_accepted=self.step - 1)
        return [ArmAnswer(ids, [self.step] * (NUM_TOKENS // self.step), stats)]


def plans(*names: str) -> list[ArmPlan]:
    every = {
        "plain": ArmPlan("plain", "Plain", lambda: CannedArm(1)),
        "twice": ArmPlan("twice", "Twice as fast", lambda: CannedArm(2), is_learning=True),
        "wrong": ArmPlan("wrong", "Wrong", lambda: CannedArm(2, wrong_at=3)),
        "failing": ArmPlan("failing", "Failing", lambda: CannedArm(1, fails_at=5)),
        "absent": ArmPlan("absent", "Absent", None, na_reason="no [checkpoint] given"),
    }
    return [every[name] for name in names]


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, speculator) -> Path:
    """A run of all arms, two repetitions; not to be written to."""
    return make_run(tmp_path_factory.mktemp("run"), speculator, *plans(*SECONDS, "absent"))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def make_run(folder: Path, speculator: SelfSpeculator, *arms: ArmPlan) -> Path:
    run_spec_bench(
        list(arms), QUESTIONS, Conversation(speculator.tokenizer), speculator=speculator, folder=folder,
        settings=SpecBenchSettings(model=str(MODEL), max_new_tokens=16, repetitions=2, warmups=0), console=quiet(),
    )  # fmt: skip
    for path in folder.rglob("model_answer/*.jsonl"):
        set_clock(path, next(s for name, s in SECONDS.items() if f"-dvi-{name}-" in path.name))
    return folder


def set_clock(path: Path, seconds: float) -> None:
    """Gives every turn of an answer file these seconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["choices"][0]["wall_time"] = [seconds] * len(line["choices"][0]["turns"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def figures_of(folder: Path, speculator: SelfSpeculator, *, baseline: str = "plain", **options) -> dict:
    """The report's figures, without its pictures, which take a second."""
    return summarise(*read_results(folder), baseline=baseline, tokenizer=speculator.tokenizer, **options)


@pytest.fixture(scope="module")
def written(finished, speculator, tmp_path_factory) -> tuple[dict, str, str]:
    """A whole report: its figures, what was printed, and the Markdown."""
    console, folder = quiet(), shutil.copytree(finished, tmp_path_factory.mktemp("written") / "run")
    report = make_report(folder, tokenizer=speculator.tokenizer, console=console)
    assert json.loads((folder / "report.json").read_text()) == report
    assert all((folder / name).stat().st_size > 0 for name in report["files"])
    return report, console.file.getvalue(), (folder / "report.md").read_text()


def arm_of(report: dict, name: str) -> dict:
    return next(arm for arm in report["arms"] if arm["name"] == name)


def test_paired_speed_and_accepted_tokens_are_those_of_the_answers(finished, speculator):
    """Catches figures of another arm's file, the text's token count in the paired ratio, and MAT without its bonus."""
    report = figures_of(finished, speculator)

    twice = arm_of(report, "twice")
    assert twice["paired"]["overall"]["interval"] == {"value": 2.0, "low": 2.0, "high": 2.0, "num_samples": 4}
    assert twice["paired"]["qa"]["interval"]["num_samples"] == 2
    assert (twice["mean_accepted_tokens"], twice["mean_accepted_drafts"], twice["acceptance"]) == (2.0, 1.0, 0.5)
    assert (twice["drafted_per_depth"], twice["accepted_per_depth"]) == ([40, 40], [40, 0])
    assert (twice["is_void"], twice["num_failed"]) == (False, 0)
    assert report["tasks"] == ["mt_bench", "translation", "qa", "overall"]


def test_harness_figures_of_the_report_are_over_runs(folder, speculator):
    """Catches a report of the first repetition alone, and tokens per second of the wrong side."""
    [path] = (folder / "run_2" / "model_answer").glob("*-dvi-twice-*")
    set_clock(path, 4.0)

    found = arm_of(figures_of(folder, speculator), "twice")["harness"]["overall"]

    assert found["tokens_per_s"]["mean"] == pytest.approx((8 / 1 + 8 / 4) / 2)
    assert found["tokens_per_s"]["std"] == pytest.approx(6 / 2**0.5)


def test_a_mismatch_voids_the_row_and_names_its_place(written):
    """Catches a wrong text that wins the table: it must be marked, and its question left out."""
    report, printed, _ = written

    wrong = arm_of(report, "wrong")
    first = wrong["first_mismatch"]
    assert (first["repetition"], first["question_id"], first["turn"], first["position"]) == (1, 81, 1, 3)
    assert first["gap"] >= 0
    assert wrong["num_differing"] == 2  # one in each repetition
    assert wrong["paired"]["overall"]["interval"]["num_samples"] == 3
    assert (wrong["paired"]["overall"]["num_differing"], wrong["paired"]["mt_bench"]["interval"]) == (1, None)
    assert "wrong VOID" in printed and "twice VOID" not in printed
    assert "run 1, question 81, turn 2, token 4" in printed


def test_a_failure_is_reported_and_never_scored(written):
    """Catches a failed question in any figure, and an error text that rich takes for markup."""
    report, printed, _ = written

    failing = arm_of(report, "failing")
    assert (failing["num_answered"], failing["num_failed"]) == (6, 2)
    assert failing["first_error"] == {"question_id": 322, "error": "RuntimeError: out of [memory]"}
    assert failing["paired"]["qa"]["interval"]["num_samples"] == 1
    assert failing["paired"]["qa"]["num_failed"] == 1
    assert "out of [memory]" in printed


def test_an_arm_that_could_not_run_stands_there_with_its_reason(written):
    """Catches n/a arms that vanish from the table."""
    for text in written[1:]:
        assert "n/a: no [checkpoint] given" in text


def test_markdown_stands_alone(written, finished):
    """Catches a report without hardware, command, conditions or biases, and published rows that look like ours."""
    run = json.loads((finished / "run.json").read_text())
    for part in (
        run["machine"]["cpu"], run["machine"]["torch"], run["command"].split()[0], "| max_new_tokens | 16 |",
        "less one a turn for the BOS", "another machine, fp16, Vicuna-7B: not comparable",
        "| EAGLE2 | A100 | 2.36x | 4.34 |", "![speedups.png](speedups.png)",
    ):  # fmt: skip
        assert part in written[2]


def test_the_same_files_give_the_same_figures(finished, speculator, written):
    """Catches a resampling without a seed, and clocks or sets that leak into the figures."""
    again = figures_of(finished, speculator)

    assert again == {name: value for name, value in written[0].items() if name != "files"}


def test_prompts_are_held_against_the_training_length(finished, speculator):
    """Catches lengths of one turn only, and a count over the limit in place of beyond it."""
    details = [json.loads(line) for line in (finished / "run_1" / "details.jsonl").read_text().splitlines()]
    lengths = [n for line in details if line["arm"] == "plain" for n in line["prompt_tokens"]]

    found = figures_of(finished, speculator, training_length=sorted(lengths)[1])["prompts"]["overall"]

    assert (found["num_prompts"], found["max"], found["num_beyond_training"]) == (5, max(lengths), 3)
    assert figures_of(finished, speculator)["prompts"]["qa"]["num_beyond_training"] is None


def test_pictures_are_drawn_for_what_there_is(written, speculator, tmp_path):
    """Catches a picture of acceptance over traffic in which nobody learns."""
    assert written[0]["files"] == ["speedups.png", "acceptance.png", "report.md", "report.json"]

    make_run(tmp_path, speculator, *plans("plain", "wrong"))
    frozen = make_report(tmp_path, tokenizer=speculator.tokenizer, console=quiet())

    assert frozen["files"] == ["speedups.png", "report.md", "report.json"]


def test_acceptance_of_a_task_unknown_is_drawn_too(tmp_path):
    """Catches a KeyError where a question failed in all arms, so that its task is not known."""
    curve = AcceptanceCurve("online", [(1, 0.5), (2, 0.7)], is_learning=True)

    plot_acceptance_over_questions([curve], tmp_path / "a.png", tasks=["qa", "overall"], conditions="")

    assert (tmp_path / "a.png").stat().st_size > 0


def test_an_unfinished_run_is_reported_as_far_as_it_came(folder, speculator):
    """Catches a report that needs the last repetition, or takes a missing question for a failed one."""
    shutil.rmtree(folder / "run_2")
    path = folder / "run_1" / "details.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["question_id"] != 322))

    report = figures_of(folder, speculator)

    assert report["num_served"] == [3]
    assert arm_of(report, "twice")["paired"]["overall"]["interval"]["num_samples"] == 3
    assert arm_of(report, "failing")["num_failed"] == 0
    assert arm_of(report, "twice")["harness"]["overall"]["speedup"]["std"] is None


def test_sampled_texts_may_differ(folder, speculator):
    """Catches rows voided under sampling, where only the law of the tokens is the same."""
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["temperature"] = 0.7
    (folder / "run.json").write_text(json.dumps(run))

    report = figures_of(folder, speculator)

    assert not arm_of(report, "wrong")["is_void"]
    assert arm_of(report, "wrong")["paired"]["overall"]["interval"]["num_samples"] == 4
    assert any("not compared" in table.as_markdown() for table in report_tables(report))


def test_another_baseline_may_be_asked_for(finished, speculator):
    """Catches ratios against the first arm whatever was asked, and mismatches taken from the wrong arm."""
    report = figures_of(finished, speculator, baseline="twice")

    assert arm_of(report, "plain")["paired"]["overall"]["interval"]["value"] == 0.5
    assert arm_of(report, "wrong")["is_void"]


def test_what_is_no_run_is_refused_with_the_remedy(folder, speculator, tmp_path):
    """Catches a KeyError or an empty table for a wrong folder or name."""
    with pytest.raises(ValueError, match=r"one of plain, twice, wrong, failing; got 'vllm'"):
        figures_of(folder, speculator, baseline="vllm")
    with pytest.raises(ValueError, match=r"no run\.json"):
        read_results(tmp_path)
    for repetition in folder.glob("run_*"):
        shutil.rmtree(repetition)
    with pytest.raises(ValueError, match="holds no answer yet"):
        read_results(folder)


# The unmodified harness


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "Spec-Bench" / "evaluation").mkdir(parents=True)
    (tmp_path / "Spec-Bench" / "evaluation" / "speed.py").write_text(SPEED_PY)
    return tmp_path / "Spec-Bench"


def compared(folder: Path, speculator: SelfSpeculator, checkout: Path) -> dict:
    return compare_with_harness(
        read_results(folder)[1], load_speed(checkout), baseline="plain", tokenizer=speculator.tokenizer
    )


def test_the_checkouts_own_speed_py_agrees_with_ours(finished, speculator, checkout):
    """Catches a formula that left the harness's, on real files, in any task or run; and files of different runs."""
    found = compared(finished, speculator, checkout)

    assert set(found) == set(SECONDS)
    for tasks in found.values():
        assert list(tasks) == ["mt_bench", "translation", "qa", "overall"]
        for figures in tasks.values():
            assert figures["largest_difference"] < 1e-12  # the order of additions
            assert figures["speedup"] == pytest.approx(figures["our_speedup"])


def test_a_harness_that_says_otherwise_is_seen(finished, speculator, checkout):
    """Catches a comparison of our figures with themselves."""
    path = checkout / "evaluation" / "speed.py"
    path.write_text(path.read_text().replace("input_ids) - 1", "input_ids)"))

    assert compared(finished, speculator, checkout)["plain"]["overall"]["largest_difference"] > 0.01


def test_its_figures_stand_beside_ours_in_the_report(folder, speculator, checkout):
    """Catches an option that is taken and not passed on."""
    console = quiet()

    report = make_report(folder, tokenizer=speculator.tokenizer, spec_bench_dir=checkout, console=console)

    assert set(report["unmodified_harness"]) == set(SECONDS)
    assert "The unmodified speed.py on the same files" in console.file.getvalue()


def test_a_task_without_questions_is_nan_and_no_warning(finished, checkout):
    """Catches numpy's warning for an empty task passed on, which stops programs that treat warnings as errors."""
    [path] = (finished / "run_1" / "model_answer").glob("*-dvi-plain-*")

    found = unmodified_figures(load_speed(checkout), answers=path, baseline=path, tokenizer_path=str(MODEL))

    assert found["rag"].speedup != found["rag"].speedup
    assert found["overall"].tokens_per_s == pytest.approx(4.0)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    """Catches an ImportError, or another package named evaluation taken for the harness."""
    with pytest.raises(ValueError, match="no Spec-Bench checkout"):
        load_speed(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "speed.py").write_text("")
    with pytest.raises(ValueError, match="no function `speed`"):
        load_speed(tmp_path)


def test_markdown_cells_keep_their_columns():
    """Catches a pipe or a line break in an error message that breaks the table."""
    table = ReportTable("T", ["a", "b"], [["x|y", "1\n2"]])

    assert table.as_markdown().splitlines()[-1] == "| x\\|y | 1<br>2 |"
