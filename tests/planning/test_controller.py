"""Plans at run time: applied without a loss, made anew when traffic has changed and not when it only varies."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dvi.draft.length_policies import GoodputLength
from dvi.planning.controller import MIN_INTERVAL_S, MIN_WINDOW, PlanController, is_worthwhile, run_time_space
from dvi.planning.drift import EndedRequest, Traffic
from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.profile import LatencyProfile
from dvi.planning.replan import Proposal
from dvi.records import RoundStats, ServingPlan
from dvi.serving.api_schema import CompletionBody, draft_choice
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.request import DraftChoice, RequestOutput
from dvi.settings import DraftSettings, ServeSettings
from tests.serving.test_engine import Gathered, alone, engine_of, greedy, random_prompts, request_of
from tests.serving.test_loop import Client, running, some_requests
from tests.support.drafter_doubles import randomise
from tests.support.planning_doubles import synthetic
from tests.support.serving_doubles import FakeLoop, client_of, stories_config, stories_loop

OURS = DraftChoice(policy="fixed", num_draft_tokens=4, may_draft_less=True)
ASKED_FOR = DraftChoice(policy="goodput", num_draft_tokens=3)
PLAN = ServingPlan(1, 4, 4, 32)
BOUND = LatencyBound(token_s=0.010)


# A plan applied


def test_plans_that_change_under_traffic_lose_no_request_and_change_no_token():
    """Catches rows lost with a smaller batch, requests refused that were let in, and a policy that tears a round."""
    num_rounds_by_length: dict[int, int] = {}
    for seed in range(5):
        chance, gathered = random.Random(seed), Gathered()
        engine = engine_of(max_rows=4, max_waiting=8, max_positions=260, prefill_tokens_per_step=16)
        requests = [
            request_of(i, prompt, greedy(chance.randint(1, 25)), draft=chance.choice([OURS, OURS, ASKED_FOR]))
            for i, prompt in enumerate(random_prompts(12, seed=seed, longest=40))
        ]  # fmt: skip
        for request in requests:
            engine.add(request)
        space = PlanSpace((1,), (1, 2, 4), (1, 2, 4, 8), (7, 16, 100), (1, 3, 16))
        while engine.has_work:
            if gathered.num_steps % 3 == 0:
                engine.apply(chance.choice(list(space)))
                randomise(engine.drafters["default"], seed=gathered.num_steps, scale=0.02)
            gathered.step(engine)
            assert gathered.num_steps < 10_000
        for request in requests:
            assert gathered.last[request.request_id].finish_reason == "length"
            assert gathered.token_ids[request.request_id] == alone(request)
            depths = len(gathered.last[request.request_id].stats.drafted_per_depth)
            num_rounds_by_length[depths] = num_rounds_by_length.get(depths, 0) + 1
    assert len(num_rounds_by_length) > 2, "the plans must have mattered"


def test_a_plan_sets_rows_reading_and_the_draft_length_of_rounds_to_come():
    """Catches a plan that is reported and not applied, or to new requests alone."""
    engine = engine_of(max_rows=4, max_waiting=3)
    engine.add(request_of(0, [5, 9, 33], greedy(40), draft=OURS))
    gathered = Gathered()
    gathered.step(engine)
    assert drafted_in(engine) == 4
    engine.apply(ServingPlan(1, 1, 2, 64, 5))
    limits = engine.scheduler.limits
    assert (limits.max_rows, limits.prefill_tokens_per_step, limits.rounds_per_prefill) == (2, 64, 5)
    assert engine.scheduler.num_places == 4 + 3 - 1, "as many may be here as before"
    assert drafted_in(engine) == 1
    engine.apply(PLAN)
    assert drafted_in(engine) == 4


def test_a_draft_length_that_was_asked_for_stays():
    """Catches a plan that overrides what a client has asked for."""
    engine = engine_of()
    engine.apply(ServingPlan(1, 1, 4, 32))
    engine.add(request_of(0, [5, 9, 33], greedy(40), draft=DraftChoice(policy="fixed", num_draft_tokens=3)))
    assert drafted_in(engine) == 3


def test_what_a_goodput_rule_has_learnt_outlives_a_change_of_plan():
    """Catches a rule that begins anew, with its burst of probes, whenever the plan returns to a length."""
    engine = engine_of()
    choice = DraftChoice(policy="goodput", num_draft_tokens=4, may_draft_less=True)
    engine.add(request_of(0, [5, 9, 33], greedy(60), draft=choice))
    Gathered().step(engine)
    [lane] = engine._lanes.values()
    learnt = lane.batch.policy
    assert isinstance(learnt, GoodputLength) and learnt.buckets[-1] == 4
    engine.apply(ServingPlan(1, 2, 4, 32))
    assert lane.batch.policy.buckets[-1] == 2
    engine.apply(PLAN)
    assert lane.batch.policy is learnt


def drafted_in(engine) -> int:
    """Tokens drafted in the next round of the only request."""
    return engine.step().report.rounds.num_drafted


# When to plan anew


@functools.cache
def ended(kind: str = "usual") -> list[EndedRequest]:
    """Requests as real ones vary: log-normal lengths, and a difficulty of its own for each."""
    chance = random.Random(0)
    prompt_tokens, new_tokens, acceptance = {
        "usual": (150, 60, 0.6), "long answers": (150, 180, 0.6), "long prompts": (450, 60, 0.6),
        "easy": (150, 60, 0.85), "hard": (150, 60, 0.2), "undrafted": (150, 60, None),
    }[kind]  # fmt: skip
    return [
        EndedRequest(
            1 + int(prompt_tokens * chance.lognormvariate(0, 0.8)),
            (num_new := 1 + int(new_tokens * chance.lognormvariate(0, 0.8))),
            *rounds_of(num_new, acceptance, chance),
        )
        for _ in range(4000)
    ]


def rounds_of(new_tokens: int, acceptance: float | None, chance: random.Random, longest: int = 4) -> tuple:
    """drafted_per_depth and accepted_per_depth of a request with so many tokens."""
    if acceptance is None:
        return (), ()
    stats, mine = RoundStats(), min(max(chance.gauss(acceptance, 0.12), 0.02), 0.98)
    while stats.committed_tokens < new_tokens:
        num_accepted = next((depth for depth in range(longest) if chance.random() > mine), longest)
        stats.count_round(num_drafted=longest, num_accepted=num_accepted)
    return tuple(stats.drafted_per_depth), tuple(stats.accepted_per_depth)


def some(kind: str, count: int, *, seed: int) -> list[EndedRequest]:
    return random.Random(seed).sample(ended(kind), count)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("long answers", "new_tokens"), ("long prompts", "prompt_tokens"), ("easy", "tokens_per_round"),
     ("hard", "tokens_per_round")],
)  # fmt: skip
def test_what_has_drifted_is_named(kind, changed):
    """Catches a plan that stays although its traffic is gone, and a reason that misleads."""
    for seed in range(20):
        reference = Traffic.of(some("usual", 200, seed=seed))
        assert reference.drift(Traffic.of(some(kind, 200, seed=100 + seed))) == changed


@pytest.mark.parametrize(("num_planned", "num_seen"), [(50, 50), (200, 50), (50, 200), (200, 200)])
def test_of_1000_windows_of_the_same_traffic_one_in_100_at_most_seems_changed(num_planned, num_seen):
    """Catches a server that plans for ever, because lengths vary."""
    num_alarms = sum(
        Traffic.of(some("usual", num_planned, seed=seed)).drift(Traffic.of(some("usual", num_seen, seed=10**6 + seed)))
        is not None
        for seed in range(1000)
    )
    assert num_alarms <= 10


def test_acceptance_is_told_from_draft_length():
    """Catches a plan's own draft length taken for a drift of acceptance, and then for another, without an end."""
    chance = random.Random(0)
    short, long = (
        Traffic.of([EndedRequest(9, 60, *rounds_of(60, 0.7, chance, longest=n)) for _ in range(200)]) for n in (1, 8)
    )
    assert short.drift(long) is None
    undrafted = Traffic.of(some("undrafted", 100, seed=0))
    assert undrafted.tokens_per_round is None
    assert undrafted.drift(short) != "tokens_per_round" != short.drift(undrafted)


# The controller


def forecast(tokens_per_s: float = 100.0, token_p99_s: float = 0.008, first_token_p99_s: float = 0.1) -> Forecast:
    return Forecast(tokens_per_s, token_p99_s / 2, token_p99_s, first_token_p99_s / 2, first_token_p99_s)


class Planned:
    """A controller whose proposals are written down beforehand."""

    def __init__(self, *proposals: Proposal | Exception, bound: LatencyBound = BOUND) -> None:
        self.now_s, self.told, self.applied, self.asked_for = 0.0, [], [], []
        self._proposals = list(proposals)
        self.controller = PlanController(
            PLAN, bound, propose=self._propose, apply=self._apply, tell=lambda *news: self.told.append(news),
            clock=lambda: self.now_s,
        )

    def _propose(self, requests: list[EndedRequest], plan: ServingPlan) -> Proposal:
        self.asked_for.append(requests)
        proposal = self._proposals.pop(0) if self._proposals else Proposal(plan, forecast(), forecast())
        if isinstance(proposal, Exception):
            raise proposal
        return proposal

    def _apply(self, plan: ServingPlan) -> Future[None]:
        self.applied.append(plan)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def see(self, requests: list[EndedRequest], *, finish_reason: str = "stop") -> None:
        for request in requests:
            stats = RoundStats(
                prompt_tokens=request.prompt_tokens + 16, new_tokens=request.new_tokens,
                drafted_per_depth=list(request.drafted_per_depth), accepted_per_depth=list(request.accepted_per_depth),
            )
            self.controller.observe(RequestOutput(1, finish_reason=finish_reason, stats=stats, num_cached_tokens=16))
            self.wait()

    def wait(self) -> None:
        """For the plan that is being made, if one is."""
        if self.controller._thread is not None:
            self.controller._thread.join(10)

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.told]


def test_a_server_plans_at_its_first_traffic_and_again_when_that_drifts():
    """Catches a controller that never begins, and one that goes by the traffic before the last."""
    planned = Planned()
    planned.see(some("usual", MIN_WINDOW - 1, seed=0))
    assert planned.reasons == ["settings"]
    planned.see(some("usual", 1, seed=1))
    assert planned.reasons == ["settings", "unplanned"]
    planned.now_s += MIN_INTERVAL_S
    planned.see(some("usual", 400, seed=2))
    assert planned.reasons == ["settings", "unplanned"], "traffic as it was"
    planned.see(some("long answers", 200, seed=3))
    assert planned.reasons == ["settings", "unplanned", "new_tokens"]
    planned.now_s += MIN_INTERVAL_S
    planned.see(some("long answers", 400, seed=4))
    planned.now_s += MIN_INTERVAL_S
    num_plans = len(planned.reasons)
    assert num_plans <= 4, "at most once more, for what was mixed in the window"
    planned.see(some("long answers", 1000, seed=5))
    assert len(planned.reasons) == num_plans


def test_a_plan_is_made_for_requests_that_ended_after_the_last_one():
    """Catches traffic of long ago in the sample, which the next plan is then made for too."""
    planned, usual = Planned(), some("usual", MIN_WINDOW + 200, seed=0)
    planned.see(usual[:MIN_WINDOW])
    planned.now_s += 2 * MIN_INTERVAL_S
    planned.see(some("long answers", 200, seed=1))
    planned.now_s += 2 * MIN_INTERVAL_S
    planned.see(usual[MIN_WINDOW:])
    asked_for = [request for requests in planned.asked_for for request in requests]
    assert len(planned.asked_for) >= 3 and len(set(asked_for)) == len(asked_for)


def test_prompt_tokens_from_the_prefix_cache_are_not_counted_as_read():
    """Catches plans for prefill work that nobody does."""
    planned, seen = Planned(), some("usual", MIN_WINDOW, seed=0)
    planned.see(seen)
    assert planned.asked_for == [seen]


def test_requests_that_were_cut_short_say_nothing():
    """Catches a wave of disconnects taken for short answers."""
    planned = Planned()
    for reason in ("cancelled", "timeout", "error"):
        planned.see(some("usual", 2 * MIN_WINDOW, seed=0), finish_reason=reason)
    assert planned.reasons == ["settings"]


def test_plans_are_made_no_faster_than_the_limit():
    """Catches traffic that swings, and a machine that does nothing but plan."""
    planned = Planned()
    for second in range(int(5 * MIN_INTERVAL_S)):
        planned.now_s = float(second)
        planned.see(some("usual" if second // 10 % 2 else "long answers", 20, seed=second))
    assert 3 <= len(planned.asked_for) <= 5


OTHER = ServingPlan(1, 2, 2, 64)


@pytest.mark.parametrize(
    ("new", "present", "is_worth_it"),
    [
        (forecast(102), forecast(100), False),  # less than the margin
        (forecast(104), forecast(100), True),
        (forecast(60), forecast(100, token_p99_s=0.0101), True),  # the present one breaks the bound
        (forecast(90, token_p99_s=0.0200), forecast(99, token_p99_s=0.0203), False),  # both do, and about alike
        (forecast(90, token_p99_s=0.0150), forecast(99, token_p99_s=0.0203), True),
    ],
)
def test_a_plan_changes_for_a_gain_or_for_the_bound_alone(new, present, is_worth_it):
    """Catches plans that swing between equals, and a bound that is kept only where that pays."""
    proposal = Proposal(OTHER, new, present)
    assert is_worthwhile(proposal, BOUND) is is_worth_it
    planned = Planned(proposal)
    planned.see(some("usual", MIN_WINDOW, seed=0))
    assert planned.applied == ([OTHER] if is_worth_it else [])
    assert planned.controller.plan == (OTHER if is_worth_it else PLAN)


def test_an_impossible_bound_gets_the_nearest_plan_and_is_said(caplog):
    """Catches a server that misses its bound in silence."""
    planned = Planned(Proposal(OTHER, forecast(token_p99_s=0.015), forecast(token_p99_s=0.030)))
    planned.see(some("usual", MIN_WINDOW, seed=0))
    assert planned.applied == [OTHER]
    assert "at most 10 ms a token" in caplog.text and "at most 15 ms a token" in caplog.text
    numbers = planned.told[-1][1]
    assert numbers["meets_bound"] == 0.0 and numbers["num_draft_tokens"] == 2
    assert (numbers["bound_token_p99_s"], numbers["forecast_token_p99_s"]) == (0.010, 0.015)
    assert "bound_first_token_p99_s" not in numbers


def test_a_plan_that_cannot_be_made_is_tried_again_later(caplog):
    """Catches a planner that ends with its first failure, or tries all the time."""
    planned = Planned(OSError("no process to spare"))
    planned.see(some("usual", 200, seed=0))
    assert len(planned.asked_for) == 1 and "no process to spare" in caplog.text
    planned.now_s += MIN_INTERVAL_S
    planned.see(some("usual", MIN_WINDOW, seed=1))
    assert planned.reasons == ["settings", "unplanned"]


def test_the_engine_waits_for_no_plan():
    """Catches a plan made on the engine's thread."""
    planned = Planned()
    is_planning, may_end = threading.Event(), threading.Event()
    propose = planned.controller._propose

    def slowly(requests: list[EndedRequest], plan: ServingPlan) -> Proposal:
        is_planning.set()
        assert may_end.wait(10)
        return propose(requests, plan)

    planned.controller._propose = slowly
    planned.wait = lambda: None
    planned.see(some("usual", 300, seed=0))
    assert is_planning.wait(10) and planned.reasons == ["settings"]
    may_end.set()
    Planned.wait(planned)
    assert planned.reasons == ["settings", "unplanned"]


class Watching:
    """A planner that only counts, and dies at the second request."""

    def __init__(self) -> None:
        self.num_seen = 0

    def observe(self, output: RequestOutput) -> None:
        self.num_seen += 1
        assert output.finish_reason == "length" and output.stats.new_tokens == 12
        if self.num_seen == 2:
            raise RuntimeError("killed")


def test_the_loop_shows_the_planner_each_request_once_and_survives_its_death(caplog):
    """Catches a planner that sees nothing, or every piece of news, and one that takes the engine's thread with it."""
    planner, client = Watching(), Client()
    with running() as loop:
        loop.planner = planner
        for seed in range(4):
            requests = some_requests(loop, 1, seed=seed)
            loop.submit(requests, client)
            client.wait_for_all(requests)
        assert loop.planner is None and planner.num_seen == 2 and loop.is_alive
    assert "killed" in caplog.text


# What is seen of it


def test_plan_and_reasons_are_shown_to_scrapers_and_admins():
    """Catches a controller whose doings nobody can follow."""
    loop = FakeLoop(engine=None)
    planned = Planned(Proposal(OTHER, forecast(), forecast(token_p99_s=0.030)))
    planned.controller._tell = loop.monitor.on_plan
    planned.see(some("usual", MIN_WINDOW, seed=0))
    families = text_string_to_metric_families(exposition(loop.monitor).decode())
    samples = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert samples["dvi:plan_max_rows",] == 2 and samples["dvi:plan_forecast_token_p99_s",] == 0.008
    assert samples["dvi:replans_total", "unplanned"] == 1
    plan = loop.monitor.snapshot()["plan"]
    assert plan["reason"] == "unplanned" and plan["meets_bound"] == 1 and plan["num_draft_tokens"] == 2


def test_without_a_planner_nothing_is_shown_of_plans():
    """Catches empty gauges on every server's page."""
    loop = FakeLoop(engine=None)
    assert loop.monitor.snapshot()["plan"] == {} and b"plan" not in exposition(loop.monitor)


def test_a_server_without_a_bound_loads_nothing_of_planning():
    """Catches seconds of measuring, or megabytes of modules, that nobody asked for."""
    program = "import sys, dvi.serving.server; print(*(name for name in sys.modules if 'planning' in name))"
    loaded = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert set(loaded.split()) == set()


@pytest.mark.parametrize(("bound", "dvi", "may_draft_less"), [
    ({"max_token_latency_ms": 20.0}, {}, True), ({"max_first_token_ms": 900.0}, {}, True),
    ({"max_token_latency_ms": 20.0}, {"num_draft_tokens": 4}, False), ({}, {}, False),
])  # fmt: skip
def test_a_plan_rules_over_the_servers_own_draft_length_alone(bound, dvi, may_draft_less):
    """Catches a client's number taken for the server's, and lanes split where nobody plans."""
    body, settings = CompletionBody(prompt="x", dvi=dvi), ServeSettings(**bound)
    choice = draft_choice(body, DraftSettings(num_draft_tokens=4), has_plan=settings.has_bound)
    assert choice.num_draft_tokens == 4 and choice.may_draft_less is may_draft_less


def test_at_run_time_a_plan_stays_within_the_settings():
    """Catches more rows than memory was set aside for, and a plan without drafts, from which no way leads back."""
    space = run_time_space(ServingPlan(2, 5, 12, 100, 3))
    assert space.num_draft_tokens == (1, 2, 3, 4, 5) and space.max_rows == (1, 2, 4, 8, 12)
    assert space.prefill_tokens_per_step == (64, 100) and space.rounds_per_prefill == (1, 3, 4, 16)
    assert space.split_layer == (2,) and space.tensor_parallel == (1,)
    assert run_time_space(ServingPlan(2, 0, 1, 32)).num_draft_tokens == (0,)


def test_a_server_with_a_bound_plans_for_its_traffic_and_runs_by_that(monkeypatch):
    """Catches wires that end nowhere between settings, engine, planner and the admin's view."""
    passes = next(iter(synthetic(0)[0].passes.values()))
    monkeypatch.setattr(
        "dvi.planning.controller.obtain_profile", lambda *_, **__: (LatencyProfile({(0, 1): passes}), False)
    )
    config = stories_config("serve.max_token_latency_ms=0.001", "serve.rounds_per_prefill=2")
    with stories_loop(config) as loop:
        client = client_of(loop, config)
        assert client.get("/admin/plan").json()["plan"] == {
            "split_layer": 0, "num_draft_tokens": 4, "max_rows": 16, "prefill_tokens_per_step": 256,
            "rounds_per_prefill": 2, "tensor_parallel": 1, "bound_token_p99_s": 1e-6, "reason": "settings",
        }  # fmt: skip
        assert loop.engine.scheduler.limits.rounds_per_prefill == 2
        body = {"prompt": "Once upon a time", "max_tokens": 6, "n": 8, "dvi": {"policy": "fixed"}, "ignore_eos": True}
        for _ in range(-(-MIN_WINDOW // 8) + 1):
            assert client.post("/v1/completions", json=body).status_code == 200
        loop.planner._thread.join(30)
        answer = client.get("/admin/plan").json()
        assert answer["plan"]["reason"] == "unplanned" and answer["replans"] == {"settings": 1, "unplanned": 1}
        assert answer["plan"]["meets_bound"] == 0, "no machine does"
        limits = loop.engine.scheduler.limits
        assert limits.max_rows == answer["plan"]["max_rows"] == 1 and limits.max_waiting == 16 + 8 - 1
        reply = client.post("/v1/completions", json=body | {"n": 1}).json()
        stats = reply["metrics"]["speculative_decoding"]
        assert len(stats["drafted_per_depth"]) <= answer["plan"]["num_draft_tokens"] < 4
