"""The lean path on x86 CPUs: whole runs of layers in one call of compiled kernels, for few rows.

Knows the weights of Llama-shaped blocks and a `RollbackCache`; knows nothing of drafting. Every row is computed in one
order of operations, whatever rows stand beside it, however far the cache reaches: prefill, plain decoding and
verification of a position give the same bits.
"""
# B rows, Q query positions, M = B * Q or fewer where a packing leaves some out, D hidden, S positions, d head size.

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor, nn

from dvi.model.blocks import BLOCK
from dvi.model.hollow import hollow_out
from dvi.model.kv_cache import Placement, RollbackCache
from dvi.model.llama_path import DirectPath
from dvi.model.native.library import Layer, Pass, load
from dvi.model.native.weights import INT4, INT8, L, PackedWeight, multiply, pack_linears
from dvi.model.ragged import Packing

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 512


class NativePath:
    """Shallow and deep passes over the blocks of one Llama-shaped model, as `DirectPath` has them."""

    TAKES = "Llama-shaped models in float32 or bfloat16 on an x86 CPU with a C++ compiler"

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the kernels take the model as it is, and this machine has them."""
        weight = model.get_input_embeddings().weight
        return weight.device.type == "cpu" and NativePath.takes(model, weight.dtype)

    @staticmethod
    def takes(model: nn.Module, dtype: torch.dtype) -> bool:
        """`supports` of a model of this shape, on a CPU in this dtype; compiles the kernels if they never were."""
        if not DirectPath.supports(model):
            return False
        attention = model.model.layers[0].self_attn
        return (
            dtype in DTYPES
            and attention.head_dim % (2 * L) == 0
            and attention.head_dim <= MAX_HEAD_DIM
            and all(size % L == 0 for size in (model.config.hidden_size, model.config.intermediate_size))
            and load() is not None
        )

    def __init__(self, model: nn.Module, split_layer: int) -> None:
        self._library = load()
        inner = model.model
        self._embed, self._rotary = inner.embed_tokens, inner.rotary_emb
        self._dtype = self._embed.weight.dtype
        with torch.no_grad():
            self._layers = [_NativeLayer(layer) for layer in inner.layers]
            self._structs = (Layer * len(self._layers))(*(layer.struct for layer in self._layers))
            head = model.get_output_embeddings()
            self._head = pack_linears([head])
            self._final_gain_D, self._final_eps = inner.norm.weight.float().clone(), inner.norm.variance_epsilon
        first = self._layers[0]
        self._widest_input = max(weight.shape[1] for weight in first.weights)
        self._widest_output = max(first.qkv.shape[0], first.gate_up.shape[0])
        self.split_layer = split_layer
        self._cos_Sd = self._sin_Sd = None

    def _rotary_table(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [S, d], float32, for every position a cache can hold; grown, never shrunk."""
        if self._cos_Sd is None or len(self._cos_Sd) < capacity:
            cos, sin = self._rotary(torch.zeros(1), torch.arange(capacity)[None])
            half = cos.shape[-1] // 2
            self._cos_Sd = cos[0].contiguous()
            self._sin_Sd = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        return self._cos_Sd, self._sin_Sd

    def _run(
        self, x_MD: Tensor, blocks: range, cache: RollbackCache, placement: Placement, packing: Packing | None
    ) -> Tensor:
        """x_MD float32, changed in place: through the blocks."""
        if not blocks:
            return x_MD
        first, num_rows = self._layers[0], len(x_MD)
        keys, values = self._addresses(blocks, cache)
        width, tree = placement.positions_BQ.shape[1], placement.tree
        rows_M = _rows(placement.rows.start, placement.rows.stop, width)
        of_queries = [rows_M, placement.positions_BQ.reshape(-1), placement.slots_BQ.reshape(-1)]
        if tree is not None:
            of_queries += [tree.ancestors_BQ.reshape(-1), tree.lengths_B.repeat_interleave(width)]
        if packing is not None:
            of_queries = [of_query.index_select(0, packing.kept_M) for of_query in of_queries]
        of_queries = [of_query.contiguous() for of_query in of_queries]
        cos_Sd, sin_Sd = self._rotary_table(cache.capacity)
        threads = torch.get_num_threads()
        scratch = (
            torch.empty(num_rows, self._widest_input, dtype=self._dtype),
            torch.empty(num_rows, self._widest_output),
            torch.empty(num_rows, self._widest_input // BLOCK),
            torch.empty(threads, 4, cache.capacity + L),
        )
        addresses = [of_query.data_ptr() for of_query in of_queries] + [None] * (5 - len(of_queries))
        the_pass = Pass(
            num_rows, x_MD.shape[1], first.num_heads, first.num_kv_heads, first.head_dim, cache.capacity, threads,
            first.scale, *addresses, *(tensor.data_ptr() for tensor in (cos_Sd, sin_Sd, *scratch)),
        )
        structs = ctypes.addressof(self._structs) + blocks.start * ctypes.sizeof(Layer)
        self._library.dvi_layers(structs, len(blocks), ctypes.byref(the_pass), keys, values, x_MD.data_ptr())
        return x_MD

    def _addresses(self, blocks: range, cache: RollbackCache) -> tuple[ctypes.Array, ctypes.Array]:
        """Where the blocks' keys and values lie, as the kernels want to be told."""
        if blocks not in cache.addresses:
            first, pointers = self._layers[0], ctypes.c_void_p * len(blocks)
            buffers = [cache.buffers(i, first.num_kv_heads, first.head_dim, self._dtype) for i in blocks]
            cache.addresses[blocks] = tuple(
                pointers(*(buffer.data_ptr() for buffer in of_one)) for of_one in zip(*buffers, strict=True)
            )
        return cache.addresses[blocks]

    def give_up_weights(self, layers: nn.ModuleList) -> None:
        """Frees what the packed weights are copies of, see `dvi.model.hollow`. layers: of the model."""
        for layer, packed in zip(layers, self._layers, strict=True):
            hollow_out(layer, packed.names, lambda packed=packed: packed.unpacked())

    @property
    def has_blocks(self) -> bool:
        """Whether any weight is of a GGUF file's quantised blocks."""
        return any(weight.kind in (INT4, INT8) for weight in self._weights)

    @property
    def num_weight_bytes(self) -> int:
        """Of what a plain step reads: the packed weights, and the gains."""
        gains = [self._final_gain_D, *(gain for layer in self._layers for gain in layer.gains)]
        return sum(weight.num_bytes for weight in self._weights) + sum(gain.nbytes for gain in gains)

    @property
    def _weights(self) -> list[PackedWeight]:
        return [*(weight for layer in self._layers for weight in layer.weights), self._head]

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """h_k [B, Q, D] of the tokens at the placement's positions."""
        hidden_BQD = self._embed(token_ids_BQ)
        if self.split_layer == 0:
            return hidden_BQD
        x_MD = hidden_BQD.view(-1, hidden_BQD.shape[-1]).to(torch.float32)
        x_MD = self._run(x_MD, range(self.split_layer), cache, placement, None)
        return x_MD.to(self._dtype).view_as(hidden_BQD)

    def deep_packed(
        self, hidden_MD: Tensor, cache: RollbackCache, placement: Placement, packing: Packing | None
    ) -> Tensor:
        """The verifier's final hidden state, after the final norm, from stored h_k: of all positions of the placement,
        row by row, or of those that the packing keeps, [M, D]."""
        x_MD = hidden_MD.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        x_MD = self._run(x_MD, range(self.split_layer, len(self._layers)), cache, placement, packing)
        final_MD = torch.empty_like(x_MD, dtype=self._dtype)
        self._library.dvi_norm(
            x_MD.data_ptr(), self._final_gain_D.data_ptr(), self._final_eps, *x_MD.shape,
            self._dtype == torch.bfloat16, final_MD.data_ptr(),
        )
        return final_MD

    def head(self, final_hidden_BQD: Tensor) -> Tensor:
        """Logits [B, Q, V], float32, of final hidden states."""
        flat_MD = final_hidden_BQD.reshape(-1, final_hidden_BQD.shape[-1])
        return multiply(self._library, self._head, flat_MD).view(*final_hidden_BQD.shape[:-1], -1)


@functools.lru_cache(maxsize=256)
def _rows(start: int, stop: int, width: int) -> Tensor:
    """The cache row of each of (stop - start) * width positions, row by row, int64."""
    return torch.arange(start, stop).repeat_interleave(width)


class _NativeLayer:
    """One layer's packed weights and gains, and the struct that points at them."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.weight.shape[0] // self.head_dim
        self.num_kv_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.scale = attention.scaling
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv, self.o = pack_linears(projections), pack_linears([attention.o_proj])
        self.gate_up, self.down = pack_linears([mlp.gate_proj, mlp.up_proj]), pack_linears([mlp.down_proj])
        width, inner = attention.o_proj.weight.shape[0], mlp.up_proj.weight.shape[0]
        self._names = (
            [(f"self_attn.{name}_proj", len(p.weight)) for name, p in zip("qkv", projections, strict=True)],
            [("self_attn.o_proj", width)], [("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
            [("mlp.down_proj", width)],
        )  # fmt: skip
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        self.gains = [norm.weight.float().clone() for norm in norms]
        gains = [gain.data_ptr() for gain in self.gains] + [None] * (4 - len(norms))
        # Mistral's window is a fact of its config alone.
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.struct = Layer(
            *(weight.product for weight in self.weights), *gains,
            norms[0].variance_epsilon, norms[1].variance_epsilon, norms[-1].variance_epsilon, window or 0,
        )

    @torch.no_grad()
    def unpacked(self) -> dict[str, Tensor]:
        """The layer's own weights by their names in it, to the bit."""
        found = {}
        for weight, names in zip(self.weights, self._names, strict=True):
            parts = weight.unpacked().split([rows for _, rows in names])
            found |= {f"{name}.weight": part.clone() for (name, _), part in zip(names, parts, strict=True)}
        return found

    @property
    def names(self) -> list[str]:
        """Of the layer's own weights that are packed."""
        return [f"{name}.weight" for parts in self._names for name, _ in parts]

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        return self.qkv, self.o, self.gate_up, self.down
