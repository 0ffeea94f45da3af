"""Learning from recorded texts before a drafter serves: the step of online training without the serving.

Knows a corpus, a speculator and a trainer. Of a text nothing is kept but what the replay holds: another epoch decodes
and records it anew. A run's folder is that of `trainers.jobs.run_folder`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from torch import nn

from dvi.decode.speculator import SelfSpeculator
from dvi.distributed import wait
from dvi.records import SamplingParams, UpdateReport
from dvi.settings import WarmupConfig
from dvi.signals import Interrupted, Signals
from dvi.telemetry import MetricsWriter
from dvi.traffic import AnsweredPrompt, Messages, as_answered, as_text
from trainers.jobs.evaluation import weights_alike
from trainers.jobs.job import Job, Request, read_own_traffic, resume_job, speculator_of
from trainers.jobs.progress import RunDisplay
from trainers.learning.experience import MIN_POSITIONS_PER_BLOCK
from trainers.learning.online import OnlineTrainer
from trainers.learning.rank_report import RankReport
from trainers.learning.recordings import RecordedText, decode_answers, record, replay_rounds
from trainers.learning.zero3 import ShardedBackbone, ShardedSpeculator
from trainers.learning.zero_student import is_launched_with_deepspeed
from trainers.ranks.launch import Launch

BATCHES_AT_ONCE = 4  # batches of prompts that are decoded before their texts are learnt from: rows that end refill
SCHEDULES = ("kl_only", "lk")  # the others need rewards, and nothing is drafted here


class RecordingLearner:
    """Has a trainer learn from recorded texts, one after the other.

    positions_per_step  answer positions that owe one optimizer step.
    owed_steps          what is owed so far, fractions included.
    """

    def __init__(self, trainer: OnlineTrainer, *, positions_per_step: float) -> None:
        if positions_per_step <= 0:
            raise ValueError(f"positions_per_step must be above 0, got {positions_per_step}; try 8")
        self._trainer, self._positions_per_step = trainer, positions_per_step
        self.owed_steps = 0.0

    def learn(self, text: RecordedText) -> Iterator[UpdateReport]:
        """Stores the text and makes the steps due, one whenever the next report is asked for."""
        self.store(text)
        while self.steps_due >= 1:
            self.owed_steps -= 1
            yield self._trainer.step()

    def store(self, text: RecordedText) -> None:
        """Stores the text, and owes the steps for it."""
        trainer, request_id = self._trainer, 0  # the same for all: each one is ended before the next begins
        trainer.observe([text.transitions(request_id, with_prompt=trainer.config.learn_from_prompts)])
        trainer.replay.end(request_id)
        self.owed_steps += text.num_answered / self._positions_per_step

    @property
    def steps_due(self) -> float:
        """Those owed, fractions included; none before there is enough experience for batches that do not repeat."""
        trainer = self._trainer
        has_data = len(trainer.replay) >= MIN_POSITIONS_PER_BLOCK * trainer.blocks_here
        # What was made beyond one's own stays to be set off, whoever has experience.
        return self.owed_steps if has_data else min(self.owed_steps, 0.0)


def learn_from_recordings(
    trainer: OnlineTrainer, texts: Iterable[RecordedText], *, positions_per_step: float, max_steps: int | None = None,
    on_step: Callable[[UpdateReport], None] = lambda report: None,
) -> int:
    """Has the trainer learn from the texts in their order and publishes the result; returns the steps made.

    max_steps: stop after so many, in the middle of a text and of `texts` if need be; None learns from all.
    """
    learner, num_steps = RecordingLearner(trainer, positions_per_step=positions_per_step), 0
    reports = (report for text in texts for report in learner.learn(text))
    for report in itertools.islice(reports, max_steps):
        on_step(report)
        num_steps += 1
    trainer.publish_now()
    return num_steps


def run_warmup(config: WarmupConfig, *, console: Console) -> dict[str, object]:
    """Runs the warm-up to its end, or to SIGINT or SIGTERM, and returns its summary (what summary.json holds).

    summary["status"] is "done" or "interrupted"; an interrupted run has saved a checkpoint and goes on with
    output.resume=true from the last text it has learnt from.
    Raises ValueError for settings that do not fit together, a bad row, and a folder that already holds a run.
    """
    _check(config)
    warmup = config.warmup
    reading = {"parse": as_answered, "answer_field": warmup.answer_field} if warmup.source == "texts" else {}
    with Launch(config, console) as launch:
        kind = ShardedSpeculator if config.model.placement == "zero3" else SelfSpeculator
        traffic, held_out = read_own_traffic(launch, **reading)
        speculator = speculator_of(launch, kind=kind)
        params = SamplingParams(max_new_tokens=warmup.max_new_tokens)
        job = _WarmupJob(launch, speculator, params=params, traffic=traffic, held_out=held_out)
        return resume_job(job, sections=("model", "drafter", "data", "warmup"))


def _check(config: WarmupConfig) -> None:
    """Raises ValueError for settings that would be ignored."""
    if config.model.placement == "zero3" and is_launched_with_deepspeed():
        raise ValueError(
            "model.placement 'zero3' must not be launched with a DeepSpeed config, which would be for the drafter; "
            "start it with torchrun, or with configs/accelerate/ddp_2.yaml"
        )
    if not config.train.enabled:
        raise ValueError("train.enabled must be true for a warm-up, got false; leave it out")
    if config.train.learner != "shared":
        raise ValueError(
            f"train.learner must be shared for a warm-up, where nobody is served, got {config.train.learner!r}; "
            "leave it out"
        )
    if config.model.placement == "tensor":
        raise ValueError(
            "model.placement must not be 'tensor' for a warm-up; try device_map, or zero3 with warmup.source=texts"
        )
    if config.train.schedule not in SCHEDULES:
        raise ValueError(
            f"train.schedule must be {' or '.join(SCHEDULES)} for a warm-up, which drafts nothing and so earns no "
            f"rewards, got {config.train.schedule!r}; try kl_only"
        )
    if config.warmup.answer_field is not None and (config.warmup.source == "answers" or config.data.dataset is None):
        raise ValueError(
            f"warmup.answer_field goes with warmup.source=texts and data.dataset, got {config.warmup.answer_field!r}; "
            'rows of data.prompts have their answer under "answer"'
        )


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt and its answer, not recorded yet; is_cut: it had to lose its beginning."""

    token_ids: list[int]
    prompt_len: int
    is_cut: bool


def encode_text(speculator: SelfSpeculator, answered: AnsweredPrompt, *, max_positions: int) -> Text:
    """A prompt with the answer of the data, up to the end token, as decoding would have given it.

    They are tokenized apart, for the prompt's tokens are not the answer's to choose. A text that stands alone counts as
    the answer to its first token.
    """
    tokenizer, prompt_ids, prompt_len = speculator.tokenizer, [], 1
    if answered.messages:
        has_template = tokenizer.chat_template is not None
        prompt = answered.messages if has_template else as_text(answered.messages)
        prompt_ids = speculator.encode(prompt, max_tokens=speculator.max_positions - 1)
        prompt_len = len(prompt_ids)
    ids = prompt_ids + tokenizer(answered.answer, add_special_tokens=not answered.messages)["input_ids"]
    ends = speculator.eos_token_ids
    if ends:
        ids.append(min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    num_lost = max(len(ids) - max_positions, 0)
    return Text(ids[num_lost:], max(prompt_len - num_lost, 1), is_cut=num_lost > 0)


class _WarmupJob(Job):
    """Learns from the traffic's texts in turns.

    Several ranks take every so many-th text each. In a turn each records and stores its next one; then they add up the
    steps that they owe, as many as a single rank would for the same texts, and make them together. What they do depends
    on no clock, so a run of as many ranks that is resumed ends with the drafter that it would have had, to the bit. In
    every turn all wait for the one with the longest text, and for one that decodes: train.peer_timeout_s must be enough
    for BATCHES_AT_ONCE batches of answers. A signal is heard at the end of a turn.
    """

    noun = "texts"
    counts = (*Job.counts, "owed_steps")

    def __init__(self, launch: Launch, *args: object, **options: object) -> None:
        super().__init__(launch, *args, **options)
        trainer, split = self.trainer, self.speculator.split
        # Of a step each rank has but a part, so that each owes as many of them as if it had them all.
        positions_per_step = self.config.warmup.positions_per_step * self.peers.num_ranks * trainer.part_here
        self.learner = RecordingLearner(trainer, positions_per_step=positions_per_step)
        trainer.follows_rounds, trainer.must_step = False, True
        self._is_sharded = isinstance(split, ShardedBackbone)
        self._record_text = split.record if self._is_sharded else functools.partial(record, split)

    @property
    def owed_steps(self) -> float:
        return self.learner.owed_steps

    @owed_steps.setter
    def owed_steps(self, steps: float) -> None:
        self.learner.owed_steps = steps

    def _facts(self) -> dict[str, object]:
        return {"cut_texts": self.num_cut, "source": self.config.warmup.source}

    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        self._metrics, self._signals, self._saved_s = metrics, signals, time.monotonic()
        num_texts = len(self.traffic) if isinstance(self.traffic, list) else None
        texts = self._open_texts()
        with RunDisplay(
            num_requests=num_texts, num_done=self.cursor.num_done, doing="warming up", noun=self.noun
        ) as display:
            # First the steps that the earlier run still owed: its checkpoint is of before they were made.
            self._end_turn(is_done=False)
            is_over = False
            while not is_over:
                numbered = next(texts, None)
                if numbered is not None:
                    self._learn(*numbered, display)
                elif self._is_sharded:
                    self.speculator.split.stand_by()
                is_over = self._end_turn(is_done=numbered is None)
        self.trainer.publish_now()

    def _learn(self, index: int, text: Text, display: RunDisplay) -> None:
        """Measures the drafter on the text as it was before, then stores the text."""
        recorded = self._record_text(text.token_ids, prompt_len=text.prompt_len)
        stats = replay_rounds(
            self.trainer.drafter, [recorded], num_draft_tokens=max(self.config.draft.num_draft_tokens, 1)
        )
        stats.new_tokens = recorded.num_answered
        self.learner.store(recorded)
        self.cursor.finish(index)
        self.num_tokens += recorded.num_answered
        self.num_cut += text.is_cut
        version = self.speculator.drafter.version
        if stats.num_rounds:  # a text too short for one says nothing of the drafter
            self._metrics.write(
                "request", index=index, tokens_seen=self.num_tokens, new_tokens=recorded.num_answered,
                prompt_tokens=text.prompt_len, rounds=stats.num_rounds, drafted=stats.num_drafted,
                accepted=stats.num_accepted, acceptance=stats.acceptance_rate,
                mean_accepted_tokens=stats.mean_accepted_tokens, drafter_version=version,
            )  # fmt: skip
        display.finish_request(stats, self.trainer.last_report, speed_up=None, drafter_version=version)

    def _end_turn(self, *, is_done: bool) -> bool:
        """Makes the steps that all ranks owe together; whether all are done.

        Before that it saves, if it is time. Raises Interrupted when any rank was asked to end.
        """
        trainer = self.trainer
        trainer.notices.num_done = self.num_done_here
        is_save_due = time.monotonic() - self._saved_s >= self.config.output.checkpoint_every_s
        mine = RankReport(
            is_done=is_done, is_interrupted=self._signals.received is not None,
            wants_save=self.peers.is_first and is_save_due, num_done=self.num_done_here,
            wants_step=self.learner.steps_due,
        )  # fmt: skip
        agreed = RankReport.of(wait(self.peers.total(mine.tensor())))
        trainer.hear(agreed)
        if agreed.wants_save:
            self.save()
            self._saved_s = time.monotonic()
        if agreed.is_interrupted:
            raise Interrupted
        for _ in range(int(agreed.wants_step)):
            self.learner.owed_steps -= 1 / self.peers.num_ranks
            self._metrics.write("update", **dataclasses.asdict(trainer.step()))
        return agreed.is_done == self.peers.num_ranks

    def _drafts_alike(self, reloaded: nn.Module) -> bool:
        """As of any job; where nothing can be decoded, whether the weights are the same to the bit."""
        if not self._is_sharded:
            return super()._drafts_alike(reloaded)
        return weights_alike(self.speculator.drafter, reloaded)

    # Texts

    def _open_texts(self) -> Iterator[tuple[int, Text]]:
        """What of this rank's share has not been learnt from yet. Alone it raises Interrupted on a signal."""
        share = ((index, prompt) for index, prompt in enumerate(self.traffic) if self._is_mine(index))
        if self.config.warmup.source == "texts":
            for index, prompt in share:
                if not self.cursor.is_done(index):
                    yield index, self._encode_text(prompt)
            return
        # Always the same prompts together, so that a resumed run meets the same answers to the bit.
        size = BATCHES_AT_ONCE * self.config.data.batch_size
        while numbered := list(itertools.islice(share, size)):
            if all(self.cursor.is_done(index) for index, _ in numbered):
                continue
            chunk = [self._checked(index, prompt) for index, prompt in numbered]
            with self._interruptible(self._signals):
                answers = decode_answers(
                    self.speculator, [request.token_ids for request in chunk], batch_size=self.config.data.batch_size,
                    max_new_tokens=self.params.max_new_tokens,
                )
            for request, answer in zip(chunk, answers, strict=True):
                if not self.cursor.is_done(request.index):
                    yield request.index, Text(*answer, is_cut=request.is_cut)

    def _request(self, index: int, prompt: Messages | AnsweredPrompt) -> Request:
        """Also no longer than leaves room for an answer in a text. Of a text alone the first half is the prompt."""
        if isinstance(prompt, AnsweredPrompt):
            if not prompt.messages:
                text = self._encode_text(prompt)
                return Request(index, text.token_ids[: max(len(text.token_ids) // 2, 1)], text.is_cut)
            prompt = prompt.messages
        request = super()._request(index, prompt)
        room = max(self.config.warmup.text_positions - self.params.max_new_tokens, 1)
        return Request(index, request.token_ids[-room:], request.is_cut or len(request.token_ids) > room)

    def _encode_text(self, prompt: AnsweredPrompt) -> Text:
        longest = min(self.config.warmup.text_positions, self.speculator.max_positions)
        return encode_text(self.speculator, prompt, max_positions=longest)
