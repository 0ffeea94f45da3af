"""A lean path through Llama-shaped layers: few, fused calls where small batches are bound by dispatch, not arithmetic.

Knows the weights of Llama-shaped blocks (pre-norm, rotary, grouped-query attention, SwiGLU) and a `RollbackCache`;
knows nothing of drafting. Gives the same hidden states as the model's own forward up to rounding; `SplitModel` checks.

On CPUs the weights are packed a second time: each projection is stored as panels and multiplied with `bmm`, which
reads every weight once for any small number of rows, where one ordinary matrix product repacks them on every call.
Measured, 2 cores of an AVX2 server, float32, 256 -> 1408: 1 row 154 -> 86 us, 5 rows 396 -> 119 us.
"""
# B rows, Q query positions, M matrix rows (B * Q, or fewer where a packing leaves some out), N = B * Q, P panels,
# H query heads, G key/value heads, d head size.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvi.model.kv_cache import Placement, RollbackCache
from dvi.model.ragged import Packing

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary variants whose angles depend on position alone, so that one table serves every length.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NUM_PANELS = 8  # 8: within noise of the best of 2..64 for every projection of the bundled model, see LOG.md 2026-11-22


class Panels:
    """y = x W^T + b for few rows, computed as `num_panels` independent products.

    The result is [P, M, N/P]: panel p holds outputs p*N/P .. (p+1)*N/P, so a panel per head is already in attention's
    layout and needs no transpose.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, num_panels: int) -> None:
        n, k = weight_NK.shape
        self.num_panels = num_panels
        self.weight_PKn = weight_NK.view(num_panels, n // num_panels, k).transpose(1, 2).contiguous()
        self.bias_P1n = None if bias_N is None else bias_N.view(num_panels, 1, n // num_panels).clone()

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_PMK = x_MK.expand(self.num_panels, *x_MK.shape)
        if self.bias_P1n is None:
            return torch.bmm(x_PMK, self.weight_PKn)
        return torch.baddbmm(self.bias_P1n, x_PMK, self.weight_PKn)


def join_panels(y_PMn: Tensor) -> Tensor:
    """[P, M, n] -> [M, P*n]; free for one row."""
    num_panels, rows, width = y_PMn.shape
    return y_PMn.transpose(0, 1).reshape(rows, num_panels * width)


def panels_for(width: int) -> int:
    """The largest panel count up to NUM_PANELS that divides the width."""
    return next(count for count in range(NUM_PANELS, 0, -1) if width % count == 0)


class PanelHead:
    """The output head packed as panels: [M, D] -> [M, V]."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self._panels = Panels(weight_VD, bias_V, panels_for(weight_VD.shape[0]))

    def __call__(self, x_MD: Tensor) -> Tensor:
        return join_panels(self._panels(x_MD))


class PassPlace:
    """What all layers of one pass share: its placement, rotary factors and masks, and which positions are computed."""

    def __init__(
        self, placement: Placement, cos_Sd: Tensor, sin_Sd: Tensor, *, group: int, packing: Packing | None
    ) -> None:
        self.placement = placement
        self.rows, self.width = placement.positions_BQ.shape
        self._packing = packing
        self.is_single_row = self.rows == 1 and placement.slots is not None and packing is None
        if self.is_single_row and placement.tree is None:
            self.cos_Md, self.sin_Md = cos_Sd[placement.slots], sin_Sd[placement.slots]
        else:
            positions_M = placement.positions_BQ.reshape(-1)
            if packing is not None:
                positions_M = positions_M[packing.kept_M]
            self.cos_Md, self.sin_Md = cos_Sd[positions_M], sin_Sd[positions_M]
        self._group = group
        self._folded_masks: dict[int | None, Tensor | None] = {}

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """M computed positions in `dim` -> the N that attention reads."""
        return x if self._packing is None else x.index_select(dim, self._packing.source_N)

    def gather(self, x_ND: Tensor) -> Tensor:
        """[N, D] of attention -> [M, D]."""
        return x_ND if self._packing is None else x_ND.index_select(0, self._packing.kept_M)

    def needs_mask(self, window: int | None) -> bool:
        """False when every query may see every visible slot."""
        return not self.placement.is_trivially_causal or (window is not None and self.placement.visible > window)

    def folded_mask(self, window: int | None, dtype: torch.dtype, num_kv_heads: int) -> Tensor | None:
        """Additive mask [B*G, group*Q, S] for queries folded into their key/value head; None when all is visible."""
        if window not in self._folded_masks:
            mask = None
            if self.needs_mask(window):
                mask_B1QS = self.placement.mask_B1QS(window=window, dtype=dtype)
                mask = mask_B1QS.repeat(1, num_kv_heads, self._group, 1).flatten(0, 1)
            self._folded_masks[window] = mask
        return self._folded_masks[window]


class _Shape:
    """Numbers of one attention block that both block kinds need."""

    def __init__(self, layer: nn.Module) -> None:
        attention = layer.self_attn
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.weight.shape[0] // self.head_dim
        self.num_kv_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.group = self.num_heads // self.num_kv_heads
        self.num_rotated = self.num_heads + self.num_kv_heads
        self.scale = attention.scaling
        # Mistral's window is a fact of its config alone.
        self.window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


class _PackedBlock:
    """One layer for few rows on a CPU: weights packed as panels, norm gains and the attention scale folded into them.

    Call counts matter here: at 256 wide a layer is some 35 calls of 3 us next to 100 us of arithmetic.
    """

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.shape = shape = _Shape(layer)
        self._input_floor, input_gain_D = _norm_constants(layer.input_layernorm)
        self._post_floor, post_gain_D = _norm_constants(layer.post_attention_layernorm)
        self._qk_gain_P1d = None
        query_scale = shape.scale
        if hasattr(attention, "q_norm"):
            self._qk_floor, q_gain_d = _norm_constants(attention.q_norm)
            _, k_gain_d = _norm_constants(attention.k_norm)
            gains = [q_gain_d * shape.scale] * shape.num_heads + [k_gain_d] * shape.num_kv_heads
            self._qk_gain_P1d = torch.stack(gains)[:, None]
            query_scale = 1.0
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        scales = (query_scale, 1.0, 1.0)
        weight = torch.cat([p.weight * scale for p, scale in zip(projections, scales, strict=True)]) * input_gain_D
        bias = None
        if projections[0].bias is not None:
            bias = torch.cat([p.bias * scale for p, scale in zip(projections, scales, strict=True)])
        self._qkv = Panels(weight, bias, shape.num_heads + 2 * shape.num_kv_heads)
        self._half = panels_for(mlp.gate_proj.weight.shape[0])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * post_gain_D
        self._gate_up = Panels(gate_up, None, 2 * self._half)
        width = attention.o_proj.weight.shape[0]
        self._o = Panels(attention.o_proj.weight, None, panels_for(width))
        self._down = Panels(mlp.down_proj.weight, None, panels_for(width))

    def __call__(self, x_MD: Tensor, index: int, cache: RollbackCache, place: PassPlace) -> Tensor:
        qkv_PMd = self._qkv(_normalise(x_MD, self._input_floor))
        attended_MK = self._attend(qkv_PMd, index, cache, place)
        x_MD = x_MD + join_panels(self._o(attended_MK))
        both_PMn = self._gate_up(_normalise(x_MD, self._post_floor))
        gated_PMn = F.silu(both_PMn[: self._half], inplace=True).mul_(both_PMn[self._half :])
        return x_MD + join_panels(self._down(join_panels(gated_PMn)))

    def _attend(self, qkv_PMd: Tensor, index: int, cache: RollbackCache, place: PassPlace) -> Tensor:
        shape, rows, width = self.shape, place.rows, place.width
        h, g, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qk_PMd = qkv_PMd[: shape.num_rotated]
        if self._qk_gain_P1d is not None:
            qk_PMd.copy_(_normalise(qk_PMd, self._qk_floor) * self._qk_gain_P1d)
        _rotate(qk_PMd, place, out=qk_PMd)
        qkv_PNd = place.spread(qkv_PMd, 1)
        # Queries of a group are stacked as rows of their shared key/value head: attention is three calls.
        if place.is_single_row:
            stacked_2gSd = cache.write_stacked(index, qkv_PNd[h:].view(2, g, width, d), place.placement)
            keys, values = stacked_2gSd.unbind()
            queries = qkv_PNd[:h].view(g, shape.group * width, d)
        else:
            qkv_BPQd = qkv_PNd.view(-1, rows, width, d).transpose(0, 1)
            written = cache.write(index, qkv_BPQd[:, h : h + g], qkv_BPQd[:, h + g :], place.placement)
            keys, values = (t.flatten(0, 1) for t in written)
            queries = qkv_BPQd[:, :h].reshape(rows * g, shape.group * width, d)
        mask = place.folded_mask(shape.window, queries.dtype, g)
        keys_T = keys.transpose(1, 2)
        scores = torch.bmm(queries, keys_T) if mask is None else torch.baddbmm(mask, queries, keys_T)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values)
        return place.gather(attended.view(rows, h, width, d).transpose(1, 2).reshape(rows * width, h * d))


class _FusedBlock:
    """One layer for GPUs and half precisions: projections fused in place, PyTorch's own attention.

    The model's parameters become views of the fused tensors, so nothing is stored twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.shape = _Shape(layer)
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qk_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._qkv_NK = _fuse_in_place(projections)
        self._bias_N = None if projections[0].bias is None else torch.cat([p.bias for p in projections])
        self._gate_up_NK = _fuse_in_place((mlp.gate_proj, mlp.up_proj))
        self._o_KN, self._down_KN = attention.o_proj.weight.t(), mlp.down_proj.weight.t()

    def __call__(self, x_MD: Tensor, index: int, cache: RollbackCache, place: PassPlace) -> Tensor:
        x_MD = torch.addmm(x_MD, self._attend(rms_norm(x_MD, self._input_norm), index, cache, place), self._o_KN)
        gate_MN, up_MN = F.linear(rms_norm(x_MD, self._post_norm), self._gate_up_NK).chunk(2, dim=-1)
        return torch.addmm(x_MD, F.silu(gate_MN) * up_MN, self._down_KN)

    def _attend(self, normed_MD: Tensor, index: int, cache: RollbackCache, place: PassPlace) -> Tensor:
        shape, rows, width = self.shape, place.rows, place.width
        h, g, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv_MPd = F.linear(normed_MD, self._qkv_NK, self._bias_N).view(len(normed_MD), -1, d)
        qk_PMd = qkv_MPd[:, : shape.num_rotated].transpose(0, 1)
        if self._qk_norms is not None:
            q_norm, k_norm = self._qk_norms
            qk_PMd = torch.cat([rms_norm(qk_PMd[:h], q_norm), rms_norm(qk_PMd[h:], k_norm)])
        qk_BPQd = place.spread(_rotate(qk_PMd, place), 1).view(-1, rows, width, d).transpose(0, 1)
        values_BgQd = place.spread(qkv_MPd[:, shape.num_rotated :], 0).view(rows, width, g, d).transpose(1, 2)
        keys, values = cache.write(index, qk_BPQd[:, h:], values_BgQd, place.placement)
        mask = place.placement.mask_B1QS(window=shape.window) if place.needs_mask(shape.window) else None
        attended_BhQd = F.scaled_dot_product_attention(
            qk_BPQd[:, :h], keys, values, attn_mask=mask, scale=shape.scale, enable_gqa=shape.group > 1
        )
        return place.gather(attended_BhQd.transpose(1, 2).reshape(rows * width, h * d))


def _rotate(x_PMd: Tensor, place: PassPlace, out: Tensor | None = None) -> Tensor:
    """Rotary embedding: x cos + rotate_half(x) sin, with rotate_half's sign baked into the sine table."""
    rolled_PMd = torch.roll(x_PMd, x_PMd.shape[-1] // 2, -1)
    return torch.addcmul(x_PMd * place.cos_Md, rolled_PMd, place.sin_Md, out=out)


def _norm_constants(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """sqrt(D eps) as a 0-d tensor and the gain times sqrt(D): x / sqrt(mean(x^2) + eps) * gain, rearranged so that
    `_normalise` is three calls and the gain folds into the weights that follow."""
    width = norm.weight.shape[0]
    return norm.weight.new_tensor(math.sqrt(width * norm.variance_epsilon)), norm.weight * math.sqrt(width)


def _normalise(x: Tensor, floor: Tensor) -> Tensor:
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """The model's own RMSNorm: in float32, then its gain in the model's dtype."""
    return norm.weight * F.rms_norm(x.float(), x.shape[-1:], eps=norm.variance_epsilon).to(x.dtype)


def _fuse_in_place(linears: tuple[nn.Linear, ...]) -> Tensor:
    """One weight for several projections of the same input; their own weights become views of it."""
    fused_NK = torch.cat([linear.weight.data for linear in linears])
    start = 0
    for linear in linears:
        stop = start + linear.weight.shape[0]
        linear.weight.data = fused_NK[start:stop]
        start = stop
    return fused_NK


class DirectPath:
    """Shallow and deep passes over the blocks of one Llama-shaped model."""

    TAKES = "Llama-shaped models"

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """True for Llama-shaped models whose weights are plain tensors on one device with static rotary angles."""
        config = model.config
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            return False
        parameters = list(model.parameters())
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return (
            rope_type in STATIC_ROPE_TYPES
            and config.hidden_act == "silu"
            and not getattr(config, "mlp_bias", False)
            and all(layer.self_attn.o_proj.bias is None for layer in model.model.layers)
            and len({p.device for p in parameters}) == 1
            and all(type(p) is nn.Parameter for p in parameters)
        )

    def __init__(self, model: nn.Module, split_layer: int) -> None:
        inner = model.model
        self._embed, self._final_norm, self._rotary = inner.embed_tokens, inner.norm, inner.rotary_emb
        weight = model.get_input_embeddings().weight
        pack = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
        with torch.no_grad():
            self._blocks = [(_PackedBlock if pack else _FusedBlock)(layer) for layer in inner.layers]
            head = model.get_output_embeddings()
            self._head = PanelHead(head.weight, head.bias) if pack else head
            self._final_floor, self._final_gain_D = _norm_constants(inner.norm) if pack else (None, None)
        self.split_layer = split_layer
        self._rotary_tables: list[tuple[Tensor, Tensor]] = []

    def _rotary_table(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [S, d] for every position a cache can hold: for one capacity always the same tensors."""
        for table in self._rotary_tables:
            if len(table[0]) >= capacity:
                return table
        # A graph of another batch may hold a shorter one: it stays. By doubling, all together are as long as the last.
        longest = len(self._rotary_tables[-1][0]) if self._rotary_tables else 0
        weight = self._embed.weight
        positions_1S = torch.arange(max(capacity, 2 * longest), device=weight.device)[None]
        cos, sin = self._rotary(weight.new_zeros(1), positions_1S)
        half = cos.shape[-1] // 2
        signed_Sd = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        self._rotary_tables.append((cos[0].contiguous(), signed_Sd))
        return self._rotary_tables[-1]

    def _run(
        self, x_MD: Tensor, blocks: range, cache: RollbackCache, placement: Placement, packing: Packing | None = None
    ) -> Tensor:
        if not blocks:
            return x_MD
        cos, sin = self._rotary_table(cache.capacity)
        place = PassPlace(placement, cos, sin, group=self._blocks[0].shape.group, packing=packing)
        for index in blocks:
            x_MD = self._blocks[index](x_MD, index, cache, place)
        return x_MD

    def shallow(self, token_ids_BQ: Tensor, cache: RollbackCache, placement: Placement) -> Tensor:
        """h_k [B, Q, D] of the tokens at the placement's positions."""
        x_BQD = self._embed(token_ids_BQ)
        x_MD = self._run(x_BQD.view(-1, x_BQD.shape[-1]), range(self.split_layer), cache, placement)
        return x_MD.view_as(x_BQD)

    def deep_packed(
        self, hidden_MD: Tensor, cache: RollbackCache, placement: Placement, packing: Packing | None
    ) -> Tensor:
        """The verifier's final hidden state, after the final norm, from stored h_k: of all positions of the placement,
        row by row, or of those that the packing keeps, [M, D]."""
        x_MD = self._run(hidden_MD, range(self.split_layer, len(self._blocks)), cache, placement, packing)
        if self._final_floor is not None:
            return _normalise(x_MD, self._final_floor) * self._final_gain_D
        return rms_norm(x_MD, self._final_norm)

    def head(self, final_hidden_BQD: Tensor) -> Tensor:
        """Logits [B, Q, V] of final hidden states."""
        flat_MD = final_hidden_BQD.reshape(-1, final_hidden_BQD.shape[-1])
        return self._head(flat_MD).view(*final_hidden_BQD.shape[:-1], -1)
