"""The main job: serve a stream of prompts with a drafter that learns from it, and leave behind what was learnt.

The one place where serving and training meet. Knows the stream, a role among the ranks, and what is written down of a
request; the rest is any `Job`'s.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from rich.console import Console

from dvi.records import GenerationResult, SamplingParams
from dvi.seeds import answer_seed
from dvi.settings import TrainConfig
from dvi.signals import Signals
from dvi.telemetry import MetricsWriter
from trainers.jobs.evaluation import SpeedProbe
from trainers.jobs.held_out_curve import HeldOutCurve
from trainers.jobs.job import Job, Request, read_own_traffic, resume_job, speculator_of
from trainers.jobs.progress import RunDisplay
from trainers.ranks.launch import Launch
from trainers.ranks.roles import JobHooks, Role, take_role


def run_training(config: TrainConfig, *, console: Console) -> dict[str, object]:
    """Runs the job to its end, or to SIGINT or SIGTERM, and returns its summary (what summary.json holds).

    summary["status"] is "done" or "interrupted"; an interrupted run has saved a checkpoint and goes on with
    output.resume=true from the last finished request.
    Raises ValueError for settings that do not fit together, a bad prompt row, and a folder that already holds a run.
    """
    with Launch(config, console) as launch:
        traffic, held_out = read_own_traffic(launch)
        speculator = speculator_of(launch)
        params = SamplingParams(**dataclasses.asdict(config.sampling))
        job = _ServingJob(launch, speculator, params=params, traffic=traffic, held_out=held_out)
        return resume_job(job, sections=("model", "drafter", "data"))


class _ServingJob(Job):
    """Serves the traffic, and learns from it beside that."""

    noun = "requests"
    counts = (*Job.counts, "serving_s", "num_waived")
    serving_s = 0.0
    num_waived = 0
    _company: dict[str, object] | None = None  # what it cost; None where the work was not begun

    def _facts(self) -> dict[str, object]:
        return {
            "level": self.speculator.level, "verify_rule": self.speculator.rule.name, "waived": self.num_waived,
            "cut_prompts": self.num_cut, "serving_s": round(self.serving_s, 2), **(self._company or {}),
        }  # fmt: skip

    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        first_step = self._step_offset + self._num_before + 1
        hooks = JobHooks(self.launch, metrics, signals, save=self.save, num_done=lambda: self.num_done_here,
                    first_step=first_step)  # fmt: skip
        role = take_role(hooks, self.speculator, self.trainer)
        try:
            if role.serves:
                self._serve(role, metrics)
            role.wait_for_others()
        finally:
            role.leave()
            self._last_step, self._company = role.save_step, role.facts()

    def _serve(self, role: Role, metrics: MetricsWriter) -> None:
        batch_size = self.config.data.batch_size
        num_requests = len(self.traffic) if isinstance(self.traffic, list) else None
        probe = SpeedProbe(self.speculator, self.params, batch_size=batch_size)
        # Ranks in lock-step have clocks of their own, and must all do the same.
        follows = self.before is not None and self.peers.is_first and not self.launch.is_lock_step
        curve = HeldOutCurve(self.held_out, metrics) if follows else None
        admitted: list[Request | None] = []

        def waiting() -> Iterator[list[int]]:
            for index, messages in self.cursor.open_requests(self.traffic):
                if role.lost is not None:
                    return
                if not self._is_mine(index):
                    continue
                admitted.append(self._checked(index, messages))
                yield admitted[-1].token_ids

        def seed_of(place: int, _prompt_ids: list[int]) -> int:
            """By the request's number in the traffic: a resumed run and every rank draw as one run would."""
            return answer_seed(self.params.seed, admitted[place].index)

        last_s = time.monotonic()
        rule, doing = self.speculator.rule, "serving"
        if not rule.is_lossless:
            doing = f"serving, LOSSY ({rule.name})"
            self.console.print(f"warning: verify rule {rule.name} is lossy: the output is not the model's own")
        with RunDisplay(
            num_requests=num_requests, num_done=self.cursor.num_done, doing=doing
        ) as display:
            for result in self.speculator.generate(
                waiting(), self.params, batch_size=batch_size, learner=role, seeds=seed_of
            ):
                self.serving_s += time.monotonic() - last_s
                request, admitted[result.index] = admitted[result.index], None
                role.end_request(result.request_id)
                probe.observe(request.token_ids, result)
                self._record(request, result, metrics, plain_tokens_per_s=probe.plain_tokens_per_s)
                if curve is not None:
                    curve.update(num_tokens=self.num_tokens)
                display.finish_request(
                    result.stats, role.last_report, speed_up=probe.speed_up,
                    drafter_version=result.drafter_version,
                )
                role.save_if_due()
                last_s = time.monotonic()

    def _record(
        self, request: Request, result: GenerationResult, metrics: MetricsWriter, *, plain_tokens_per_s: float | None
    ) -> None:
        stats = result.stats
        self.cursor.finish(request.index)
        self.num_tokens += stats.new_tokens
        self.num_cut += request.is_cut
        self.num_waived += stats.num_waived
        metrics.write(
            "request", index=request.index, tokens_seen=self.num_tokens, new_tokens=stats.new_tokens,
            prompt_tokens=stats.prompt_tokens, rounds=stats.num_rounds, drafted=stats.num_drafted,
            accepted=stats.num_accepted, waived=stats.num_waived, acceptance=stats.acceptance_rate,
            mean_accepted_tokens=stats.mean_accepted_tokens, tokens_per_s=stats.decode_tokens_per_s,
            drafter_version=result.drafter_version, finish_reason=result.finish_reason, level=result.level,
            prefill_s=stats.prefill_s, serving_s=self.serving_s, plain_tokens_per_s=plain_tokens_per_s,
            train_s=0.0 if self.trainer is None else self.trainer.train_s,
        )  # fmt: skip
