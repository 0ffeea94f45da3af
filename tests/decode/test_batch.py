"""The batch: rows come and go, and disturb nobody; texts, counts and experience end together.

Most tests run in float64, where batched and single-row passes agree to 1e-12 and no argmax hangs on it.
"""

from __future__ import annotations

import pytest
import torch

from dvi.decode.sequence import Sequence
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import ConfidenceStop, FixedLength
from dvi.records import Transitions
from tests.support.drafter_doubles import Recorder, plain_text, random_drafter, small_config
from tests.support.small_speculator import PROMPTS, batch_of, greedy, knowing, sequence_of, speculator_of, with_drafter
from tests.support.tiny_models import tiny_model

# Rows


@pytest.mark.parametrize("policy", [FixedLength(3), ConfidenceStop(5, threshold=0.5)])
def test_rows_that_leave_and_join_do_not_disturb_the_others(policy):
    """Catches a row that takes over the wrong cache, anchor, last token, seed or penalties when others come and go."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=1))
    params = [greedy(4 + 5 * (i % 3), repetition_penalty=1.0 + 0.2 * (i % 2)) for i in range(8)]
    alone = [plain_text(speculator, prompt, one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    results = list(speculator.generate(PROMPTS, params, batch_size=3, policy=policy))
    assert [r.index for r in results] != sorted(r.index for r in results)  # rows did end out of order
    assert {r.index: r.token_ids for r in results} == dict(enumerate(alone))


def test_a_row_removed_before_its_end_leaves_the_others_as_they_were():
    """A cancelled request: the last row moves into the gap with its cache, last token and anchor."""
    params = greedy(15)
    speculator = with_drafter(knowing(PROMPTS[:3], params, wrong_depths=(1,)))
    expected = [plain_text(speculator, p, params)[0] for p in PROMPTS[:3]]
    batch = batch_of(speculator, FixedLength(3), max_rows=3)
    sequences = [sequence_of(i, prompt, params) for i, prompt in enumerate(PROMPTS[:3])]
    for sequence in sequences:
        batch.admit(sequence)
    batch.round()
    batch.remove(sequences[0])
    assert batch.sequences == [sequences[2], sequences[1]]
    while batch.sequences:
        batch.round()
        batch.take_finished()
    assert [s.token_ids for s in sequences[1:]] == expected[1:]
    assert len(sequences[0].token_ids) < 15


@pytest.mark.parametrize("options", [{"temperature": 0.9}, {"temperature": 1.3, "top_p": 0.8, "presence_penalty": 0.5}])
def test_a_batch_of_eight_samples_what_each_row_samples_alone(options):
    """Draws are keyed by request, never by row or batch: the same tokens for a fixed drafter and fixed T."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=2))
    params = [greedy(10, seed=100 + i, **options) for i in range(8)]
    together = {r.index: r for r in speculator.generate(PROMPTS, params, batch_size=8, policy=FixedLength(3))}
    for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
        (alone,) = speculator.generate([prompt], [one], policy=FixedLength(3))
        assert together[index].token_ids == alone.token_ids
    assert sum(r.stats.num_accepted for r in together.values()) > 0
    assert len({tuple(r.token_ids) for r in together.values()}) == 8


def test_prompts_read_in_turns_join_in_any_order_with_their_own_anchors_and_tokens():
    """Catches a row that joins with another's anchor: the tokens stay right and only the drafts are worse."""
    speculator = speculator_of()
    speculator.drafter = random_drafter(speculator.split, seed=1, scale=0.02)
    prompts = [[5, 9, 33, 40, 41, 42, 43], [7, 8, 9], [1, 2, 3, 4, 50, 6], [60, 61]]

    def sequence(index: int) -> Sequence:
        return Sequence(index, prompts[index], greedy(12), lambda _token: None, max_new_tokens=12)

    def drafts(stretches: list[Transitions], index: int) -> list[float]:
        """How likely the drafter thought its drafts: the anchor is among what that depends on."""
        own = [s for s in stretches if s.request_id == index and not s.is_prefill]
        return [p for stretch in own for p in stretch.draft_log_probs_W.tolist()]

    alone, expected = [sequence(index) for index in range(4)], []
    for index, one in enumerate(alone):
        batch, stretches = batch_of(speculator, FixedLength(3), max_rows=1), []
        batch.admit(one)
        while one.finish_reason is None:
            stretches += batch.round()
        expected.append(drafts(stretches, index))

    together, stretches = [sequence(index) for index in range(4)], []
    batch = batch_of(speculator, FixedLength(3), max_rows=4)
    for one in together:
        batch.open(one)
    batch.prefill(together[0], 3)
    for index in (2, 1, 3):  # all overtake the first
        while together[index] in batch.prefilling:
            batch.prefill(together[index], 4)
        stretches += batch.round()
    batch.prefill(together[0], 4)
    while any(one.finish_reason is None for one in together):
        stretches += batch.round()
        batch.take_finished()
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for index in range(4):
        assert drafts(stretches, index) == pytest.approx(expected[index], abs=1e-5)
    assert not batch.sequences and not batch.prefilling


# Stops


def test_a_stop_inside_an_accepted_block_ends_text_counts_and_experience_there():
    """Catches tokens after the end of a text, and a length that counts what the user never saw."""
    text = plain_text(speculator_of(), PROMPTS[2], greedy(16))[0]
    at = next(i for i in range(2, 16) if text[i] not in text[:i])
    speculator = with_drafter(knowing([PROMPTS[2]], greedy(16)))
    recorder = Recorder(speculator.drafter)
    (result,) = speculator.generate(
        [PROMPTS[2]], greedy(16, stop_token_ids=(text[at],)), policy=FixedLength(8), learner=recorder
    )
    assert result.token_ids == text[: at + 1] and result.finish_reason == "stop"
    assert result.stats.new_tokens == at + 1
    # What came behind the end is nobody's token: it is in the raw count of the verdicts and nowhere else.
    assert result.stats.mean_accepted_tokens == (at + 1) / result.stats.num_rounds
    assert result.stats.num_accepted == sum(result.stats.accepted_per_depth) <= at + 1
    assert result.stats.committed_tokens == 9 * result.stats.num_rounds > at + 1
    assert result.stats.num_accepted_past_end == 9 * result.stats.num_rounds - (at + 1)
    assert sum(len(s) for s in recorder.stretches) == len(PROMPTS[2]) + at


@pytest.mark.parametrize("policy", [FixedLength(4), ConfidenceStop(4, threshold=0.0)])
def test_no_row_drafts_more_than_it_can_keep(policy):
    """Catches drafts behind the last token that a request may have: work, acceptances and speed that nobody gets."""
    lengths = [1, 2, 3, 7, 12]
    params = [greedy(length) for length in lengths]
    prompts = PROMPTS[: len(lengths)]
    speculator = with_drafter(knowing(prompts, greedy(40)))
    results = {r.index: r for r in speculator.generate(prompts, params, batch_size=3, policy=policy)}
    for index, length in enumerate(lengths):
        stats = results[index].stats
        assert results[index].token_ids == plain_text(speculator, prompts[index], params[index])[0]
        # Every draft is right, so a round takes its share of the five at a time, and the last one what is left.
        assert results[index].accept_lengths == [5] * (length // 5) + ([length % 5] if length % 5 else [])
        assert stats.num_drafted == stats.num_accepted == length - stats.num_rounds
        assert stats.committed_tokens == stats.new_tokens == length and stats.num_accepted_past_end == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_a_text_ends_at_the_models_context(arch):
    """Drafts may look past the end of the context: no position embedding exists there, and nothing may come of it."""
    limit = {"n_positions": 24} if arch == "gpt2" else {"max_position_embeddings": 24}
    model = tiny_model(arch, num_layers=2, hidden_size=16, **limit)
    speculator = SelfSpeculator(model, None, drafter=small_config())
    speculator.drafter = random_drafter(speculator.split, seed=0)
    prompts = [[5] * 19, [7, 8] * 11, [9]]
    results = list(speculator.generate(prompts, greedy(40), policy=FixedLength(6)))
    plain = list(speculator.generate(prompts, greedy(40), policy=PLAIN))
    assert {r.index: len(r.token_ids) for r in results} == {0: 5, 1: 2, 2: 23}
    assert {r.finish_reason for r in results} == {"length"}
    assert {r.index: r.token_ids for r in results} == {r.index: r.token_ids for r in plain}


def test_a_prompt_of_one_token_needs_no_prefill_and_no_anchor():
    """The first round's anchor is zeros; a stale one would be another request's state."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=5))
    recorder = Recorder(speculator.drafter)
    prompts, params = [PROMPTS[2], [7]], [greedy(3), greedy(6)]
    list(speculator.generate(prompts, params, batch_size=1, policy=FixedLength(2), learner=recorder))
    first = next(s for s in recorder.stretches if s.token_ids_W[0] == 7 and s.start_position == 0)
    logits_NTV = speculator.drafter(first.hidden_WD[None, :1], torch.zeros(1, 16))
    log_prob = logits_NTV.log_softmax(-1)[0, 0, first.draft_token_ids_W[0]]
    torch.testing.assert_close(first.draft_log_probs_W[0], log_prob, rtol=1e-4, atol=1e-4)
