"""One frozen language model cut at a layer: the shallow part drafts, the deep part verifies from stored states.

Works on any Hugging Face decoder-only model whose layers keep keys and values and nothing else. Knows layers, positions
and the cache; knows nothing of drafts, sampling or training. Neither the model's modules nor its config change; what
cannot be split is refused, and every split is compared with the plain model when it is made.
Rotary embeddings that stretch with the longest row (dynamic, longrope) serve up to their original length, see
`dvi.model.context`.
"""
# B rows, Q query positions, D hidden size, V vocabulary, S positions of a text.

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dvi.model.context import SHORTEST, max_positions_of, why_shorter
from dvi.model.devices import execution_device, gather_module, is_spread
from dvi.model.hollow import refill
from dvi.model.kv_cache import Placement, RollbackCache
from dvi.model.ragged import Packing
from dvi.model.tree import Tree
from dvi.model.views_path import ViewsPath, dissect
from dvi.progress import shown_as
from dvi.settings import ModelSettings

PATHS = ("auto", "views", "direct", "native")
SPLITTABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}
SPLITTABLE_ATTENTION = ("sdpa", "eager")

# Largest relative error (Frobenius, per phase) between split and plain logits that rounding explains: models take norms
# and eager softmax in float32 whatever their dtype, and bfloat16 is off by 0.01 in 12 layers. A wrong mask, position or
# layer gives 0.1 and more.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


class SplitModel:
    """A model seen as two: `shallow` runs layers [0, split_layer), `deep` the others and the final norm.

    split_layer  0..num_layers-1; at 0 only the embedding is shallow.
    path         how layers are called: "views" suits every model, "direct" is leaner on Llama-shaped ones, "native" is
                 that in kernels compiled on this machine, for CPUs; "auto" is the last of these that can be.

    The backbone is frozen: no gradients, eval mode. Attributes: model, config (of its decoder), path, split_layer,
    layers, num_layers, hidden_size, vocab_size, num_input_ids (ids below it can be read), device (where token ids go,
    and where every result is), dtype, final_norm, head_weight_VD, head_bias_V (or None), and post_head: what the model
    does to the head's logits, element by element.
    A model on the meta device is taken as well, for its shape; nothing is compared then.
    fixed_width: None, for a pass may have any number of positions; `PaddedSplit` has one for all.
    Raises ValueError, with the reason, when the model cannot be split or the split differs from the plain model.
    """

    fixed_width: int | None = None

    def __init__(self, model: PreTrainedModel, *, split_layer: int, path: str = ModelSettings.path_kind) -> None:
        refuse_unsplittable(model)
        self.model = model.requires_grad_(False).eval()
        anatomy = dissect(model)
        self.config = anatomy.decoder.config
        self.layers = anatomy.layers
        self.num_layers = len(self.layers)
        for layer in self.layers:
            refill(layer)
        if not 0 <= split_layer < self.num_layers:
            raise ValueError(
                f"split_layer must be in 0..{self.num_layers - 1} for this {self.num_layers}-layer model, "
                f"got {split_layer}; try {max(1, self.num_layers // 8)}"
            )
        self.split_layer = split_layer
        self.device = execution_device(model.get_input_embeddings())
        self.final_norm, head = anatomy.final_norm, model.get_output_embeddings()
        if is_spread(model):
            # Drafting and learning read norm and head whole. The head's V x D numbers on the first device (with tensor
            # parallelism on every one) also give the verifier's logits, so only final states cross to it, not logits.
            self.final_norm, head = (gather_module(module, self.device) for module in (self.final_norm, head))
        self.head_weight_VD, self.head_bias_V = head.weight, head.bias
        self.vocab_size, self.hidden_size = self.head_weight_VD.shape
        num_embeddings = getattr(model.get_input_embeddings(), "num_embeddings", self.vocab_size)
        self.num_input_ids = min(self.vocab_size, num_embeddings)
        self.dtype = model.dtype
        self.post_head = post_head_of(model.config)
        self.path = _choose_path(model, path)
        if self.path == "views":
            self._path = ViewsPath(anatomy, split_layer=split_layer)
            self._linear_head = head
        else:
            self._path = _lean_paths()[self.path](model, split_layer=split_layer)
            self._linear_head = self._path.head
        self._carries_trees = True
        if self.device.type != "meta":  # a shape has no numbers to compare
            self.self_check()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"SplitModel({type(self.model).__name__}, {self.split_layer} of {self.num_layers} layers shallow, "
            f"{self.path}, {self.weights} {dtype} on {self.device})"
        )

    def make_cache(self, rows: int, capacity: int) -> RollbackCache:
        """An empty cache for `rows` sequences of at most `capacity` positions, rejected drafts included."""
        return RollbackCache(rows=rows, capacity=capacity, device=self.device)

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """hidden_BQD: h_k, the raw output of layer split_layer (at 0 what the first layer would read).

        Writes the shallow layers' keys and values at the placement; commits nothing.
        """
        return self._path.shallow(token_ids_BQ, cache, placement).to(self.device)

    def deep(self, hidden_BQD: Tensor, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """final_hidden_BQD: what the output head reads, from the stored h_k of the same tokens at the same placement.

        Writes the deep layers' keys and values at the placement; commits nothing.
        """
        if self.path == "views":
            return self._path.deep(hidden_BQD, token_ids_BQ, cache, placement).to(self.device)
        flat_MD = hidden_BQD.reshape(-1, hidden_BQD.shape[-1])  # Llama-shaped layers never look at token ids
        return self._path.deep_packed(flat_MD, cache, placement, None).view_as(hidden_BQD)

    @property
    def can_tree(self) -> bool:
        """Whether a pass can hold a draft tree, by the self-check: not where what lies over the keys counts slots."""
        return self._carries_trees

    @property
    def can_pack(self) -> bool:
        """Whether positions that a length rule leaves out of a round cost nothing: see `deep_packed`."""
        # Not on a GPU: how many positions count is known there only after a wait inside the round, shapes that follow
        # the data cannot be captured as a graph, and few positions cost about what fewer do.
        return self.path != "views" and self.device.type == "cpu"

    def deep_packed(self, hidden_MD: Tensor, cache: RollbackCache, placement: Placement, packing: Packing) -> Tensor:
        """final_hidden_MD: `deep` of the positions alone that the packing keeps of the placement's. Where `can_pack`.

        In the cache the others hold copies of their own row's last kept position, past what the round can commit.
        """
        return self._path.deep_packed(hidden_MD, cache, placement, packing)

    def head(self, final_hidden: Tensor) -> Tensor:
        """The verifier's logits [..., V] of final hidden states [..., D], as the plain model gives them."""
        return self.post_head(self._linear_head(final_hidden))

    def cut_at(self, split_layer: int) -> SplitModel:
        """The same model cut at another layer, with what is packed shared where the path has it packed."""
        if self.path != "native":
            return SplitModel(self.model, split_layer=split_layer, path=self.path)
        other = copy.copy(self)
        other._path = copy.copy(self._path)
        other.split_layer = other._path.split_layer = split_layer
        return other

    def give_up_weights(self) -> None:
        """Frees the weights of the model's layers where the path holds packed copies of them: half the memory.

        They come back, layer by layer and to the bit, when the model's own forward or state dict is asked for.
        """
        if self.path == "native":
            self._path.give_up_weights(self.layers)

    @property
    def weights(self) -> str:
        """"blocks" where any are multiplied as a GGUF file has them quantised, else "dense"."""
        return "blocks" if self.path == "native" and self._path.has_blocks else "dense"

    @property
    def num_weight_bytes(self) -> int:
        """Of the weights that one plain step reads, as they are held: all layers, final norm and head, no embedding."""
        if self.path == "native":
            return self._path.num_weight_bytes
        modules = (*self.layers, self.final_norm)
        return self.head_weight_VD.nbytes + sum(weight.nbytes for module in modules for weight in module.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of all of the backbone's parameters and persistent buffers.

        Derived buffers are left out: some rotary embeddings recompute theirs while serving. Not for a spread model:
        its weights are not all here.
        """
        return _sha256(self.model.state_dict().items())

    def head_fingerprint(self) -> str:
        """What tells the output head from others, see `fingerprint_of_head`."""
        return fingerprint_of_head(self.head_weight_VD)

    @torch.no_grad()
    @shown_as("checking the split model")
    def self_check(self) -> None:
        """Compares prefill, a partly rejected round and a round of rows of unequal length with the plain forward.

        Raises ValueError, with the phase and the relative error, when the split computes something else.
        """
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(self.vocab_size, (2, 10), generator=generator).to(self.device)
        plain_BSV = self.model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False).logits
        plain_BSV = plain_BSV.to(self.device)
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

        self._carries_trees = self._error_of_tree(ids_BS, plain_BSV, prompt=4) <= tolerance

    def _error_of_tree(self, ids_BS: Tensor, plain_BSV: Tensor, *, prompt: int) -> float:
        """Of the nodes of a tree that are the text's own; beside each stands one that is not."""
        cache = self.make_cache(2, prompt + 5)
        ids_BQ = ids_BS[:, :prompt]
        placement = cache.place(offset=0, width=prompt)
        self.deep(self.shallow(ids_BQ, cache, placement), ids_BQ, cache, placement)
        cache.commit([prompt, prompt])
        tree, own = Tree.of_parents([[0, 0, 2, 1]] * 2, self.device), [0, 2, 3]
        ids_BN = ((ids_BS[:, prompt : prompt + 1] + 1) % self.vocab_size).repeat(1, 5)
        ids_BN[:, own] = ids_BS[:, prompt : prompt + 3]
        placement = cache.place(offset=0, width=5, tree=tree)
        final_BND = self.deep(self.shallow(ids_BN, cache, placement), ids_BN, cache, placement)
        return _relative_error(self.head(final_BND)[:, own], plain_BSV[:, prompt : prompt + 3])

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


def _choose_path(model: PreTrainedModel, path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    lean_paths = _lean_paths()
    if is_spread(model):
        if path in lean_paths:
            raise ValueError(f"path {path!r} needs the whole model on one device, this one is spread; use 'views'")
        return "views"
    if path == "auto":
        return next((name for name, kind in lean_paths.items() if kind.supports(model)), "views")
    if path in lean_paths and not lean_paths[path].supports(model):
        raise ValueError(
            f"path {path!r} is for {lean_paths[path].TAKES}, got {type(model).__name__} in "
            f"{str(model.dtype).removeprefix('torch.')}; use 'auto' or 'views'"
        )
    return path


def _lean_paths() -> dict[str, type]:
    """The paths of Llama-shaped models by name, the leanest first."""
    from dvi.model.llama_path import DirectPath
    from dvi.model.native.path import NativePath

    return {"native": NativePath, "direct": DirectPath}


def fingerprint_of_head(weight_VD: Tensor) -> str:
    """SHA-256 over the output head's weight as float32, so that loading a bfloat16 model wider changes nothing."""
    return _sha256([("head", weight_VD.float())])


def post_head_of(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
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


def refuse_unsplittable(model: PreTrainedModel) -> None:
    """Raises ValueError for models known not to work, with the reason. `SplitModel.self_check` finds the others."""
    config = model.config.get_text_config(decoder=True)
    layer_types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    foreign = ", ".join(sorted(layer_types - SPLITTABLE_LAYER_TYPES))
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder; only decoder-only models draft and verify one sequence"
    elif foreign:
        reason = f"its {foreign} layers keep or see more than keys and values by position, so drafts cannot be undone"
    elif getattr(model, "_is_stateful", False):
        reason = "it keeps recurrent state, so drafts cannot be undone"
    elif "local" in (getattr(config, "attention_layers", None) or ()):
        # GPT-Neo. The self-check cannot know: it would take a text longer than the window.
        reason = "its local layers take the queries for the cache's last slots, which is wrong where rows differ"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = f"its last {config.num_kv_shared_layers} layers read the keys and values of earlier ones"
    elif max_positions_of(config) < SHORTEST and why_shorter(config):
        reason = why_shorter(config)
    elif model.get_output_embeddings() is None:
        reason = "it has no output head; load it with AutoModelForCausalLM"
    elif config._attn_implementation not in SPLITTABLE_ATTENTION:
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
