"""What of a round is not arithmetic: its seconds by part, with everything beside decoding that a server has.

Knows the names of the calls that make a round, which no call knows of itself. A learner stores the experience, the
goodput rule follows the rounds, and the text is read as it comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dvi.decode.batch
import dvi.decode.round
from dvi.bench.part_clock import PartClock, Place
from dvi.draft.length_policies import LengthPolicy
from dvi.learner import Learner
from dvi.records import SamplingParams

if TYPE_CHECKING:
    from dvi.decode.batch import DecodingBatch
    from dvi.decode.speculator import SelfSpeculator

# Parts that are the model's and the drafter's arithmetic; all others are what a round costs besides.
DRAFTING, VERIFYING = "shallow layers and drafter", "deep layers and head"
ARITHMETIC = (DRAFTING, VERIFYING)


def seconds_by_part(
    speculator: SelfSpeculator, policy: LengthPolicy, learner: Learner, prompt_ids: list[int], params: SamplingParams
) -> dict[str, float]:
    """Seconds a round by part, over the rounds of one answer; ARITHMETIC first, then in the order of a round."""
    batch = speculator.open_batch(max_rows=1, policy=policy, wants_transitions=True)
    sequence, _ = speculator.new_sequence(prompt_ids, params)
    learner.observe(batch.admit(sequence))
    clock = PartClock()
    places = _places(speculator, batch, policy, learner)
    with clock.wrapping([*places, (sequence, "extend", "text and its end")]):
        while sequence.finish_reason is None:
            learner.observe(batch.round())
            learner.step_if_due()
    learner.end_request(sequence.request_id)
    parts = dict.fromkeys(part for _, _, part in places)
    return {part: clock.seconds[part] / sequence.stats.num_rounds for part in [*parts, "text and its end"]}


def _places(
    speculator: SelfSpeculator, batch: DecodingBatch, policy: LengthPolicy, learner: Learner
) -> list[Place]:
    passes, drafter, of_round, of_batch = speculator.passes, speculator.drafter, dvi.decode.round, dvi.decode.batch
    choice, storing, to_host = "length rule", "experience stored", "to the host and on"
    return [
        (passes, "shallow", DRAFTING), (drafter, "begin", DRAFTING), (drafter, "step", DRAFTING),
        (passes, "deep", VERIFYING), (passes, "head", VERIFYING),
        (policy, "choose", choice), (policy, "keep", choice), (policy, "observe", choice),
        (of_round, "propose", "drafts: tokens, places, stacking"),
        (of_round, "judge", "verdict"), (of_round, "judged_on_host", "verdict"),
        (of_round, "for_host", to_host), (of_round, "fetch", to_host), (of_batch, "move_on", to_host),
        (batch.cache, "commit", "commit"),
        (of_batch, "RoundExperience", "experience cut"), (batch, "_account", "accounting"),
        (learner, "observe", storing), (learner, "step_if_due", "learner asked"),
        (batch, "round", "rest of the round"),
    ]  # fmt: skip
