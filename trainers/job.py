"""The main job: serve a stream of prompts with a drafter that learns from it, and leave behind what was learnt.

The one place where serving and training meet. Knows settings, traffic, a speculator, a trainer and files; every piece
of arithmetic is theirs. A run's folder holds config.yaml, provenance.json, metrics.jsonl, tensorboard/, checkpoints/,
and at the end acceptance.png, drafter/ and summary.json.

Several ranks, started by torchrun or accelerate, share a run: rank r of n takes every n-th request from the r-th on,
keeps its own metrics and checkpoints (see `trainers.shards`), and learns with the others; rank 0 measures and reports.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console

from dvi.adapter_store import load_drafter, read_manifest
from dvi.config import load_config, write_provenance
from dvi.distributed import PeerLostError, join
from dvi.durable import surviving_folder
from dvi.records import GenerationResult, SamplingParams, Transitions, UpdateReport
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig
from dvi.speculator import SelfSpeculator, build_speculator
from dvi.telemetry import METRICS_FILE, MetricsWriter, plot_acceptance, read_metrics
from dvi.terminal import say
from dvi.traffic import Messages, NoPromptsError, as_messages, read_dataset, read_prompts
from trainers.ballot import Ballot
from trainers.checkpoint import CheckpointStore
from trainers.evaluation import Measurement, SpeedProbe, drafts_alike, measure
from trainers.online import OnlineTrainer
from trainers.progress import RunDisplay, comparison_table
from trainers.shards import CHECKPOINTS, SavedRun, load_saved, rank_folder

DRAFTER, PICTURE, SUMMARY = "drafter", "acceptance.png", "summary.json"
NUM_RELOAD_PROMPTS = 3
_NO_PLACE = {"counts": {"num_metrics_bytes": 0}}


class Interrupted(Exception):
    """SIGINT or SIGTERM came; raised between rounds."""


def run_training(config: TrainConfig, *, console: Console) -> dict[str, object]:
    """Runs the job to its end, or to SIGINT or SIGTERM, and returns its summary (what summary.json holds).

    summary["status"] is "done" or "interrupted"; an interrupted run has saved a checkpoint and goes on with
    output.resume=true from the last finished request.
    Raises ValueError for settings that do not fit together, a bad prompt row, and a folder that already holds a run.
    """
    with Place(config, console) as place:
        speculator = build_speculator(place.config)
        traffic, held_out = read_traffic(config)
        params = SamplingParams(**dataclasses.asdict(config.sampling))
        job = _ServingJob(place, speculator, params=params, traffic=traffic, held_out=held_out)
        return resume_job(job, sections=("model", "drafter", "data"))


class Place:
    """Where a job runs: among which ranks, on which device, in which folder, and where its words go. A context manager.

    config  the settings with this rank's device, and resuming where torchrun has started the job again.
    folder  this rank's own.
    Raises ValueError when the ranks' settings differ, PeerLostError when they do not find each other.
    """

    def __init__(self, config: TrainConfig | WarmupConfig, console: Console) -> None:
        self.peers = join(timeout_s=config.train.peer_timeout_s)
        if not self.peers.is_alone and not config.train.enabled:
            raise ValueError("train.enabled must be true with several ranks, got false: start single processes instead")
        self.peers.check_alike("the settings", _shared_settings(config))
        # After a rank was lost torchrun starts all of them again, with the same command.
        is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        self.config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, device=self.peers.device(config.model.device)),
            output=dataclasses.replace(config.output, resume=config.output.resume or is_restart),
        )
        self.console = console if self.peers.is_first else Console(quiet=True)
        self.run_folder = Path(config.output.folder)
        self.folder = rank_folder(self.run_folder, self.peers.rank)
        self.store = CheckpointStore(self.folder / CHECKPOINTS)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self.peers.leave()


def _shared_settings(config: TrainConfig | WarmupConfig) -> dict[str, object]:
    """What must be alike on all ranks: all but each machine's own."""
    settings = dataclasses.asdict(config)
    for section, key in (("model", "device"), ("model", "num_threads"), ("output", "folder")):
        del settings[section][key]
    return json.loads(json.dumps(settings))


def resume_job(job: Job, *, sections: Iterable[str]) -> dict[str, object]:
    """Runs the job, from where its folder's checkpoint has it if output.resume says so; its summary.

    sections: the settings that must be those of the earlier run.
    """
    place, config = job.place, job.config
    saved = load_saved(place.run_folder, place.peers)
    if saved is not None and not config.output.resume:
        raise ValueError(
            f"output.folder {place.run_folder} already holds a run; output.resume=true continues it, another folder "
            "starts afresh"
        )
    if saved is not None and place.peers.is_first:
        _check_same_run(config, place.run_folder, sections)
    elif config.output.resume and saved is None:
        job.console.print(f"nothing to resume in {place.run_folder}: starting afresh")
    if place.peers.local_rank == 0:
        write_provenance(place.run_folder, config)
    if saved is not None:
        job.load(saved)
    return job.run()


def load_run(folder: str | Path, *, model: str | None = None) -> tuple[SelfSpeculator, dict, dict]:
    """The speculator of a run with its final drafter, or its newest checkpoint's; the drafter's metrics; the settings.

    The run is one of `dvi train` or `dvi warmup`, or a server's that has ended; a server's metrics say how its drafter
    came about. model: another path of the base model. Raises ValueError when the folder holds neither.
    """
    folder = Path(folder)
    config = _run_config(folder, [] if model is None else [f"model.path={json.dumps(model)}"])
    settings = dataclasses.asdict(config)
    final = surviving_folder(folder / DRAFTER)
    if final.is_dir():
        config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, adapter=str(final)))
        return build_speculator(config), read_manifest(final).metrics, settings
    with CheckpointStore(folder / CHECKPOINTS) as store:
        saved = store.load_latest()
    if saved is None or saved[0]["trainer"] is None:
        raise ValueError(f"{folder} must hold a drafter or a checkpoint with one; let the run reach its first")
    speculator = build_speculator(config)
    trainer = OnlineTrainer(speculator, config.train)
    trainer.load_state_dict({"replay": trainer.replay.state_dict()} | saved[0]["trainer"])  # a server may have none
    return speculator, saved[0].get("provenance", {}), settings


def _run_config(folder: Path, overrides: Iterable[str] = ()) -> TrainConfig | ServeConfig | WarmupConfig:
    """The settings that a run left in its folder."""
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    schemas = {"serve": ServeConfig, "warmup": WarmupConfig}
    schema = next((schema for section, schema in schemas.items() if f"\n{section}:\n" in text), TrainConfig)
    return load_config(path, overrides, schema=schema)


class TrafficPosition:
    """Which requests are done: all before first_open, and those of done_ahead, which overtook it in a batch."""

    def __init__(self, first_open: int = 0, done_ahead: Iterable[int] = ()) -> None:
        self.first_open, self.done_ahead = first_open, set(done_ahead)

    @classmethod
    def union(cls, places: Iterable[dict[str, object]]) -> TrafficPosition:
        """What is done in any of these places, each with first_open and done_ahead."""
        places = list(places)
        first_open = max(place["first_open"] for place in places)
        position = cls(first_open, {i for place in places for i in place["done_ahead"] if i >= first_open})
        position._advance()
        return position

    @property
    def num_done(self) -> int:
        return self.first_open + len(self.done_ahead)

    def finish(self, index: int) -> None:
        self.done_ahead.add(index)
        self._advance()

    def _advance(self) -> None:
        while self.first_open in self.done_ahead:
            self.done_ahead.remove(self.first_open)
            self.first_open += 1

    def is_done(self, index: int) -> bool:
        return index < self.first_open or index in self.done_ahead

    def open_requests(self, traffic: Iterable[Messages]) -> Iterator[tuple[int, Messages]]:
        """(index, prompt) of what was not done when this was called."""
        first_open, done_ahead = self.first_open, frozenset(self.done_ahead)
        return ((i, p) for i, p in enumerate(traffic) if i >= first_open and i not in done_ahead)


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

    def __init__(
        self, place: Place, speculator: SelfSpeculator, *, params: SamplingParams, traffic: Iterable, held_out: list
    ) -> None:
        self.place, self.config, self.console, self.folder = place, place.config, place.console, place.folder
        self.peers, self.store, self.speculator = place.peers, place.store, speculator
        config = self.config
        self.params = params
        self.eval_params = dataclasses.replace(params, max_new_tokens=config.eval.max_new_tokens)
        self.trainer = OnlineTrainer(speculator, config.train, peers=self.peers) if config.train.enabled else None
        self.traffic = traffic
        self.held_out = [self._request(0, prompt).token_ids for prompt in held_out]
        self.position = TrafficPosition()
        self.before: Measurement | None = None
        self.num_tokens = self.num_cut = self.num_metrics_bytes = 0
        self._num_before = 0  # requests done in earlier runs

    def _is_mine(self, index: int) -> bool:
        """Whether a request of the traffic is this rank's."""
        return index % self.peers.num_ranks == self.peers.rank

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
            trainer = {"replay": trainer["replay"]}
        return {
            "trainer": trainer,
            "first_open": self.position.first_open,
            "done_ahead": sorted(self.position.done_ahead),
            "before": None if self.before is None else dataclasses.asdict(self.before),
            "counts": {name: getattr(self, name) for name in self.counts},
            "num_ranks": self.peers.num_ranks,
        }

    def load(self, saved: SavedRun) -> None:
        """Goes on where the earlier run was saved."""
        state, own = saved.state, saved.own
        if self.trainer is not None and state["trainer"] is not None:
            replay = self.trainer.replay
            if own is None:
                for part_state, part, num_parts in saved.replays:
                    replay.adopt(part_state, part=part, num_parts=num_parts)
            experience = replay.state_dict() if own is None else own["trainer"]["replay"]
            self.trainer.load_state_dict(state["trainer"] | {"replay": experience})
        self.position = TrafficPosition.union(saved.places.values())
        self._num_before = self.position.num_done
        self.before = None if state["before"] is None else Measurement(**state["before"])
        for rank, place in saved.places.items():
            # Counts of a rank that is no more are rank 0's now.
            if rank % self.peers.num_ranks == self.peers.rank:
                for name, value in place["counts"].items():
                    setattr(self, name, getattr(self, name) + value)
        # Events after the checkpoint belong to what will be done again.
        self.num_metrics_bytes = saved.places.get(self.peers.rank, _NO_PLACE)["counts"]["num_metrics_bytes"]
        path = self.folder / METRICS_FILE
        if path.exists():
            os.truncate(path, self.num_metrics_bytes)

    @property
    def num_done_here(self) -> int:
        """Requests done, of which the earlier runs' are rank 0's."""
        return self.position.num_done - (0 if self.peers.is_first else self._num_before)

    def save(self) -> Path:
        """A checkpoint of this rank; all ranks make one, under the same number."""
        self.num_metrics_bytes = (self.folder / METRICS_FILE).stat().st_size
        agreed = None if self.trainer is None else self.trainer.agreed
        num_done = self.position.num_done if agreed is None else int(agreed.num_done)
        return self.store.save(self.state_dict(), num_done)

    # Running

    def run(self) -> dict[str, object]:
        """Measures, works, saves, and if nobody interrupted it measures again and saves the drafter."""
        start_s, interruption = time.perf_counter(), None
        metrics = MetricsWriter(self.folder, tensorboard=self.config.output.tensorboard and self.peers.is_first)
        try:
            with Signals() as signals:
                if self.before is None and self.held_out and self.peers.is_first:
                    self.console.print(f"measuring the drafter as it is on {len(self.held_out)} held-out requests")
                    self.before = self._measure()
                try:
                    self._work(metrics, signals)
                except Interrupted:
                    interruption = signals.received or signal.SIGTERM  # another rank's
                checkpoint = self.save()
        finally:
            metrics.close()
        summary: dict[str, object] = {
            "status": "done" if interruption is None else "interrupted", "signal": interruption,
            "folder": str(self.place.run_folder), "checkpoint": str(checkpoint), "level": self.config.model.mode,
            **self._total_facts(),
            "drafter_version": self.speculator.drafter.version,
            "before": None if self.before is None else dataclasses.asdict(self.before),
        }  # fmt: skip
        if self.trainer is not None:
            summary |= {"steps": self.trainer.num_steps, "train_s": round(self.trainer.train_s, 2)}
        if not self.peers.is_first:
            return summary
        if interruption is None:
            summary |= self._conclude()
        else:
            self.console.print(f"interrupted after {summary[self.noun]} {self.noun}; output.resume=true goes on")
        summary["seconds"] = round(time.perf_counter() - start_s, 2)
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary

    def _total_facts(self) -> dict[str, object]:
        """Counts of all ranks together; with several, what each did and what telling each other cost it."""
        own = {self.noun: self.position.num_done - self._num_before, "tokens": self.num_tokens, **self._facts()}
        if self.peers.is_alone:
            return own | {self.noun: self.position.num_done}
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
            after = self._measure()
            self.console.print(comparison_table(self.before, after))
        events = [event for event in read_metrics(self.folder / METRICS_FILE) if event["event"] == "request"]
        picture = self.folder / PICTURE if events else None
        if picture is not None:
            plot_acceptance(events, picture)
        metrics = None if after is None else dataclasses.asdict(after)
        self.speculator.save_drafter(self.folder / DRAFTER, metrics=metrics, config=dataclasses.asdict(self.config))
        reloaded = load_drafter(self.folder / DRAFTER, self.speculator.split)
        traffic = (self._request(0, messages).token_ids for messages in self.traffic)
        is_alike = drafts_alike(
            self.speculator, reloaded, list(itertools.islice(self.held_out or traffic, NUM_RELOAD_PROMPTS)),
            self.eval_params, num_draft_tokens=max(self.config.draft.num_draft_tokens, 1),
        )
        verdict = "drafts the same" if is_alike else "DRAFTS OTHERWISE"
        self.console.print(f"drafter saved in {self.folder / DRAFTER}; reloaded, it {verdict}")
        return {
            "after": metrics, "drafter": str(self.folder / DRAFTER), "reloads_alike": is_alike,
            "picture": picture and str(picture),
        }  # fmt: skip

    def _measure(self) -> Measurement:
        return measure(
            self.speculator, self.held_out, self.eval_params, num_draft_tokens=self.config.draft.num_draft_tokens
        )

    def _request(self, index: int, messages: Messages) -> Request:
        """The prompt's last tokens, as many as leave room for an answer."""
        longest = max(self.params.max_new_tokens, self.eval_params.max_new_tokens)
        return Request(index, *self.speculator.encode_request(messages, max_new_tokens=longest))


class _ServingJob(Job):
    """Serves the traffic, and learns from it beside that."""

    noun = "requests"
    counts = (*Job.counts, "serving_s")
    serving_s = 0.0

    def _facts(self) -> dict[str, object]:
        return {"cut_prompts": self.num_cut, "serving_s": round(self.serving_s, 2)}

    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        batch_size = self.config.data.batch_size
        num_requests = len(self.traffic) if isinstance(self.traffic, list) else None
        learner = JobLearner(self, metrics, signals)
        probe = SpeedProbe(self.speculator, self.params, batch_size=batch_size)
        admitted: list[Request | None] = []

        def waiting() -> Iterator[list[int]]:
            for index, messages in self.position.open_requests(self.traffic):
                if learner.lost is not None:
                    return
                if not self._is_mine(index):
                    continue
                admitted.append(self._request(index, messages))
                yield admitted[-1].token_ids

        # A resumed run draws with the seeds that it would have come to.
        params = dataclasses.replace(self.params, seed=self.params.seed + self.position.num_done)
        last_s = time.monotonic()
        with RunDisplay(self.console, num_requests=num_requests, num_done=self.position.num_done) as display:
            for result in self.speculator.generate(waiting(), params, batch_size=batch_size, learner=learner):
                self.serving_s += time.monotonic() - last_s
                request, admitted[result.index] = admitted[result.index], None
                self._record(request, result, metrics)
                probe.observe(request.token_ids, result)
                display.finish_request(
                    result.stats, learner.last_report, speed_up=probe.speed_up, drafter_version=result.drafter_version
                )
                learner.save_if_due()
                last_s = time.monotonic()
        learner.wait_for_others()

    def _record(self, request: Request, result: GenerationResult, metrics: MetricsWriter) -> None:
        stats = result.stats
        self.position.finish(request.index)
        self.num_tokens += stats.new_tokens
        self.num_cut += request.is_cut
        if self.trainer is not None:
            self.trainer.replay.end(result.request_id)
        metrics.write(
            "request", index=request.index, tokens_seen=self.num_tokens, new_tokens=stats.new_tokens,
            prompt_tokens=stats.prompt_tokens, rounds=stats.num_rounds, drafted=stats.num_drafted,
            accepted=stats.num_accepted, acceptance=stats.acceptance_rate,
            mean_accepted_tokens=stats.mean_accepted_tokens, tokens_per_s=stats.decode_tokens_per_s,
            drafter_version=result.drafter_version, finish_reason=result.finish_reason, level=result.level,
        )  # fmt: skip


class JobLearner:
    """The trainer as serving sees it, with its updates written down; ends the serving between rounds on a signal.

    With peers it also says at every tick what the job has to say, and does what was agreed on: saves, or ends. When one
    is lost it lets what is running be finished, without learning: `lost` is why.
    """

    def __init__(self, job: Job, metrics: MetricsWriter, signals: Signals) -> None:
        self._job, self._trainer, self._peers = job, job.trainer, job.peers
        self._metrics, self._signals = metrics, signals
        self._saved_s = time.monotonic()
        self._agreed: Ballot | None = None  # the last one acted on
        self.last_report: UpdateReport | None = None
        self.lost: PeerLostError | None = None

    def observe(self, transitions: list[Transitions]) -> None:
        if self._trainer is not None and self.lost is None:
            self._trainer.observe(transitions)

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        if self.lost is not None:
            return None
        report = None
        if self._trainer is not None:
            if not self._peers.is_alone:
                self._announce()
            try:
                report = self._trainer.step_if_due(is_idle=is_idle)
            except PeerLostError as error:
                self.lost = error
                say(f"{error}; finishing what is running")
                return None
        if report is not None:
            self.last_report = report
            self._metrics.write("update", **dataclasses.asdict(report))
        if self._peers.is_alone:
            if self._signals.received is not None:
                raise Interrupted
        elif self._trainer.agreed is not self._agreed:
            self._agreed = self._trainer.agreed
            self._act(self._agreed)
        return report

    def _announce(self) -> None:
        """Says at the next tick what this rank's job has to say."""
        notices, job = self._trainer.notices, self._job
        notices.is_interrupted = self._signals.received is not None
        notices.wants_save = self._peers.is_first and self._is_save_due
        notices.num_done = job.num_done_here

    def _act(self, agreed: Ballot) -> None:
        if agreed.wants_save:
            self._save()
        if agreed.is_interrupted:
            raise Interrupted

    def save_if_due(self) -> None:
        """A checkpoint when its time has come; with peers they agree on the moment at a tick."""
        if self._peers.is_alone and self._is_save_due:
            self._save()

    @property
    def _is_save_due(self) -> bool:
        return time.monotonic() - self._saved_s >= self._job.config.output.checkpoint_every_s

    def _save(self) -> None:
        self._job.save()
        self._saved_s = time.monotonic()

    def wait_for_others(self) -> None:
        """Does its part in the ticks until no rank has any traffic. Raises PeerLostError when one was lost."""
        if self._peers.is_alone:
            return
        self._trainer.notices.is_done = True
        while self.lost is None and not (self._agreed is not None and self._agreed.is_done == self._peers.num_ranks):
            self.step_if_due(is_idle=True)
        if self.lost is not None:
            raise self.lost


class Signals:
    """While entered, the first SIGINT or SIGTERM is only noted in `received`; a second one acts as ever."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received = number
        self.__exit__()


def read_traffic(
    config: TrainConfig | WarmupConfig, *, answer_field: str | None = None, parse: Callable = as_messages
) -> tuple[Iterable, list]:
    """The requests to serve (a list where their number is known) and the held-out ones, as `parse` gives them.

    answer_field, parse: see `dvi.traffic.read_dataset`.
    Raises ValueError when no traffic is named, or what `dvi.traffic` raises.
    """
    data, limit = config.data, config.eval.limit
    order = {"shuffle_seed": data.shuffle_seed, "epochs": data.epochs}
    form = {"parse": parse}
    if data.dataset is not None:
        source = {"split": data.dataset_split, "field": data.text_field, "answer_field": answer_field} | form
        held_out = list(read_dataset(data.dataset, limit=limit, **source)) if limit else []
        return DatasetTraffic(data.dataset, {"skip": limit, "limit": data.limit} | source | order), held_out
    if not data.prompts:
        raise ValueError("data.prompts or data.dataset must name the traffic, such as configs/demo/prompts.jsonl")
    traffic = read_prompts(data.prompts, split=data.split, domains=data.domains, limit=data.limit, **order, **form)
    if not limit or data.split == "eval":
        return traffic, []
    try:
        return traffic, read_prompts(data.prompts, split="eval", domains=data.domains, limit=limit, **form)
    except NoPromptsError:
        return traffic, []


class DatasetTraffic:
    """A streamed dataset that can be read from its start more than once."""

    def __init__(self, name: str, options: dict[str, object]) -> None:
        self._name, self._options = name, options

    def __iter__(self) -> Iterator:
        return read_dataset(self._name, **self._options)


def _check_same_run(config: TrainConfig | WarmupConfig, folder: Path, sections: Iterable[str]) -> None:
    """Raises ValueError when the run in the folder had other settings in one of these sections."""
    earlier = load_config(folder / "config.yaml", schema=type(config))
    for section in sections:
        now, then = (dataclasses.asdict(getattr(c, section)) for c in (config, earlier))
        for key in now.keys() - {"device", "num_threads", "placement"}:
            if now[key] != then[key]:
                raise ValueError(
                    f"{section}.{key} must be {then[key]!r} to resume the run in {folder}, got {now[key]!r}; "
                    "another output.folder starts afresh"
                )
