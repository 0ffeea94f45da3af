"""Seeds: which requests draw alike, and which must not."""

from __future__ import annotations

import itertools

from dvi.seeds import SEED_SPAN, AnswerSeeds, answer_seed, prompt_seed


def test_answers_of_neighbouring_seeds_never_meet():
    """Catches seed + i, by which answer 1 under seed 7 is answer 0 under seed 8."""
    seeds = [answer_seed(seed, index) for seed, index in itertools.product(range(100), range(50))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < SEED_SPAN for seed in seeds)
    assert [answer_seed(seed, 0) for seed in range(3)] == [0, 1, 2]


def test_prompts_draw_apart_and_each_the_same_for_ever():
    """Catches prompts that share their draws, ids that run together, and a hash that differs between processes."""
    prompts = [[1], [1, 0], [0, 1], [256], [1, 2], [12]]
    assert len({prompt_seed(seed, prompt) for seed in (0, 1) for prompt in prompts}) == 12
    assert prompt_seed(7, [1, 2, 3]) == 2146775787896699672


def test_a_prompt_that_comes_again_is_the_next_answer_wherever_it_stands():
    """Catches seeds that depend on the prompts in between."""
    alone, mixed = AnswerSeeds(5), AnswerSeeds(5)
    expected = [alone(place, [4, 2]) for place in range(3)]
    assert expected == [answer_seed(5, index) for index in range(3)]
    places = [mixed(place, prompt) for place, prompt in enumerate([[9], [4, 2], [4, 2], [9], [4, 2]])]
    assert [places[1], places[2], places[4]] == expected
