"""Drafters as models of their own: they draft alike where they are loaded without this library, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dvi.model import standalone_model
from dvi.model.split import SplitModel
from dvi.model.standalone_model import export_standalone
from tests.model.test_adapter_store import make_split, model_logits, trained


@pytest.fixture(scope="module")
def split() -> SplitModel:
    return make_split()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "smollm3", "gemma2", "granite", "cohere", "opt", "gpt_neox"])
def test_a_standalone_draft_model_gives_the_drafters_logits(tmp_path: Path, arch: str) -> None:
    """Would catch a lost logit scale or soft-cap, a norm off by one (Gemma), uncut per-layer lists, a tied head."""
    split = make_split(arch, split_layer=1)
    drafter = trained(split, kind="lora_head")
    head_before = split.head_fingerprint()
    export_standalone(tmp_path, drafter, split)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == 1 and split.model.config.num_hidden_layers == 4
    assert split.head_fingerprint() == head_before
    token_ids_BQ = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = model(input_ids=token_ids_BQ).logits
    torch.testing.assert_close(logits, model_logits(drafter, split, token_ids_BQ), rtol=1e-4, atol=1e-4)  # float32 sums


def test_a_standalone_draft_model_of_a_trimmed_drafter_keeps_the_full_vocabulary(
    tmp_path: Path, split: SplitModel
) -> None:
    """Would catch a correction added to the wrong rows, or a vocabulary that `generate` would refuse."""
    token_ids_V, token_ids_BQ = torch.tensor([3, 8, 60]), torch.arange(6)[None]
    drafter = trained(split, kind="lora_head", token_ids_V=token_ids_V)
    export_standalone(tmp_path, drafter, split)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(input_ids=token_ids_BQ).logits
    assert logits.shape[-1] == split.vocab_size
    expected = model_logits(drafter, split, token_ids_BQ)
    torch.testing.assert_close(logits[..., token_ids_V], expected, rtol=1e-4, atol=1e-4)
    frozen = model.lm_head.weight[torch.tensor([0, 4, 63])]
    assert torch.equal(frozen, split.head_weight_VD[torch.tensor([0, 4, 63])])


@pytest.mark.parametrize("kind", ["anchored", "recurrent"])
def test_a_drafter_that_reads_the_verifier_says_that_it_needs_this_runtime(
    tmp_path: Path, split: SplitModel, kind: str
) -> None:
    """Would catch an export that silently drops the anchor and drafts worse."""
    with pytest.raises(
        ValueError, match=f"got '{kind}': it reads the verifier's hidden state, so it needs this runtime"
    ):
        export_standalone(tmp_path / "draft", trained(split, kind=kind), split)
    assert not (tmp_path / "draft").exists()


def test_a_standalone_model_without_layers_is_refused(tmp_path: Path) -> None:
    """Would catch a checkpoint that nothing can load."""
    split = make_split(split_layer=0)
    with pytest.raises(ValueError, match="split_layer must be >= 1 for a standalone model, got 0"):
        export_standalone(tmp_path, trained(split, kind="lora_head"), split)


def test_a_standalone_model_is_never_written_over_another(tmp_path: Path, split: SplitModel) -> None:
    """Would catch an export into the base model's own folder."""
    (tmp_path / "model.safetensors").write_bytes(b"the base")
    with pytest.raises(ValueError, match="must be a new or an empty folder for a standalone model"):
        export_standalone(tmp_path, trained(split, kind="lora_head"), split)
    assert (tmp_path / "model.safetensors").read_bytes() == b"the base"


def test_a_standalone_model_that_drafts_otherwise_is_not_written(
    tmp_path: Path, split: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch, for architectures not tried here, first layers that mean something else on their own."""
    monkeypatch.setattr(standalone_model, "_copy_norm", lambda *_: None)
    with pytest.raises(ValueError, match="the first 2 layers of LlamaForCausalLM do not draft alone"):
        export_standalone(tmp_path / "draft", trained(split, kind="lora_head"), split)
    assert not (tmp_path / "draft").exists()
