"""Drafts whose fate is known beforehand, at the real drafter's cost: a round's speed without the luck of a drafter.

Knows an answer, coins and the protocols `Drafter` and `LengthPolicy`; measures nothing. One row, greedy.
"""
# B rows (one), D hidden, V the drafter's vocabulary.

from __future__ import annotations

import random

from torch import Tensor, nn

from dvi.bench.arms import ArmOptions, OurArm
from dvi.bench.records import ArmAnswer
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import DraftContext, FixedLength, LengthPolicy, RoundInfo, RoundOutcome

SURE = 1e4  # above any logit, and finite in every dtype
MAX_TRIALS = 16


class Script:
    """An answer, and which of its tokens are drafted right: each with probability `acceptance`, once drawn for all.

    A token that the drafter cannot draft, its vocabulary being trimmed, is never right.
    """

    def __init__(self, drafter: nn.Module, token_ids: list[int], *, acceptance: float, seed: int = 0) -> None:
        head, draws = drafter.draft_head, random.Random(seed)
        self.token_ids, self._vocab_size = token_ids, head.vocab_size
        ids_N = head.lora_B.new_tensor(token_ids).long()
        self._draft_ids = head.to_draft_ids(ids_N).tolist()
        can_draft = head.can_draft(ids_N).tolist()
        self._is_right = [draws.random() < acceptance and can for can in can_draft]
        self.position = 0  # tokens of the answer that are committed

    def draft_id(self, depth: int) -> int:
        """Of the token to draft at this depth of the round: the answer's own, or another one."""
        place = min(self.position + depth, len(self.token_ids) - 1)  # what is drafted behind the end counts nowhere
        return (self._draft_ids[place] + (not self._is_right[place])) % self._vocab_size


class ScriptedDrafter:
    """Does all that `drafter` does at a step, and then says what the script says."""

    def __init__(self, drafter: nn.Module, script: Script) -> None:
        self._drafter, self._script = drafter, script
        self.begin = drafter.begin

    def __getattr__(self, name: str) -> object:
        return getattr(self._drafter, name)

    def step(self, hidden_BD: Tensor, state: object, depth: int) -> Tensor:
        logits_BV = self._drafter.step(hidden_BD, state, depth)
        logits_BV[:, self._script.draft_id(depth)] = SURE
        return logits_BV


class ScriptedLength(FixedLength):
    """Always T, and the script goes on with every round. rule: asked and told of every round all the same."""

    def __init__(self, script: Script, num_draft_tokens: int, *, rule: LengthPolicy | None = None) -> None:
        super().__init__(num_draft_tokens)
        self._script, self._rule = script, rule or FixedLength(num_draft_tokens)
        self.stops_early = self._rule.stops_early

    def choose(self, info: RoundInfo) -> int:
        self._rule.choose(info)
        return super().choose(info)

    def keep(self, context: DraftContext) -> Tensor:
        return self._rule.keep(context)

    def observe(self, outcome: RoundOutcome) -> None:
        self._rule.observe(outcome)
        self._script.position += outcome.num_accepted[0] + 1


class ScriptedArm:
    """Speculative decoding of one prompt, T fixed, by the script."""

    def __init__(self, speculator: SelfSpeculator, script: Script, options: ArmOptions) -> None:
        twin = speculator.afresh(drafter=ScriptedDrafter(speculator.drafter, script))
        self._script = script
        self._arm = OurArm(twin, ScriptedLength(script, options.num_draft_tokens), options)

    def answer(self, prompts: list[list[int]], *, seed: int) -> list[ArmAnswer]:
        """See `Arm.answer`; of one prompt, that of the script."""
        self._script.position = 0
        return self._arm.answer(prompts, seed=seed)


def settled_script(
    speculator: SelfSpeculator, prompt_ids: list[int], token_ids: list[int], *, acceptance: float, options: ArmOptions
) -> Script:
    """The script of the answer that scripted drafts lead to, beginning with plain decoding's, token_ids.

    The two may differ in half precision, where a pass of several positions rounds otherwise; a draft of a token that
    this verifier would not give has no acceptance but 0. The last trial's where they never come to agree.
    """
    for _ in range(MAX_TRIALS):
        script = Script(speculator.drafter, token_ids, acceptance=acceptance)
        (answer,) = ScriptedArm(speculator, script, options).answer([prompt_ids], seed=0)
        if answer.token_ids == token_ids:
            break
        token_ids = answer.token_ids
    return script
