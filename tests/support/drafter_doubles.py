"""Drafters, length rules and learners made for tests: right, wrong, constant, broken or changing, on purpose.

They keep the protocols `Drafter` and `LengthPolicy` of dvi.model.drafter and dvi.draft.length_policies, or are a
`dvi.learner.Learner`.
"""
# B rows, D hidden, V vocabulary, N remembered positions.

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import DraftContext, RoundInfo, RoundOutcome
from dvi.learner import Learner
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.records import SamplingParams, Transitions

SURE = 30.0  # a logit so far above 0 that softmax puts all but e^-30 on it, and that survives every penalty


def small_config(kind: str = "anchored", *, draft_vocab_size: int = 0) -> DrafterConfig:
    return DrafterConfig(
        kind=kind, lora_rank=4, lora_alpha=8.0, anchor_hidden=16, draft_vocab_size=draft_vocab_size
    )


@torch.no_grad()
def randomise(drafter: nn.Module, *, seed: int, scale: float = 0.3) -> nn.Module:
    """Adds noise to every parameter and publishes as the next version, as a step of some learner would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    drafter.publish(drafter, drafter.version + 1)
    return drafter


def random_drafter(
    split: SplitModel, kind: str = "anchored", *, seed: int, scale: float = 0.3, draft_vocab_size: int = 0
) -> nn.Module:
    """A real drafter with random weights: it agrees with the verifier now and then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        token_ids_V = torch.arange(draft_vocab_size) if draft_vocab_size else None
        drafter = build_drafter(
            split, small_config(kind, draft_vocab_size=draft_vocab_size), draft_token_ids_V=token_ids_V
        )
    return randomise(drafter.requires_grad_(False), seed=seed, scale=scale)


def broken_drafter(split: SplitModel, value: float) -> nn.Module:
    """A real drafter all of whose weights are `value` (NaN or infinity)."""
    drafter = random_drafter(split, seed=0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.fill_(value)
    drafter.publish(drafter, 1)
    return drafter


class MemoryDrafter:
    """Knows texts by heart: finds the remembered shallow state nearest to its input and drafts the token after it.

    wrong_depths  depths at which it drafts another token than the one it remembers.
    With nothing remembered it drafts token `constant` for ever.
    """

    def __init__(
        self, split: SplitModel, texts: list[tuple[Tensor, Tensor]], *, wrong_depths: tuple[int, ...] = (),
        constant: int = 0,
    ) -> None:
        self.config = small_config("lora_head")
        self.draft_head = build_drafter(split, self.config).draft_head
        self.version = 1
        self._states_ND = torch.cat([states for states, _ in texts]) if texts else None
        self._next_N = torch.cat([following for _, following in texts]) if texts else None
        self._vocab_size, self._wrong_depths, self._constant = split.vocab_size, wrong_depths, constant

    def begin(self, anchor_BD: Tensor) -> None:
        return None

    def step(self, hidden_BD: Tensor, state: None, depth: int) -> Tensor:
        if self._states_ND is None:
            token_B = torch.full_like(hidden_BD[:, 0], self._constant, dtype=torch.int64)
        else:
            token_B = self._next_N[torch.cdist(hidden_BD.double(), self._states_ND.double()).argmin(-1)]
        if depth in self._wrong_depths:
            token_B = (token_B + 1) % self._vocab_size
        logits_BV = torch.zeros(len(token_B), self._vocab_size, device=token_B.device)
        return logits_BV.scatter(1, token_B[:, None], SURE)


def plain_text(
    speculator: SelfSpeculator, prompt: list[int], params: SamplingParams
) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """What plain decoding of this prompt alone gives: its new tokens, and (h_k, next token) of every position."""
    result = next(iter(speculator.generate([prompt], [params], policy=PLAIN, batch_size=1)))
    states_ND = torch.cat([stretch.hidden_WD for stretch in result.transitions])
    text = torch.tensor([*prompt, *result.token_ids])
    return result.token_ids, (states_ND, text[1 : len(states_ND) + 1])


class RaggedLength:
    """Any T in 0..most for a round and any rows ending anywhere in it, at random: the least regular lawful rule."""

    companion, stops_early = None, True

    def __init__(self, most: int, *, seed: int, keep: float = 0.8) -> None:
        self.buckets = tuple(range(most + 1))
        self._generator = torch.Generator().manual_seed(seed)
        self._keep = keep

    def choose(self, info: RoundInfo) -> int:
        return int(torch.randint(len(self.buckets), (), generator=self._generator))

    def keep(self, context: DraftContext) -> Tensor:
        return torch.rand(len(context.is_open_B), generator=self._generator) < self._keep

    def observe(self, outcome: RoundOutcome) -> None:
        assert all(a <= d for a, d in zip(outcome.num_accepted, outcome.num_drafted, strict=True))


class Recorder(Learner):
    """A learner that only writes down what it is shown, with the version that was live when it was shown."""

    def __init__(self, drafter: nn.Module) -> None:
        self.drafter = drafter
        self.rounds: list[list[Transitions]] = []
        self.versions: list[int] = []

    def observe(self, transitions: list[Transitions]) -> None:
        self.rounds.append(list(transitions))
        self.versions.append(self.drafter.version)

    @property
    def stretches(self) -> list[Transitions]:
        return [stretch for transitions in self.rounds for stretch in transitions]


class Swapper(Recorder):
    """A recorder that also publishes new weights, moved at random by `scale`, after every round."""

    def __init__(self, drafter: nn.Module, *, scale: float = 0.3) -> None:
        super().__init__(drafter)
        self.num_swaps = 0
        self._scale = scale

    def step_if_due(self) -> None:
        randomise(self.drafter, seed=self.drafter.version, scale=self._scale)
        self.num_swaps += 1


class Letters:
    """A tokenizer of sorts: token i is the letter i mod 26, so that stop strings are easy to find and to cross."""

    chat_template = eos_token_id = None
    added_tokens_decoder, all_special_ids, all_special_tokens = {}, [], []

    def decode(self, ids: list[int], **_options: bool) -> str:
        return "".join(chr(ord("a") + i % 26) for i in ids)
