"""Learning from recorded texts before a drafter serves: the step of online training without the serving.

Knows a corpus, a speculator and a trainer. Of a text nothing is kept but what the replay holds: another epoch decodes
and records it anew. A run's folder is that of `trainers.job`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dvi.recordings import RecordedText, decode_answers, record, replay_rounds
from dvi.records import SamplingParams, UpdateReport
from dvi.settings import WarmupConfig
from dvi.speculator import SelfSpeculator, build_speculator
from dvi.telemetry import MetricsWriter
from dvi.traffic import AnsweredPrompt, Messages, as_answered, as_text
from trainers.checkpoint import CheckpointStore
from trainers.job import CHECKPOINTS, Interrupted, Job, Request, Signals, read_traffic, resume_job
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
        trainer, config = self._trainer, self._trainer.config
        request_id = 0  # the same for all: each one is ended before the next begins
        trainer.observe([text.transitions(request_id, with_prompt=config.learn_from_prompts)])
        trainer.replay.end(request_id)
        self.owed_steps += text.num_answered / self._positions_per_step
        while self.owed_steps >= 1 and len(trainer.replay) >= MIN_POSITIONS_PER_BLOCK * config.blocks_per_step:
            self.owed_steps -= 1
            yield trainer.step()


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
    speculator = build_speculator(config)
    with CheckpointStore(Path(config.output.folder) / CHECKPOINTS) as store:
        traffic, held_out = read_traffic(config, **reading)
        params = SamplingParams(max_new_tokens=warmup.max_new_tokens)
        job = _WarmupJob(config, speculator, store, console, params=params, traffic=traffic, held_out=held_out)
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
    """Learns from the traffic's texts, one after the other."""

    noun = "texts"

    def __init__(self, config: WarmupConfig, *args: object, **options: object) -> None:
        super().__init__(config, *args, **options)
        self.learner = RecordingLearner(self.trainer, positions_per_step=config.warmup.positions_per_step)

    def _facts(self) -> dict[str, object]:
        return {"cut_texts": self.num_cut, "source": self.config.warmup.source}

    def state_dict(self) -> dict[str, object]:
        return super().state_dict() | {"owed_steps": self.learner.owed_steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        self.learner.owed_steps = state["owed_steps"]

    def _work(self, metrics: MetricsWriter, signals: Signals) -> None:
        def stop_if_asked() -> None:
            if signals.received is not None:
                raise Interrupted

        num_done = self.position.num_done
        num_texts = len(self.traffic) if isinstance(self.traffic, list) else None
        saved_s = time.monotonic()
        with RunDisplay(
            self.console, num_requests=num_texts, num_done=num_done, doing="warming up", noun=self.noun
        ) as display:
            for index, text in enumerate(self._open_texts(stop_if_asked), start=num_done):
                self._learn(index, text, metrics, display)
                if time.monotonic() - saved_s >= self.config.output.checkpoint_every_s:
                    self._save()
                    saved_s = time.monotonic()
                stop_if_asked()
        self.trainer.publish_now()

    def _learn(self, index: int, text: Text, metrics: MetricsWriter, display: RunDisplay) -> None:
        """Measures the drafter on the text as it was before, then has it learn from it."""
        recorded = record(self.speculator.split, text.token_ids, prompt_len=text.prompt_len)
        stats = replay_rounds(
            self.trainer.drafter, [recorded], num_draft_tokens=max(self.config.draft.num_draft_tokens, 1)
        )
        stats.new_tokens = recorded.num_answered
        for report in self.learner.learn(recorded):
            metrics.write("update", **dataclasses.asdict(report))
        self.position.finish(index)
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

    def _open_texts(self, stop_if_asked: Callable[[], None]) -> Iterator[Text]:
        """What has not been learnt from yet. stop_if_asked: called now and then, may raise."""
        num_done = self.position.num_done
        if self.config.warmup.source == "texts":
            for prompt in itertools.islice(self.traffic, num_done, None):
                yield self._encode_text(prompt)
            return
        # Always the same prompts together, so that a resumed run meets the same answers to the bit.
        size = BATCHES_AT_ONCE * self.config.data.batch_size
        num_again = num_done % size
        prompts = itertools.islice(self.traffic, num_done - num_again, None)
        while chunk := [self._request(0, prompt) for prompt in itertools.islice(prompts, size)]:
            answers = decode_answers(
                self.speculator, [request.token_ids for request in chunk], batch_size=self.config.data.batch_size,
                max_new_tokens=self.params.max_new_tokens, on_answer=stop_if_asked,
            )
            texts = [Text(*answer, is_cut=request.is_cut) for request, answer in zip(chunk, answers, strict=True)]
            yield from texts[num_again:]
            num_again = 0

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
