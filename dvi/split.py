"""One frozen language model cut at a layer: the shallow part drafts, the deep part verifies from stored states.

Works on any Hugging Face decoder-only model whose layers keep keys and values and nothing else. Knows layers, positions
and the cache; knows nothing of drafts, sampling or training. No weight is copied, and neither the model's modules nor its
config change; what cannot be split is refused, and every split is compared with the plain model when it is made.
Not covered: rotary embeddings that stretch with the longest row (dynamic, longrope) beyond their original length, where
a row's keys depend on its batch mates.
"""
# B rows, Q query positions, D hidden size, V vocabulary, S cached positions.

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from dvi.kv_cache import Placement, RollbackCache

SPLITTABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}
PATHS = ("auto", "views", "direct")

# Largest relative error (Frobenius, per phase) between split and plain logits that rounding explains: eager attention
# takes its softmax in float32 whatever the dtype. A wrong mask, position or layer gives 0.1 and more on tiny models.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


class SplitModel:
    """A model seen as two: `shallow` runs layers [0, split_layer), `deep` the others and the final norm.

    split_layer  0..num_layers-1; at 0 only the embedding is shallow.
    path         how layers are called: "views" suits every model, "direct" is leaner on Llama-shaped ones, "auto" chooses.

    The backbone is frozen (no gradients, eval mode). Attributes: model, config (of the text decoder), path, split_layer,
    num_layers, hidden_size, vocab_size, device (where token ids go), dtype, final_norm, head_weight_VD, head_bias_V or None.
    Raises ValueError, with the reason, when the model cannot be split or the split differs from the plain model.
    """

    def __init__(self, model: PreTrainedModel, *, split_layer: int, path: str = "auto") -> None:
        _refuse_unsplittable(model)
        self.model = model.requires_grad_(False).eval()
        anatomy = _dissect(model)
        self.config = anatomy.decoder.config
        self.num_layers = len(anatomy.layers)
        if not 0 <= split_layer < self.num_layers:
            raise ValueError(
                f"split_layer must be in 0..{self.num_layers - 1} for this {self.num_layers}-layer model, "
                f"got {split_layer}; try {max(1, self.num_layers // 8)}"
            )
        self.split_layer = split_layer
        self.final_norm = anatomy.final_norm
        head = model.get_output_embeddings()
        self.head_weight_VD, self.head_bias_V = head.weight, head.bias
        self.vocab_size, self.hidden_size = self.head_weight_VD.shape
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.dtype
        self.post_head = _post_head(model.config)
        self.path = _choose_path(model, path)
        if self.path == "direct":
            from dvi.direct import DirectPath

            self._path = DirectPath(model, split_layer=split_layer)
            self._linear_head = self._path.head
        else:
            self._path = ViewsPath(anatomy, split_layer=split_layer)
            self._linear_head = head
        self.self_check()

    def make_cache(self, rows: int, capacity: int) -> RollbackCache:
        """An empty cache for `rows` sequences of at most `capacity` positions, rejected drafts included."""
        return RollbackCache(rows=rows, capacity=capacity, device=self.device)

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """hidden_BQD: h_k, the raw output of layer split_layer (at 0 what the first layer would read).

        Writes the shallow layers' keys and values at the placement; commits nothing.
        """
        return self._path.shallow(token_ids_BQ, cache, placement)

    def deep(self, hidden_BQD: Tensor, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """final_hidden_BQD: what the output head reads, from the stored h_k of the same tokens at the same placement.

        Writes the deep layers' keys and values at the placement; commits nothing.
        """
        if self.path == "direct":  # Llama-shaped layers never look at token ids
            return self._path.deep(hidden_BQD, cache, placement)
        return self._path.deep(hidden_BQD, token_ids_BQ, cache, placement)

    def head(self, final_hidden: Tensor) -> Tensor:
        """The verifier's logits [..., V] of final hidden states [..., D], as the plain model gives them."""
        return self.post_head(self._linear_head(final_hidden))

    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of all of the backbone's parameters and persistent buffers.

        Derived buffers are left out: some rotary embeddings recompute theirs while serving.
        """
        return _sha256(self.model.state_dict().items())

    def head_fingerprint(self) -> str:
        """SHA-256 over the output head's weight: which head a drafter was trained against."""
        return _sha256([("head", self.head_weight_VD)])

    @torch.no_grad()
    def self_check(self) -> None:
        """Compares prefill, a partly rejected round and a round of rows of unequal length with the plain forward.

        Raises ValueError, with the phase and the relative error, when the split computes something else.
        """
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(self.vocab_size, (2, 10), generator=generator).to(self.device)
        plain_BSV = self.model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False).logits
        name, tolerance = type(self.model).__name__, _TOLERANCE.get(self.dtype, _HALF_TOLERANCE)
        try:
            errors = self._errors_by_phase(ids_BS, plain_BSV, prompt=4, width=3)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} cannot be split: its layers do not run apart ({error})") from error
        for phase, error in errors.items():
            if not error <= tolerance:
                raise ValueError(
                    f"{name} cannot be split: {phase} at split_layer {self.split_layer} differs from the plain forward "
                    f"by a relative error of {error:.1e}; rounding explains at most {tolerance:.0e}"
                )

    def _errors_by_phase(self, ids_BS: Tensor, plain_BSV: Tensor, *, prompt: int, width: int) -> dict[str, float]:
        cache = self.make_cache(2, prompt + 3 * width)
        errors = {}

        placement = cache.place(offset=0, width=prompt)
        hidden_BQD = self.shallow(ids_BS[:, :prompt], cache, placement)
        final_BQD = self.deep(hidden_BQD, ids_BS[:, :prompt], cache, placement)
        errors["prefill"] = _relative_error(self.head(final_BQD), plain_BSV[:, :prompt])
        cache.commit([prompt, prompt])

        # Row 0 drafts its true continuation; row 1 leaves it after one token, so only that one may survive.
        drafted_BQ = ids_BS[:, prompt : prompt + width].clone()
        drafted_BQ[1, 1:] = (drafted_BQ[1, 1:] + 1) % self.vocab_size
        logits_BQV = self._draft_and_verify(drafted_BQ, cache)
        errors["verification"] = _relative_error(logits_BQV[0], plain_BSV[0, prompt : prompt + width])
        cache.commit([width, 1])

        columns_BQ = cache.lengths_B[:, None] + torch.arange(width, device=self.device)
        rows_B1 = torch.arange(2, device=self.device)[:, None]
        logits_BQV = self._draft_and_verify(ids_BS[rows_B1, columns_BQ], cache)
        errors["a batch of unequal lengths"] = _relative_error(logits_BQV, plain_BSV[rows_B1, columns_BQ])
        return errors

    def _draft_and_verify(self, token_ids_BQ: Tensor, cache: RollbackCache) -> Tensor:
        """logits_BQV of one round: a shallow step per token, then one deep pass over all of them."""
        width = token_ids_BQ.shape[1]
        steps = [self.shallow(token_ids_BQ[:, i : i + 1], cache, cache.place(offset=i, width=1)) for i in range(width)]
        return self.head(self.deep(torch.cat(steps, dim=1), token_ids_BQ, cache, cache.place(offset=0, width=width)))


class ViewsPath:
    """The generic path: two shallow copies of the model's decoder that share its layer objects.

    One holds the layers below the split, the other those above it behind an `_Inject`. Each runs the model's own forward,
    which makes its own rotary embeddings, positions and per-layer masks; only the cache and the queries' places are ours.
    """

    def __init__(self, anatomy: _Anatomy, *, split_layer: int) -> None:
        layers, num_layers = anatomy.layers, len(anatomy.layers)
        self._inject = _Inject(returns_tuple=anatomy.layers_return_tuples)
        self._shallow = _view(anatomy, layers[:split_layer], range(split_layer))
        # The injecting layer takes the config entries of the layer above it.
        self._deep = _view(anatomy, [self._inject, *layers[split_layer:]], [split_layer, *range(split_layer, num_layers)])
        if anatomy.norm_name is not None:
            setattr(self._shallow, anatomy.norm_name, nn.Identity())
        self._takes_positions = "position_ids" in inspect.signature(anatomy.decoder.forward).parameters

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        return self._run(self._shallow, token_ids_BQ, cache, placement)

    def deep(self, hidden_BQD: Tensor, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        self._inject.hidden_BQD = hidden_BQD
        return self._run(self._deep, token_ids_BQ, cache, placement)

    def _run(self, view: PreTrainedModel, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        # The config is the view's own, and the only thing of the view that reaches the mask function.
        view.config.dvi_placement = placement
        positions = {"position_ids": placement.positions_BQ} if self._takes_positions else {}
        return view(input_ids=token_ids_BQ, past_key_values=_PlacedCache(cache, placement), use_cache=True, **positions)[0]


class _Inject(nn.Module):
    """Stands where the layers below the split were: ignores its input and gives the stored h_k."""

    def __init__(self, *, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.hidden_BQD: Tensor | None = None

    def forward(self, *_args, **_kwargs) -> Tensor | tuple[Tensor]:
        return (self.hidden_BQD,) if self.returns_tuple else self.hidden_BQD


class _PlacedCache(Cache):
    """A RollbackCache at one placement, as transformers models call it. Layer indices are the whole model's."""

    def __init__(self, cache: RollbackCache, placement: Placement) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._placement = placement

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        return self._cache.write(layer_idx, key_states, value_states, self._placement)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._placement.visible, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Models add the number of queries to this to size what they lay over the keys (alibi of Bloom, Falcon and MPT).
        return self._placement.visible - self._placement.positions_BQ.shape[1]


def _placed_mask(
    *,
    mask_function: Callable[..., Tensor],
    config: PretrainedConfig,
    dtype: torch.dtype,
    is_additive: bool,
    allow_is_causal_skip: bool = True,
    **_kwargs,
) -> Tensor | None:
    """mask_B1QS by the model's own rule (causal, sliding window, ...), asked with each row's true positions.

    transformers would take the queries to be the last slots of every row, which is wrong for rows of unequal length.
    is_additive: 0 or the lowest number of dtype for eager attention, which adds the mask; else bool, True = attend.
    """
    placement: Placement = config.dvi_placement
    if placement.is_trivially_causal and mask_function is causal_mask_function and allow_is_causal_skip and not is_additive:
        return None
    positions_BQ = placement.positions_BQ
    row_B = torch.arange(positions_BQ.shape[0], device=positions_BQ.device)
    slot_S = torch.arange(placement.visible, device=positions_BQ.device)
    mask = mask_function(row_B[:, None, None, None], row_B[:1], positions_BQ[:, None, :, None], slot_S)
    if is_additive:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask


_MASK_PREFIX = "dvi_placed_"
AttentionMaskInterface.register(_MASK_PREFIX + "sdpa", partial(_placed_mask, is_additive=False))
AttentionMaskInterface.register(_MASK_PREFIX + "eager", partial(_placed_mask, is_additive=True))


@dataclass(frozen=True)
class _Anatomy:
    """Where a decoder keeps what a split touches. norm_name is None when nothing follows the last layer."""

    decoder: PreTrainedModel
    layers_name: str
    norm_name: str | None
    layers_return_tuples: bool

    @property
    def layers(self) -> list[nn.Module]:
        return list(getattr(self.decoder, self.layers_name))

    @property
    def final_norm(self) -> nn.Module:
        return nn.Identity() if self.norm_name is None else getattr(self.decoder, self.norm_name)


@torch.no_grad()
def _dissect(model: PreTrainedModel) -> _Anatomy:
    """The model's anatomy, seen by watching a forward pass of two tokens, so that no list of names is needed."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} cannot be split: get_decoder() gives its {type(decoder).__name__}")
    num_layers = decoder.config.num_hidden_layers
    lists = [name for name, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} cannot be split: found {len(lists)} lists of {num_layers} layers in it")
    calls: list[tuple[str, object]] = []

    def watch(module: nn.Module, name: str):
        return module.register_forward_hook(lambda _module, _args, output: calls.append((name, output)))

    hooks = [watch(module, name) for name, module in decoder.named_children()]
    hooks += [watch(layer, lists[0]) for layer in getattr(decoder, lists[0])]
    try:
        decoder(input_ids=torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    last = max(i for i, (name, _) in enumerate(calls) if name == lists[0])
    output, after = calls[last][1], [name for name, _ in calls[last + 1 :]]
    hidden = output[0] if isinstance(output, tuple) else output
    head_width = model.get_output_embeddings().weight.shape[1]
    if len(after) > 1 or hidden.shape[-1] != head_width:
        raise ValueError(
            f"{type(model).__name__} cannot be split: after its last layer, {hidden.shape[-1]} wide, come "
            f"{after} and a head that reads {head_width}; at most one norm of the same width is supported"
        )
    return _Anatomy(decoder, lists[0], after[0] if after else None, isinstance(output, tuple))


def _view(anatomy: _Anatomy, layers: Iterable[nn.Module], layer_indices: Iterable[int]) -> PreTrainedModel:
    """A copy of the decoder that holds these layers and a config that describes them; all modules are shared."""
    view = copy.copy(anatomy.decoder)
    view._modules = dict(view._modules)
    # A forward bound to the instance (accelerate's hooks) would still run the original.
    view.__dict__.pop("forward", None)
    setattr(view, anatomy.layers_name, nn.ModuleList(layers))
    view.config = _config_of_layers(view.config, list(layer_indices))
    return view


def _config_of_layers(config: PretrainedConfig, layer_indices: list[int]) -> PretrainedConfig:
    """A copy of the config for the chosen layers, which asks `_placed_mask` for its masks."""
    config, num_layers = copy.copy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        # One entry per layer: layer_types, no_rope_layers and their like.
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            setattr(config, name, [value[i] for i in layer_indices])
    config.num_hidden_layers = len(layer_indices)
    config._attn_implementation = _MASK_PREFIX + config._attn_implementation
    return config


def _choose_path(model: PreTrainedModel, path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if path == "views":
        return "views"
    from dvi.direct import DirectPath

    is_supported = DirectPath.supports(model)
    if path == "direct" and not is_supported:
        raise ValueError(f"path 'direct' is for Llama-shaped models, got {type(model).__name__}; use 'views'")
    return "direct" if is_supported else "views"


def _post_head(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What the model does to the head's logits, element by element, so that it suits any slice of the vocabulary.

    Granite divides, Cohere multiplies, Gemma soft-caps. `SplitModel.self_check` finds what is missing here.
    """
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def post_head(logits: Tensor) -> Tensor:
        if divisor != 1.0:
            logits = logits / divisor
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return post_head


def _refuse_unsplittable(model: PreTrainedModel) -> None:
    """Raises ValueError for models known not to work, with the reason. `SplitModel.self_check` finds the others."""
    config = model.config.get_text_config(decoder=True)
    layer_types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    foreign = sorted(layer_types - SPLITTABLE_LAYER_TYPES)
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder; only decoder-only models draft and verify the same sequence"
    elif foreign:
        reason = f"its {', '.join(foreign)} layers keep more than keys and values by position, so drafts cannot be undone"
    elif getattr(model, "_is_stateful", False):
        reason = "it keeps recurrent state, so drafts cannot be undone"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = f"its last {config.num_kv_shared_layers} layers read the keys and values of earlier ones"
    elif model.get_output_embeddings() is None:
        reason = "it has no output head; load it with AutoModelForCausalLM"
    elif config._attn_implementation not in ("sdpa", "eager"):
        reason = (
            f"its attention implementation is {config._attn_implementation!r}, which takes no mask per row; "
            "load it with attn_implementation='sdpa'"
        )
    else:
        return
    raise ValueError(f"{type(model).__name__} cannot be split: {reason}")


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).double().norm() / expected.double().norm()).item()


def _sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
