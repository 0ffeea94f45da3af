"""Companions: what each kind thinks of a draft, and that it keeps up with drafters that learn and rows that move."""
# B rows, D hidden, V vocabulary.

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.companion_model import MAX_RAGGED, ModelCompanion, load_companion
from dvi.draft.companions import (
    EMA_MOMENTUM,
    Companion,
    EmaCompanion,
    ExitCompanion,
    OlderCompanion,
    SelfCompanion,
    agreement,
    token_ratio,
)
from dvi.draft.length_policies import FixedLength, RoundOutcome
from dvi.model.split import SplitModel
from dvi.records import SamplingParams
from dvi.settings import COMPANIONS
from tests.support.drafter_doubles import MemoryDrafter, broken_drafter, random_drafter, randomise, small_config
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
STORIES = "tests/stories260k"


@dataclass
class TextRow:
    request_id: int
    text_ids: list[int] = field(default_factory=list)


@functools.cache
def split_of(split_layer: int = 1) -> SplitModel:
    return SplitModel(
        tiny_model("llama", num_layers=2, hidden_size=16, vocab_size=VOCAB_SIZE, dtype=torch.float64, seed=1),
        split_layer=split_layer,
    )


def states(*, seed: int = 0, num_rows: int = 3) -> tuple[Tensor, Tensor]:
    """h_k and anchors, [B, D] each."""
    generator = torch.Generator().manual_seed(seed)
    hidden, anchor = torch.randn(2, num_rows, 16, generator=generator, dtype=torch.float64)
    return hidden, anchor


def opinion(companion: Companion, drafter, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of the drafter and of the companion at depths 0 and 1, stacked; as in a round."""
    hidden_BD, anchor_BD = states(seed=seed)
    companion.follow(drafter, [TextRow(i, [1, 2]) for i in range(len(hidden_BD))])
    both = [], []
    state, own_state = companion.begin(anchor_BD), drafter.begin(anchor_BD)
    for depth in range(2):
        draft_BV = drafter.step(hidden_BD, own_state, depth)
        token_B = torch.zeros(len(hidden_BD), dtype=torch.int64)
        both[0].append(draft_BV)
        both[1].append(companion.step(token_B, hidden_BD, draft_BV, state, depth))
    return torch.stack(both[0]), torch.stack(both[1])


# --- the drafter itself, and the second exit --------------------------------------------------------------------------


def test_the_drafters_own_confidence_is_its_agreement_with_its_first_choice():
    """S is the largest probability; A is 1 for the first choice and nothing for any other token."""
    logits_BV = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    companion_BV = SelfCompanion().step(torch.zeros(5, dtype=torch.int64), logits_BV, logits_BV, None, 0)
    torch.testing.assert_close(agreement(logits_BV, companion_BV), logits_BV.softmax(-1).amax(-1))
    first_B = logits_BV.argmax(-1)
    assert token_ratio(logits_BV, companion_BV, first_B).tolist() == [1.0] * 5
    assert token_ratio(logits_BV, companion_BV, (first_B + 1) % 9).amax() < 1e-6


def test_confidence_needs_no_more_than_half_precision():
    """Catches a logit that overflows, whose softmax would be NaN and its agreement 0."""
    logits_BV = torch.tensor([[0.0, 2.0]], dtype=torch.float16)
    companion_BV = SelfCompanion().step(torch.zeros(1, dtype=torch.int64), logits_BV, logits_BV, None, 0)
    assert agreement(logits_BV, companion_BV).item() == pytest.approx(logits_BV.float().softmax(-1).amax().item())


@pytest.mark.parametrize("draft_vocab_size", [0, 24])
def test_the_second_exit_is_the_models_own_norm_and_head_on_the_shallow_state(draft_vocab_size):
    """Catches the drafter's trained norm or corrected head used in their place, and the full vocabulary."""
    split = split_of()
    drafter = random_drafter(split, seed=1, draft_vocab_size=draft_vocab_size)
    _, exit_TBV = opinion(ExitCompanion(split.final_norm), drafter)
    expected_BV = split.head(split.final_norm(states()[0]))[:, : draft_vocab_size or None]
    torch.testing.assert_close(exit_TBV[0], expected_BV)
    torch.testing.assert_close(exit_TBV[1], expected_BV)


# --- what the drafter has been ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OlderCompanion, EmaCompanion])
def test_before_any_publish_the_past_is_the_drafter(kind):
    """Catches an untrained, unpublished or random companion at the start."""
    drafter = random_drafter(split_of(), seed=1)
    ours, theirs = opinion(kind(), drafter)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("drafter_kind", ["anchored", "recurrent", "lora_head"])
def test_the_older_companion_is_the_version_before(drafter_kind):
    """Over three versions. Catches one that shares the drafter's buffers, which publishes rewrite in place, and one
    that stays two versions behind."""
    drafter, companion = random_drafter(split_of(), drafter_kind, seed=1), OlderCompanion()
    before, _ = opinion(companion, drafter)
    for seed in (2, 3):
        randomise(drafter, seed=seed)
        now, theirs = opinion(companion, drafter)
        assert torch.equal(theirs, before) and not torch.equal(now, before)
        assert torch.equal(opinion(companion, drafter)[1], before)  # a second round of the same version
        before = now


def test_the_average_moves_by_its_momentum():
    """By hand over two publishes. Catches momentum the wrong way round, and buffers that serve the old average."""
    drafter, companion = random_drafter(split_of(), "lora_head", seed=1), EmaCompanion()
    opinion(companion, drafter)
    averages = {name: value.clone() for name, value in drafter.named_parameters()}
    for seed in (2, 3):
        randomise(drafter, seed=seed)
        _, theirs = opinion(companion, drafter)
        for name, value in drafter.named_parameters():
            averages[name] = EMA_MOMENTUM * averages[name] + (1 - EMA_MOMENTUM) * value
    reference = random_drafter(split_of(), "lora_head", seed=1)
    reference.load_state_dict(averages)
    reference.publish(reference, 9)
    expected, _ = opinion(SelfCompanion(), reference)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)  # parameters are float32


def test_an_average_comes_back_from_a_version_that_was_not_finite():
    """Catches NaN for ever after one publish that the learner has long taken back."""
    drafter, companion = random_drafter(split_of(), seed=1), EmaCompanion()
    good = {name: value.clone() for name, value in drafter.state_dict().items()}
    opinion(companion, drafter)
    for state in (broken_drafter(split_of(), float("nan")).state_dict(), good):
        drafter.load_state_dict(state)
        drafter.publish(drafter, drafter.version + 1)
        _, theirs = opinion(companion, drafter)
    assert theirs.isfinite().all()


@pytest.mark.parametrize("kind", [OlderCompanion, EmaCompanion])
def test_the_past_survives_a_head_that_is_trimmed(kind):
    """Catches logits over the old vocabulary, which nothing of the new one fits; and the version after it."""
    drafter, companion = random_drafter(split_of(), seed=1), kind()
    opinion(companion, drafter)
    drafter.draft_head.trim(torch.arange(0, VOCAB_SIZE, 2))
    randomise(drafter, seed=2)
    trimmed, theirs = opinion(companion, drafter)
    assert torch.equal(trimmed, theirs)
    randomise(drafter, seed=3)
    now, theirs = opinion(companion, drafter)
    assert theirs.shape == now.shape and not torch.equal(now, theirs)
    if kind is OlderCompanion:
        assert torch.equal(theirs, trimmed)


@pytest.mark.parametrize("kind", [OlderCompanion, EmaCompanion])
def test_another_drafter_has_another_past(kind):
    """Catches a companion that goes on with the first drafter it met; versions of two drafters are often equal."""
    companion = kind()
    for seed in (1, 2):
        drafter = random_drafter(split_of(), seed=seed)
        ours, theirs = opinion(companion, drafter)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [OlderCompanion, EmaCompanion])
def test_the_past_shares_the_frozen_head(kind):
    """Catches a second copy of the model's largest matrix."""
    drafter, companion = random_drafter(split_of(), seed=1), kind()
    companion.follow(drafter, [])
    assert companion._past.draft_head._frozen[0] is drafter.draft_head._frozen[0]
    assert companion._past.draft_head.served is not drafter.draft_head.served


# --- a model of its own -----------------------------------------------------------------------------------------------


@functools.cache
def companion_split(arch: str = "llama") -> SplitModel:
    model = tiny_model(arch, num_layers=2, hidden_size=16, vocab_size=VOCAB_SIZE, dtype=torch.float64, seed=7)
    return SplitModel(model, split_layer=0)


def plain_logits(split: SplitModel, text_ids: list[int]) -> Tensor:
    """[V], the model's own for the token after the text."""
    with torch.no_grad():
        return split.model(torch.tensor([text_ids])).logits[0, -1]


def run_round(
    companion: ModelCompanion, drafter, rows: list[TextRow], rng: random.Random, *, num_draft_tokens: int,
    split: SplitModel,
) -> None:
    """One round with random drafts, checked at every depth against the plain forward; then commits some of them."""
    companion.follow(drafter, rows)
    drafts = [[rng.randrange(VOCAB_SIZE) for _ in range(num_draft_tokens)] for _ in rows]
    if num_draft_tokens:
        state = companion.begin(torch.zeros(len(rows), 16))
        num_steps = rng.randint(1, num_draft_tokens)  # a round may end early
        for depth in range(num_steps):
            fed = [row.text_ids[-1] if depth == 0 else d[depth - 1] for row, d in zip(rows, drafts, strict=True)]
            token_B = torch.tensor(fed)
            logits_BV = companion.step(token_B, None, None, state, depth)
            token_B.zero_()  # the first is a buffer of the batch's, which the round rewrites
            for logits_V, row, draft in zip(logits_BV, rows, drafts, strict=True):
                expected_V = plain_logits(split, row.text_ids + draft[:depth])
                torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=1e-4)  # rotary angles are float32
    else:
        num_steps = 0
    for row, draft in zip(rows, drafts, strict=True):
        row.text_ids = [*row.text_ids, *draft[: rng.randint(0, num_steps)], rng.randrange(VOCAB_SIZE)]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_a_model_gives_its_plain_forwards_logits_on_ragged_histories(arch):
    """Rows of unequal length that accept unequally, join, leave and change places; rounds without drafts. Catches
    rejected drafts that stay cached, tokens that were never fed, rows that mix, and another one's row taken over."""
    split, rng = companion_split(arch), random.Random(0)
    drafter = random_drafter(split_of(), seed=1)
    companion, ids = ModelCompanion(split), itertools.count()

    def new_row() -> TextRow:
        return TextRow(next(ids), [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))])

    rows = [new_row() for _ in range(3)]
    for _ in range(40):
        run_round(companion, drafter, rows, rng, num_draft_tokens=rng.choice((0, 1, 4)), split=split)
        if rng.random() < 0.3 and len(rows) > 1:
            rows.pop(rng.randrange(len(rows)))
        if rng.random() < 0.3:
            rows.insert(rng.randrange(len(rows) + 1), new_row())
        if rng.random() < 0.3:
            rng.shuffle(rows)


def test_two_batches_may_take_turns():
    """Two lanes of an engine share one policy. Catches rows of one that push out those of the other."""
    split, rng = companion_split(), random.Random(1)
    drafter, companion = random_drafter(split_of(), seed=1), ModelCompanion(split)
    lanes = [[TextRow(10 * lane + i, [3, 4, 5 + i]) for i in range(2)] for lane in range(2)]
    for _ in range(6):
        for rows in lanes:
            run_round(companion, drafter, rows, rng, num_draft_tokens=3, split=split)
    assert len(companion._batches) == 2


def test_a_round_costs_a_model_one_pass_beside_its_steps(monkeypatch):
    """Catches texts read anew in every round: after the first, only what the round left out may be read."""
    split, rng = companion_split(), random.Random(2)
    drafter, companion = random_drafter(split_of(), seed=1), ModelCompanion(split)
    rows = [TextRow(i, [rng.randrange(VOCAB_SIZE) for _ in range(30)]) for i in range(3)]
    run_round(companion, drafter, rows, rng, num_draft_tokens=4, split=split)
    widths, deep = [], SplitModel.deep

    def watched(self, hidden_BQD, *args):
        widths.append(hidden_BQD.shape[1])
        return deep(self, hidden_BQD, *args)

    monkeypatch.setattr(SplitModel, "deep", watched)
    for _ in range(10):
        widths.clear()
        run_round(companion, drafter, rows, rng, num_draft_tokens=4, split=split)
        assert len(widths) <= 5 and max(widths) <= 2 < MAX_RAGGED


def test_a_request_of_the_same_number_with_another_text_is_read_anew():
    """Catches logits after somebody else's text: numbers begin again with every engine."""
    split = companion_split()
    drafter, companion = random_drafter(split_of(), seed=1), ModelCompanion(split)
    rng = random.Random(3)
    for text in ([1, 2, 3, 4], [9, 8, 7, 6, 5], [9, 8]):
        run_round(companion, drafter, [TextRow(0, text)], rng, num_draft_tokens=2, split=split)


def test_rounds_that_another_policy_decoded_are_read():
    """An engine may change policies between rounds. Catches rejected drafts taken for accepted because the text has
    grown by as much."""
    split, rng = companion_split(), random.Random(6)
    drafter, companion = random_drafter(split_of(), seed=1), ModelCompanion(split)
    rows = [TextRow(i, [3, 4, 5]) for i in range(3)]
    for _ in range(8):
        run_round(companion, drafter, rows, rng, num_draft_tokens=4, split=split)
        for row in rows:
            row.text_ids = row.text_ids + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 6))]


def test_rows_that_have_ended_make_room():
    """Catches a cache that grows with every request."""
    split, rng = companion_split(), random.Random(4)
    drafter, companion = random_drafter(split_of(), seed=1), ModelCompanion(split)
    old = TextRow(0, [1, 2])
    for number in range(1, 30):
        run_round(companion, drafter, [TextRow(number, [number, 3]), old], rng, num_draft_tokens=2, split=split)
    assert companion._batches[0]._cache.rows <= 4


def test_plain_rounds_cost_a_model_nothing(monkeypatch):
    """Catches passes where nothing is drafted: plain decoding would be slower for having a companion."""
    split, rng = companion_split(), random.Random(5)
    companion, rows = ModelCompanion(split), [TextRow(0, [1, 2, 3])]
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "deep", lambda *_: pytest.fail("a pass"))
        for _ in range(9):
            run_round(companion, None, rows, rng, num_draft_tokens=0, split=split)
    run_round(companion, random_drafter(split_of(), seed=1), rows, rng, num_draft_tokens=2, split=split)


def test_a_model_tells_of_the_drafters_vocabulary_alone():
    """Catches logits over all tokens beside those of a trimmed head."""
    companion = ModelCompanion(companion_split())
    drafter = random_drafter(split_of(), seed=1, draft_vocab_size=24)
    ours, theirs = opinion(companion, drafter)
    assert theirs.shape == ours.shape == (2, 3, 24)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> SelfSpeculator:
    return SelfSpeculator.from_pretrained(STORIES, companion="model", companion_model=STORIES, device="cpu")


def test_a_model_with_the_same_tokenizer_is_taken(stories):
    """End to end, greedy: the model itself as its own companion draws full agreement wherever the drafter is right."""
    policy = Recording(3, stories.new_companion())
    token_ids = [
        result.token_ids
        for rule in (policy, FixedLength(0))
        for result in stories.generate("Once upon a time", SamplingParams(max_new_tokens=24), policy=rule)
    ]
    assert token_ids[0] == token_ids[1]
    assert policy.companion_scores and all(0 <= s <= 1 and 0 <= a <= 1 for s, a in policy.companion_scores)


def test_another_vocabulary_is_refused(stories):
    """Catches logits gathered at ids that mean other tokens."""
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, got 512"):
        load_companion(STORIES, split=split_of(), tokenizer=None, max_positions=64)


def test_a_shorter_context_is_refused(stories):
    """Catches a companion that fails in the middle of a long text."""
    with pytest.raises(ValueError, match="context of 100000 positions, got 512"):
        load_companion(STORIES, split=stories.split, tokenizer=None, max_positions=100_000)


def test_the_same_size_of_vocabulary_with_other_tokens_is_refused(stories, tmp_path):
    """Catches the likeliest slip: another family's model whose vocabulary happens to be as large."""
    folder = tmp_path / "other"
    shutil.copytree(STORIES, folder)
    tokenizer_file = folder / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    vocab = content["model"]["vocab"]
    vocab["q"], vocab["x"] = vocab["x"], vocab["q"]  # in none of the texts that are tried
    tokenizer_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must have the model's tokenizer"):
        load_companion(folder, split=stories.split, tokenizer=stories.tokenizer, max_positions=512)


def test_a_companion_model_and_its_kind_go_together():
    """Catches a setting that is silently ignored, in either direction."""
    with pytest.raises(ValueError, match="needs companion_model"):
        SelfSpeculator(split_of().model, None, drafter=small_config(), companion="model")
    with pytest.raises(ValueError, match="goes with companion 'model', got 'self'"):
        SelfSpeculator(split_of().model, None, drafter=small_config(), companion_model=STORIES)
    with pytest.raises(ValueError, match="companion must be one of self, exit, older, ema, model, got 'elder'"):
        SelfSpeculator(split_of().model, None, drafter=small_config(), companion="elder")
    with pytest.raises(ValueError, match="needs companion_model"):
        SelfSpeculator(split_of().model, None, drafter=small_config()).new_companion("model")


# --- in a round -------------------------------------------------------------------------------------------------------


class Recording(FixedLength):
    """A fixed length that writes down (S, A) of all that was drafted."""

    def __init__(self, num_draft_tokens: int, companion: Companion) -> None:
        super().__init__(num_draft_tokens)
        self.companion = companion
        self.companion_scores: list[tuple[float, float]] = []

    def observe(self, outcome: RoundOutcome) -> None:
        self.companion_scores += [score for row in outcome.companion_scores for score in row]


@pytest.mark.parametrize("drafter", ["random", "trimmed", "memory", "nan"])
@pytest.mark.parametrize("name", COMPANIONS)
def test_every_companion_goes_with_every_drafter(name, drafter, stories):
    """Catches shapes, dtypes and NaN: S and A are numbers in 0..1 whatever drafts, greedy and sampled."""
    split = stories.split
    made = {
        "random": lambda: random_drafter(split, seed=1),
        "trimmed": lambda: random_drafter(split, seed=1, draft_vocab_size=100),
        "memory": lambda: MemoryDrafter(split, [], constant=7),
        "nan": lambda: broken_drafter(split, float("nan")),
    }
    previous, stories.drafter = stories.drafter, made[drafter]()
    try:
        for temperature in (0.0, 1.0):
            policy = Recording(3, stories.new_companion(name))
            params = SamplingParams(max_new_tokens=8, temperature=temperature, ignore_eos=True)
            results = stories.generate(
                ["Once upon", "The big dog"], params, batch_size=2, policy=policy, keep_transitions=False
            )
            assert len(list(results)) == 2
            assert policy.companion_scores and all(0 <= s <= 1 and 0 <= a <= 1 for s, a in policy.companion_scores)
    finally:
        stories.drafter = previous
