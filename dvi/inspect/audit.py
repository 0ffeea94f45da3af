"""Evidence that speculative decoding changes no token: the same prompts plainly and with drafts, and every difference.

Knows a speculator and token ids; decides what rounding explains. Greedy decoding only: under sampling the law of the
tokens is preserved, not the tokens.
"""
# U verified positions, S generated positions, V vocabulary.

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from dvi.decode.batch import PREFILL_CHUNK
from dvi.decode.speculator import SelfSpeculator
from dvi.model.split import SplitModel
from dvi.progress import each
from dvi.records import RoundStats, SamplingParams

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The capital of France is",
    "def fibonacci(n):",
    "Explain in one paragraph why the sky is blue.",
    "List three kinds of fruit and a use for each.",
    "What is 17 times 23? Think step by step.",
    "Write a polite letter that declines an invitation.",
    "1, 2, 4, 8, 16,",
)


@dataclass(frozen=True)
class Divergence:
    """The first token of one prompt where another decoder left the plain one.

    arm           "speculative" or "huggingface".
    position      0-based among the new tokens. Either token is None where that text had ended.
    gap           the plain decoder's logit of its own token minus that of the other's: what rounding had to bridge;
                  None without two tokens, which nothing explains.
    top_gap       its top-1 minus its top-2 logit; equals gap when the other took the runner-up.
    noise         largest |logit difference| over this text between the two ways of computing it; see `audit`.
    is_explained  gap <= 2 noise: either logit may move by that much, towards the other. Never in exact mode.
    """

    index: int
    arm: str
    position: int
    plain_token: int | None
    other_token: int | None
    gap: float | None
    top_gap: float
    noise: float
    is_explained: bool


@dataclass
class AuditReport:
    """Counts over the audited prompts; noise is the largest that was measured (one text at least)."""

    mode: str
    dtype: str
    num_draft_tokens: int
    num_prompts: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_matches: int = 0
    num_huggingface_matches: int | None = None
    noise: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def num_explained(self) -> int:
        return sum(d.is_explained for d in self.divergences)

    @property
    def num_unexplained(self) -> int:
        return len(self.divergences) - self.num_explained


def audit(
    speculator: SelfSpeculator, prompts: Iterable[list[int]], *, max_new_tokens: int, against_huggingface: bool = False
) -> AuditReport:
    """Decodes each prompt plainly and with num_draft_tokens drafts a round, or with a lookup's, one prompt at a time.

    Noise against the speculative decoder is measured between passes of one row and of U rows, against Hugging Face's
    `generate` between one-row passes and the model's own forward; both over the tokens the two texts share.
    Raises ValueError for a lossy rule, whose output differs by design.
    """
    if not speculator.rule.is_lossless:
        raise ValueError(
            f"the audit needs the strict rule, got {speculator.rule.name}: a lossy rule's output is not the model's "
            "own; dvi bench margin measures how far it is from it"
        )
    report = AuditReport(
        mode=speculator.mode, dtype=str(speculator.split.dtype).removeprefix("torch."),
        num_draft_tokens=speculator.num_draft_tokens, num_huggingface_matches=0 if against_huggingface else None,
    )
    params = SamplingParams(max_new_tokens=max_new_tokens)
    num_drafts = speculator.max_nodes if speculator.source == "lookup" else speculator.num_draft_tokens
    split, width = speculator.split, num_drafts + 1

    def in_blocks(ids: list[int], start: int) -> Tensor:
        return logits_in_blocks(split, ids, start=start, width=width)

    def in_one_pass(ids: list[int], start: int) -> Tensor:
        return logits_in_one_pass(speculator.model, ids, start=start)

    for index, prompt in enumerate(each(prompts, "comparing", noun="prompts")):
        plain_ids, _ = _decode(speculator, prompt, params, num_draft_tokens=0)
        ids, stats = _decode(speculator, prompt, params, num_draft_tokens=speculator.num_draft_tokens)
        report.num_prompts += 1
        report.num_tokens += len(ids)
        report.num_drafted += stats.num_drafted
        report.num_accepted += stats.num_accepted
        arms = [("speculative", ids, in_blocks)]
        if against_huggingface:
            arms.append(("huggingface", _huggingface_ids(speculator, prompt, max_new_tokens), in_one_pass))
        for arm, other_ids, logits in arms:
            divergence = find_divergence(split, prompt, plain_ids, other_ids, index=index, arm=arm, other_logits=logits)
            if divergence is not None:
                is_explained = divergence.is_explained and not (report.mode == "exact" and arm == "speculative")
                report.divergences.append(dataclasses.replace(divergence, is_explained=is_explained))
            elif arm == "speculative":
                report.num_matches += 1
            else:
                report.num_huggingface_matches += 1
        if index == 0:
            _, report.noise = _noise(split, [*prompt, *plain_ids[:-1]], len(prompt) - 1, in_blocks)
    report.noise = max([report.noise, *(d.noise for d in report.divergences if d.arm == "speculative")])
    return report


def find_divergence(
    split: SplitModel, prompt: list[int], plain_ids: list[int], other_ids: list[int], *, index: int, arm: str,
    other_logits: Callable[[list[int], int], Tensor],
) -> Divergence | None:
    """The first difference of two continuations and whether noise explains it; None when they are equal."""
    if plain_ids == other_ids:
        return None
    shortest = min(len(plain_ids), len(other_ids))
    position = next((i for i in range(shortest) if plain_ids[i] != other_ids[i]), shortest)
    plain_V, noise = _noise(split, [*prompt, *plain_ids[:position]], len(prompt) - 1, other_logits)
    top = plain_V.topk(2).values
    plain_token, other_token = (ids[position] if position < len(ids) else None for ids in (plain_ids, other_ids))
    has_both = plain_token is not None and other_token is not None
    gap = float(plain_V[plain_token] - plain_V[other_token]) if has_both else None
    return Divergence(
        index=index, arm=arm, position=position, plain_token=plain_token, other_token=other_token, gap=gap,
        top_gap=float(top[0] - top[1]), noise=noise,
        is_explained=has_both and gap <= 2 * noise,
    )


def _noise(
    split: SplitModel, ids: list[int], start: int, other_logits: Callable[[list[int], int], Tensor]
) -> tuple[Tensor, float]:
    """The plain decoder's logits [V] after `ids`, and its largest difference from the other way over start.. ."""
    plain_SV = logits_in_blocks(split, ids, start=start, width=1)
    return plain_SV[-1], float((plain_SV - other_logits(ids, start)).abs().max())


@torch.no_grad()
def logits_in_blocks(split: SplitModel, ids: list[int], *, start: int, width: int) -> Tensor:
    """Verifier logits [S, V] in float64 at positions start.., the text before them prefilled, `width` to a deep pass.

    As decoding does it: one shallow step per position, one deep pass per block.
    """
    ids_1S = torch.tensor([ids], device=split.device)
    cache = split.make_cache(1, len(ids) + width)
    logits = []
    for begin, end in _blocks(len(ids), start, width):
        ids_1Q, placement = ids_1S[:, begin:end], cache.place(offset=0, width=end - begin)
        if begin < start:
            hidden_1QD = split.shallow(ids_1Q, cache, placement)
        else:
            steps = (split.shallow(ids_1S[:, i : i + 1], cache, cache.place(offset=i - begin, width=1))
                     for i in range(begin, end))  # fmt: skip
            hidden_1QD = torch.cat(list(steps), dim=1)
        final_1QD = split.deep(hidden_1QD, ids_1Q, cache, placement)
        cache.commit([end - begin])
        if begin >= start:
            logits.append(split.head(final_1QD)[0])
    return torch.cat(logits).double()


def _blocks(length: int, start: int, width: int) -> Iterable[tuple[int, int]]:
    """Prefill chunks up to start, then blocks of `width`."""
    for first, last, size in ((0, start, PREFILL_CHUNK), (start, length, width)):
        for begin in range(first, last, size):
            yield begin, min(begin + size, last)


@torch.no_grad()
def logits_in_one_pass(model: PreTrainedModel, ids: list[int], *, start: int) -> Tensor:
    """The model's own logits [S, V] in float64 at positions start.. ."""
    ids_1S = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids_1S, use_cache=False).logits[0, start:].double()


def _decode(
    speculator: SelfSpeculator, prompt: list[int], params: SamplingParams, *, num_draft_tokens: int
) -> tuple[list[int], RoundStats]:
    policy = speculator.afresh(policy="fixed", num_draft_tokens=num_draft_tokens).choose_policy([params], 1)
    result = next(speculator.generate([prompt], params, batch_size=1, policy=policy, keep_transitions=False))
    return result.token_ids, result.stats


def _huggingface_ids(speculator: SelfSpeculator, prompt: list[int], max_new_tokens: int) -> list[int]:
    """New tokens of the model's own greedy `generate`."""
    ids_1S = torch.tensor([prompt], device=speculator.split.device)
    output_1S = speculator.model.generate(
        ids_1S, attention_mask=torch.ones_like(ids_1S), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(speculator.eos_token_ids) or None, pad_token_id=min(speculator.eos_token_ids, default=0),
    )  # fmt: skip
    return output_1S[0, len(prompt) :].tolist()


def divergence_table(divergences: Iterable[Divergence]) -> Table:
    """The differences, one a row."""
    table = Table("prompt", "against", "token", "plain", "other", "gap", "top gap", "noise", "explained")
    for d in divergences:
        table.add_row(
            str(d.index), d.arm, str(d.position), str(d.plain_token), str(d.other_token),
            "-" if d.gap is None else f"{d.gap:.2e}", f"{d.top_gap:.2e}", f"{d.noise:.2e}",
            "yes" if d.is_explained else "NO",
        )  # fmt: skip
    return table
