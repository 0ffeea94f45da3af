"""Cells of an ablation: the traffic served with a learner beside it, or the same texts learnt from without serving.

Every cell starts from the untrained drafter of its seed and meets the same prompts in the seed's order. Decoding is
greedy, so all arms generate the same text: the data are equal whatever an arm has learnt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.decode.construction import build_speculator
from dvi.decode.speculator import PLAIN
from dvi.draft.length_policies import FixedLength
from dvi.hardware import describe_machine, wait_for
from dvi.model.drafter import build_drafter
from dvi.progress import doing, each
from dvi.records import ReplayBatch, SamplingParams, Transitions, UpdateReport
from dvi.settings import LearningSettings, TrainConfig
from trainers.experiments.ablation_figures import (
    OFFLINE,
    OFFLINE_EPOCHS,
    Block,
    Cell,
    HeldOut,
    PlainBlock,
    ServedRequest,
)
from trainers.experiments.domain_shift import encode
from trainers.jobs.traffic_cursor import read_traffic
from trainers.jobs.warmup import learn_from_recordings
from trainers.learning.online import OnlineTrainer
from trainers.learning.recordings import RecordedText, decode_answers, record, replay_rounds

NUM_BLOCKS = 12  # of the traffic; held-out figures are taken after each
BLOCKS_PER_PLAIN = 3  # one block in so many is decoded plainly too, the last one of every quarter
WARM_UP_TOKENS = 8
SEGMENT_LEN = 32  # of the replay, whose slots one text never shares with another


@dataclass(frozen=True)
class AblationArm:
    """A way of learning. name is as it was asked for, kind what stands before its colon."""

    name: str
    kind: str
    settings: LearningSettings

    @property
    def is_offline(self) -> bool:
        return self.kind in OFFLINE


class _WatchedTrainer(OnlineTrainer):
    """A trainer that counts what it is shown and what its batches hold."""

    def __init__(self, speculator: object, config: LearningSettings) -> None:
        super().__init__(speculator, config)
        self.num_transitions = 0
        # Positions, those with a reward, and of these the on-policy ones. Summed on the device: no syncs.
        self.sampled = torch.zeros(3, dtype=torch.int64, device=speculator.split.device)

    def observe(self, transitions: list[Transitions]) -> None:
        self.num_transitions += sum(len(stretch) for stretch in transitions if not stretch.is_prefill)
        super().observe(transitions)

    def _sample(self, num_blocks: int, generator: torch.Generator | None = None) -> ReplayBatch:
        batch = super()._sample(num_blocks, generator)
        if generator is None:  # the canary draws with one of its own
            self.sampled += count_rewards(batch)
        return batch


def count_rewards(batch: ReplayBatch) -> Tensor:
    """int64 [3]: positions, those with a reward, and of these the ones drafted by the version that serves now."""
    is_on_policy_NT = batch.has_reward_NT & (batch.staleness_N == 0)[:, None]
    return torch.stack([mask_NT.sum() for mask_NT in (batch.mask_NT, batch.has_reward_NT, is_on_policy_NT)])


class CellRunner:
    """The model, the traffic and the held-out texts, and how a cell is run on them."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.speculator = build_speculator(config)
        self.params = SamplingParams(**dataclasses.asdict(config.sampling))
        self.drafting = FixedLength(config.draft.num_draft_tokens)
        self._drafter_config = self.speculator.drafter.config
        self._corpus: dict[tuple[int, ...], tuple[list[int], int]] = {}
        held_out, _ = encode(self.speculator, read_traffic(config)[1], config)
        texts = self._decode(held_out, config.eval.max_new_tokens, "decoding held-out answers")
        # Where a text has no whole round, nobody can say what would be accepted in it.
        texts = [(ids, length) for ids, length in texts if len(ids) - length > config.draft.num_draft_tokens]
        if not texts:
            raise ValueError(
                'data.prompts must have rows with "split": "eval" whose answers are longer than '
                f"draft.num_draft_tokens = {config.draft.num_draft_tokens}, got none of {len(held_out)}"
            )
        self.held_out = [
            record(self.speculator.split, ids, prompt_len=length)
            for ids, length in each(texts, "recording held-out answers", noun="texts")
        ]

    def run_online(self, arm: AblationArm, seed: int) -> Cell:
        """Serves the traffic once with a learner beside it."""
        prompts, num_cut = self._traffic(seed)
        trainer = self._fresh_trainer(arm.settings, seed)
        held_out, blocks = [self._measure(0, 0)], []
        self._warm_up(prompts)
        bounds = [round(i * len(prompts) / NUM_BLOCKS) for i in range(NUM_BLOCKS + 1)]
        with doing(f"{arm.name}, seed {seed}", total=len(prompts), noun="requests") as stage:
            for number, (first, end) in enumerate(itertools.pairwise(bounds), start=1):
                is_plain = number % BLOCKS_PER_PLAIN == 0
                earlier = blocks[-1].requests[-1] if blocks else None
                blocks.append(self._serve(prompts[first:end], trainer, earlier, is_plain=is_plain))
                if number == NUM_BLOCKS:
                    trainer.publish_now()
                held_out.append(self._measure(trainer.num_steps, trainer.num_transitions))
                stage.advance(end - first)
        return _cell(arm, seed, trainer, held_out, blocks, num_cut)

    def run_offline(self, arm: AblationArm, seed: int, num_steps: int) -> Cell:
        """The same texts recorded, and as many steps: over each once, in the order of serving, or over all at once."""
        prompts, num_cut = self._traffic(seed)
        unseen = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in self._corpus]
        for text in self._decode(unseen, self.params.max_new_tokens, "decoding answers to learn from"):
            self._corpus[tuple(text[0][: text[1]])] = text
        texts = [self._corpus[tuple(prompt)] for prompt in prompts]
        num_positions = sum(len(ids) - prompt_len for ids, prompt_len in texts)
        settings = arm.settings
        if arm.kind == OFFLINE_EPOCHS:
            # What RecordedText.transitions gives of each text: the answer and two positions before it, or all.
            kept = [len(ids) if settings.learn_from_prompts else len(ids) - length + 2 for ids, length in texts]
            capacity = SEGMENT_LEN * sum(math.ceil(count / SEGMENT_LEN) for count in kept)
            settings = dataclasses.replace(settings, replay_positions=capacity, reservoir_fraction=0.0)
        trainer = self._fresh_trainer(settings, seed)
        held_out, num_seen = [self._measure(0, 0)], 0
        steps_of_marks = {round(i * num_steps / NUM_BLOCKS) for i in range(1, NUM_BLOCKS)}

        def recordings() -> Iterator[RecordedText]:
            nonlocal num_seen
            for ids, prompt_len in texts:
                num_seen += len(ids) - prompt_len
                yield record(self.speculator.split, ids, prompt_len=prompt_len)

        def finish_step(report: UpdateReport) -> None:
            stage.advance()
            if report.step in steps_of_marks:
                held_out.append(self._measure(report.step, num_seen))

        learn = _learn_in_epochs if arm.kind == OFFLINE_EPOCHS else _learn_in_one_pass
        with doing(f"{arm.name}, seed {seed}", total=num_steps, noun="steps") as stage:
            learn(trainer, recordings(), num_positions=num_positions, num_steps=num_steps, on_step=finish_step)
        held_out.append(self._measure(trainer.num_steps, num_positions))
        return _cell(arm, seed, trainer, held_out, None, num_cut)

    def _serve(
        self, prompts: list[list[int]], trainer: _WatchedTrainer, earlier: ServedRequest | None, *, is_plain: bool
    ) -> Block:
        """earlier: the request served last, from whose totals the clocks go on."""
        served_s, trained_s = (earlier.serving_s, earlier.train_s) if earlier else (0.0, 0.0)
        learner_s, token_ids, requests = trainer.train_s, {}, []
        start_s = self._now_s()
        for result in self.speculator.generate(
            prompts, self.params, batch_size=self.config.data.batch_size, policy=self.drafting, learner=trainer
        ):
            now_s, train_s, stats = self._now_s(), trainer.train_s - learner_s, result.stats
            trainer.replay.end(result.request_id)
            token_ids[result.index] = result.token_ids
            requests.append(ServedRequest(
                drafted=stats.num_drafted, accepted=stats.num_accepted, tokens=stats.new_tokens,
                transitions=trainer.num_transitions,
                serving_s=served_s + now_s - start_s - train_s, train_s=trained_s + train_s,
            ))
        return Block(requests, self._decode_plainly(prompts, token_ids) if is_plain else None)

    def _decode_plainly(self, prompts: list[list[int]], served: dict[int, list[int]]) -> PlainBlock:
        start_s = self._now_s()
        results = list(self.speculator.generate(
            prompts, self.params, batch_size=self.config.data.batch_size, policy=PLAIN, keep_transitions=False
        ))
        return PlainBlock(
            tokens=sum(result.stats.new_tokens for result in results), seconds=self._now_s() - start_s,
            num_mismatches=sum(result.token_ids != served[result.index] for result in results),
        )

    def _warm_up(self, prompts: list[list[int]]) -> None:
        """What is slow only the first time is kept out of both clocks."""
        params = dataclasses.replace(self.params, max_new_tokens=WARM_UP_TOKENS)
        for policy in (self.drafting, PLAIN):
            list(self.speculator.generate(
                prompts[: self.config.data.batch_size], params, batch_size=self.config.data.batch_size, policy=policy,
                keep_transitions=False,
            ))

    def _measure(self, steps: int, transitions: int) -> HeldOut:
        stats = replay_rounds(
            self.speculator.drafter, self.held_out, num_draft_tokens=self.config.draft.num_draft_tokens
        )
        return HeldOut(
            steps, transitions, stats.acceptance_rate, stats.acceptance_per_depth, stats.mean_accepted_tokens
        )

    def _fresh_trainer(self, settings: LearningSettings, seed: int) -> _WatchedTrainer:
        """A trainer beside an untrained drafter, which serves from now on."""
        split = self.speculator.split
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drafter = build_drafter(split, self._drafter_config)
        drafter.publish(drafter, version=0)
        self.speculator.drafter = drafter.requires_grad_(False)
        return _WatchedTrainer(self.speculator, dataclasses.replace(settings, seed=seed))

    def _traffic(self, seed: int) -> tuple[list[list[int]], int]:
        """Token ids of all prompts, in the seed's order, and how many lost their beginning."""
        data = dataclasses.replace(self.config.data, shuffle_seed=seed)
        messages = list(read_traffic(dataclasses.replace(self.config, data=data))[0])
        if len(messages) < NUM_BLOCKS:
            raise ValueError(f"data must have at least {NUM_BLOCKS} requests, got {len(messages)}; try data.limit=240")
        return encode(self.speculator, messages, self.config)

    def _decode(self, prompts: list[list[int]], max_new_tokens: int, label: str) -> list[tuple[list[int], int]]:
        return decode_answers(self.speculator, prompts, max_new_tokens=max_new_tokens, doing=label)

    def _now_s(self) -> float:
        wait_for(self.speculator.split.device)
        return time.perf_counter()


def _learn_in_one_pass(
    trainer: OnlineTrainer, texts: Iterator[RecordedText], *, num_positions: int, num_steps: int,
    on_step: Callable[[UpdateReport], None],
) -> None:
    """Each text is met once; the steps are spread evenly over the positions."""
    if num_steps:
        # A little less, so that rounding does not swallow the last step.
        positions_per_step = num_positions / num_steps * (1 - 1e-9)
        learn_from_recordings(
            trainer, texts, positions_per_step=positions_per_step, max_steps=num_steps, on_step=on_step
        )


def _learn_in_epochs(
    trainer: OnlineTrainer, texts: Iterator[RecordedText], *, num_positions: int, num_steps: int,
    on_step: Callable[[UpdateReport], None],
) -> None:
    """Every step draws from all texts."""
    for text in texts:
        trainer.observe([text.transitions(0, with_prompt=trainer.config.learn_from_prompts)])
        trainer.replay.end(0)
    for _ in range(num_steps):
        on_step(trainer.step())
    trainer.publish_now()


def _cell(
    arm: AblationArm, seed: int, trainer: _WatchedTrainer, held_out: list[HeldOut], blocks: list[Block] | None,
    num_cut: int,
) -> Cell:
    num_sampled, num_rewarded, num_on_policy = trainer.sampled.tolist()
    return Cell(
        arm=arm.name, seed=seed, num_steps=trainer.num_steps, num_transitions=held_out[-1].transitions,
        train_s=trainer.train_s, num_rollbacks=trainer.num_rollbacks, num_skipped=trainer.num_skipped,
        num_drifts=trainer.trend.num_drifts, num_sampled=num_sampled, num_rewarded=num_rewarded,
        num_on_policy=num_on_policy, num_cut_prompts=num_cut, held_out=held_out, blocks=blocks,
        machine=describe_machine(trainer.sampled.device), command=shlex.join(["dvi", *sys.argv[1:]]),
    )
