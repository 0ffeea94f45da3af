"""`dvi tune`: what it measures, writes and says, and that a server takes what it writes."""

import contextlib
import dataclasses
import json

import pytest
from typer.testing import CliRunner

from dvi.cli.main import app
from dvi.config import load_config
from dvi.explained_yaml import explained_yaml
from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.search import NoFeasiblePlan
from dvi.planning.tune import plan_settings, plan_space, present_plan, report_plan
from dvi.records import ServingPlan
from dvi.settings import ServeConfig
from dvi.terminal import make_console
from tests.planning.test_search import SPACE, Arithmetic
from tests.support.paths import STORIES

FEW = ("--max-rows", "1,4", "--num-draft-tokens", "0,2", "--prefill-tokens-per-step", "64", "--rounds-per-prefill", "1")
CHANGED = {"model.split_layer", "draft.policy", "draft.num_draft_tokens", "serve.max_rows",
           "serve.prefill_tokens_per_step", "serve.rounds_per_prefill"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A server's settings, some prompts, lengths of traffic and acceptance at two split layers."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "serve.yaml").write_text(
        f"model: {{path: {STORIES}, split_layer: 1, num_threads: 1}}\nsampling: {{max_new_tokens: 12}}\n"
        "drafter: {draft_vocab_size: 0, anchor_hidden: 64}\n",
        encoding="utf-8",
    )
    rows = [{"prompt": "Once upon a time"}, {"prompt": "The dog"}, {"prompt": "One day, a girl named Lily"}]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    lengths = [{"prompt_tokens": 5 + n, "new_tokens": 4 + n} for n in range(8)]
    (folder / "lengths.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lengths), encoding="utf-8")
    (folder / "acceptance.json").write_text('{"1": [0.5, 0.4], "2": [0.9, 0.9]}', encoding="utf-8")
    return folder


def tune(folder, *arguments):
    """(exit code, the JSON of the last line or None, stderr), the profile kept in the folder."""
    command = ["tune", str(folder / "serve.yaml"), "--prompts", str(folder / "prompts.jsonl"), "--seconds", "0"]
    result = CliRunner(env={"XDG_CACHE_HOME": str(folder)}).invoke(
        app, [*command, *map(str, arguments)], catch_exceptions=False
    )
    last = (result.stdout.splitlines() or [""])[-1]
    return result.exit_code, json.loads(last) if last else None, " ".join(result.stderr.split())


def differing(one, other):
    """Names of the settings in which two configs differ."""
    sections = [(name, vars(getattr(one, name)), vars(getattr(other, name))) for name in vars(one)]
    return {f"{section}.{key}" for section, left, right in sections for key in left if left[key] != right[key]}


def test_a_plan_is_measured_found_and_written_as_settings_that_a_server_takes(folder):
    """Catches a fragment that sets too much, too little or something else than was planned, and a forgotten profile."""
    arguments = ("--max-token-latency-ms", 1e6, "--output", folder / "out", *FEW)
    code, facts, stderr = tune(folder, *arguments)
    assert code == 0, stderr
    assert facts["command"] == "tune" and facts["is_met"] and facts["is_proved"] and facts["is_newly_measured"]
    assert "measured now" in stderr and "traffic: 3 requests" in stderr and "untrained drafter" in stderr
    config = load_config(folder / "serve.yaml", schema=ServeConfig)
    planned = load_config(folder / "serve.yaml", [str(folder / "out/plan.yaml")], schema=ServeConfig)
    assert present_plan(planned, split_layer=planned.model.split_layer) == ServingPlan(
        **{field.name: facts["tuned"][field.name] for field in dataclasses.fields(ServingPlan)}
    )
    assert planned.draft.policy == "fixed" and differing(config, planned) <= CHANGED
    command = ["serve", str(folder / "serve.yaml"), str(folder / "out/plan.yaml"), "--print-config"]
    assert CliRunner().invoke(app, command).stdout == explained_yaml(planned)
    written = json.loads((folder / "out/frontier.json").read_text())
    assert written["tuned"] == facts["tuned"] and written["frontier"][-1] == facts["tuned"]
    assert (folder / "out/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "dvi serve" in (folder / "out/plan.yaml").read_text()

    code, again, stderr = tune(folder, *arguments)
    assert code == 0 and not again["is_newly_measured"] and "measured before" in stderr


def test_an_impossible_bound_is_refused_with_the_nearest_plan_which_is_written_all_the_same(folder):
    """Catches an exit code of 0, a message without remedy, and a plan that does not say what it misses."""
    output = folder / "impossible"
    code, facts, stderr = tune(
        folder, "--max-token-latency-ms", 1e-3, "--traffic", folder / "lengths.jsonl", "--acceptance",
        folder / "acceptance.json", "--output", output, *FEW,
    )  # fmt: skip
    assert (code, facts) == (2, None)
    assert "error: no plan gives at most 0.001 ms a token for 99 requests of 100; the nearest gives" in stderr
    assert "--max-token-latency-ms" in stderr and "traffic: 8 requests" in stderr
    written = json.loads((output / "frontier.json").read_text())
    assert not written["is_met"] and written["nearest"] in written["frontier"]
    assert written["plans"] == 8  # split layer 2 is planned too, as there is acceptance for it
    fragment = (output / "plan.yaml").read_text()
    assert "No plan gives at most 0.001 ms" in fragment
    load_config(folder / "serve.yaml", [str(output / "plan.yaml")], schema=ServeConfig)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-token-latency-ms", "0"], "--max-token-latency-ms must be > 0, got 0.0; try 50"),
        (["--max-token-latency-ms", "nan"], "--max-token-latency-ms must be > 0, got nan"),
        (["--max-token-latency-ms", "9", "--max-first-token-ms", "-1"], "--max-first-token-ms must be > 0, got -1.0"),
        (["--max-token-latency-ms", "9", "--max-rows", "0,4"], "--max-rows must be numbers in 1..4096 with commas"),
        (["--max-token-latency-ms", "9", "--num-draft-tokens", "9"], "--num-draft-tokens must be numbers in 0..8"),
        (["--max-token-latency-ms", "9", "--traffic", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--max-token-latency-ms", "9", "--prompts", "nowhere"], "no prompts file nowhere; give JSONL"),
        (["--max-token-latency-ms", "9", "--traffic", "PROMPTS"], "line 1: prompt_tokens and new_tokens must be"),
        (["--max-token-latency-ms", "9", "--acceptance", "PROMPTS"], "must hold acceptance by split layer"),
        (["--max-token-latency-ms", "9", "serve.maxrows=1"], "unknown key 'serve.maxrows'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(folder, arguments, message):
    """Catches half a minute of measuring that ends in an error which was there from the beginning."""
    arguments = [str(folder / "prompts.jsonl") if argument == "PROMPTS" else argument for argument in arguments]
    code, facts, stderr = tune(folder, *arguments)
    assert (code, facts) == (2, None) and message in stderr and "profile" not in stderr


def report(folder, bound, config, **options):
    options = {"present": present_plan(config, split_layer=1), "evaluator": Arithmetic(), "space": SPACE} | options
    space, evaluator = options.pop("space"), options.pop("evaluator")
    return report_plan(
        space, bound, evaluator, config=config, folder=folder, command="dvi serve x.yaml plan.yaml",
        conditions="arithmetic", console=make_console(), **options,
    )  # fmt: skip


def test_a_split_layer_other_than_the_drafters_is_planned_with_the_word_to_train_for_it(tmp_path, capsys):
    """Catches a plan that a server refuses at its start, for its adapter was trained for another layer."""
    facts = report(tmp_path, LatencyBound(0.02), ServeConfig())
    assert facts["tuned"]["split_layer"] == 2
    for text in (capsys.readouterr().err, (tmp_path / "plan.yaml").read_text()):
        assert "Split layer 2 is not the drafter's, 1: first train one for it" in " ".join(text.split())


def test_every_field_of_a_plan_that_a_server_has_is_written(tmp_path):
    """Catches a field that is planned and then left as it was."""
    plan = ServingPlan(3, 5, 7, 111, rounds_per_prefill=9)
    (tmp_path / "plan.yaml").write_text(json.dumps(plan_settings(plan, ServeConfig())), encoding="utf-8")
    planned = load_config(tmp_path / "plan.yaml", schema=ServeConfig)
    assert present_plan(planned, split_layer=planned.model.split_layer) == plan
    assert differing(ServeConfig(), planned) == CHANGED


@pytest.mark.parametrize(("policy", "written"), [("auto", "fixed"), ("fixed", None), ("goodput", None)])
def test_only_an_automatic_length_policy_is_replaced(policy, written):
    """Catches a plan that overrides what the user chose, and one whose rounds are not those that were simulated."""
    config = load_config(None, [f"draft.policy={policy}"], schema=ServeConfig)
    fragment = plan_settings(ServingPlan(1, 4, 8, 64), config)
    assert fragment["draft"].get("policy") == written and fragment["serve"]["max_rows"] == 8


def test_an_impossible_bound_raises_after_the_picture_is_drawn(tmp_path):
    """Catches a refusal that leaves nothing to look at."""
    with pytest.raises(NoFeasiblePlan):
        report(tmp_path, LatencyBound(1e-6, 1e-6), ServeConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "frontier.json", "frontier.png"}


class ByRows:
    """Plans of 1, 2 and 4 rows. The second takes a twentieth longer for a token than the first: less than a rung."""

    def forecast(self, plans):
        seconds = {1: 0.010, 2: 0.0105, 4: 0.020}
        return [Forecast(100 * p.max_rows, *2 * [seconds[p.max_rows]], 0.1, 0.1) for p in plans]

    def optimistic(self, lowest, highest):
        low, high = self.forecast([lowest, highest])
        return dataclasses.replace(low, tokens_per_s=high.tokens_per_s)


@pytest.mark.parametrize(("bound_s", "label"), [(0.0102, "tuned"), (0.001, "nearest")])
def test_the_plan_that_is_chosen_is_on_the_frontier_however_near_it_lies_to_a_faster_one(tmp_path, bound_s, label):
    """Catches a frontier that ends a rung above the lowest latency, and one without the best plan under the bound."""
    space = PlanSpace((1,), num_draft_tokens=(0,), max_rows=(1, 2, 4), prefill_tokens_per_step=(64,),
                      rounds_per_prefill=(1,))  # fmt: skip
    with pytest.raises(NoFeasiblePlan) if label == "nearest" else contextlib.nullcontext():
        report(
            tmp_path, LatencyBound(bound_s), ServeConfig(), evaluator=ByRows(), space=space, present=next(iter(space))
        )
    written = json.loads((tmp_path / "frontier.json").read_text())
    assert written[label]["max_rows"] == 1
    assert [choice["max_rows"] for choice in written["frontier"]] == [1, 2, 4]


def test_the_figures_are_json_whatever_the_bound_leaves_open(tmp_path):
    """Catches infinity in the last line, which is no JSON."""
    facts = report(tmp_path, LatencyBound(0.02), ServeConfig())
    assert facts["bound"] == {"token_ms": 20.0, "first_token_ms": None}
    json.dumps(facts, allow_nan=False)


def test_the_present_values_are_among_the_choices_and_too_many_rows_are_not():
    """Catches a best plan behind the present one, and rows whose requests would push each other out."""
    present = ServingPlan(split_layer=1, num_draft_tokens=5, max_rows=3, prefill_tokens_per_step=100)
    lengths = [(100, 50), (400, 83)]  # 483 and the headroom of 17: 500 positions
    space = plan_space(present, {}, split_layers=(1,), max_positions=2500, lengths=lengths)
    assert space.max_rows == (1, 2, 3, 4) and 5 in space.num_draft_tokens and 100 in space.prefill_tokens_per_step
    given = plan_space(present, {"max_rows": (2, 8)}, split_layers=(1,), max_positions=2500, lengths=lengths)
    assert given.max_rows == (2,) and given.num_draft_tokens == space.num_draft_tokens
    with pytest.raises(ValueError, match=r"serve\.max_positions must be at least 1000 for so few rows as 2"):
        plan_space(present, {"max_rows": (2,)}, split_layers=(1,), max_positions=999, lengths=lengths)


def test_a_further_yaml_file_lies_over_the_first_and_under_what_follows(tmp_path):
    """Catches a plan that loses to the file it is for, wins over the command line, or resets other keys."""
    (tmp_path / "base.yaml").write_text("serve: {max_rows: 3, port: 1234}", encoding="utf-8")
    (tmp_path / "plan.yaml").write_text("serve: {max_rows: 4, prefill_tokens_per_step: 5}", encoding="utf-8")
    overrides = [str(tmp_path / "plan.yaml"), "serve.prefill_tokens_per_step=6"]
    serve = load_config(tmp_path / "base.yaml", overrides, schema=ServeConfig).serve
    assert (serve.max_rows, serve.port, serve.prefill_tokens_per_step) == (4, 1234, 6)
    with pytest.raises(ValueError, match=r"unknown key 'max_rows' in .*bad.yaml"):
        (tmp_path / "bad.yaml").write_text("max_rows: 4", encoding="utf-8")
        load_config(tmp_path / "base.yaml", [str(tmp_path / "bad.yaml")], schema=ServeConfig)
