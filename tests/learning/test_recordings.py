"""What is recorded of a text once is what decoding it gives, states and rounds alike."""

import copy
from functools import cache

import pytest
import torch

from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.records import RoundStats, SamplingParams
from dvi.settings import LearningSettings
from tests.support.drafter_doubles import small_config
from tests.support.paths import STORIES
from trainers.jobs.warmup import learn_from_recordings
from trainers.learning.online import OnlineTrainer
from trainers.learning.recordings import decode_answers, record, replay_rounds

NUM_DRAFT_TOKENS = 3
PARAMS = SamplingParams(max_new_tokens=70)
PROMPTS = ["Once upon a time", "Tom and Lily", "The dog was", "One day a bird"]


@cache
def trained_speculator() -> SelfSpeculator:
    """A drafter that has learnt a little of its own model's stories: right at some depths, wrong at others."""
    speculator = SelfSpeculator.from_pretrained(STORIES, split_layer=1, drafter=small_config())
    trainer = OnlineTrainer(speculator, LearningSettings(lr=5e-3, schedule="kl_only", steps_per_canary=1000))
    learn_from_recordings(trainer, recordings(speculator, PROMPTS[:2]), positions_per_step=1)
    return speculator


def recordings(speculator, prompts, **options):
    ids = [speculator.encode(prompt) for prompt in prompts]
    answers = decode_answers(speculator, ids, max_new_tokens=PARAMS.max_new_tokens, **options)
    return [record(speculator.split, token_ids, prompt_len=prompt_len) for token_ids, prompt_len in answers]


def live_rounds(speculator, prompt_ids):
    """Text, and (start, accepted) of each round of live speculative decoding."""
    policy = FixedLength(NUM_DRAFT_TOKENS)
    (result,) = speculator.generate([prompt_ids], PARAMS, batch_size=1, policy=policy)
    rounds = [(t.start_position, t.num_accepted) for t in result.transitions if not t.is_prefill]
    return prompt_ids + result.token_ids, rounds


def stats_of(accepted) -> RoundStats:
    stats = RoundStats()
    for count in accepted:
        stats.count_round(num_drafted=NUM_DRAFT_TOKENS, num_accepted=count)
    return stats


@pytest.mark.parametrize("prompt", [*PROMPTS, [1]])
def test_replayed_rounds_are_those_of_live_decoding(prompt):
    """Catches a block shifted by one, the wrong anchor (none at position 0), and rounds that overlap or leave gaps."""
    speculator = trained_speculator()
    prompt_ids = speculator.encode(prompt)
    token_ids, rounds = live_rounds(speculator, prompt_ids)
    text = record(speculator.split, token_ids, prompt_len=len(prompt_ids))
    # A replayed round ends within the text; a live one near the end may have been cut or have drafted beyond it.
    whole = [accepted for start, accepted in rounds if start + NUM_DRAFT_TOKENS + 1 < len(token_ids)]
    assert len(rounds) - NUM_DRAFT_TOKENS <= len(whole) < len(rounds)
    assert 0 < sum(whole) < NUM_DRAFT_TOKENS * len(whole)
    assert replay_rounds(speculator.drafter, [text], num_draft_tokens=NUM_DRAFT_TOKENS) == stats_of(whole)


def test_rounds_of_several_texts_add_up_however_many_are_computed_at_once(monkeypatch):
    """Catches a text that goes on where the last one ended, and a seam between portions of starts."""
    speculator = trained_speculator()
    texts = recordings(speculator, PROMPTS)
    one_by_one = RoundStats()
    for text in texts:
        one_by_one.add(replay_rounds(speculator.drafter, [text], num_draft_tokens=NUM_DRAFT_TOKENS))
    monkeypatch.setattr("trainers.learning.recordings.ROUNDS_AT_ONCE", 7)
    assert replay_rounds(speculator.drafter, texts, num_draft_tokens=NUM_DRAFT_TOKENS) == one_by_one


def test_a_drafter_with_a_trimmed_vocabulary_is_judged_by_the_tokens_it_means():
    """Catches draft ids compared with token ids."""
    speculator = trained_speculator()
    (text,) = recordings(speculator, PROMPTS[:1])
    trimmed = copy.deepcopy(speculator.drafter)
    trimmed.draft_head.trim(torch.arange(speculator.split.vocab_size - 1, -1, -1))  # to every token, backwards
    expected = replay_rounds(speculator.drafter, [text], num_draft_tokens=NUM_DRAFT_TOKENS)
    assert expected.num_accepted > 0
    assert replay_rounds(trimmed, [text], num_draft_tokens=NUM_DRAFT_TOKENS) == expected


@pytest.mark.parametrize("prompt_len", [1, 5])
def test_a_replayed_round_is_anchored_to_the_position_before_it(prompt_len):
    """Catches an anchor that is the round's own position, or that is made up where there is none before."""
    speculator = trained_speculator()
    text = record(speculator.split, list(range(1, 20)), prompt_len=prompt_len)
    anchors = []

    class Watching(torch.nn.Module):
        draft_head = speculator.drafter.draft_head

        def forward(self, hidden_NTD, anchor_ND):
            anchors.extend(anchor_ND)
            return speculator.drafter(hidden_NTD, anchor_ND)

    replay_rounds(Watching(), [text], num_draft_tokens=NUM_DRAFT_TOKENS)
    nothing_D, before_SD = torch.zeros(text.target_hidden_SD.shape[1]), text.target_hidden_SD
    expected = [before_SD[start - 1] if start else nothing_D for start in range(prompt_len - 1, 18 - NUM_DRAFT_TOKENS)]
    assert torch.equal(torch.stack(anchors), torch.stack(expected))


def test_a_text_too_short_for_a_round_has_none():
    """Catches a negative range, and drafts compared with what lies beyond the text's end."""
    speculator = trained_speculator()
    for num_answered, num_rounds in ((1, 0), (NUM_DRAFT_TOKENS, 0), (NUM_DRAFT_TOKENS + 1, 1)):
        text = record(speculator.split, list(range(1, 6 + num_answered)), prompt_len=5)
        assert text.num_answered == num_answered
        stats = replay_rounds(speculator.drafter, [text], num_draft_tokens=NUM_DRAFT_TOKENS)
        assert stats.num_rounds == num_rounds


def test_recorded_states_are_those_that_decoding_shows_its_learner(monkeypatch):
    """Catches states of the wrong layer, shifted positions, and a seam between chunks of a long text."""
    monkeypatch.setattr("trainers.learning.recordings.PREFILL_CHUNK", 16)
    speculator = trained_speculator()
    prompt_ids = speculator.encode("Once upon a time there was a little girl")
    policy = FixedLength(NUM_DRAFT_TOKENS)
    (result,) = speculator.generate([prompt_ids], PARAMS, batch_size=1, policy=policy)
    text = record(speculator.split, prompt_ids + result.token_ids, prompt_len=len(prompt_ids))
    seen = 0
    for stretch in result.transitions:
        where = slice(stretch.start_position, stretch.start_position + len(stretch))
        assert text.token_ids[where] == stretch.token_ids_W[: len(text.token_ids[where])].tolist()
        count = len(text.token_ids[where])
        # Other shapes round differently: float32, five layers.
        recorded, live = ((t.hidden_WD, t.target_hidden_WD) for t in (text.transitions(0, with_prompt=True), stretch))
        for recorded_SD, live_WD in zip(recorded, live, strict=True):
            torch.testing.assert_close(recorded_SD[where], live_WD[:count], rtol=1e-4, atol=1e-4)
        seen += count
    assert len(text.token_ids) - 1 <= seen <= len(text.token_ids)


def test_a_text_as_experience_begins_with_the_anchor_of_its_answer():
    """Catches an answer whose first draft cannot be learnt, and prompts learnt from without being asked for."""
    speculator = trained_speculator()
    text = record(speculator.split, list(range(1, 21)), prompt_len=8)
    answer, whole = text.transitions(7), text.transitions(7, with_prompt=True)
    assert (answer.start_position, len(answer)) == (6, 14) and (whole.start_position, len(whole)) == (0, 20)
    assert answer.token_ids_W.tolist() == list(range(7, 21)) and answer.request_id == 7
    assert torch.equal(answer.hidden_WD, text.hidden_SD[6:])
    assert torch.equal(answer.target_hidden_WD, text.target_hidden_SD[6:])
    assert answer.num_drafted == answer.num_accepted == 0 and set(answer.draft_token_ids_W.tolist()) == {-1}
    for prompt_len in (1, 2):  # nothing before the last prompt position, and nothing left to leave out
        short = record(speculator.split, list(range(1, 21)), prompt_len=prompt_len)
        assert short.transitions(0).start_position == 0 and len(short.transitions(0)) == 20


def test_answers_are_greedy_and_in_the_order_of_their_prompts():
    """Catches answers under another's prompt when short ones finish first, and drafts that change them."""
    speculator = trained_speculator()
    prompts = [speculator.encode(prompt) for prompt in PROMPTS]
    texts = decode_answers(speculator, prompts, max_new_tokens=20, batch_size=3)
    params = SamplingParams(max_new_tokens=20)
    for prompt, (token_ids, prompt_len) in zip(prompts, texts, strict=True):
        (alone,) = speculator.generate([prompt], params, batch_size=1, policy=PLAIN)
        assert (token_ids, prompt_len) == (prompt + alone.token_ids, len(prompt))
