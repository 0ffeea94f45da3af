"""One arm asked one batch of questions: prompts made turn by turn, the clock held, tokens counted one way for all.

Knows arms and questions; knows no files and no other arm, except to say where two of them differ.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import torch

from dvi.bench.answers import AnsweredTurn, Detail, FirstDifference
from dvi.bench.questions import Conversation, Prompt, Question
from dvi.bench.records import Arm, ArmAnswer
from dvi.decode.speculator import SelfSpeculator
from dvi.hardware import wait_for
from dvi.inspect.audit import logits_in_blocks
from dvi.model.split import SplitModel
from dvi.records import RoundStats

# A prompt leaves room for the whole answer, or for this share of the context where that is less: answers are mostly
# short, and a prompt that is cut asks something else than the question.
ANSWER_SHARE = 8
COUNTS = ("num_rounds", "num_drafted", "num_accepted", "num_waived", "drafted_per_depth", "accepted_per_depth")


@dataclass
class Outcome:
    """One arm's way through one question. stats: raw counts over all turns; None for decoders that are not ours.

    error: class and message where it failed; then `turns` and `token_ids` end before that turn, `prompts` with it.
    """

    question: Question
    prompts: list[Prompt] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    turns: list[AnsweredTurn] = field(default_factory=list)
    stats: RoundStats | None = None
    error: str | None = None

    def fail(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}"

    def detail(self, arm: str, *, divergence: FirstDifference | None) -> Detail:
        counts = {name: None if self.stats is None else getattr(self.stats, name) for name in COUNTS}
        return Detail(
            arm=arm, question_id=self.question.question_id,
            prompt_tokens=[len(prompt.token_ids) for prompt in self.prompts],
            cut_tokens=[prompt.num_cut for prompt in self.prompts], token_ids=self.token_ids, **counts,
            error=self.error, divergence=divergence,
        )


class ArmTimer:
    """How every arm of a run is asked. room: prompt tokens that are kept, the last ones."""

    def __init__(self, speculator: SelfSpeculator, conversation: Conversation, *, max_new_tokens: int) -> None:
        """speculator: the model that all arms share, for its end tokens, context and device."""
        self._conversation, self._max_new_tokens = conversation, max_new_tokens
        self._eos_token_ids, self._device = speculator.eos_token_ids, speculator.split.device
        self.context = speculator.max_positions
        self.room = self.context - min(max_new_tokens, self.context // ANSWER_SHARE)

    def ask(self, arm: Arm, questions: list[Question], *, seed: int) -> list[Outcome]:
        """The arm's answers to the questions, decoded together turn by turn; those with fewer turns drop out.

        seed: of the first turn; turn i has seed + 1,000,000 i.
        """
        outcomes = [Outcome(question) for question in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [o for o in outcomes if turn < len(o.question.turns) and o.error is None]
            if not asked:
                break
            for outcome in asked:
                texts = [answered.text for answered in outcome.turns]
                prompt = self._conversation.encode(outcome.question.turns[: turn + 1], texts, room=self.room)
                outcome.prompts.append(prompt)
            try:
                prompts = [o.prompts[-1].token_ids for o in asked]
                answers, wall_time_s = timed(arm, prompts, seed=seed + 10**6 * turn, device=self._device)
            except Exception as error:  # whatever an arm raises, the other arms and questions go on
                for outcome in asked:
                    outcome.fail(error)
                continue
            for outcome, answer in zip(asked, answers, strict=True):
                self._take(outcome, answer, wall_time_s / len(asked))
        return outcomes

    def _take(self, outcome: Outcome, answer: ArmAnswer, wall_time_s: float) -> None:
        """Counts the answer as the question's next turn, or fails the question where it cannot be counted."""
        num_left = self.context - len(outcome.prompts[-1].token_ids)
        try:
            answer = count_tokens(answer, eos_token_ids=self._eos_token_ids, max_new_tokens=self._max_new_tokens)
            if len(answer.token_ids) > num_left:
                # Not trimmed: the others stopped here, and its time beyond would count against it.
                raise ValueError(f"an answer must end at the model's context of {self.context} tokens, went on past it")
        except ValueError as error:
            outcome.fail(error)
            return
        text = self._conversation.answer_text(answer.token_ids)
        outcome.turns.append(AnsweredTurn(text, len(answer.token_ids), wall_time_s, answer.accept_lengths))
        outcome.token_ids.append(answer.token_ids)
        if answer.stats is not None:
            outcome.stats = outcome.stats or RoundStats()
            outcome.stats.add(answer.stats)


def timed(arm: Arm, prompts: list[list[int]], *, seed: int, device: torch.device) -> tuple[list[ArmAnswer], float]:
    """The answers and the seconds they took together. Raises what the arm raises, and ValueError for too few."""
    wait_for(device)
    start_s = time.perf_counter()
    answers = arm.answer(prompts, seed=seed)
    wait_for(device)
    wall_time_s = time.perf_counter() - start_s
    if len(answers) != len(prompts):
        raise ValueError(f"an arm must answer each of {len(prompts)} prompts, got {len(answers)} answers")
    return answers, wall_time_s


def count_tokens(answer: ArmAnswer, *, eos_token_ids: set[int], max_new_tokens: int) -> ArmAnswer:
    """The answer through its first end token and at most max_new_tokens long, accept_lengths trimmed with it.

    Raises ValueError where accept_lengths do not account for the tokens, or there are none.
    """
    if not answer.token_ids:
        raise ValueError("an answer must hold at least 1 token, got none")
    if sum(answer.accept_lengths) != len(answer.token_ids) or min(answer.accept_lengths) < 1:
        raise ValueError(
            f"accept_lengths must be >= 1 and sum to the answer's {len(answer.token_ids)} tokens, got "
            f"{sum(answer.accept_lengths)} in {len(answer.accept_lengths)} steps"
        )
    ends = (position + 1 for position, token_id in enumerate(answer.token_ids) if token_id in eos_token_ids)
    num_left = num_tokens = min(next(ends, len(answer.token_ids)), max_new_tokens)
    lengths = []
    for length in answer.accept_lengths:
        if num_left == 0:
            break
        lengths.append(min(length, num_left))
        num_left -= lengths[-1]
    return dataclasses.replace(answer, token_ids=answer.token_ids[:num_tokens], accept_lengths=lengths)


def first_difference(split: SplitModel, plain: Outcome, other: Outcome) -> FirstDifference | None:
    """Where the other's tokens leave the plain ones; None where they do not, or where one of the two failed."""
    if plain.error is not None or other.error is not None:
        return None
    for turn, (plain_ids, other_ids) in enumerate(zip(plain.token_ids, other.token_ids, strict=True)):
        if plain_ids == other_ids:
            continue
        shortest = min(len(plain_ids), len(other_ids))
        position = next((i for i in range(shortest) if plain_ids[i] != other_ids[i]), shortest)
        shared = plain.prompts[turn].token_ids + plain_ids[:position]
        top = logits_in_blocks(split, shared, start=len(shared) - 1, width=1)[-1].topk(2).values
        plain_token, other_token = (ids[position] if position < len(ids) else None for ids in (plain_ids, other_ids))
        return FirstDifference(turn, position, plain_token, other_token, float(top[0] - top[1]))
    return None
