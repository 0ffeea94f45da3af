"""SplitModel: every split of every architecture computes what the whole model computes, and leaves it as it was."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

import dvi.model.split
from dvi.model.kv_cache import RollbackCache
from dvi.model.llama_path import DirectPath
from dvi.model.split import SplitModel
from tests.support.tiny_models import ARCHITECTURES, SLIDING_WINDOW, tiny_model

NUM_LAYERS = 4
TEXT_LENGTH = 16
SPLIT_LAYERS = range(NUM_LAYERS)
# The views run the model's own code. The direct path keeps float64 where the model rounds its norms to float32.
TOLERANCE = {"views": 1e-10, "direct": 1e-5}

# The paths and architectures that go together, "llama-eager" for attention that adds its masks.
EAGER = "llama-eager"
CASES = [("views", arch) for arch in (*ARCHITECTURES, EAGER)]
CASES += [("direct", arch) for arch in ("llama", "mistral", "qwen2", "qwen3")]


@functools.cache
def model_of(arch: str) -> PreTrainedModel:
    if arch == EAGER:
        return tiny_model("llama", attn_implementation="eager")
    return tiny_model(arch)


@functools.cache
def split_of(arch: str, split_layer: int, path: str) -> SplitModel:
    return SplitModel(model_of(arch), split_layer=split_layer, path=path)


def text(rows: int, seed: int = 0, length: int = TEXT_LENGTH) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """[B, S, V] of each row alone, so that no batch mate can touch it."""
    ones = torch.ones_like(ids_BS[:1])
    return torch.cat([model(input_ids=ids_S[None], attention_mask=ones, use_cache=False).logits for ids_S in ids_BS])


def visible_for(model: PreTrainedModel) -> int | None:
    """Eager attention sums its softmax in float32: beyond 1e-7 it compares only over the plain forward's width."""
    return TEXT_LENGTH if model.config._attn_implementation == "eager" else None


def forward(split: SplitModel, ids_BQ: Tensor, cache: RollbackCache, *, visible: int | None = None) -> Tensor:
    """Logits [B, Q, V] of one pass of both parts, from each row's length on. Commits nothing."""
    placement = cache.place(offset=0, width=ids_BQ.shape[1], visible=visible)
    return split.head(split.deep(split.shallow(ids_BQ, cache, placement), ids_BQ, cache, placement))


def draft_and_verify(split: SplitModel, ids_BU: Tensor, cache: RollbackCache, *, visible: int | None = None) -> Tensor:
    """Logits [B, U, V] of a round: a shallow step per token, one deep pass over all of them. Commits nothing."""
    hidden = [
        split.shallow(ids_BU[:, i : i + 1], cache, cache.place(offset=i, width=1, visible=visible))
        for i in range(ids_BU.shape[1])
    ]
    placement = cache.place(offset=0, width=ids_BU.shape[1], visible=visible)
    return split.head(split.deep(torch.cat(hidden, dim=1), ids_BU, cache, placement))


def serve(split: SplitModel, ids_BS: Tensor, *, prompts: list[int], kept: list[list[int]]) -> list[Tensor]:
    """Logits [S', V] of every committed position of each row, over a right-padded prefill and rounds of three tokens.

    Round r drafts the row's true text for kept[r][row] tokens and junk after them, and commits just the former.
    """
    cache = split.make_cache(len(prompts), TEXT_LENGTH + 3)
    visible = visible_for(split.model)
    prompt_logits_BQV = forward(split, ids_BS[:, : max(prompts)], cache, visible=visible)
    cache.commit(prompts)
    committed = [[logits[:n]] for logits, n in zip(prompt_logits_BQV, prompts, strict=True)]
    for kept_B in kept:
        columns_BU = cache.lengths_B[:, None] + torch.arange(3)
        drafted_BU = ids_BS.gather(1, columns_BU)
        is_junk_BU = torch.arange(3) >= torch.tensor(kept_B)[:, None]
        drafted_BU = torch.where(is_junk_BU, 63 - drafted_BU, drafted_BU)
        logits_BUV = draft_and_verify(split, drafted_BU, cache, visible=visible)
        cache.commit(kept_B)
        for row, n in enumerate(kept_B):
            committed[row].append(logits_BUV[row, :n])
    return [torch.cat(parts) for parts in committed]


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = TOLERANCE["views"]) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance


@pytest.mark.parametrize("split_layer", SPLIT_LAYERS)
@pytest.mark.parametrize(("path", "arch"), CASES)
def test_prefill_rejected_and_accepted_rounds_equal_the_plain_forward(path, arch, split_layer):
    """Catches wrong masks, windows, positions, layers and heads, and keys of rejected drafts that stay visible."""
    model = model_of(arch)
    split = split_of(arch, split_layer, path)
    ids_BS = text(rows=1)
    (logits_SV,) = serve(split, ids_BS, prompts=[5], kept=[[0], [2], [3]])
    assert len(logits_SV) > SLIDING_WINDOW
    assert_close(logits_SV, plain_logits(model, ids_BS)[0, : len(logits_SV)], tolerance=TOLERANCE[path])


@pytest.mark.parametrize("split_layer", SPLIT_LAYERS)
@pytest.mark.parametrize(("path", "arch"), CASES)
def test_rows_of_unequal_length_equal_each_row_alone(path, arch, split_layer):
    """Catches positions, alibi and masks taken from the batch, not the row, once prompts and acceptance differ."""
    model = model_of(arch)
    split = split_of(arch, split_layer, path)
    ids_BS = text(rows=3)
    rows = serve(split, ids_BS, prompts=[2, 7, 4], kept=[[3, 0, 1], [2, 1, 3], [0, 3, 1]])
    assert [len(logits_SV) for logits_SV in rows] == [7, 11, 9]
    for logits_SV, expected_SV in zip(rows, plain_logits(model, ids_BS), strict=True):
        assert_close(logits_SV, expected_SV[: len(logits_SV)], tolerance=TOLERANCE[path])


@pytest.mark.parametrize("split_layer", SPLIT_LAYERS)
@pytest.mark.parametrize(("path", "arch"), CASES)
def test_the_hidden_states_are_the_raw_split_layer_and_the_normed_last_one(path, arch, split_layer):
    """A drafter trained on a normed h_k, or a replay of an un-normed h_L, would learn from the wrong tensor."""
    model = model_of(arch)
    split = split_of(arch, split_layer, path)
    ids_BS = text(rows=1)
    states = model(
        input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False, output_hidden_states=True
    ).hidden_states
    cache = split.make_cache(1, TEXT_LENGTH)
    placement = cache.place(offset=0, width=TEXT_LENGTH)
    hidden_BQD = split.shallow(ids_BS, cache, placement)
    assert_close(hidden_BQD, states[split_layer], tolerance=TOLERANCE[path])
    assert_close(split.deep(hidden_BQD, ids_BS, cache, placement), states[-1], tolerance=TOLERANCE[path])


@pytest.mark.parametrize("arch", ["mistral", "qwen3"])
def test_the_direct_path_keeps_the_window_in_half_precision_too(arch):
    """Half precision runs other kernels, whose mask may be left out for one query only while the window sees it all."""
    model = tiny_model(arch, dtype=torch.bfloat16)
    ids_BS = text(rows=1)
    views, direct = (SplitModel(model, split_layer=3, path=path) for path in ("views", "direct"))
    logits = [serve(split, ids_BS, prompts=[10], kept=[[3]])[0] for split in (views, direct)]
    assert_close(logits[1], logits[0], tolerance=0.05)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2", "falcon"])
def test_the_head_is_the_models_own_whether_tied_or_not(arch, is_tied):
    """Catches a head looked up by name or rebuilt from the embedding."""
    model = tiny_model(arch, tied=is_tied)
    split = SplitModel(model, split_layer=1, path="views")
    assert (split.head_weight_VD is model.get_input_embeddings().weight) == is_tied
    ids_BS = text(rows=1)
    logits = forward(split, ids_BS, split.make_cache(1, TEXT_LENGTH))
    assert_close(logits, plain_logits(model, ids_BS))


@pytest.mark.parametrize("arch", ["granite", "cohere", "gemma2", "phi", "llama"])
def test_post_head_turns_any_slice_of_the_linear_head_into_that_slice_of_the_logits(arch):
    """A drafter over a trimmed vocabulary needs the same scaling and soft cap, element by element, and the bias."""
    model = tiny_model(arch)
    split = SplitModel(model, split_layer=1, path="views")
    ids_BS, kept_V = text(rows=1), slice(10, 20)
    final = model.get_decoder()(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)).last_hidden_state
    bias_V = None if split.head_bias_V is None else split.head_bias_V[kept_V]
    sliced = split.post_head(torch.nn.functional.linear(final, split.head_weight_VD[kept_V], bias_V))
    assert_close(sliced, plain_logits(model, ids_BS)[..., kept_V])


def test_experts_in_float32_equal_the_plain_forward_up_to_rounding():
    """Grouped experts take another code path than the float64 models above; 1e-5 is float32 rounding."""
    model = tiny_model("qwen3_moe", dtype=torch.float32, experts_implementation=None)
    split = SplitModel(model, split_layer=1, path="views")
    ids_BS = text(rows=1)
    (logits_SV,) = serve(split, ids_BS, prompts=[5], kept=[[0], [3], [1]])
    assert_close(logits_SV, plain_logits(model, ids_BS)[0, : len(logits_SV)], tolerance=1e-5)


# Named sizes are for configs that do not know the Llama names.
FURTHER_ARCHITECTURES = {
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},
    "biogpt": {},
    "cohere2": {"sliding_window": SLIDING_WINDOW},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
        "first_k_dense_replace": 1, "moe_intermediate_size": 32, "experts_implementation": "eager",
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", FURTHER_ARCHITECTURES)
def test_further_ways_to_place_tokens_and_to_cache_pass_the_self_check(arch):
    """Alibi, learned positions, interleaved rotary, latent keys: the views name no architecture, so these work."""
    model = tiny_model(arch, **FURTHER_ARCHITECTURES[arch])
    for split_layer in (0, 2):
        SplitModel(model, split_layer=split_layer, path="views")


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_splitting_leaves_the_model_and_its_config_as_they_were(arch):
    """Views that wrote to shared dicts, or hooks left behind, would change the model for everyone else who uses it."""
    model = tiny_model(arch)
    decoder = model.get_decoder()

    def snapshot() -> tuple:
        modules = [(name, module, len(module._forward_hooks)) for name, module in model.named_modules()]
        return repr(model.config), repr(decoder.config), model.config.to_dict(), dict(vars(decoder.config)), modules

    ids_BS = text(rows=1)
    logits, before = plain_logits(model, ids_BS), snapshot()
    fingerprint = SplitModel(model, split_layer=2, path="views").fingerprint()
    serve(SplitModel(model, split_layer=1, path="views"), ids_BS, prompts=[5], kept=[[3]])
    after = snapshot()
    assert after == before
    assert SplitModel(model, split_layer=1, path="views").fingerprint() == fingerprint
    assert torch.equal(plain_logits(model, ids_BS), logits)


def test_the_views_hold_the_models_own_layers_and_weights():
    """A copied weight would double the memory and miss later changes, device maps and tensor parallelism."""
    model = tiny_model("llama")
    path = SplitModel(model, split_layer=1, path="views")._path
    own_layers = list(model.model.layers)
    assert [*path._shallow.layers, *list(path._deep.layers)[1:]] == own_layers
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for p in itertools.chain(path._shallow.parameters(), path._deep.parameters())} <= own


@pytest.mark.parametrize("split_layer", SPLIT_LAYERS)
def test_each_layer_runs_once_per_token(split_layer):
    """Catches recomputation: shallow must not run deep layers, nor deep the shallow ones."""
    model = tiny_model("gpt_neox")
    split = SplitModel(model, split_layer=split_layer, path="views")
    runs: list[int] = []
    for index, layer in enumerate(model.gpt_neox.layers):
        layer.register_forward_hook(lambda *_args, index=index: runs.append(index))
    cache = split.make_cache(1, 4)
    placement = cache.place(offset=0, width=4)
    ids_BQ = text(rows=1, length=4)
    hidden = split.shallow(ids_BQ, cache, placement)
    assert runs == list(range(split_layer))
    split.deep(hidden, ids_BQ, cache, placement)
    assert runs == list(range(NUM_LAYERS))


def test_a_decoder_whose_forward_is_wrapped_by_accelerate_is_split_all_the_same():
    """device_map binds a forward to the instance; a view that inherited it would run the whole original decoder."""
    model = tiny_model("llama")
    add_hook_to_module(model.model, ModelHook())
    split = SplitModel(model, split_layer=1, path="views")
    ids_BS = text(rows=1)
    assert_close(forward(split, ids_BS, split.make_cache(1, TEXT_LENGTH)), plain_logits(model, ids_BS))


def test_the_backbone_takes_no_gradient():
    """A trainable backbone would let an optimizer change the verifier."""
    model = tiny_model("llama").requires_grad_(True).train()
    split = SplitModel(model, split_layer=1)
    assert not any(parameter.requires_grad for parameter in split.model.parameters())
    assert not split.model.training


@pytest.mark.parametrize("split_layer", [-1, NUM_LAYERS])
def test_a_split_layer_outside_the_model_is_refused_with_the_range(split_layer):
    """At num_layers nothing would be left to verify with; negative indices would count from the end."""
    expected = rf"split_layer must be in 0\.\.3 for this 4-layer model, got {split_layer}; try 1"
    with pytest.raises(ValueError, match=expected):
        SplitModel(tiny_model("llama"), split_layer=split_layer)


def test_unknown_and_unsuitable_paths_are_refused_with_the_choices():
    """A misspelt path must not fall back to another silently."""
    with pytest.raises(ValueError, match="must be one of auto, views, direct, native, got 'fast'"):
        SplitModel(tiny_model("llama"), split_layer=1, path="fast")
    with pytest.raises(ValueError, match="GPT2LMHeadModel in float64; use 'auto' or 'views'"):
        SplitModel(tiny_model("gpt2"), split_layer=1, path="direct")


def test_auto_is_direct_where_that_is_supported_and_views_elsewhere():
    """Catches a lean path that is never taken, or taken for a model it does not know."""
    for arch in ("llama", "gpt2"):
        model = tiny_model(arch)
        assert SplitModel(model, split_layer=1).path == ("direct" if DirectPath.supports(model) else "views")


def headless_llama() -> PreTrainedModel:
    return LlamaModel(tiny_model("llama").config)


def encoder_decoder() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=8))


def flash_attention() -> PreTrainedModel:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


ALTERNATING = ("sliding_attention", "full_attention") * 2
REFUSED = {
    "encoder-decoder": (encoder_decoder, "it is an encoder-decoder"),
    "no head": (headless_llama, "it has no output head; load it with AutoModelForCausalLM"),
    "flash attention": (flash_attention, "load it with attn_implementation='sdpa'"),
    "mamba": (lambda: tiny_model("mamba"), "linear_attention layers keep|keeps recurrent state"),
    "rwkv": (lambda: tiny_model("rwkv"), "keeps recurrent state"),
    "jamba": (lambda: tiny_model("jamba"), "mamba layers keep|keeps recurrent state"),
    "qwen3_next": (lambda: tiny_model("qwen3_next", num_experts=2), "linear_attention layers keep"),
    "lfm2": (lambda: tiny_model("lfm2", layer_types=["conv", "full_attention"] * 2), "conv layers keep"),
    "llama4": (lambda: tiny_model("llama4_text", num_local_experts=2), "chunked_attention layers keep"),
    "gemma3n": (
        lambda: tiny_model(
            "gemma3n_text", num_kv_shared_layers=2, layer_types=list(ALTERNATING), vocab_size_per_layer_input=64
        ),
        "its last 2 layers read the keys and values of earlier ones",
    ),
    "gpt_neo": (
        lambda: tiny_model("gpt_neo", num_heads=4, attention_types=[[["global", "local"], 2]]),
        "its local layers take the queries for the cache's last slots",
    ),
    # The rest is found by the self-check alone: a norm used twice, no cache at all, inputs to every layer by token.
    "nanochat": (
        lambda: tiny_model("nanochat"),
        "prefill at split_layer 1 differs from the plain forward by a relative error of",
    ),
    "openai-gpt": (
        lambda: tiny_model("openai-gpt", n_embd=32, n_layer=4, n_head=4),
        "verification at split_layer 1 differs from the plain forward by a relative error of",
    ),
    "gemma3n without sharing": (
        lambda: tiny_model(
            "gemma3n_text", num_kv_shared_layers=0, layer_types=list(ALTERNATING), vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * NUM_LAYERS,
        ),
        "its layers do not run apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_with_the_reason(name):
    """Without the refusal these would draft from states that no rollback can restore, and be silently wrong."""
    build, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"cannot be split: .*({reason})"):
        SplitModel(build(), split_layer=1)


def test_the_self_check_finds_a_head_with_a_missing_scale(monkeypatch):
    """The safety net must have no hole: here the formula after the head is dropped on purpose."""
    monkeypatch.setattr(dvi.model.split, "post_head_of", lambda _config: lambda logits: logits)
    with pytest.raises(ValueError, match=r"prefill at split_layer 1 differs .* relative error of [0-9.e+-]+; rounding"):
        SplitModel(tiny_model("granite"), split_layer=1)


@pytest.mark.parametrize("path", ["views", "direct"])
def test_the_self_check_finds_rows_placed_as_if_they_were_of_equal_length(path, monkeypatch):
    """The safety net for batches: here every row is placed where the furthest one goes."""
    place = RollbackCache.place

    def place_at_the_furthest(self: RollbackCache, **kwargs):
        lengths, self.lengths = self.lengths, [max(self.lengths)] * self.rows
        try:
            return place(self, **kwargs)
        finally:
            self.lengths = lengths

    monkeypatch.setattr(RollbackCache, "place", place_at_the_furthest)
    with pytest.raises(ValueError, match="a batch of unequal lengths at split_layer 1 differs"):
        SplitModel(tiny_model("llama"), split_layer=1, path=path)


def test_the_fingerprint_follows_every_weight_and_the_head_fingerprint_only_the_head():
    """A hash that misses a tensor would call a changed backbone the same."""
    model = tiny_model("llama")
    split = SplitModel(model, split_layer=1, path="views")
    whole, head = split.fingerprint(), split.head_fingerprint()
    assert len(whole) == len(head) == 64
    model.model.norm.weight[3] += 1e-12
    assert split.fingerprint() != whole
    assert split.head_fingerprint() == head
    model.lm_head.weight[0, 0] += 1e-3  # the head is hashed as float32
    assert split.head_fingerprint() != head


def test_models_from_the_same_seed_have_the_same_fingerprint():
    """Adapters are tied to their base by it, so it must not depend on the process, the split or the path."""
    models = [SplitModel(tiny_model("llama", seed=seed), split_layer=k) for seed, k in ((0, 1), (0, 2), (1, 1))]
    fingerprints = [split.fingerprint() for split in models]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
