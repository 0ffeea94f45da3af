"""The round and the batch: nothing computed twice, nobody disturbed, experience true to what was served.

Most tests run in float64, where batched and single-row passes agree to 1e-12 and no argmax hangs on it.
"""
# U = T + 1 verified positions.

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import nn

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import ConfidenceStop, FixedLength, LengthPolicy
from dvi.records import SamplingParams, Transitions
from tests.support.drafter_doubles import (
    MemoryDrafter,
    RaggedLength,
    Recorder,
    Swapper,
    plain_text,
    random_drafter,
    small_config,
)
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
PROMPTS = [[5, 9, 33], [7], [1, 2, 3, 4, 50, 6, 7], [60, 60], [11, 12, 13, 14], [3], [40, 2, 21], [8, 30, 9, 31, 10]]


@functools.cache
def speculator_of(path: str = "direct") -> SelfSpeculator:
    model = tiny_model("llama", num_layers=3, hidden_size=16, vocab_size=VOCAB_SIZE, seed=3)
    return SelfSpeculator(model, None, split_layer=1, drafter=small_config(), path=path)


def with_drafter(drafter: object, path: str = "direct") -> SelfSpeculator:
    speculator = speculator_of(path)
    speculator.drafter = drafter
    return speculator


def greedy(max_new_tokens: int = 16, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **{"ignore_eos": True, **options})


def knowing(prompts: list[list[int]], params: SamplingParams, *, path: str = "direct", **options) -> MemoryDrafter:
    """A drafter that knows the texts that follow these prompts."""
    speculator = speculator_of(path)
    return MemoryDrafter(speculator.split, [plain_text(speculator, p, params)[1] for p in prompts], **options)


def batch_of(speculator: SelfSpeculator, policy: LengthPolicy, *, max_rows: int) -> DecodingBatch:
    return DecodingBatch(
        speculator.split, speculator.drafter, max_rows=max_rows, capacity=0, policy=policy, rule=StrictRule(),
        wants_transitions=True,
    )  # fmt: skip


def sequence_of(index: int, prompt: list[int], params: SamplingParams) -> Sequence:
    return Sequence(index, prompt, params, lambda _token: None, params.max_new_tokens)


# Nothing twice


@pytest.mark.parametrize("wrong_depths", [(), (2,)])
def test_every_layer_runs_once_per_drafted_or_committed_position(wrong_depths):
    """Catches a second shallow pass for verification, a deep pass per token, a second pass for learning: work beyond
    prefill + one last token per round + the drafts. Without rejections that is once per committed position."""
    params = greedy(20)
    drafter = knowing(PROMPTS[:1], greedy(40), path="views", wrong_depths=wrong_depths)
    speculator = with_drafter(drafter, "views")
    positions, calls = Counter(), Counter()

    def count(_module: nn.Module, args: tuple, *, layer: int) -> None:
        positions[layer] += args[0].shape[0] * args[0].shape[1]
        calls[layer] += 1

    layers = speculator.model.model.layers
    hooks = [
        layer.register_forward_pre_hook(functools.partial(count, layer=index)) for index, layer in enumerate(layers)
    ]
    (result,) = speculator.generate(PROMPTS[:1], params, policy=FixedLength(4), learner=Recorder(drafter))
    for hook in hooks:
        hook.remove()
    stats = result.stats
    num_prefilled = len(PROMPTS[0]) - 1
    executed = num_prefilled + stats.num_rounds + stats.num_drafted
    assert positions == {layer: executed for layer in range(3)}
    assert calls == {0: 1 + stats.num_rounds + stats.num_drafted, 1: 1 + stats.num_rounds, 2: 1 + stats.num_rounds}
    if wrong_depths:
        assert stats.num_drafted > stats.num_accepted > 0
    else:
        assert stats.num_accepted == stats.num_drafted > 0
        assert executed == num_prefilled + stats.committed_tokens


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


# Experience


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


# Length rules


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_confidence_stop_as_a_mask_gives_what_ending_early_gives(temperature):
    """With an unsure row beside them the others' stop is a mask; alone the loop ends early. Outputs must agree."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=6))
    params = [greedy(12, temperature=temperature, seed=i) for i in range(4)]

    def run(prompts: list, params: list) -> dict[int, tuple]:
        policy = ConfidenceStop(6, threshold=0.5)
        results = speculator.generate(prompts, params, batch_size=len(prompts), policy=policy)
        return {r.index: (r.token_ids, r.stats.num_drafted, r.stats.accepted_per_depth) for r in results}

    together = run(PROMPTS[:4], params)
    alone = [run([p], [q])[0] for p, q in zip(PROMPTS[:4], params, strict=True)]
    assert [together[i] for i in range(4)] == alone
    assert len({num_drafted for _, num_drafted, _ in alone}) > 1


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
