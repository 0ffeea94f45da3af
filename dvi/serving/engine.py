"""The engine: one step admits, prefills a little and runs one round over every row that decodes.

Knows a speculator, a scheduler and a prefix cache; knows nothing of threads, HTTP or training: what the rounds taught
is returned, and whoever calls may pass it to a learner before the next step.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field

from torch import nn

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.text import TextStream
from dvi.draft.catalogue import GOODPUT_BUCKETS, buckets_of
from dvi.draft.length_policies import CostTable, GoodputLength, LengthPolicy
from dvi.draft.measure_costs import measure_costs
from dvi.model.drafter import MAX_DEPTH
from dvi.model.padded import PADDED_WIDTH
from dvi.records import RoundStats, ServingPlan, Transitions
from dvi.serving.prefix_cache import PrefixCache
from dvi.serving.request import DEFAULT_DRAFTER, DraftChoice, Load, Request, RequestOutput, StepReport
from dvi.serving.scheduler import Scheduler, SchedulerLimits

PREFIX_CHUNK = 5 * PADDED_WIDTH  # positions; a multiple of that width, so that padded passes stay aligned
FIRST_ROWS = 4  # of a lane's cache, which grows: most lanes never see more
MEASURED_ROWS = (1, 2, 4, 8, 16)
MEASURING_S = 4.0

log = logging.getLogger(__name__)


@dataclass
class StepResult:
    """News for the clients, experience for a learner, counts for the monitor."""

    outputs: list[RequestOutput]
    transitions: list[Transitions]
    report: StepReport


@dataclass
class _Active:
    """A request that has been admitted; without a row while it waits for its prefill, at first or after preemption."""

    request: Request
    sequence: Sequence
    text: TextStream | None
    lane: _Lane
    admitted_s: float
    has_row: bool = False
    num_sent: int = 0
    num_logprobs_sent: int = 0
    num_cached: int = 0
    first_token_s: float | None = None


@dataclass
class _Lane:
    """Rows that may decode in one batch: one way of drafting, one way of drawing."""

    batch: DecodingBatch
    by_sequence: dict[int, _Active] = field(default_factory=dict)


class Engine:
    """Continuous batching over one speculator: requests join and leave between rounds.

    drafters: by name; "default" is the speculator's own, the one that a learner improves in place.
    """

    def __init__(
        self, speculator: SelfSpeculator, limits: SchedulerLimits, *, prefix_positions: int = 16384,
        wants_transitions: bool = True, costs: CostTable | None = None,
    ) -> None:
        """wants_transitions: False where nobody learns, and rounds save the bookkeeping. costs: of this machine."""
        self.speculator, self.scheduler = speculator, Scheduler(limits)
        self.drafters: dict[str, nn.Module] = {DEFAULT_DRAFTER: speculator.drafter}
        self.prefixes = PrefixCache(chunk_len=PREFIX_CHUNK, max_positions=prefix_positions)
        self._max_rows = limits.max_rows
        self._wants_transitions = wants_transitions
        self._lanes: dict[tuple[DraftChoice, str], _Lane] = {}
        self._policies: dict[DraftChoice, LengthPolicy] = {}  # they outlive lanes: what they learnt was paid for
        self._requests: dict[int, Request] = {}
        self._active: dict[int, _Active] = {}
        self._longest_draft = MAX_DEPTH  # of requests that `may_draft_less`
        self._costs = costs
        self._outputs: list[RequestOutput] = []

    def apply(self, plan: ServingPlan) -> None:
        """Runs by this plan from the next step on; its split layer and ranks were settled when the model was loaded.

        Nobody loses anything by it. Rows beyond the plan's end by themselves; as many requests as before may be here,
        and those that rows are missing for wait. Who asked for a draft length of his own keeps it.
        """
        limits = self.scheduler.limits
        num_places = limits.max_rows + limits.max_waiting
        self.scheduler.limits = dataclasses.replace(
            limits, max_rows=plan.max_rows, max_waiting=max(num_places - plan.max_rows, 1),
            prefill_tokens_per_step=plan.prefill_tokens_per_step, rounds_per_prefill=plan.rounds_per_prefill,
        )
        self._longest_draft = plan.num_draft_tokens
        for (choice, _), lane in self._lanes.items():
            lane.batch.policy = self._policy_of(choice)

    # Requests

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could never run, naming value and bound. Any thread."""
        if request.draft.drafter not in self.drafters:
            raise ValueError(f"no drafter {request.draft.drafter!r}; there are {', '.join(sorted(self.drafters))}")
        self.scheduler.limits.check(request)

    def add(self, request: Request) -> list[RequestOutput]:
        """Queues a request. Raises what `check` raises, and QueueFull. See `add_all`."""
        return self.add_all([request])

    def add_all(self, requests: list[Request]) -> list[RequestOutput]:
        """Queues all of one tenant's requests or none; the last news of those that gave way to them."""
        for request in requests:
            self.check(request)
        displaced = self.scheduler.add_all(requests)
        self._requests |= {request.request_id: request for request in requests}
        return [self._close(request, "displaced", None) for request in displaced]

    def cancel(self, request_id: int) -> RequestOutput | None:
        """Gives a request up, wherever it stands; its last news, or None for an unknown one."""
        if not self.scheduler.cancel(request_id):
            return None
        return self._close(self._requests[request_id], "cancelled", None)

    def give_up_all(self, reason: str, error: str | None) -> list[RequestOutput]:
        """The last news of every request: nothing runs or waits afterwards, whatever state a failed step left."""
        outputs = []
        for request_id in list(self._requests):
            self.scheduler.cancel(request_id)
            active = self._active.pop(request_id, None)
            stats = RoundStats() if active is None else active.sequence.stats
            outputs.append(RequestOutput(request_id, finish_reason=reason, error=error, stats=stats))
        self._requests.clear()
        self._lanes.clear()
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    # The step

    def step(self) -> StepResult:
        """Schedule, prefill, one round per lane, postprocess. A request that fails, fails alone."""
        start_s = time.perf_counter()
        report, transitions, self._outputs = StepReport(seconds=0.0, drafter_version=self._version), [], []
        plan = self.scheduler.schedule(start_s)
        for request, reason in plan.expired:
            self._outputs.append(self._close(request, "timeout", reason))
        for request_id in plan.preempt:
            self._preempt(self._active[request_id])
            report.num_preempted += 1
        for request in plan.admit:
            try:
                active = self._admit(request, start_s)
            except Exception as error:
                self._fail(request, error)
                continue
            if len(active.sequence.text_ids) == 1:  # nothing to prefill, so the plan does not name it
                self._prefill(active, 0, report)
        for request_id, num_positions in plan.prefill:
            if request_id not in self._active:  # it has failed just now
                continue
            transitions += self._prefill(self._active[request_id], num_positions, report)
        for lane in list(self._lanes.values()):
            if lane.batch.sequences:
                transitions += self._round(lane, report)
        self._drop_idle_lanes()
        report.num_running, report.num_waiting = self.scheduler.num_running, self.scheduler.num_waiting
        report.seconds = time.perf_counter() - start_s
        return StepResult(self._outputs, transitions, report)

    def load(self) -> Load:
        """What it holds now. Any thread."""
        scheduler = self.scheduler
        return Load(
            num_running=scheduler.num_running, num_waiting=scheduler.num_waiting,
            num_cached_positions=scheduler.num_positions, num_prefix_positions=self.prefixes.num_positions,
            drafter_version=self._version, level=self.speculator.level, verify_rule=self.speculator.rule.name,
        )

    @property
    def _version(self) -> int:
        return self.drafters[DEFAULT_DRAFTER].version

    def _admit(self, request: Request, now_s: float) -> _Active:
        active = self._active.get(request.request_id)
        if active is None:
            sequence, text = self.speculator.new_sequence(
                request.prompt_ids, request.params, request_id=request.request_id, num_logprobs=request.num_logprobs,
                teaches=request.may_train, tenant=request.tenant,
            )
            active = _Active(request, sequence, text, self._lane_of(request), admitted_s=now_s)
            self._active[request.request_id] = active
        active.lane.by_sequence[request.request_id] = active
        return active

    def _prefill(self, active: _Active, num_positions: int, report: StepReport) -> list[Transitions]:
        """Runs some of the text's positions; the row is opened, with what the prefix cache has, at the first."""
        request, sequence, batch = active.request, active.sequence, active.lane.batch
        start_s = time.perf_counter()
        try:
            if not active.has_row:
                reused = self.prefixes.match(request.tenant, sequence.text_ids)
                batch.open(sequence, reused=reused)
                active.has_row = True
                num_reused = len(reused) * self.prefixes.chunk_len
                active.num_cached = active.num_cached or num_reused
                self.scheduler.reused(request.request_id, num_reused)
                num_positions = min(num_positions, len(sequence.text_ids) - 1 - num_reused)
            row = batch.row_of(sequence)
            before = batch.cache.lengths[row]
            transitions = batch.prefill(sequence, num_positions)
            row = batch.row_of(sequence)
            num_done = batch.cache.lengths[row] - before
        except Exception as error:
            self._fail(active.request, error)
            return []
        self.scheduler.prefilled(request.request_id, num_done)
        report.num_prefill_tokens += num_done
        report.rounds.prefill_s += time.perf_counter() - start_s
        if sequence not in batch.prefilling:
            self._remember(active)  # now, so that other requests with this beginning need not wait for the end
        return transitions

    def _round(self, lane: _Lane, report: StepReport) -> list[Transitions]:
        batch, start_s = lane.batch, time.perf_counter()
        transitions = None
        while transitions is None and batch.sequences:
            try:
                transitions = batch.round()
            except Exception as error:
                self._fail(lane.by_sequence[batch.newest.request_id].request, error)
        if not transitions and not batch.sequences:
            return []
        seconds, num_rows, num_kept = time.perf_counter() - start_s, len(batch.sequences), 0
        for outcome in batch.outcomes:
            active = lane.by_sequence[outcome.sequence.request_id]
            tallies = [report.rounds]
            if active.request.domain:
                tallies.append(report.rounds_by_domain.setdefault(active.request.domain, RoundStats()))
            for tally in tallies:
                outcome.add_to(tally)
            num_kept += outcome.num_kept
            self.scheduler.grew(outcome.sequence.request_id, outcome.num_kept)
        report.num_rows += num_rows
        report.rounds.decode_s += seconds
        costs = batch.policy.costs if isinstance(batch.policy, GoodputLength) else self.costs()
        report.plain_s += num_kept / num_rows * costs.round_s(num_rows, 0)
        for sequence in list(batch.sequences):
            active = lane.by_sequence[sequence.request_id]
            try:
                self._tell(active)
            except Exception as error:
                self._fail(active.request, error)
        return transitions

    def _tell(self, active: _Active) -> None:
        """News of one row after a round; frees it when it has ended."""
        sequence, now_s = active.sequence, time.perf_counter()
        if active.first_token_s is None and sequence.token_ids:
            active.first_token_s = now_s - active.request.arrived_s
        reason = sequence.finish_reason
        if sequence.error is not None:
            self._fail(active.request, sequence.error)
        elif reason == "error":
            log.error("request %d: the verifier's states are not finite", active.request.request_id)
            self._end(active.request, "error", "the model's output was not finite")
        elif reason is not None:
            self._remember(active)
            self._end(active.request, reason, None)
        else:
            self._outputs.append(self._news(active))

    def _news(self, active: _Active, *, is_last: bool = False) -> RequestOutput:
        sequence, text = active.sequence, active.text
        sent, active.num_sent = active.num_sent, len(sequence.token_ids)
        if is_last and text is not None:
            text.close()
        piece = "" if text is None else text.read(is_final=is_last)
        told = slice(active.num_logprobs_sent, None if is_last or text is None else text.num_told)
        logprobs = sequence.logprobs[told]
        active.num_logprobs_sent += len(logprobs)
        return RequestOutput(
            request_id=active.request.request_id, text=piece, token_ids=sequence.token_ids[sent:], logprobs=logprobs,
            text_offsets=text.offsets[told] if logprobs and text is not None else [],
            queue_s=active.admitted_s - active.request.arrived_s, first_token_s=active.first_token_s,
            drafter_version=active.lane.batch.drafter.version,
            level=self.speculator.level, verify_rule=self.speculator.rule.name,
        )

    # Ends

    def _remember(self, active: _Active) -> None:
        """Keeps the row's keys and values for other texts that begin as this one does."""
        batch, sequence = active.lane.batch, active.sequence
        row = batch.row_of(sequence)
        # All but the newest token are cached; past a stop more is, of tokens that are not part of the text.
        cached_ids = sequence.text_ids[: batch.cache.lengths[row]]
        self.prefixes.store(
            active.request.tenant, cached_ids, lambda start, stop: batch.cache.copy_out(row, start, stop)
        )

    def _preempt(self, active: _Active) -> None:
        """Takes the row away; the text so far stays, and is prefilled again when its turn comes."""
        if active.has_row:
            self._remember(active)
            active.lane.batch.remove(active.sequence)
            active.has_row = False
        del active.lane.by_sequence[active.request.request_id]

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends one request for what went wrong with it; the others go on."""
        log.error("request %d failed", request.request_id, exc_info=error)
        active = self._active.get(request.request_id)
        if active is not None:
            active.sequence.fail(error)
            active.text = None  # which may be what fails
        self._end(request, "error", "the server could not compute this request; try again")

    def _end(self, request: Request, reason: str, error: str | None) -> None:
        self.scheduler.finished(request.request_id)
        self._outputs.append(self._close(request, reason, error))

    def _close(self, request: Request, reason: str, error: str | None) -> RequestOutput:
        """The last news of a request that the scheduler has forgotten already; frees what it held."""
        del self._requests[request.request_id]
        active = self._active.pop(request.request_id, None)
        if active is None:
            return RequestOutput(request.request_id, finish_reason=reason, error=error, stats=RoundStats())
        if active.has_row:
            active.lane.batch.remove(active.sequence)
        active.lane.by_sequence.pop(request.request_id, None)
        output = self._news(active, is_last=True)
        output.finish_reason, output.error, output.stats = reason, error, active.sequence.stats
        output.num_cached_tokens = active.num_cached
        return output

    # Lanes

    def _lane_of(self, request: Request) -> _Lane:
        params, choice = request.params, request.draft
        key = (choice, "rejection" if params.is_greedy else params.coupling)
        if key not in self._lanes:
            is_padded, longest = self.speculator.passes.fixed_width is not None, self.speculator.max_positions
            self._lanes[key] = _Lane(self.speculator.open_batch(
                max_rows=FIRST_ROWS, policy=self._policy_of(choice), wants_transitions=self._wants_transitions,
                drafter=self.drafters[choice.drafter],
                # One capacity for all rows where passes are padded: it is part of shapes, and keys pass between rows.
                capacity=longest + 2 * (MAX_DEPTH + 1) if is_padded else 0,
            ))
        return self._lanes[key]

    def _policy_of(self, choice: DraftChoice) -> LengthPolicy:
        if choice.may_draft_less:
            choice = dataclasses.replace(choice, num_draft_tokens=min(choice.num_draft_tokens, self._longest_draft))
        if choice not in self._policies:
            # auto is the goodput rule: seeded requests draw by Gumbel noise, whose tokens do not depend on lengths.
            self._policies[choice] = self.speculator.new_policy(
                choice.policy, choice.num_draft_tokens, costs=self.costs
            )
        return self._policies[choice]

    def costs(self) -> CostTable:
        """Of a round's parts on this machine, measured at the first call: a few seconds."""
        if self._costs is None:
            rows = tuple(r for r in MEASURED_ROWS if r <= self._max_rows)
            self._costs = measure_costs(
                self.speculator.passes, self.drafters[DEFAULT_DRAFTER], rows=rows, budget_s=MEASURING_S,
                buckets=buckets_of(self.speculator.source, GOODPUT_BUCKETS[-1]),
            )
        return self._costs

    def _drop_idle_lanes(self) -> None:
        """A lane's cache is memory: only the busy ones keep theirs, and the first."""
        for key in list(self._lanes)[1:]:
            if not self._lanes[key].by_sequence:
                del self._lanes[key]

    def unload(self, drafter: str) -> None:
        """Drops a drafter. Raises ValueError while a request that runs is drafted for by it."""
        if any(active.request.draft.drafter == drafter for active in self._active.values()):
            raise ValueError(f"adapter {drafter!r} is in use; try again when its requests have ended")
        del self.drafters[drafter]
        for key in [key for key in self._lanes if key[0].drafter == drafter]:
            del self._lanes[key]
        for choice in [choice for choice in self._policies if choice.drafter == drafter]:
            del self._policies[choice]
