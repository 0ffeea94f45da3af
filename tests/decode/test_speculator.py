"""SelfSpeculator as its users call it: text in, text out, on a real tiny model."""

from __future__ import annotations

import pytest

from dvi import SamplingParams, SelfSpeculator
from dvi.decode.verification import MarginRule
from dvi.draft.catalogue import GOODPUT_BUCKETS
from dvi.model.starting_drafter import default_split_layer
from tests.support.paths import STORIES
from trainers import OnlineTrainer

PROMPTS = ["Once upon a time", "Lily and Tom", "The dog was"]


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(STORIES, split_layer=1, policy="fixed", num_draft_tokens=3)


def answers(
    speculator: SelfSpeculator, prompts: list, params: SamplingParams, **options: object
) -> dict[int, list[int]]:
    return {r.index: r.token_ids for r in speculator.generate(prompts, params, **options)}


@pytest.mark.parametrize("stop_strings", [(), (" the",)])
def test_streamed_pieces_are_the_text_that_generate_returns(speculator, stop_strings):
    """Catches a piece lost or printed twice at a round's border, and a stop string that shows in the stream."""
    params = SamplingParams(max_new_tokens=40, stop_strings=stop_strings)
    (result,) = speculator.generate(PROMPTS[0], params)
    assert "".join(speculator.stream(PROMPTS[0], params)) == result.text
    assert not any(stop in result.text for stop in stop_strings)


def test_accept_lengths_count_every_token_once_and_every_round(speculator):
    """Catches tokens beyond a stop that are counted, and rounds that are not."""
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    for result in speculator.generate(PROMPTS, params, batch_size=2):
        assert sum(result.accept_lengths) == len(result.token_ids) == 10
        assert len(result.accept_lengths) == result.stats.num_rounds
        assert min(result.accept_lengths) >= 1


def test_draws_depend_on_seed_and_prompt_and_not_on_the_place_in_a_list(speculator):
    """Catches draws by row, batch mate or place, and prompts that share their draws, which a learner must not see."""
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    first, second = (answers(speculator, [prompt], params)[0] for prompt in PROMPTS[:2])
    for batch_size in (1, 3):
        assert answers(speculator, PROMPTS[1::-1], params, batch_size=batch_size) == {0: second, 1: first}
    assert "".join(speculator.stream(PROMPTS[0], params)) == "".join(speculator.stream(PROMPTS[0], params))
    sequences = [speculator.new_sequence(speculator.encode(prompt), params)[0] for prompt in PROMPTS[:2]]
    assert len({sequence.params.seed for sequence in sequences}) == 2


def test_a_prompt_that_comes_again_is_answered_anew_and_the_same_in_any_batch(speculator):
    """Catches samples of one prompt that are all the same, and a sequence of them that follows the batch."""
    params = SamplingParams(max_new_tokens=12, temperature=2.0, seed=5)
    together = answers(speculator, [PROMPTS[0]] * 3, params, batch_size=3)
    assert answers(speculator, [PROMPTS[0]] * 3, params, batch_size=1) == together
    assert len({tuple(ids) for ids in together.values()}) == 3
    mixed = answers(speculator, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], params)
    assert (mixed[0], mixed[2]) == (together[0], together[1])


def test_seeds_given_by_the_caller_are_those_of_his_params(speculator):
    """Catches a function of seeds that is asked by another place, or not at all."""
    params = [SamplingParams(max_new_tokens=8, temperature=1.0, seed=100 + i) for i in range(2)]
    given = speculator.generate(PROMPTS[:2], params[0], seeds=lambda place, _ids: 100 + place)
    assert {r.index: r.token_ids for r in given} == answers(speculator, PROMPTS[:2], params)


def test_the_coarse_form_teaches_the_same_experience_as_the_fine_one(speculator):
    """Catches transitions that results drop or change."""
    fine, coarse = OnlineTrainer(speculator), OnlineTrainer(speculator)
    params = SamplingParams(max_new_tokens=16)
    for _ in speculator.generate(PROMPTS, params, batch_size=1, learner=fine):
        pass
    for result in speculator.generate(PROMPTS, params, batch_size=1):
        coarse.observe(result.transitions)
        coarse.step_if_due()
    assert len(fine.replay) == len(coarse.replay) > 40
    assert fine.token_counts_V.equal(coarse.token_counts_V)


def test_a_saved_drafter_comes_back_with_its_split_layer_and_drafts_alike(speculator, tmp_path):
    """Catches an adapter that loads with other weights, at another layer or at version 0."""
    learned = SelfSpeculator.from_pretrained(STORIES, split_layer=2, policy="fixed")
    trainer = OnlineTrainer(learned)
    params = SamplingParams(max_new_tokens=48)
    for result in learned.generate(PROMPTS * 4, params, batch_size=2):
        trainer.observe(result.transitions)
    for _ in range(8):
        trainer.step()
    assert learned.drafter.version > 0
    learned.save_drafter(tmp_path / "drafter")
    loaded = SelfSpeculator.from_pretrained(STORIES, adapter=tmp_path / "drafter", policy="fixed")
    assert (loaded.split.split_layer, loaded.drafter.version) == (2, learned.drafter.version)
    counts = [
        [r.stats.accepted_per_depth for r in s.generate(PROMPTS, params, batch_size=1)] for s in (learned, loaded)
    ]
    assert counts[0] == counts[1]


def test_no_draft_tokens_is_plain_decoding(speculator):
    """Catches a limit on drafts that the goodput rule does not know."""
    plain = SelfSpeculator.from_pretrained(STORIES, num_draft_tokens=0)
    (result,) = plain.generate(PROMPTS[0], SamplingParams(max_new_tokens=10))
    assert result.stats.num_drafted == 0
    limited = SelfSpeculator.from_pretrained(STORIES, num_draft_tokens=2, policy="goodput")
    assert max(limited.choose_policy([SamplingParams()], 1).buckets) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least 1 token"),
        ([1, 512], r"in 0\.\.511"),
        ([1] * 512, "shorter than the model's context of 512"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
    ],
)
def test_a_bad_prompt_is_refused_with_value_and_bound(speculator, prompt, message):
    """Catches an index error from deep inside a forward pass."""
    with pytest.raises(ValueError, match=message):
        list(speculator.generate([prompt], SamplingParams(max_new_tokens=4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "bitwise"}, "auto, exact, fast"),
        ({"policy": "long"}, "auto, fixed, confidence, goodput"),
        ({"source": "lookups"}, "source must be one of drafter, lookup, got 'lookups'"),
        ({"source": "lookup", "policy": "companion"}, "policy 'companion' asks the drafter"),
        ({"source": "lookup", "rule": MarginRule()}, "the strict rule alone, got 'margin 0.9'"),
        ({"num_draft_tokens": 99}, rf"0\.\.{GOODPUT_BUCKETS[-1]}"),
        ({"split_layer": 5}, "split_layer must be in 0..4 for this 5-layer model, got 5"),
        ({"drafter": "medusa"}, "anchored, recurrent, lora_head"),
    ],
)
def test_a_bad_option_is_refused_with_its_choices(options, message):
    """Catches a setting that is silently ignored."""
    with pytest.raises(ValueError, match=message):
        SelfSpeculator.from_pretrained(STORIES, **options)


def test_the_default_split_is_one_layer_in_sixteen():
    """The paper's cut of 32 layers, and the embedding alone for the bundled model's 12."""
    assert [default_split_layer(n) for n in (12, 16, 32)] == [0, 1, 2]
