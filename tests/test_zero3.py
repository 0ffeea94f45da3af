"""Texts recorded by a model that is sharded over ranks are those that the whole model gives."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import distributed

from dvi.drafter import DrafterConfig, build_drafter
from dvi.recordings import RecordedText, record
from dvi.split import SplitModel
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's: pip install 'dvi[deepspeed]'")

# By rank: not equally many, nor equally long.
TEXTS = ([list(range(2, 11))], [list(range(12, 30)), [5], [40, 41, 42]])
DTYPES = ("float32", "bfloat16")
ARCHITECTURES = {"qwen3": 1, "gpt2": 0}  # split layer; gpt2's head is its embedding, and what is split off is that
HIDDEN_SIZE = 256  # so that some weights have more numbers than DeepSpeed leaves whole
MOST_LEFT_WHOLE = 100_000
DRAFTER = DrafterConfig(kind="anchored", lora_rank=4, lora_alpha=4.0, anchor_hidden=16)


def tiny_whole(arch: str, dtype: str) -> torch.nn.Module:
    return tiny_model(arch, num_layers=3, hidden_size=HIDDEN_SIZE, dtype=torch.float32).to(getattr(torch, dtype))


def record_sharded(folder: str) -> dict:
    """By architecture and dtype, what a rank records and holds."""
    # Nothing may be compiled: where there is no compiler it would fail.
    os.environ["PATH"] = ""
    from dvi.zero3 import ShardedBackbone, record_in_step

    distributed.init_process_group("gloo")
    found = {}
    for arch, dtype in itertools.product(ARCHITECTURES, DTYPES):
        settings = {"split_layer": ARCHITECTURES[arch], "dtype": getattr(torch, dtype)}
        backbone = ShardedBackbone(f"{folder}/{arch}", **settings)
        texts = [(token_ids, 1) for token_ids in TEXTS[distributed.get_rank()]]
        turns = list(record_in_step(backbone, texts))
        parameters = list(backbone.model.parameters())
        found[arch, dtype] = {
            "texts": [None if text is None else states_of(text) for text in turns],
            "head": backbone.head_fingerprint(), "drafts": draft(backbone, turns[0]),
            "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
            "whole_sizes": [parameter.numel() for parameter in parameters if parameter.ds_numel > MOST_LEFT_WHOLE],
        }  # fmt: skip
    return found


def states_of(text: RecordedText) -> tuple[list, list]:
    return text.hidden_SD.tolist(), text.target_hidden_SD.tolist()


def draft(split: object, text: RecordedText) -> list:
    """Logits of an untrained drafter, which reads the norm and the head."""
    torch.manual_seed(0)
    return build_drafter(split, DRAFTER)(text.hidden_SD[None, 1:3], text.target_hidden_SD[:1]).tolist()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    if torch.cuda.is_available():
        pytest.skip("ranks would take a GPU each; this compares two on the CPU")
    folder: Path = tmp_path_factory.mktemp("models")
    for arch in ARCHITECTURES:
        tiny_whole(arch, "float32").save_pretrained(folder / arch)
    return run_ranks(record_sharded, str(folder), timeout_s=180)


CASES = list(itertools.product(ARCHITECTURES, DTYPES))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_sharded_recordings_are_those_of_the_whole_model(ranks, arch, dtype):
    """Catches h_k taken a layer off, states before the norm, and weights that a shard lacks.

    The whole model records through a cache, so bits may differ by rounding.
    """
    split = SplitModel(tiny_whole(arch, dtype), split_layer=ARCHITECTURES[arch], path="views")
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    for found, texts in zip(ranks, TEXTS, strict=True):
        recorded = [text for text in found[arch, dtype]["texts"] if text is not None]
        for states, token_ids in zip(recorded, texts, strict=True):
            for actual, expected in zip(states, states_of(record(split, token_ids, prompt_len=1)), strict=True):
                error = (torch.tensor(actual) - torch.tensor(expected)).norm() / torch.tensor(expected).norm()
                assert error < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_ranks_take_as_many_turns_as_the_one_with_most_texts(ranks, arch, dtype):
    """Else the others would wait for a pass that never comes."""
    assert [len(found[arch, dtype]["texts"]) for found in ranks] == [3, 3]
    assert ranks[0][arch, dtype]["texts"][1:] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_a_drafter_reads_the_whole_norm_and_head_beside_the_shards(ranks, arch, dtype):
    """Catches a drafter whose frozen head went with the gathered weights."""
    split = SplitModel(tiny_whole(arch, dtype), split_layer=ARCHITECTURES[arch], path="views")
    text = record(split, TEXTS[0][0], prompt_len=1)
    found = ranks[0][arch, dtype]
    assert found["head"] == split.head_fingerprint()
    drafts, expected = torch.tensor(found["drafts"]), torch.tensor(draft(split, text))
    assert (drafts - expected).norm() / expected.norm() < {"float32": 1e-5, "bfloat16": 5e-2}[dtype]


@pytest.mark.slow
def test_each_rank_holds_half_of_the_weights_and_gathers_none_for_good(ranks):
    whole = sum(parameter.numel() for parameter in tiny_whole("qwen3", "float32").parameters())
    for found in ranks:
        assert whole // 2 <= found["qwen3", "float32"]["held"] < whole // 2 + 100  # padded to even shards
        assert set(found["qwen3", "float32"]["whole_sizes"]) == {0}


def test_float64_is_refused_with_the_reason():
    """Norms would silently be rounded to float32."""
    from dvi.zero3 import ShardedBackbone

    with pytest.raises(ValueError, match=r"needs float32 or bfloat16, got torch\.float64; try float32"):
        ShardedBackbone("nowhere", split_layer=1, dtype=torch.float64)
