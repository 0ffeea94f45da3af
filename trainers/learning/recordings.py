"""Texts with the states that the frozen model gave them, and the rounds a drafter would make of them.

Greedy output does not depend on the drafter, and h_k and h_L depend on nothing that learns. So a text is decoded once,
and any drafter can be trained on it or judged by it without running the model again. Knows split models and drafters;
knows nothing of learning.
"""
# S positions of a text, W of a stretch of it, N round starts, T drafted tokens, D hidden size.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dvi import progress
from dvi.decode.batch import PREFILL_CHUNK
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.model.split import SplitModel
from dvi.records import RoundStats, SamplingParams, Transitions

ROUNDS_AT_ONCE = 512  # round starts whose drafts are computed together: bounds the logits in memory


@dataclass(frozen=True)
class RecordedText:
    """Token ids of a prompt and its answer, and both states of every position, [S, D], of the model's dtype."""

    token_ids: list[int]
    prompt_len: int
    hidden_SD: Tensor
    target_hidden_SD: Tensor

    @property
    def num_answered(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def transitions(self, request_id: int, *, with_prompt: bool = False) -> Transitions:
        """The text as experience without drafts: from the anchor of its answer on, or from its beginning."""
        first = 0 if with_prompt else max(self.prompt_len - 2, 0)
        count = len(self.token_ids) - first
        device = self.hidden_SD.device
        return Transitions(
            request_id=request_id, start_position=first,
            token_ids_W=torch.tensor(self.token_ids[first:], device=device), hidden_WD=self.hidden_SD[first:],
            target_hidden_WD=self.target_hidden_SD[first:], num_drafted=0, num_accepted=0,
            draft_token_ids_W=torch.full((count,), -1, device=device),
            draft_log_probs_W=torch.zeros(count, device=device), drafter_version=0,
        )


@torch.no_grad()
def record(split: SplitModel, token_ids: list[int], *, prompt_len: int) -> RecordedText:
    """Runs the frozen model over a text once."""
    ids_1S = torch.tensor([token_ids], device=split.device)
    cache = split.make_cache(1, len(token_ids))
    hidden, final = [], []
    for chunk in ids_1S.split(PREFILL_CHUNK, dim=1):
        placement = cache.place(offset=0, width=chunk.shape[1])
        hidden.append(split.shallow(chunk, cache, placement))
        final.append(split.deep(hidden[-1], chunk, cache, placement))
        cache.commit([chunk.shape[1]])
    return RecordedText(token_ids, prompt_len, torch.cat(hidden, 1)[0], torch.cat(final, 1)[0])


def decode_answers(
    speculator: SelfSpeculator, prompts: list[list[int]], *, max_new_tokens: int, batch_size: int = 8,
    doing: str = "decoding answers",
) -> list[tuple[list[int], int]]:
    """(prompt and greedy answer, prompt length) of each prompt, in their order. doing: what whoever waits is told."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    texts: list = [None] * len(prompts)
    results = speculator.generate(prompts, params, batch_size=batch_size, policy=PLAIN, keep_transitions=False)
    for result in progress.each(results, doing, noun="answers", total=len(prompts)):
        prompt = prompts[result.index]
        texts[result.index] = (prompt + result.token_ids, len(prompt))
    return texts


@torch.no_grad()
def replay_rounds(drafter: nn.Module, texts: Iterable[RecordedText], *, num_draft_tokens: int) -> RoundStats:
    """The rounds that greedy speculative decoding of these texts would make with this drafter, T drafts each.

    Rounds that would end beyond a text's end are left out: what would have been accepted there nobody knows.
    """
    stats = RoundStats()
    for text in texts:
        ids_S = torch.tensor(text.token_ids, device=text.hidden_SD.device)
        first, end = text.prompt_len - 1, len(ids_S) - 1 - num_draft_tokens
        start_N = torch.arange(first, max(first, end), device=ids_S.device)
        accepted = [
            count for chunk_N in start_N.split(ROUNDS_AT_ONCE)
            for count in _accepted_from(drafter, text, ids_S, chunk_N, num_draft_tokens)
        ]
        position = 0
        while position < len(accepted):
            stats.count_round(num_drafted=num_draft_tokens, num_accepted=accepted[position])
            position += accepted[position] + 1
    return stats


def _accepted_from(
    drafter: nn.Module, text: RecordedText, ids_S: Tensor, start_N: Tensor, num_draft_tokens: int
) -> list[int]:
    """Accepted drafts of the round that begins at each of these positions."""
    block_NT = start_N[:, None] + torch.arange(num_draft_tokens, device=start_N.device)
    # A round at the very first position has no state before it: its anchor is zeros, as in decoding.
    anchor_ND = text.target_hidden_SD[(start_N - 1).clamp_min(0)] * (start_N > 0)[:, None]
    drafted_NT = drafter.draft_head.to_token_ids(drafter(text.hidden_SD[block_NT], anchor_ND).argmax(-1))
    return (drafted_NT == ids_S[block_NT + 1]).long().cumprod(1).sum(1).tolist()
