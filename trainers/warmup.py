"""Learning from recorded texts before a drafter serves: the step of online training without the serving.

Knows a corpus, a speculator and a trainer. Of a text nothing is kept but what the replay holds: another epoch decodes
and records it anew. A run's folder is that of `trainers.job`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console

from dvi.recordings import RecordedText, decode_answers, record, replay_rounds
from dvi.records import SamplingParams, UpdateReport
from dvi.settings import WarmupConfig
from dvi.speculator import SelfSpeculator, build_speculator
from dvi.telemetry import MetricsWriter
from dvi.traffic import AnsweredPrompt, Messages, as_answered, as_text
from trainers.job import Job, JobLearner, Place, Request, Signals, read_traffic, resume_job
from trainers.online import MIN_POSITIONS_PER_BLOCK, OnlineTrainer
from trainers.progress import RunDisplay

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
        """Stores the text and makes the steps owed, one whenever the next report is asked for.

        Steps wait until there is enough experience for a batch that does not repeat itself, as they do in serving.
        """
        self.store(text)
        while self.is_step_due:
            self.owed_steps -= 1
            yield self._trainer.step()

    def store(self, text: RecordedText) -> None:
        """Stores the text, and owes the steps for it."""
        trainer, request_id = self._trainer, 0  # the same for all: each one is ended before the next begins
        trainer.observe([text.transitions(request_id, with_prompt=trainer.config.learn_from_prompts)])
        trainer.replay.end(request_id)
        self.owed_steps += text.num_answered / (self._positions_per_step * trainer.part_here)

    @property
    def is_step_due(self) -> bool:
        trainer = self._trainer
        has_data = len(trainer.replay) >= MIN_POSITIONS_PER_BLOCK * trainer.config.blocks_per_step
        return self.owed_steps >= 1 and has_data


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
    with Place(config, console) as place:
        speculator = build_speculator(place.config)
        traffic, held_out = read_traffic(config, **reading)
        params = SamplingParams(max_new_tokens=warmup.max_new_tokens)
        job = _WarmupJob(place, speculator, params=params, traffic=traffic, held_out=held_out)
        return resume_job(job, sections=("model", "drafter", "data", "warmup"))


def _check(config: WarmupConfig) -> None:
    """Raises ValueError for settings that would be ignored."""
    if not config.train.enabled:
        raise ValueError("train.enabled must be true for a warm-up, got false; leave it out")
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
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    num_lost = max(len(ids) - max_positions, 0)
    return Text(ids[num_lost:], max(prompt_len - num_lost, 1), is_cut=num_lost > 0)


class _WarmupJob(Job):
    """Learns from the traffic's texts, one after the other.

    Several ranks take every so many-th text each and make a step together whenever one of them owes one, which is then
    paid by all: where their texts are of like length that is as often as one rank alone would, on so many more blocks.
    """

    noun = "texts"
    counts = (*Job.counts, "owed_steps")

    def __init__(self, place: Place, *args: object, **options: object) -> None:
        super().__init__(place, *args, **options)
        self.learner = RecordingLearner(self.trainer, positions_per_step=self.config.warmup.positions_per_step)
        self.trainer.follows_rounds = False

    @property
    def owed_steps(self) -> float:
        return self.learner.owed_steps

    @owed_steps.setter
    def owed_steps(self, steps: float) -> None:
        self.learner.owed_steps = steps

    def _facts(self) -> dict[str, object]:
        return {"cut_texts": self.num_cut, "source": self.config.warmup.source}

    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        attendance = JobLearner(self, metrics, signals)

        def attend() -> None:
            """Does this rank's part in the ticks; a step that was made is paid for. Raises Interrupted."""
            if attendance.step_if_due(is_idle=self.trainer.must_step) is not None:
                self.learner.owed_steps -= 1
            if attendance.lost is not None:
                raise attendance.lost

        num_texts = len(self.traffic) if isinstance(self.traffic, list) else None
        with RunDisplay(
            self.console, num_requests=num_texts, num_done=self.position.num_done, doing="warming up", noun=self.noun
        ) as display:
            for index, text in self._open_texts(attend):
                self._learn(index, text, metrics, display, attend)
                attendance.save_if_due()
                attend()
        attendance.wait_for_others()
        self.trainer.publish_now()

    def _learn(
        self, index: int, text: Text, metrics: MetricsWriter, display: RunDisplay, attend: Callable[[], None]
    ) -> None:
        """Measures the drafter on the text as it was before, then has it learn from it."""
        recorded = record(self.speculator.split, text.token_ids, prompt_len=text.prompt_len)
        stats = replay_rounds(
            self.trainer.drafter, [recorded], num_draft_tokens=max(self.config.draft.num_draft_tokens, 1)
        )
        stats.new_tokens = recorded.num_answered
        if self.peers.is_alone:
            for report in self.learner.learn(recorded):
                metrics.write("update", **dataclasses.asdict(report))
            self.position.finish(index)
        else:
            # A checkpoint may be agreed on in any tick: then the text is done, and its steps are still owed.
            self.learner.store(recorded)
            self.position.finish(index)
            self.trainer.must_step = True
            while self.learner.is_step_due:
                attend()
            self.trainer.must_step = False
        self.num_tokens += recorded.num_answered
        self.num_cut += text.is_cut
        version = self.speculator.drafter.version
        if stats.num_rounds:  # a text too short for one says nothing of the drafter
            metrics.write(
                "request", index=index, tokens_seen=self.num_tokens, new_tokens=recorded.num_answered,
                prompt_tokens=text.prompt_len, rounds=stats.num_rounds, drafted=stats.num_drafted,
                accepted=stats.num_accepted, acceptance=stats.acceptance_rate,
                mean_accepted_tokens=stats.mean_accepted_tokens, drafter_version=version,
            )  # fmt: skip
        display.finish_request(stats, self.trainer.last_report, speed_up=None, drafter_version=version)

    # Texts

    def _open_texts(self, attend: Callable[[], None]) -> Iterator[tuple[int, Text]]:
        """What of this rank's share has not been learnt from yet. attend: called now and then, may raise."""
        share = ((index, prompt) for index, prompt in enumerate(self.traffic) if self._is_mine(index))
        if self.config.warmup.source == "texts":
            for index, prompt in share:
                if not self.position.is_done(index):
                    yield index, self._encode_text(prompt)
            return
        # Always the same prompts together, so that a resumed run meets the same answers to the bit.
        size = BATCHES_AT_ONCE * self.config.data.batch_size
        while numbered := list(itertools.islice(share, size)):
            if all(self.position.is_done(index) for index, _ in numbered):
                continue
            chunk = [self._request(index, prompt) for index, prompt in numbered]
            answers = decode_answers(
                self.speculator, [request.token_ids for request in chunk], batch_size=self.config.data.batch_size,
                max_new_tokens=self.params.max_new_tokens, on_answer=attend,
            )
            for request, answer in zip(chunk, answers, strict=True):
                if not self.position.is_done(request.index):
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
