"""A job: a learner's way through some traffic, measured before and after, saved on the way, resumed where it stopped.

Knows settings, traffic, a speculator, a trainer, ranks and files, whose every piece of arithmetic is; knows nothing of
what a subclass does with the traffic.

Several ranks, started by torchrun or accelerate, share a run: rank r of n takes every n-th request from the r-th on,
keeps its own metrics and checkpoints (see `trainers.ranks.shards`), and learns with the others (see
`trainers.ranks.roles`); rank 0 measures and reports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import nn

from dvi import progress
from dvi.config import write_provenance
from dvi.decode.construction import as_built, build_speculator
from dvi.decode.precision import dtype_of_run, plain_lead, settle_dtype, weights_of_run
from dvi.decode.speculator import SelfSpeculator
from dvi.distributed import SOLO
from dvi.model.adapter_store import load_drafter
from dvi.records import SamplingParams
from dvi.signals import Interrupted, Signals
from dvi.telemetry import METRICS_FILE, MetricsWriter, read_metrics
from dvi.traffic import Messages
from dvi.whole_files import write_whole
from trainers.jobs.evaluation import HeldOutRequests, Measurement, drafts_alike, headline
from trainers.jobs.picture import plot_run
from trainers.jobs.progress import comparison_table
from trainers.jobs.run_folder import DRAFTER, PICTURE, SUMMARY, check_same_run
from trainers.jobs.traffic_cursor import TrafficCursor, read_traffic, what_to_expect
from trainers.learning.checkpoint import check_counts
from trainers.learning.online import OWN, OnlineTrainer
from trainers.ranks.launch import Launch
from trainers.ranks.shards import SavedRun, load_alike, load_saved, rank_folder


def read_own_traffic(launch: Launch, **reading: object) -> tuple[Iterable, list]:
    """See `read_traffic`, whose options these are; also says what to expect of little."""
    traffic, held_out = read_traffic(launch.config, say=launch.console.print, **reading)
    expectation = what_to_expect(launch.config, traffic)
    if expectation is not None:
        launch.console.print(expectation)
    return traffic, held_out


def speculator_of(launch: Launch, *, kind: type[SelfSpeculator] = SelfSpeculator) -> SelfSpeculator:
    """Settles what the settings leave to the machine, as an earlier run in the folder has it if that is resumed, and
    builds the speculator."""
    earlier, weights = None, None
    if launch.config.output.resume:
        earlier, weights = dtype_of_run(launch.run_folder), weights_of_run(launch.run_folder)
    launch.config = settle_dtype(launch.config, earlier=earlier, earlier_weights=weights)
    speculator = build_speculator(launch.config, kind=kind)
    launch.config = as_built(launch.config, speculator)
    return speculator


def resume_job(job: Job, *, sections: Iterable[str]) -> dict[str, object]:
    """Runs the job, from where its folder's checkpoint has it if output.resume says so; its summary.

    sections: the settings that must be those of the earlier run.
    """
    launch, config = job.launch, job.config
    if launch.is_lock_step:
        saved = load_alike(launch.run_folder, launch.processes)
    else:
        saved = load_saved(launch.run_folder, launch.peers, is_dedicated=launch.is_dedicated)
    if saved is not None and not config.output.resume:
        raise ValueError(
            f"output.folder {launch.run_folder} already holds a run; output.resume=true continues it, another folder "
            "starts afresh"
        )
    if saved is not None and launch.processes.is_first:
        check_same_run(config, launch.run_folder, sections)
    elif config.output.resume and saved is None:
        job.console.print(f"nothing to resume in {launch.run_folder}: starting afresh")
    job.check_traffic()
    if launch.processes.local_rank == 0:
        write_provenance(launch.run_folder, config)
    if saved is not None:
        job.load(saved)
    return job.run()


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt of the traffic: its place there, its token ids, and whether they had to lose their beginning."""

    index: int
    token_ids: list[int]
    is_cut: bool


class Job(ABC):
    """A learner's way through some traffic: measured before and after, saved on the way, resumed where it stopped.

    A subclass goes the way in `_work` and says in `_facts` what came of it. noun: what its traffic is made of; counts:
    the attributes, plain numbers, that a resumed run must have.
    """

    noun: str
    counts: tuple[str, ...] = ("num_tokens", "num_cut", "num_metrics_bytes")
    _last_step: int | None = None  # of the checkpoint at the end, where another rank says it

    def __init__(
        self, launch: Launch, speculator: SelfSpeculator, *, params: SamplingParams, traffic: Iterable, held_out: list
    ) -> None:
        self.launch, self.config, self.console, self.folder = launch, launch.config, launch.console, launch.folder
        self.peers, self.store, self.speculator = launch.peers, launch.store, speculator
        config = self.config
        self.params = params
        self.eval_params = dataclasses.replace(params, max_new_tokens=config.eval.max_new_tokens)
        self.trainer = self._make_trainer()
        self.traffic = traffic
        self.held_out = HeldOutRequests(
            speculator, [self._checked(0, prompt).token_ids for prompt in held_out], self.eval_params,
            num_draft_tokens=config.draft.num_draft_tokens,
            plain_lead=plain_lead(config.model, speculator.model.config) if held_out else 1.0,
        )
        self.cursor = TrafficCursor()
        self.before: Measurement | None = None
        self.num_tokens = self.num_cut = self.num_metrics_bytes = 0
        self._num_before = 0  # requests done in earlier runs
        self._step_offset = 0  # of a checkpoint's number over the requests done

    def _make_trainer(self) -> OnlineTrainer | None:
        """What learns here; None where nothing is learnt, or another rank does it."""
        train, launch = self.config.train, self.launch
        if not train.enabled or (launch.is_dedicated and not launch.peers.is_first):
            return None
        return OnlineTrainer(self.speculator, train, peers=SOLO if launch.is_dedicated else launch.peers)

    def check_traffic(self) -> None:
        """Raises ValueError, naming file and line, for a prompt that the model's template or tokenizer does not take.

        Of a dataset, which is read as it is needed, such a row is found when it comes.
        """
        if isinstance(self.traffic, list):
            for prompt in {id(prompt): prompt for prompt in self.traffic}.values():  # the same ones in every epoch
                self._checked(0, prompt)

    def _checked(self, index: int, prompt: object) -> Request:
        """The request, or its error with the place of the row."""
        try:
            return self._request(index, prompt)
        except ValueError as error:
            raise ValueError(f"{getattr(prompt, 'where', '') or f'prompt {index}'}: {error}") from error

    def _is_mine(self, index: int) -> bool:
        """Whether a request of the traffic is this rank's."""
        num_learners = int(self.launch.is_dedicated)
        return index % (self.peers.num_ranks - num_learners) == self.peers.rank - num_learners

    @abstractmethod
    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        """Goes through what is left of the traffic; raises Interrupted soon after a signal."""

    @abstractmethod
    def _facts(self) -> dict[str, object]:
        """For the summary."""

    # Saving

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs besides its settings; of what all ranks have alike, rank 0's holds it."""
        trainer = None if self.trainer is None else self.trainer.state_dict()
        if trainer is not None and not self.peers.is_first:
            trainer = {key: trainer[key] for key in OWN}
        return {
            "trainer": trainer,
            "first_open": self.cursor.first_open,
            "done_ahead": sorted(self.cursor.done_ahead),
            "before": None if self.before is None else dataclasses.asdict(self.before),
            "counts": {name: getattr(self, name) for name in self.counts},
            "num_ranks": self.peers.num_ranks,
            "is_dedicated": self.launch.is_dedicated,
        }

    def load(self, saved: SavedRun) -> None:
        """Goes on where the earlier run was saved."""
        state, own = saved.state, saved.own
        if self.trainer is not None and state["trainer"] is not None:
            if own is None:
                for part_state, part, num_parts in saved.replays:
                    self.trainer.replay.adopt(part_state, part=part, num_parts=num_parts)
                self.trainer.load_state_dict(state["trainer"] | {"replay": self.trainer.replay.state_dict()})
                self.trainer.take_over(saved.taken_over)
            else:
                self.trainer.load_state_dict(state["trainer"] | own["trainer"])
        self.cursor = TrafficCursor.union(saved.places.values())
        self._num_before = self.cursor.num_done
        # What a lost part had done counts no more; numbers of checkpoints go on all the same.
        self._step_offset = max(max(saved.steps.values()) - self._num_before, 0)
        self.store.drop_after(saved.steps.get(self.peers.rank, -1))
        self.before = None if state["before"] is None else Measurement(**state["before"])
        for rank, place in saved.places.items():
            check_counts(place["counts"] | {"first_open": place["first_open"]}, where=f"counts of rank {rank}")
            # Counts of a rank that is no more are rank 0's now.
            if rank % self.peers.num_ranks == self.peers.rank:
                for name, value in place["counts"].items():
                    setattr(self, name, getattr(self, name) + value)
        # Events after the checkpoint belong to what will be done again.
        num_bytes = {rank: place["counts"]["num_metrics_bytes"] for rank, place in saved.places.items()}
        self.num_metrics_bytes = num_bytes.setdefault(self.peers.rank, 0)
        gone = {r: rank_folder(self.launch.run_folder, r) for r in num_bytes if r >= self.peers.num_ranks}
        for rank, folder in ({self.peers.rank: self.folder} | gone).items():
            if (folder / METRICS_FILE).exists():
                os.truncate(folder / METRICS_FILE, num_bytes[rank])

    @property
    def num_done_here(self) -> int:
        """Requests done, of which the earlier runs' are rank 0's."""
        return self.cursor.num_done - (0 if self.peers.is_first else self._num_before)

    def save(self, step: int | None = None) -> Path | None:
        """A checkpoint of this rank, where it keeps files; all ranks make one, under the same number.

        step: that number, where another rank says it; else it is made of the requests done.
        """
        if self.launch.is_lock_step:
            self.speculator.check_lock_step()
        self.num_metrics_bytes = (self.folder / METRICS_FILE).stat().st_size
        if step is None:
            agreed = None if self.trainer is None else self.trainer.agreed
            step = self._step_offset + (self.cursor.num_done if agreed is None else int(agreed.num_done))
        state = self.state_dict()
        return self.store.save(state, step) if self.launch.keeps_files else None

    # Running

    @progress.shown_as("the whole run")  # for what is between its stages
    def run(self) -> dict[str, object]:
        """Measures, works, saves, and if nobody interrupted it measures again and saves the drafter.

        Interrupted while it measures the first time, it saves the beginning, and the second time, what was learnt.
        """
        start_s, interruption = time.perf_counter(), None
        metrics = MetricsWriter(self.folder, tensorboard=self.config.output.tensorboard and self.peers.is_first)
        try:
            with Signals() as signals:
                try:
                    if self.before is None and self.held_out and self.peers.is_first:
                        self.console.print(f"measuring the drafter as it is on {len(self.held_out)} held-out requests")
                        with self._interruptible(signals):
                            self.before = self.held_out.measure("measuring the drafter as it is")
                    self._work(metrics, signals)
                except Interrupted:
                    interruption = signals.received or signal.SIGTERM  # another rank's
                checkpoint = self.save(self._last_step)
        finally:
            metrics.close()
        summary: dict[str, object] = {
            "status": "done" if interruption is None else "interrupted", "signal": interruption,
            "folder": str(self.launch.run_folder), "checkpoint": str(checkpoint), "level": self.speculator.level,
            **self._total_facts(),
            "drafter_version": self.speculator.drafter.version,
            "before": None if self.before is None else dataclasses.asdict(self.before),
        }  # fmt: skip
        if self.trainer is not None:
            summary |= {"steps": self.trainer.num_steps, "train_s": round(self.trainer.train_s, 2)}
        if not self.peers.is_first:
            return summary
        if interruption is None:
            try:
                summary |= self._conclude()
            except Interrupted as end:  # where the process handles signals
                summary |= {"status": "interrupted", "signal": end.number}
        if summary["status"] == "interrupted":
            self.console.print(f"interrupted after {summary[self.noun]} {self.noun}; output.resume=true goes on")
        summary["seconds"] = round(time.perf_counter() - start_s, 2)
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def _interruptible(self, signals: Signals) -> AbstractContextManager[None]:
        """For what may be dropped anywhere; not among ranks, where one must not leave the others waiting."""
        return signals.interrupting() if self.launch.processes.is_alone else nullcontext()

    def _total_facts(self) -> dict[str, object]:
        """Counts of all ranks together; with several, what each did and what telling each other cost it."""
        own = {self.noun: self.cursor.num_done - self._num_before, "tokens": self.num_tokens, **self._facts()}
        if self.peers.is_alone:
            return own | {self.noun: self.cursor.num_done}
        own |= {"sync_s": round(self.peers.busy_s, 3), "sync_bytes": self.peers.num_bytes}
        ranks = self.peers.exchange(own)
        total = {
            name: round(sum(rank[name] for rank in ranks), 3) if isinstance(value, int | float) else value
            for name, value in own.items()
        }
        return total | {self.noun: self._num_before + total[self.noun], "ranks": ranks}

    def _conclude(self) -> dict[str, object]:
        """Measures, draws, saves the drafter and reloads it."""
        after = None
        if self.before is not None:
            after = self.held_out.measure("measuring what was learnt")
            self.console.print(comparison_table(self.before, after))
        picture = self._draw(after) if self.launch.keeps_files else None
        metrics = None if after is None else dataclasses.asdict(after)
        self.speculator.save_drafter(self.folder / DRAFTER, metrics=metrics, config=dataclasses.asdict(self.config))
        reloaded = load_drafter(self.folder / DRAFTER, self.speculator.split)
        with progress.doing("comparing the saved drafter with this one"):
            is_alike = self._drafts_alike(reloaded)
        verdict = "drafts the same" if is_alike else "DRAFTS OTHERWISE"
        self.console.print(f"drafter saved in {self.folder / DRAFTER}; reloaded, it {verdict}")
        if picture is not None:
            self.console.print(f"picture: {picture}")
        found = None if after is None else headline(self.before, after)
        if found is not None:
            self.console.print(f"{Path(self.config.model.path).name}: {found}.", style="bold", soft_wrap=True)
        return {
            "headline": found, "after": metrics, "drafter": str(self.folder / DRAFTER), "reloads_alike": is_alike,
            "picture": picture and str(picture),
        }  # fmt: skip

    def _drafts_alike(self, reloaded: nn.Module) -> bool:
        """Whether the drafter read back from the disk drafts what the one here does."""
        traffic = (self._request(0, messages).token_ids for messages in self.traffic)
        return drafts_alike(
            self.speculator, reloaded, self.held_out.prompts[0] if self.held_out else next(traffic), self.eval_params,
            num_draft_tokens=max(self.config.draft.num_draft_tokens, 1),
        )

    def _draw(self, after: Measurement | None) -> Path | None:
        """The picture of the run, where there was any traffic."""
        events = read_metrics(self.folder / METRICS_FILE)
        num_requests = sum(event["event"] == "request" for event in events)
        if not num_requests:
            return None
        model, num_steps = Path(self.config.model.path).name, 0 if self.trainer is None else self.trainer.num_steps
        title = f"{model} while it serves {num_requests} requests and learns in {num_steps} steps"
        plot_run(events, self.folder / PICTURE, title=title, before=self.before, after=after)
        return self.folder / PICTURE

    def _request(self, index: int, messages: Messages) -> Request:
        """The prompt's last tokens, as many as leave room for an answer."""
        longest = max(self.params.max_new_tokens, self.eval_params.max_new_tokens)
        return Request(index, *self.speculator.encode_request(messages, max_new_tokens=longest))
