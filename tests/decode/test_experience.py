"""Experience is true to what was served.

Most tests run in float64, where batched and single-row passes agree to 1e-12 and no argmax hangs on it.
"""

from __future__ import annotations

import pytest
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import FixedLength, LengthPolicy
from dvi.records import SamplingParams
from tests.support.drafter_doubles import RaggedLength, Recorder, Swapper, random_drafter
from tests.support.small_speculator import PROMPTS, greedy, speculator_of, with_drafter


def served(policy: LengthPolicy, params: SamplingParams) -> tuple[SelfSpeculator, Recorder, dict[int, list[int]]]:
    """A recorder's view of all prompts served with a drafter that changes after every round; texts by request id."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=4, scale=0.1))
    recorder = Swapper(speculator.drafter)
    results = list(speculator.generate(PROMPTS, params, batch_size=3, policy=policy, learner=recorder))
    return speculator, recorder, {r.request_id: [*PROMPTS[r.index], *r.token_ids] for r in results}


@pytest.mark.parametrize("policy", [FixedLength(3), RaggedLength(4, seed=0)])
def test_transitions_are_the_served_texts_with_their_hidden_states(policy):
    """Catches shifted positions or tokens, a stretch of a rejected draft, h_k or h_L of another row or position."""
    speculator, recorder, texts = served(policy, greedy(13))
    for request_id, text in texts.items():
        stretches = [s for s in recorder.stretches if s.request_id == request_id]
        assert [s.start_position for s in stretches] == [
            sum(len(before) for before in stretches[:i]) for i in range(len(stretches))
        ]
        # The last token of a text was committed but never read by the model.
        assert torch.cat([s.token_ids_W for s in stretches]).tolist() == text[:-1]
        cache = speculator.split.make_cache(1, len(text))
        ids_1S = torch.tensor([text[:-1]])
        place = cache.place(offset=0, width=len(text) - 1)
        hidden_1SD = speculator.split.shallow(ids_1S, cache, place)
        final_1SD = speculator.split.deep(hidden_1SD, ids_1S, cache, place)
        torch.testing.assert_close(torch.cat([s.hidden_WD for s in stretches]), hidden_1SD[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            torch.cat([s.target_hidden_WD for s in stretches]), final_1SD[0], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("policy", [FixedLength(3), RaggedLength(4, seed=0)])
def test_rewards_belong_to_what_was_really_drafted(policy):
    """Catches a reward column shifted by one, a correction counted as a draft, outcomes past the first rejection."""
    _, recorder, texts = served(policy, greedy(13))
    num_rejected = 0
    for stretch in recorder.stretches:
        following = texts[stretch.request_id][stretch.start_position + 1 :]
        drafted = stretch.draft_token_ids_W.tolist()
        if stretch.is_prefill:
            assert stretch.num_drafted == 0 and set(drafted) <= {-1}
            continue
        num_outcomes = min(stretch.num_accepted + 1, stretch.num_drafted)
        for depth, token in enumerate(drafted):
            if depth < stretch.num_accepted:
                assert token == following[depth]
            elif depth < num_outcomes:
                assert token not in (-1, following[depth])
                num_rejected += 1
            else:
                assert token == -1 and stretch.draft_log_probs_W[depth] == 0
        assert len(stretch) <= stretch.num_accepted + 1
    assert num_rejected > 0


def test_transitions_carry_the_version_and_log_probs_of_the_drafter_that_drafted_them():
    """Catches a version read after the swap, a stale or early anchor, and log-probabilities of other weights."""
    # Close to the model's own head: some drafts are accepted, and the next anchor is not the round's first state.
    speculator = with_drafter(random_drafter(speculator_of().split, seed=4, scale=0.03))
    replayed, drafter = random_drafter(speculator.split, seed=4, scale=0.03), speculator.drafter
    recorder, replayer = Swapper(drafter, scale=0.01), Swapper(replayed, scale=0.01)
    list(speculator.generate(PROMPTS, greedy(13), batch_size=2, policy=FixedLength(3), learner=recorder))
    states: dict[int, dict[int, torch.Tensor]] = {}
    was_accepted: dict[int, bool] = {}
    num_after_acceptance = 0
    for transitions, live_version in zip(recorder.rounds, recorder.versions, strict=True):
        while replayed.version < live_version:
            replayer.step_if_due()
        for stretch in transitions:
            assert stretch.drafter_version == live_version
            finals = states.setdefault(stretch.request_id, {-1: torch.zeros(16, dtype=torch.float64)})
            num_outcomes = min(stretch.num_accepted + 1, stretch.num_drafted, len(stretch))
            if num_outcomes:
                anchor_ND = finals[stretch.start_position - 1][None]
                logits_NTV = replayed(stretch.hidden_WD[None, :num_outcomes], anchor_ND)
                picked = logits_NTV.log_softmax(-1)[0].gather(1, stretch.draft_token_ids_W[:num_outcomes, None])[:, 0]
                torch.testing.assert_close(stretch.draft_log_probs_W[:num_outcomes], picked, rtol=1e-4, atol=1e-4)
                num_after_acceptance += was_accepted.get(stretch.request_id, False)
            was_accepted[stretch.request_id] = stretch.num_accepted > 0
            finals |= {stretch.start_position + i: h for i, h in enumerate(stretch.target_hidden_WD)}
    assert num_after_acceptance > 5 and recorder.num_swaps > 5


def test_a_lossy_rule_stamps_its_results_and_marks_its_experience():
    """Law: what a lossy rule accepted is never trained on as if it were an honest acceptance."""

    class AcceptsAll:
        is_lossless = False

        def waives(self, draft_ids_BT: torch.Tensor, logits_BTV: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(draft_ids_BT, dtype=torch.bool)

    speculator = with_drafter(random_drafter(speculator_of().split, seed=1))
    speculator.rule = AcceptsAll()
    try:
        (result,) = speculator.generate([PROMPTS[0]], greedy(6, temperature=1.0), policy=FixedLength(2))
    finally:
        speculator.rule = StrictRule()
    assert result.level == "lossy"
    assert not any(s.is_honest for s in result.transitions if not s.is_prefill)
