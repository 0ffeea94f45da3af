"""The round of real models on a CUDA device that is not there: shapes, dtypes and devices, in the GPU's usual dtype."""
# B rows, T drafted tokens, U = T + 1 verified positions, V vocabulary.

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dvi.decode.round import RowState, draft_and_verify
from dvi.decode.sampling import SamplingBatch, SeenTokens
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import ConfidenceStop
from dvi.model.cuda_graph import can_capture
from tests.support.fake_cuda import CUDA, fake_cuda, meta_split, moved_to_fake_cuda
from tests.support.model_shapes import SHAPES
from tests.support.rehearsal import SAMPLING, params_of

ROWS, DRAFT_TOKENS, VISIBLE = 3, 4, 256
CASES = [*((name, "greedy") for name in SHAPES), *(("qwen3_8b", name) for name in SAMPLING if name != "greedy")]


@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_a_round_stays_on_the_device_in_the_models_dtype(name, sampling):
    """Catches a tensor of the host's among the device's, a product of two dtypes, and states kept wider than they are.

    At 7B and 8B and with the query norms of Qwen3, as its GPU branch goes: fused weights, writes by position.
    """
    shape = SHAPES[name]
    split, drafter = meta_split(shape.config, split_layer=shape.config.num_hidden_layers // 8, dtype=torch.bfloat16)
    hidden, vocab_size = split.hidden_size, split.vocab_size
    with fake_cuda():
        moved_to_fake_cuda(split, drafter)
        assert can_capture(split) and not split.can_pack
        cache = split.make_cache(ROWS, 2 * VISIBLE)
        batch = SamplingBatch([params_of(sampling, seed=i) for i in range(ROWS)], vocab_size=vocab_size, device=CUDA)
        seen = SeenTokens(ROWS, vocab_size, CUDA) if batch.has_penalties else None
        room_B, token_B = (torch.zeros(ROWS, dtype=torch.int64, device=CUDA) for _ in range(2))
        anchor_BD = torch.zeros(ROWS, hidden, dtype=torch.bfloat16, device=CUDA)
        state = RowState(slice(0, ROWS), room_B, token_B, anchor_BD, batch, seen)
        verified = draft_and_verify(
            split, drafter, cache, state, ConfidenceStop(DRAFT_TOKENS), DRAFT_TOKENS, StrictRule(),
            wants_log_probs=True, keeps_logits=True,
        )  # fmt: skip

    def described(tensor: Tensor) -> tuple:
        assert tensor.device == CUDA
        return tuple(tensor.shape), tensor.dtype

    width, bfloat16 = DRAFT_TOKENS + 1, torch.bfloat16
    assert described(verified.draft.hidden_BUD) == described(verified.final_BUD) == ((ROWS, width, hidden), bfloat16)
    assert described(verified.logits_BUV) == ((ROWS, width, vocab_size), bfloat16)
    assert described(verified.judged.anchor_BD) == ((ROWS, hidden), bfloat16)
    assert described(verified.draft.log_probs_BT) == ((ROWS, DRAFT_TOKENS), torch.float32)
    assert described(verified.judged.for_host_BH) == ((ROWS, DRAFT_TOKENS + 5), torch.int64)
    head_dim, num_kv_heads = split.layers[0].self_attn.head_dim, shape.config.num_key_value_heads
    for layer in (0, split.num_layers - 1):
        keys, values = cache._buffers[layer]
        assert described(keys) == described(values) == ((ROWS, num_kv_heads, 2 * VISIBLE, head_dim), bfloat16)
