"""Keeps a server on the best plan its bound allows while traffic changes.

Sees requests end, on the engine's thread; plans on a thread of its own, which waits for a process of its own
(`dvi.planning.replan`). Knows neither engine nor HTTP: a plan is handed to whoever applies it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from dvi.planning.drift import EndedRequest, Traffic
from dvi.planning.measurement import obtain_profile
from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.replan import Planner, Proposal
from dvi.records import ServingPlan
from dvi.serving.loop import EngineLoop
from dvi.serving.request import Draining, RequestOutput
from dvi.settings import ServeConfig

WINDOW = 200  # ended requests that are looked at,
MIN_WINDOW = 50  # and the fewest
REQUESTS_PER_CHECK = 10  # a check takes the engine a third of a millisecond
MIN_INTERVAL_S = 60.0  # between two plans
WORTHWHILE = 1.03  # times the throughput, for which plans are changed: less may be the simulator's error

SETTINGS = "settings"  # the reason of the plan that a server begins with,
UNPLANNED = "unplanned"  # and of the next one, or of one after a failure: there is nothing to compare traffic with

log = logging.getLogger(__name__)

Propose = Callable[[list[EndedRequest], ServingPlan], Proposal]


class PlanController:
    """Plans anew when lengths or acceptance have drifted from those that the plan in force was made for.

    plan  in force. The first is the settings' own: nobody knows the traffic before it has come.
    """

    def __init__(
        self, plan: ServingPlan, bound: LatencyBound, *, propose: Propose,
        apply: Callable[[ServingPlan], Future[None]], tell: Callable[[str, dict[str, float]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """propose: the best plan for such requests, beside the one in force; raises ValueError or OSError when it
        cannot. apply: from any thread. tell: reason and numbers of each plan that was made or confirmed."""
        self.plan, self._bound = plan, bound
        self._propose, self._apply, self._tell, self._clock = propose, apply, tell, clock
        self._window: deque[EndedRequest] = deque(maxlen=WINDOW)
        self._num_unchecked = 0
        self._planned_for: Traffic | None = None
        self._next_s = -math.inf
        self._thread: threading.Thread | None = None
        tell(SETTINGS, _numbers(plan, None, bound))

    def observe(self, output: RequestOutput) -> None:
        """Takes in a request that has ended. One that was cut short says nothing of how long its kind are."""
        if output.finish_reason not in ("stop", "length"):
            return
        stats = output.stats
        self._window.append(EndedRequest(
            prompt_tokens=max(stats.prompt_tokens - output.num_cached_tokens, 1), new_tokens=stats.new_tokens,
            drafted_per_depth=tuple(stats.drafted_per_depth), accepted_per_depth=tuple(stats.accepted_per_depth),
        ))
        self._num_unchecked += 1
        if self._num_unchecked >= REQUESTS_PER_CHECK and len(self._window) >= MIN_WINDOW:
            self._check()

    def _check(self) -> None:
        is_planning = self._thread is not None and self._thread.is_alive()
        if is_planning or self._clock() < self._next_s:
            return
        self._num_unchecked = 0
        traffic = Traffic.of(self._window)
        reason = UNPLANNED if self._planned_for is None else self._planned_for.drift(traffic)
        if reason is None:
            return
        requests = list(self._window)
        self._planned_for, self._next_s = traffic, self._clock() + MIN_INTERVAL_S
        self._window.clear()  # requests from before the drift must not be taken for the next one
        self._thread = threading.Thread(target=self._replan, args=(reason, requests), name="planner", daemon=True)
        self._thread.start()

    # The planner's thread

    def _replan(self, reason: str, requests: list[EndedRequest]) -> None:
        try:
            proposal = self._propose(requests, self.plan)
            forecast = proposal.present
            if is_worthwhile(proposal, self._bound):
                self._apply(proposal.plan).result()
                self.plan, forecast = proposal.plan, proposal.forecast
        except Draining:
            return
        except (ValueError, OSError, subprocess.SubprocessError):
            log.exception("no plan could be made; the server runs on as it does")
            self._planned_for = None
            return
        if not forecast.meets(self._bound):
            log.warning(
                "no plan gives %s for this traffic; the server runs by the nearest, which gives %s. Raise the bound, "
                "or look for another split layer with dvi tune", self._bound, _offer(forecast, self._bound),
            )
        self._tell(reason, _numbers(self.plan, forecast, self._bound))


def build_controller(config: ServeConfig, loop: EngineLoop) -> PlanController:
    """The controller of a server with these settings and this loop; measures the machine if nobody has yet."""
    serve, speculator = config.serve, loop.engine.speculator
    plan = ServingPlan(
        split_layer=speculator.split.split_layer, num_draft_tokens=config.draft.num_draft_tokens,
        max_rows=serve.max_rows, prefill_tokens_per_step=serve.prefill_tokens_per_step,
        rounds_per_prefill=serve.rounds_per_prefill,
    )
    bound = LatencyBound(
        *(math.inf if limit_ms is None else 1e-3 * limit_ms
          for limit_ms in (serve.max_token_latency_ms, serve.max_first_token_ms))
    )  # fmt: skip
    profile, _ = obtain_profile(speculator)
    propose = Planner(
        profile, run_time_space(plan), bound, learner_share=config.train.budget if config.train.enabled else 0.0
    )
    return PlanController(plan, bound, propose=propose, apply=loop.apply, tell=loop.monitor.on_plan)


def run_time_space(plan: ServingPlan) -> PlanSpace:
    """What may change while a server runs, the settings' own plan being the most it may take.

    It drafts at least one token if that one does: without, acceptance would never be known again.
    """

    def up_to(most: int, values: tuple[int, ...]) -> tuple[int, ...]:
        return (*(value for value in values if 0 < value < most), most)

    return PlanSpace(
        split_layer=(plan.split_layer,), tensor_parallel=(plan.tensor_parallel,),
        num_draft_tokens=up_to(plan.num_draft_tokens, PlanSpace.num_draft_tokens),
        max_rows=up_to(plan.max_rows, PlanSpace.max_rows),
        prefill_tokens_per_step=up_to(plan.prefill_tokens_per_step, PlanSpace.prefill_tokens_per_step),
        rounds_per_prefill=tuple(sorted({plan.rounds_per_prefill, *PlanSpace.rounds_per_prefill})),
    )


def is_worthwhile(proposal: Proposal, bound: LatencyBound) -> bool:
    """Whether to change plans: the present one breaks the bound and the other does not, or it is better by a margin.

    Better is more throughput, or, where both break the bound, to break it less.
    """
    new, present = proposal.forecast, proposal.present
    if not new.meets(bound):
        return present.worst_ratio(bound) > WORTHWHILE * new.worst_ratio(bound)
    return not present.meets(bound) or new.tokens_per_s > WORTHWHILE * present.tokens_per_s


def _offer(forecast: Forecast, bound: LatencyBound) -> LatencyBound:
    """What the forecast gives of that in which it breaks the bound."""
    pairs = ((forecast.token_p99_s, bound.token_s), (forecast.first_token_p99_s, bound.first_token_s))
    return LatencyBound(*(given_s if given_s > asked_s else math.inf for given_s, asked_s in pairs))


def _numbers(plan: ServingPlan, forecast: Forecast | None, bound: LatencyBound) -> dict[str, float]:
    """What is shown of a plan; bounds that nobody set are left out."""
    numbers: dict[str, float] = dataclasses.asdict(plan)
    for name, bound_s in (("token_p99_s", bound.token_s), ("first_token_p99_s", bound.first_token_s)):
        if bound_s < math.inf:
            numbers[f"bound_{name}"] = bound_s
    if forecast is not None:
        numbers |= {f"forecast_{name}": value for name, value in vars(forecast).items()}
        numbers["meets_bound"] = float(forecast.meets(bound))
    return numbers
