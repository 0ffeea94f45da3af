"""The generic path through a split model: two views of its decoder that share every module with the original.

Knows how transformers decoders are put together and what they ask of a cache; knows nothing of drafting. A view runs
the model's own forward, which makes its own rotary embeddings, positions and per-layer masks, so no architecture is
named here: only the layers it holds, its cache and the places of its queries are ours.
"""
# B rows, Q query positions, D hidden size, S cached positions.

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from dvi.model.context import has_bounded_positions, max_positions_of
from dvi.model.devices import execution_device
from dvi.model.kv_cache import Placement, RollbackCache


@dataclass(frozen=True)
class Anatomy:
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
def dissect(model: PreTrainedModel) -> Anatomy:
    """The model's anatomy, seen by watching a forward pass of two tokens, so that no list of names is needed.

    Raises ValueError when it does not end in one list of layers and at most one norm, as wide as the output head reads.
    """
    name = type(model).__name__
    decoder, head_width = model.get_decoder(), model.get_output_embeddings().weight.shape[1]
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(f"{name} cannot be split: get_decoder() gives its {type(decoder).__name__}")
    num_layers = decoder.config.num_hidden_layers
    lists = [key for key, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(lists) != 1:
        raise ValueError(f"{name} cannot be split: found {len(lists)} lists of {num_layers} layers in its decoder")
    watched = [(lists[0], layer) for layer in getattr(decoder, lists[0])] + list(decoder.named_children())
    calls: list[tuple[str, object]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, key=key: calls.append((key, output)))
        for key, module in watched
    ]
    token_ids = torch.tensor([[0, 1]], device=execution_device(model.get_input_embeddings()))
    forward = _with_placed_masks(decoder, lists[0]) if token_ids.is_meta else decoder
    try:
        forward(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    last = max(i for i, (key, _) in enumerate(calls) if key == lists[0])
    output, after = calls[last][1], [key for key, _ in calls[last + 1 :]]
    is_wrapped = isinstance(output, (tuple, list))
    width = (output[0] if is_wrapped else output).shape[-1]
    if len(after) > 1 or width != head_width:
        raise ValueError(
            f"{name} cannot be split: after its last layer, {width} wide, come {after} and a head that reads "
            f"{head_width}; at most one norm of that same width is supported"
        )
    return Anatomy(decoder, lists[0], after[0] if after else None, is_wrapped)


def _with_placed_masks(decoder: PreTrainedModel, layers_name: str) -> PreTrainedModel:
    """A view of all layers, for two tokens on the meta device: transformers' own masks read numbers, ours do not."""
    anatomy = Anatomy(decoder, layers_name, norm_name=None, layers_return_tuples=False)
    view = _view(anatomy, anatomy.layers, list(range(len(anatomy.layers))))
    view.config.dvi_placement = RollbackCache(rows=1, capacity=2, device=decoder.device).place(offset=0, width=2)
    return view


class ViewsPath:
    """Shallow and deep passes as two views: the layers below the split, and an `_Inject` before those above it."""

    def __init__(self, anatomy: Anatomy, *, split_layer: int) -> None:
        layers, indices = anatomy.layers, list(range(len(anatomy.layers)))
        self._shallow = _view(anatomy, layers[:split_layer], indices[:split_layer])
        if anatomy.norm_name is not None:
            setattr(self._shallow, anatomy.norm_name, nn.Identity())
        self._inject = _Inject(returns_tuple=anatomy.layers_return_tuples)
        # The injecting layer takes the config entries of the layer above it.
        deep_indices = [split_layer, *indices[split_layer:]]
        self._deep = _view(anatomy, [self._inject, *layers[split_layer:]], deep_indices)
        self._takes_positions = "position_ids" in inspect.signature(anatomy.decoder.forward).parameters
        self._last_position = _last_position(anatomy.decoder)

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """h_k [B, Q, D] of the tokens at the placement's positions."""
        return self._run(self._shallow, token_ids_BQ, cache, placement)

    def deep(self, hidden_BQD: Tensor, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """The verifier's final hidden state [B, Q, D], after the final norm, from stored h_k."""
        self._inject.hidden_BQD = hidden_BQD
        return self._run(self._deep, token_ids_BQ, cache, placement)

    def _run(self, view: PreTrainedModel, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        # The config is the view's own, and all of the view that reaches the function which makes its masks.
        view.config.dvi_placement = placement
        positions_BQ = placement.positions_BQ
        if self._last_position is not None:
            # Drafts may run past the end of the context. No text can: what they compute there is never committed.
            positions_BQ = positions_BQ.clamp(max=self._last_position)
        positions = {"position_ids": positions_BQ} if self._takes_positions else {}
        placed_cache = _PlacedCache(cache, placement)
        return view(input_ids=token_ids_BQ, past_key_values=placed_cache, use_cache=True, **positions)[0]


def _last_position(decoder: PreTrainedModel) -> int | None:
    """The last position that a pass may hold, as those beyond have no embedding of their own or would change that of
    all others; None where they do no harm."""
    tokens = decoder.get_input_embeddings()
    has_table = any(isinstance(child, nn.Embedding) and child is not tokens for child in decoder.children())
    return max_positions_of(decoder.config) - 1 if has_table or has_bounded_positions(decoder.config) else None


def _view(anatomy: Anatomy, layers: Iterable[nn.Module], layer_indices: list[int]) -> PreTrainedModel:
    """A copy of the decoder that holds these layers and a config that describes them; all modules are shared."""
    view = copy.copy(anatomy.decoder)
    view._modules = dict(view._modules)
    # A forward bound to the instance (accelerate's hooks) would still run the original.
    view.__dict__.pop("forward", None)
    setattr(view, anatomy.layers_name, nn.ModuleList(layers))
    view.config = _config_of_layers(view.config, layer_indices)
    return view


def _config_of_layers(config: PretrainedConfig, layer_indices: list[int]) -> PretrainedConfig:
    """A copy of the config for the chosen layers, which has its masks made by `_placed_mask`."""
    config, num_layers = copy.copy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        # One entry per layer: layer_types, no_rope_layers and their like.
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            setattr(config, name, [value[i] for i in layer_indices])
    config.num_hidden_layers = len(layer_indices)
    config._attn_implementation = _MASK_PREFIX + config._attn_implementation
    # Some models look for padding among the ids, to warn of it: a device sync on every pass.
    config.pad_token_id = None
    return config


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

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args, **_kwargs) -> tuple:
        return self._cache.write(layer_idx, key_states, value_states, self._placement)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._placement.visible, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Models add the number of queries to this for the length of what they lay over the keys: alibi, for one.
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
    """mask_B1QS by the model's own rule (causal, sliding window), asked about each row's true positions.

    transformers would take the queries for the last slots of every row, which is wrong where lengths differ.
    is_additive: 0 or the lowest number of dtype, for eager attention to add; otherwise bool, True = attend.
    """
    placement: Placement = config.dvi_placement
    can_skip = allow_is_causal_skip and not is_additive and mask_function is causal_mask_function
    if can_skip and placement.is_trivially_causal:
        return None
    positions_BQ = placement.positions_BQ
    row_B = torch.arange(positions_BQ.shape[0], device=positions_BQ.device)
    key_position_B11S = placement.key_position_BS()[:, None, None]
    head = 0  # the rules of decoders do not depend on it
    mask_B1QS = mask_function(row_B[:, None, None, None], head, positions_BQ[:, None, :, None], key_position_B11S)
    if placement.tree is not None:  # by position alone a node would see its siblings
        mask_B1QS = mask_B1QS & placement.tree.is_seen_BQS(placement.visible)[:, None]
    if is_additive:
        return torch.zeros_like(mask_B1QS, dtype=dtype).masked_fill_(~mask_B1QS, torch.finfo(dtype).min)
    return mask_B1QS


_MASK_PREFIX = "dvi_placed_"
AttentionMaskInterface.register(_MASK_PREFIX + "sdpa", partial(_placed_mask, is_additive=False))
AttentionMaskInterface.register(_MASK_PREFIX + "eager", partial(_placed_mask, is_additive=True))
