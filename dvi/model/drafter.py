"""Drafters: small trainable heads over the shallow states of a frozen model.

Knows hidden states and logits; knows nothing of caches, verification or losses. Every parameter here is float32 and
none is upstream of a verifier logit. A drafter has two faces: `forward` over whole draft blocks, through its
parameters, for the learner; and `begin`/`step` inside a round, through *published* buffers that `publish` rewrites in
place between rounds. A draft is thus always made by one version, and the addresses a CUDA graph has seen never move.
"""
# B rows, N blocks, T positions of a block, D hidden, H anchor width, R rank, V draft vocabulary (trimmed or full).

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvi.model.served_weights import PackedProduct, ServedLinear, TransposedProduct, anchored_logits, served_product
from dvi.settings import DrafterSettings

MAX_DEPTH = 16
PUBLISHED_ROWS = 2048  # of the head, corrected at a time
MAX_VERSION = 2**53 - 1  # beyond it a JSON reader that takes numbers for doubles would lose the last digit
# Of a drafter's shape: beyond what any model can use, within what a machine can be asked for.
MAX_RANK, MAX_ALPHA, MAX_WIDTH, MAX_VOCAB = 4096, 1_000_000, 1 << 17, 1 << 24


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a drafter: everything needed to build it again beside the same backbone.

    kind              "anchored" (default), "recurrent" or "lora_head" (the paper's).
    lora_rank, lora_alpha  the head's low-rank correction, scaled by alpha / rank.
    anchor_hidden     hidden width of the MLP that reads the anchor; unused by lora_head.
    draft_vocab_size  0 drafts from the full vocabulary; otherwise the learner trims the head to so many tokens, where
                      the model has more, once it has seen enough traffic, see `choose_draft_tokens`.
    """

    kind: str = DrafterSettings.kind
    lora_rank: int = DrafterSettings.lora_rank
    lora_alpha: float = DrafterSettings.lora_alpha
    anchor_hidden: int = DrafterSettings.anchor_hidden
    draft_vocab_size: int = DrafterSettings.draft_vocab_size

    def __post_init__(self) -> None:
        if self.kind not in DRAFTER_KINDS:
            raise ValueError(f"drafter kind must be one of {', '.join(DRAFTER_KINDS)}, got {self.kind!r}")
        bounds = {
            "lora_rank": (1, MAX_RANK), "anchor_hidden": (1, MAX_WIDTH), "draft_vocab_size": (0, MAX_VOCAB),
            "lora_alpha": (0, MAX_ALPHA),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:  # NaN is in no range
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name} must be in {least}..{most}, got {value}; try {default}")


class Drafter(Protocol):
    """What decoding and learning ask of a drafter. Versions count publishes; 0 is the untrained drafter.

    has_learnt_lossy: what it learnt from holds tokens that only a lossy verify rule let pass.
    """

    config: DrafterConfig
    version: int
    has_learnt_lossy: bool
    draft_head: DraftHead

    def begin(self, anchor_BD: Tensor) -> object:
        """State of one round's draft, from the verifier's final hidden state at the anchor position."""

    def step(self, hidden_BD: Tensor, state: object, depth: int) -> Tensor:
        """Draft logits [B, V] at this depth, from the published buffers."""

    def forward(self, hidden_NTD: Tensor, anchor_ND: Tensor) -> Tensor:
        """Draft logits [N, T, V] of whole blocks, differentiable in the drafter's parameters."""

    def publish(self, source: nn.Module, version: int) -> None:
        """Takes over the parameters of `source` (a drafter of the same shape) and rewrites the published buffers."""


class RmsGain(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain, in float32; `unit` is the same without the gain."""

    def __init__(self, gain_D: Tensor, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(gain_D.detach().float().clone()), eps
        width = gain_D.shape[0]
        # 0-d tensors: a Python number costs a conversion at every call.
        self.register_buffer("_root_width", torch.tensor(math.sqrt(width)), persistent=False)
        self.register_buffer("_floor", torch.tensor(math.sqrt(width * eps)), persistent=False)

    def unit(self, x: Tensor) -> Tensor:
        return x * (self._root_width / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor))

    def gained(self, unit: Tensor, x: Tensor) -> Tensor:
        """The norm of x, from unit(x)."""
        return unit * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.gain


class OtherNorm(nn.Module):
    """Any other norm module as it is; `unit` is x / rms(x)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def unit(self, x: Tensor) -> Tensor:
        return x * (math.sqrt(x.shape[-1]) / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6))

    def gained(self, unit: Tensor, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def trainable_copy_of_norm(norm: nn.Module, hidden_size: int) -> RmsGain | OtherNorm:
    """A float32 trainable copy of the model's final norm; the lean RMS form where it gives the same values."""
    copied = copy.deepcopy(norm).float().requires_grad_(True)
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    # The lean form of a norm on the meta device cannot be told from others: there are no values to compare.
    if weight is None or weight.is_meta or isinstance(norm, nn.LayerNorm) or eps is None:
        return OtherNorm(copied)
    probe_ND = torch.linspace(-2.0, 3.0, 2 * hidden_size, device=weight.device).view(2, hidden_size)
    with torch.no_grad():
        expected = copied(probe_ND)
        for gain_D in (weight.float(), 1.0 + weight.float()):  # Gemma stores gain - 1
            lean = RmsGain(gain_D, eps).to(weight.device)
            if torch.allclose(lean(probe_ND), expected, rtol=1e-5, atol=1e-6):
                return lean
    return OtherNorm(copied)


class DraftHead(nn.Module):
    """softmax((W + (alpha/R) B A) x): W is the model's frozen head by reference, A and B are trained, B starts at 0.

    draft_token_ids_V maps draft ids to token ids, ascending, once the vocabulary is trimmed; None while it is full.
    """

    def __init__(
        self, head_weight: Tensor, head_bias: Tensor | None, *, rank: int, alpha: float,
        draft_token_ids_V: Tensor | None, post_head: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        width = head_weight.shape[1]
        self.register_buffer("draft_token_ids_V", None)
        # In a tuple, so that the frozen (and possibly tied) head is never a parameter, a buffer or part of a file.
        self._frozen = (head_weight.detach(), None if head_bias is None else head_bias.detach())
        self.post_head = post_head
        self.scaling = alpha / rank
        device = head_weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, width, device=device))
        self.lora_B = nn.Parameter(torch.zeros(head_weight.shape[0], rank, device=device))
        nn.init.normal_(self.lora_A, std=1.0 / math.sqrt(width))
        self.served: PackedProduct | TransposedProduct | None = None  # a learner's copy never pays for it
        if draft_token_ids_V is not None:
            self.trim(draft_token_ids_V)

    @property
    def vocab_size(self) -> int:
        return self._frozen[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The frozen head's, in which rounds multiply."""
        return self._frozen[0].dtype

    def trim(self, token_ids_V: Tensor) -> None:
        """From now on drafts only these tokens. lora_B becomes a new, shorter parameter; the old ids are gone for good.

        Raises ValueError when the head is trimmed already.
        """
        if self.draft_token_ids_V is not None:
            raise ValueError(f"the draft vocabulary is trimmed to {self.vocab_size} tokens already")
        token_ids_V = token_ids_V.sort().values
        weight, bias = self._frozen
        self._frozen = (weight[token_ids_V], None if bias is None else bias[token_ids_V])
        self.lora_B = nn.Parameter(self.lora_B.detach()[token_ids_V], requires_grad=self.lora_B.requires_grad)
        self.draft_token_ids_V = token_ids_V
        self.served = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V], float32, through the parameters."""
        weight, bias = self._frozen
        frozen = F.linear(x.to(weight.dtype), weight, bias).float()
        return self.post_head(frozen + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling)

    def frozen_logits(self, x: Tensor) -> Tensor:
        """The verifier's own logits of its final hidden states, [..., V] of the draft vocabulary alone."""
        weight, bias = self._frozen
        return self.post_head(F.linear(x, weight, bias))

    def published(self, x_BD: Tensor) -> Tensor:
        """Logits [B, V] through the published product of head and correction: one call."""
        return self.post_head(self.served(x_BD))

    def publish(self) -> None:
        weight, bias = self._frozen
        if self.served is None:
            self.served = served_product(weight, bias)
        # In pieces: what is between head and buffer is float32, and stays in the cache of a CPU.
        pieces = zip(weight.split(PUBLISHED_ROWS), self.lora_B.detach().split(PUBLISHED_ROWS), strict=True)
        for index, (weight_nD, lora_B_nR) in enumerate(pieces):
            corrected_nD = weight_nD + (lora_B_nR @ self.lora_A.detach()) * self.scaling
            self.served.write(corrected_nD, start=index * PUBLISHED_ROWS)

    @property
    def published_buffer(self) -> Tensor | None:
        """The memory that publishing rewrites, see `dvi.model.served_weights`."""
        return None if self.served is None else self.served.buffer

    def to_token_ids(self, draft_ids: Tensor) -> Tensor:
        """Token ids of draft ids."""
        return draft_ids if self.draft_token_ids_V is None else self.draft_token_ids_V.take(draft_ids)

    def to_draft_ids(self, token_ids: Tensor) -> Tensor:
        """Draft ids of token ids that the drafter can produce; of others some draft id, see `can_draft`."""
        if self.draft_token_ids_V is None:
            return token_ids
        return torch.searchsorted(self.draft_token_ids_V, token_ids).clamp_max(self.vocab_size - 1)

    def can_draft(self, token_ids: Tensor) -> Tensor:
        """bool: whether each token is in the draft vocabulary."""
        return self.to_token_ids(self.to_draft_ids(token_ids)) == token_ids

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Full-vocabulary logits [..., V_full] restricted to the draft vocabulary [..., V]."""
        return logits if self.draft_token_ids_V is None else logits[..., self.draft_token_ids_V]

    def scatter_logits(self, draft_logits: Tensor, full_vocab_size: int) -> Tensor:
        """Draft logits [..., V] laid out over the full vocabulary, -inf where the drafter cannot go."""
        if self.draft_token_ids_V is None:
            return draft_logits
        full = draft_logits.new_full((*draft_logits.shape[:-1], full_vocab_size), -math.inf)
        full[..., self.draft_token_ids_V] = draft_logits
        return full


class LoraHeadDrafter(nn.Module):
    """The paper's drafter: a LoRA-corrected head over normalised shallow states. Ignores the anchor."""

    def __init__(self, config: DrafterConfig, norm: nn.Module, draft_head: DraftHead) -> None:
        super().__init__()
        self.config = config
        self.version, self.has_learnt_lossy = 0, False
        self.norm = norm
        self.draft_head = draft_head

    def __repr__(self) -> str:
        """One line; `named_modules` tells the parts."""
        weights = sum(parameter.numel() for parameter in self.parameters())
        shape = "" if self.config.kind == "lora_head" else f"hidden {self.config.anchor_hidden}, "
        return (
            f"{type(self).__name__}(v{self.version}, {shape}rank {self.config.lora_rank}, {weights:,} weights, "
            f"drafts {self.draft_head.vocab_size:,} tokens)"
        )

    def begin(self, anchor_BD: Tensor) -> None:
        return None

    def step(self, hidden_BD: Tensor, state: None, depth: int) -> Tensor:
        return self.draft_head.published(self.norm(hidden_BD.float()))

    def forward(self, hidden_NTD: Tensor, anchor_ND: Tensor) -> Tensor:
        return self.draft_head(self.norm(hidden_NTD.float()))

    @torch.no_grad()
    def publish(self, source: nn.Module, version: int) -> None:
        if source is not self:
            self.load_state_dict(source.state_dict())
        self.draft_head.publish()
        self.version = version


class AnchoredDrafter(nn.Module):
    """x = n + W_out silu(W_hidden u(h_k) + W_anchor u(h_L(anchor)) + depth bias), then the corrected head.

    n = norm(h_k); u is RMS normalisation without gain: the final norm's gains, made for the head, differ by an order of
    magnitude between channels, and an MLP behind them learns slower (LOG.md 2026-11-22).

    The anchor, the verifier's final state at the last position it has seen, brings the context that a shallow state
    lacks. Its product is taken once per round; a draft step is one small MLP. W_out starts at zero.
    """

    def __init__(self, config: DrafterConfig, norm: nn.Module, draft_head: DraftHead) -> None:
        super().__init__()
        self.config = config
        self.version, self.has_learnt_lossy = 0, False
        self.norm = norm
        self.draft_head = draft_head
        width, hidden = draft_head.lora_A.shape[1], config.anchor_hidden
        device = draft_head.lora_A.device
        served = {"served_dtype": draft_head.dtype, "device": device}
        self.from_hidden = ServedLinear(width, hidden, **served)
        self.from_anchor = ServedLinear(width, hidden, **served)
        self.depth_bias = nn.Parameter(torch.zeros(MAX_DEPTH, hidden, device=device))
        self.to_hidden = ServedLinear(hidden, width, **served)
        nn.init.zeros_(self.to_hidden.weight)
        self._is_one_call = False

    def begin(self, anchor_BD: Tensor) -> Tensor:
        """[depth, B, H]: everything the MLP needs of the anchor, for every depth."""
        return self.from_anchor.served(self.norm.unit(anchor_BD.float())) + self.depth_bias[:, None]

    def step(self, hidden_BD: Tensor, state: Tensor, depth: int) -> Tensor:
        state_BH = state[depth]
        if self._is_one_call:
            return self.draft_head.post_head(anchored_logits(
                hidden_BD, state_BH, self.from_hidden.packed, self.to_hidden.packed, self.draft_head.served,
                self.norm.gain, self.norm.eps,
            ))
        hidden_BD = hidden_BD.float()
        unit_BD = self.norm.unit(hidden_BD)
        inner_BH = F.silu(self.from_hidden.served(unit_BD, state_BH), inplace=True)
        return self.draft_head.published(self.to_hidden.served(inner_BH, self.norm.gained(unit_BD, hidden_BD)))

    def forward(self, hidden_NTD: Tensor, anchor_ND: Tensor) -> Tensor:
        hidden_NTD = hidden_NTD.float()
        unit_NTD = self.norm.unit(hidden_NTD)
        from_anchor_N1H = self.from_anchor(self.norm.unit(anchor_ND.float()))[:, None]
        inner_NTH = self.from_hidden(unit_NTD) + from_anchor_N1H + self.depth_bias[: hidden_NTD.shape[1]]
        return self.draft_head(self.norm.gained(unit_NTD, hidden_NTD) + self.to_hidden(F.silu(inner_NTH)))

    __repr__ = LoraHeadDrafter.__repr__

    def publish(self, source: nn.Module, version: int) -> None:
        LoraHeadDrafter.publish(self, source, version)
        for linear in (self.from_hidden, self.from_anchor, self.to_hidden):
            linear.serve()
        is_packed = isinstance(self.draft_head.served, PackedProduct) and self.to_hidden.packed is not None
        widths = self.from_hidden.weight.shape
        self._is_one_call = is_packed and isinstance(self.norm, RmsGain) and not any(width % 16 for width in widths)


class RecurrentDrafter(AnchoredDrafter):
    """The anchored drafter with its own guess of h_L carried along the draft in the anchor's place after depth 0."""

    def begin(self, anchor_BD: Tensor) -> list[Tensor]:
        return [anchor_BD.float()]

    def step(self, hidden_BD: Tensor, state: list[Tensor], depth: int) -> Tensor:
        state[0] = self._advance(hidden_BD.float(), state[0], depth)
        return self.draft_head.published(state[0])

    def forward(self, hidden_NTD: Tensor, anchor_ND: Tensor) -> Tensor:
        hidden_NTD, carried_ND, states = hidden_NTD.float(), anchor_ND.float(), []
        for depth in range(hidden_NTD.shape[1]):
            carried_ND = self._advance(hidden_NTD[:, depth], carried_ND, depth)
            states.append(carried_ND)
        return self.draft_head(torch.stack(states, dim=1))

    publish = LoraHeadDrafter.publish  # what rounds and learner share reads the parameters

    def _advance(self, hidden_ND: Tensor, carried_ND: Tensor, depth: int) -> Tensor:
        unit_ND = self.norm.unit(hidden_ND)
        from_carried_NH = self.from_anchor(self.norm.unit(carried_ND)) + self.depth_bias[depth]
        inner_NH = F.silu(torch.addmm(from_carried_NH, unit_ND, self.from_hidden.weight.t()))
        return torch.addmm(self.norm.gained(unit_ND, hidden_ND), inner_NH, self.to_hidden.weight.t())


DRAFTER_KINDS: dict[str, type[nn.Module]] = {
    "anchored": AnchoredDrafter, "recurrent": RecurrentDrafter, "lora_head": LoraHeadDrafter,
}


def choose_draft_tokens(counts_V: Tensor, num_tokens: int) -> Tensor:
    """The ids that a head of so many tokens drafts: those seen most, filled up with the first ids that were not seen.

    A tokenizer's first ids are its first merges, the frequent ones: of little traffic they say more than the rest.
    counts_V: how often each token was seen, int64 or float. Returns int64 [num_tokens], in no promised order.
    """
    return counts_V.sort(descending=True, stable=True).indices[:num_tokens]


def build_drafter(split: object, config: DrafterConfig, *, draft_token_ids_V: Tensor | None = None) -> nn.Module:
    """An untrained, unpublished drafter for this split model, seeded by torch's global generator.

    draft_token_ids_V: int64 token ids of a trimmed draft vocabulary; default is the full vocabulary.
    """
    head = DraftHead(
        split.head_weight_VD, split.head_bias_V, rank=config.lora_rank, alpha=config.lora_alpha,
        draft_token_ids_V=draft_token_ids_V, post_head=split.post_head,
    )
    norm = trainable_copy_of_norm(split.final_norm, split.hidden_size)
    return DRAFTER_KINDS[config.kind](config, norm, head)
