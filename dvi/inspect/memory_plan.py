"""What a model, its drafter and its learner take on a device, before any weight is loaded.

Knows shapes and settings. The classes that will run are built on the meta device and asked for their sizes, so that the
plan cannot drift from them; only logits, which come and go, are counted by a formula.
Not covered: activations inside the layers, captured CUDA graphs, the allocator's waste, a gradient on its way to other
processes, and the second copy that paths pack on CPUs: the direct one of all weights, the native one
of the head. Untried on a GPU.
"""
# V draft vocabulary, trimmed or full.

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.records import LearnerMemory
from dvi.settings import LearningSettings, ModelSettings

# Of cards as they are sold. A card of N GB holds some N * 2^30 bytes; the plan must fit into N * 10^9, and the
# difference, 5 to 7 %, is left to what the plan does not cover.
DEVICE_GB = (24, 48, 80, 141)
OPTIMIZER_COPIES = 3  # of the learner's parameters, float32: their gradient, AdamW's two moments
# Bytes alive at once, in float32 tensors of the logits' size, at the worst moment of: a round that samples with
# penalties and filters (a greedy one has 2), an optimizer step of the preset with the most terms (kl_rl), a canary.
# Counted tensor by tensor in float32 and bfloat16, torch 2.13, and rounded up.
ROUND_LOGITS, STEP_LOGITS, CANARY_LOGITS = 15, 10, 5


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the parts. head: also counted in `all` as part of the embedding where the two are tied.

    drafter          what is trained, and what the processes of a data parallel run exchange at every update.
    drafter_trimmed  the same once the head is trimmed to drafter.draft_vocab_size tokens; else equal to drafter.
    """

    shallow: int
    deep: int
    head: int
    all: int
    drafter: int
    drafter_trimmed: int

    @property
    def draft_step_share(self) -> float:
        """Parameters a draft step reads over those a full step reads, before the drafter's own and with the whole head:
        the c of docs/benchmarks.md. Experts all count, also those that a token does not reach."""
        return (self.shallow + self.head) / (self.shallow + self.deep + self.head)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device of one process, at the worst moment of its life.

    layers, other_weights  the frozen model: decoder layers; embedding, output head, norms and buffers.
    cache                  keys and values of all rows. The buffers are as long as the longest request, for every row;
                           they grow by doubling, and while they grow the old ones are there too.
    prefix_cache           keys and values that a server keeps of texts gone by.
    draft_heads            the published product of head and correction; of a trimmed head also the two cut copies.
    drafter                the serving drafter's parameters.
    learner                the learner's copy, its gradient and its optimizer.
    versions               weights that a rollback can return to.
    replay                 stored experience.
    logits                 the larger of a round's and a learner's: they take turns.
    """

    layers: int
    other_weights: int
    cache: int
    prefix_cache: int
    draft_heads: int
    drafter: int
    learner: int
    versions: int
    replay: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


class SplitShape:
    """A model cut at a layer, on the meta device: shapes without numbers, in no memory. Answers what it would take.

    Attributes: split, and cache_bytes_per_position, the keys and values of one position over all layers.
    """

    def __init__(
        self, config: PretrainedConfig, *, dtype: torch.dtype, split_layer: int, path: str = ModelSettings.path_kind,
        block_bytes: int | None = None,
    ) -> None:
        """Takes seconds for a large model. Raises ValueError when it cannot be split, as far as its shape tells.

        block_bytes: of the layers' weights where a GGUF file's blocks are decoded as they are.
        """
        with torch.device("meta"):
            # Of the ways to compute experts the one that asks for no numbers, in any dtype.
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="batched_mm")
        self.split = SplitModel(model, split_layer=split_layer, path=path)
        dense_bytes = sum(map(_num_bytes, self.split.layers))
        self._layers_bytes = dense_bytes if block_bytes is None else block_bytes
        self._other_bytes = _num_bytes(model) - dense_bytes
        self.cache_bytes_per_position = _cache_bytes_per_position(self.split)

    def count_parameters(self, drafter: DrafterConfig) -> ParameterCounts:
        split = self.split
        stages = self._stages(drafter)
        return ParameterCounts(
            shallow=sum(map(_num_parameters, split.layers[: split.split_layer])),
            deep=sum(map(_num_parameters, split.layers[split.split_layer :])),
            head=split.head_weight_VD.numel(),
            all=_num_parameters(split.model),
            drafter=_num_parameters(stages[0]),
            drafter_trimmed=_num_parameters(stages[-1]),
        )

    def plan_memory(
        self,
        *,
        drafter: DrafterConfig,
        learning: LearningSettings,
        rows: int,
        positions: int,
        num_draft_tokens: int,
        learner_memory: Callable[[LearningSettings, SplitModel], LearnerMemory],
        prefix_positions: int = 0,
    ) -> MemoryPlan:
        """What one process takes that serves this model, and learns unless `learning.enabled` is off.

        rows, positions   requests that decode together, and cached positions of each: the longest one's, for all.
        learner_memory    what a learner keeps, asked only where there is one.
        prefix_positions  of a server's prefix cache.
        A drafter that will be trimmed has two stages, each with its own worst moment; the larger one counts.
        """
        split, kept = self.split, learner_memory(learning, self.split) if learning.enabled else None
        round_logits = ROUND_LOGITS * rows * (num_draft_tokens + 1) * split.vocab_size * torch.float32.itemsize
        plans = []
        for stage in self._stages(drafter) if kept else [build_drafter(split, drafter)]:
            head, state_bytes = stage.draft_head, _total_bytes(stage.state_dict().values())
            num_cut = 0 if head.draft_token_ids_V is None else 2  # the serving drafter's and the learner's
            num_logits = _learner_positions(learning, kept) if kept else 0
            learner_logits = num_logits * head.vocab_size * torch.float32.itemsize
            learner = state_bytes + OPTIMIZER_COPIES * _total_bytes(stage.parameters())
            plans.append(MemoryPlan(
                layers=self._layers_bytes,
                other_weights=self._other_bytes,
                cache=rows * positions * self.cache_bytes_per_position,
                prefix_cache=prefix_positions * self.cache_bytes_per_position,
                draft_heads=(1 + num_cut) * head.vocab_size * split.hidden_size * split.dtype.itemsize,
                drafter=state_bytes,
                learner=learner if kept else 0,
                versions=kept.states * state_bytes if kept else 0,
                replay=kept.replay_bytes if kept else 0,
                logits=max(round_logits, learner_logits),
            ))  # fmt: skip
        return max(plans, key=lambda plan: plan.total)

    def devices_needed(self, plan: MemoryPlan, *, device_gb: int) -> int | None:
        """Devices of this size that the plan takes: 1, or the fewest over which tensor parallelism fits it; else None.

        Tensor parallelism shares out the layers and the cache, by key/value heads, so their number must be divisible;
        all else is taken to be whole on every device.
        """
        config = self.split.config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shared = plan.layers + plan.cache + plan.prefix_cache
        for num_devices in range(1, num_kv_heads + 1):
            is_fitting = plan.total - shared + shared / num_devices <= device_gb * 10**9
            if num_kv_heads % num_devices == 0 and is_fitting:
                return num_devices
        return None

    def _stages(self, drafter: DrafterConfig) -> list[nn.Module]:
        """The drafter as it begins, and as it is once its head is trimmed, where that will be."""
        stages = [build_drafter(self.split, drafter)]
        if 0 < drafter.draft_vocab_size < self.split.vocab_size:
            token_ids_V = torch.empty(drafter.draft_vocab_size, dtype=torch.int64, device="meta")
            stages.append(build_drafter(self.split, drafter, draft_token_ids_V=token_ids_V))
        return stages


@torch.no_grad()
def _cache_bytes_per_position(split: SplitModel) -> int:
    """Seen in a cache: layers need not be alike."""
    cache, ids_11 = split.make_cache(1, 1), torch.zeros(1, 1, dtype=torch.int64, device=split.device)
    placement = cache.place(offset=0, width=1)
    split.deep(split.shallow(ids_11, cache, placement), ids_11, cache, placement)
    return cache.num_bytes


def _learner_positions(learning: LearningSettings, kept: LearnerMemory) -> int:
    """Positions times logits of each that are alive at the worst moment of a piece of learning."""
    step = learning.blocks_per_slice or learning.blocks_per_step
    canary = learning.blocks_per_slice or kept.canary_blocks
    return learning.block_len * max(STEP_LOGITS * step, CANARY_LOGITS * canary)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _num_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; what is shared within the module counts once."""
    return _total_bytes(module.parameters()) + _total_bytes(module.buffers())


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
