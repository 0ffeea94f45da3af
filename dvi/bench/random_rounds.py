"""Rounds of random models at fixed shapes, timed: what costs on a device does not depend on what weights say.

Knows shapes, clocks and the device's memory; knows nothing of text, arms or reports.
"""
# B rows, U verified positions, D hidden.

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dvi.decode.round import RowState, VerifiedRound, draft_and_verify, move_on
from dvi.decode.sampling import SamplingBatch
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import FixedLength
from dvi.hardware import wait_for
from dvi.model.cuda_graph import RoundGraphs
from dvi.model.drafter import DrafterConfig
from dvi.records import SamplingParams


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model, and how much is asked of it. deep_gain: see `make_model`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    context: int
    new_tokens: int
    repeats: int
    split_layer: int = 2
    rows: tuple[int, ...] = (1, 8)
    deep_gain: float = 1e-4

    def config(self) -> LlamaConfig:
        # Random weights would meet an end token by chance, and the arms would stop at different lengths.
        return LlamaConfig(
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size, num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads, num_key_value_heads=self.num_heads, vocab_size=self.vocab_size,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made on the device. What the layers above the split add is scaled by deep_gain.

    With little of it the head says of h_k what it says of h_L: an untrained drafter is right, at the cost of any other.
    """
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers[shape.split_layer :]:
            layer.self_attn.o_proj.weight.mul_(shape.deep_gain)
            layer.mlp.down_proj.weight.mul_(shape.deep_gain)
    return model


def make_speculator(shape: Shape, device: torch.device, dtype: torch.dtype) -> SelfSpeculator:
    model = make_model(shape, device, dtype)
    return SelfSpeculator(model, None, split_layer=shape.split_layer, drafter=DrafterConfig(), policy="fixed")


def prompts_of(shape: Shape, num_rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocab_size, (num_rows, shape.context), generator=generator).tolist()


def median_s(action: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median seconds after two runs to warm up, the device waited for around each."""
    times = []
    for _ in range(repeats + 2):
        wait_for(device)
        start_s = time.perf_counter()
        action()
        wait_for(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[2:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy within the device's memory, reads and writes counted."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source), device, repeats=10)


class Rounds:
    """Rounds of B rows at a fixed context, whatever the verdicts: as graphs on a CUDA device."""

    def __init__(self, speculator: SelfSpeculator, num_rows: int, shape: Shape) -> None:
        self.split, self.drafter, self.num_rows = speculator.split, speculator.drafter, num_rows
        self.lengths = [shape.context] * num_rows
        self.cache = self.split.make_cache(num_rows, shape.context + 64)
        self.cache.set_lengths(self.lengths)
        device = self.split.device
        self.state = RowState(
            slice(0, num_rows), torch.full((num_rows,), 2**40, device=device),  # room without end
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, self.split.hidden_size, dtype=self.split.dtype, device=device),
            SamplingBatch([SamplingParams()] * num_rows, vocab_size=self.split.vocab_size, device=device), None,
        )
        self._graphs = RoundGraphs() if device.type == "cuda" else None

    def captured(self, key: object, function: Callable[[], object]) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return function() if self._graphs is None else self._graphs.run(key, function)

        return run

    def round(self, num_draft_tokens: int) -> Callable[[], VerifiedRound]:
        policy, rule = FixedLength(num_draft_tokens), StrictRule()
        return self.captured(("round", num_draft_tokens), lambda: draft_and_verify(
            self.split, self.drafter, self.cache, self.state, policy, num_draft_tokens, rule, wants_log_probs=False,
        ))  # fmt: skip

    def verify(self, width: int) -> Callable[[], Tensor]:
        """The deep pass and the head over `width` positions of each row."""
        split, cache, rows = self.split, self.cache, self.state.rows
        hidden_BUD = self.state.anchor_BD[:, None].expand(-1, width, -1).contiguous()
        ids_BU = torch.zeros(self.num_rows, width, dtype=torch.int64, device=split.device)
        return self.captured(("verify", width), lambda: split.head(
            split.deep(hidden_BUD, ids_BU, cache, cache.place(offset=0, width=width, rows=rows))
        ))  # fmt: skip

    def scripted(self, num_draft_tokens: int, acceptance: float, *, num_rounds: int) -> float:
        """Tokens per second and row of whole rounds, the host's read and commit included, drafts kept by these odds.

        Weights are random: a verdict's shape costs, not what it says.
        """
        generator = torch.Generator().manual_seed(0)
        draws = torch.rand(num_rounds, self.num_rows, num_draft_tokens, generator=generator)
        accepted = (draws < acceptance).long().cumprod(-1).sum(-1).tolist()
        run = self.round(num_draft_tokens)
        run()
        wait_for(self.split.device)
        start_s, num_tokens = time.perf_counter(), 0.0
        for counts in accepted:
            verified = run()
            move_on(self.state, verified)
            self.cache.set_lengths(self.lengths)  # every round costs the same, and this is a commit's work on the host
            num_tokens += sum(counts) / self.num_rows + 1
        return num_tokens / (time.perf_counter() - start_s)
