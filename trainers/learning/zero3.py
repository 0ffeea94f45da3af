"""A frozen model too big for one device, sharded over all ranks by DeepSpeed's ZeRO-3, to record texts for the warm-up.

Every pass gathers each layer from all ranks when its turn comes and lets it go again: once for a whole text, which
costs little beside the text's own arithmetic, where decoding would pay it for every token. So there is no cache and no
decoding here, and one pass runs over all of a text. Knows texts and ranks; knows nothing of learning.
Tried with gloo on CPUs; with NCCL on GPUs it has not been.
"""
# S positions of a text, D hidden size, V vocabulary.

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from dvi.decode.speculator import SelfSpeculator
from dvi.model.devices import gather_module
from dvi.model.drafter import DrafterConfig
from dvi.model.pretrained import read_config, read_tokenizer, refuse_gguf
from dvi.model.split import fingerprint_of_head, post_head_of, refuse_unsplittable
from dvi.model.starting_drafter import choose_split_layer, make_drafter
from dvi.model.views_path import Anatomy, dissect
from dvi.settings import LearningSettings
from dvi.software import install_extra
from trainers.learning.recordings import RecordedText


class ShardedBackbone:
    """A causal language model of which each rank holds a part; norm and head, which the drafter reads, it holds whole.

    Has what drafters and learners ask of a `SplitModel`: model, num_layers, split_layer, hidden_size, vocab_size,
    device, dtype, final_norm, head_weight_VD, head_bias_V, post_head and head_fingerprint().
    """

    def __init__(
        self, name_or_path: str, *, split_layer: int, dtype: torch.dtype = torch.float32, **source: object
    ) -> None:
        """All ranks must call it together, their process group joined. source: other arguments of `from_pretrained`.

        Raises ValueError for float64, and for models that cannot be split.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            # ZeRO-3 makes some parameters in float32 whatever the model's dtype: float64 norms would be rounded.
            raise ValueError(f"ZeRO-3 needs float32 or bfloat16, got {dtype}; try float32")
        refuse_gguf(name_or_path)
        anatomy = _anatomy(name_or_path, source)
        if not 0 <= split_layer < len(anatomy.layers):
            raise ValueError(f"split_layer must be in 0..{len(anatomy.layers) - 1} for this model, got {split_layer}")
        deepspeed = _import_deepspeed()
        zero3 = {
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": 1,  # nothing is trained here, but it must be there
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        # As long as this object lives, from_pretrained loads a shard.
        sharding = HfDeepSpeedConfig(zero3)
        self.model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **source)
        del sharding
        self.model.requires_grad_(False).eval()
        self.dtype, self.split_layer, self.num_layers = dtype, split_layer, len(anatomy.layers)
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        self._layers = getattr(decoder, anatomy.layers_name)
        norm = torch.nn.Identity() if anatomy.norm_name is None else getattr(decoder, anatomy.norm_name)
        with deepspeed.zero.GatheredParameters([*norm.parameters(), *head.parameters()]):
            self.device = head.weight.device
            # Copied before the engine hooks the modules, and because the gathered weights are about to go.
            self.final_norm, head = (copy.deepcopy(gather_module(module, self.device)) for module in (norm, head))
        self.head_weight_VD, self.head_bias_V = head.weight, head.bias
        self.vocab_size, self.hidden_size = head.weight.shape
        self.num_input_ids = self.vocab_size
        self.post_head = post_head_of(self.model.config)
        # The decoder alone: its passes leave out the head, and with it logits [S, V] that nobody reads.
        self._engine = deepspeed.initialize(model=decoder, config=zero3)[0]

    def head_fingerprint(self) -> str:
        """That of `SplitModel`."""
        return fingerprint_of_head(self.head_weight_VD)

    @torch.no_grad()
    def record(self, token_ids: list[int], *, prompt_len: int) -> RecordedText:
        """Runs the model over a text once.

        All ranks must record together, each a text of its own of any length; one that has none must `stand_by`.
        """
        states = []
        hook = self._layers[self.split_layer].register_forward_pre_hook(
            # The first layer of the deep part reads h_k.
            lambda _layer, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            ids_1S = torch.tensor([token_ids], device=self.device)
            final_1SD = self._engine(input_ids=ids_1S, use_cache=False)[0]
        finally:
            hook.remove()
        return RecordedText(token_ids, prompt_len, states[0][0], final_1SD[0])

    def stand_by(self) -> None:
        """Does this rank's part in what the others record: hands them its shards."""
        self.record([0], prompt_len=1)


class ShardedSpeculator(SelfSpeculator):
    """A sharded model with its tokenizer and a drafter to learn: reads texts, saves the drafter, cannot decode.

    Of a `SelfSpeculator` it has model, tokenizer, split, drafter, encode, encode_request, max_positions, save_drafter.
    """

    mode = level = "fast"

    def __init__(
        self, backbone: ShardedBackbone, tokenizer: PreTrainedTokenizerBase, *, drafter: DrafterConfig,
        adapter: str | Path | None, seed: int,
    ) -> None:
        self.model, self.split, self.tokenizer = backbone.model, backbone, tokenizer
        self.drafter = make_drafter(backbone, drafter, adapter=adapter, seed=seed)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, split_layer: int | None = None, drafter: DrafterConfig, dtype: str,
        adapter: str | Path | None = None, seed: int = LearningSettings.seed, trust_remote_code: bool = False,
        **_decoding: object,
    ) -> ShardedSpeculator:
        """All ranks must call it together. The arguments are those of `SelfSpeculator`'s; those of decoding are unused.

        Raises ValueError as `ShardedBackbone` and `load_drafter` do.
        """
        if split_layer is None:
            config = read_config(name_or_path, trust_remote_code=trust_remote_code)
            split_layer = choose_split_layer(config, adapter)
        backbone = ShardedBackbone(
            str(name_or_path), split_layer=split_layer, dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
        tokenizer = read_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
        return cls(backbone, tokenizer, drafter=drafter, adapter=adapter, seed=seed)


def _anatomy(name_or_path: str, source: dict[str, object]) -> Anatomy:
    """Where the model keeps its layers and its norm, seen on a model without weights: shards cannot be run alone."""
    config = read_config(name_or_path, **source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.get("trust_remote_code", False))
    refuse_unsplittable(model)
    return dissect(model)


def _import_deepspeed() -> ModuleType:
    """DeepSpeed, on the job's process group. Raises ValueError when it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found anyway, with a warning
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ValueError(f"ZeRO-3 needs DeepSpeed; {install_extra('deepspeed')}") from error
    # Else it compiles shared-memory collectives for CPUs when it starts: minutes, and a failure without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its collectives go by names that newer torch calls old; nobody here can change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    return deepspeed
