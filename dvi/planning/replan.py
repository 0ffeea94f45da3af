"""A plan for the traffic that was seen, made by a process of its own: question and answer are JSON on its pipes.

A search is many small numpy calls, and each of them holds Python's lock: on a thread of the server such calls made
rounds two to three times as long while they lasted; beside a process no difference was seen (two cores, one thread for
the engine, rounds of 7 and of 28 ms).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from dvi.planning.drift import EndedRequest
from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.profile import LatencyProfile
from dvi.planning.search import NoFeasiblePlan, search
from dvi.planning.simulator import Simulator
from dvi.planning.workload import AcceptanceModel, Workload
from dvi.records import ServingPlan

TIMEOUT_S = 60.0
NICENESS = 10  # the server's own work comes first


@dataclass(frozen=True)
class Proposal:
    """plan: the best under the bound, or the nearest where none meets it. present: of the plan that is in force."""

    plan: ServingPlan
    forecast: Forecast
    present: Forecast


@dataclass(frozen=True)
class Planner:
    """Proposes plans for one machine, bound and space.

    learner_share  of all time, that training may take.
    """

    profile: LatencyProfile
    space: PlanSpace
    bound: LatencyBound
    learner_share: float

    def __call__(self, requests: list[EndedRequest], present: ServingPlan) -> Proposal:
        """For more requests like these. Raises SubprocessError when the process gives no answer."""
        question = {
            "profile": self.profile.to_json(), "space": dataclasses.asdict(self.space),
            "workload": _workload_of(requests, present.split_layer, self.learner_share).to_json(),
            "bound": dataclasses.asdict(self.bound), "present": dataclasses.asdict(present),
        }  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-m", "dvi.planning.replan"], input=json.dumps(question), stdout=subprocess.PIPE,
            text=True, check=True, timeout=TIMEOUT_S,
        )
        answer = json.loads(child.stdout)
        return Proposal(ServingPlan(**answer["plan"]), Forecast(**answer["forecast"]), Forecast(**answer["present"]))


def propose(
    profile: LatencyProfile, workload: Workload, space: PlanSpace, bound: LatencyBound, present: ServingPlan
) -> Proposal:
    """The best plan of the space, or the nearest to the bound, beside the present one."""
    simulator = Simulator(profile, workload)
    [now] = simulator.forecast([present])
    try:
        found = search(space, bound, simulator, known={present: now})
    except NoFeasiblePlan as error:
        found = error.nearest
    return Proposal(found.best, found.forecast, now)


def _workload_of(requests: list[EndedRequest], split_layer: int, learner_share: float) -> Workload:
    """Where nothing was drafted, no draft counts as accepted: what is not known must not be counted on."""
    if any(request.drafted_per_depth for request in requests):
        return Workload.of_counts(requests, split_layer=split_layer, learner_share=learner_share)
    lengths = tuple((request.prompt_tokens, request.new_tokens) for request in requests)
    return Workload(lengths, {split_layer: AcceptanceModel.constant((0.0,))}, learner_share)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(propose(
        LatencyProfile.from_json(question["profile"]), Workload.from_json(question["workload"]),
        PlanSpace(**{name: tuple(values) for name, values in question["space"].items()}),
        LatencyBound(**question["bound"]), ServingPlan(**question["present"]),
    ))  # fmt: skip


if __name__ == "__main__":
    os.nice(NICENESS)
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
