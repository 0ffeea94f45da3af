"""Texts recorded by a model that is sharded over ranks are those that the whole model gives."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import distributed

from dvi.config import load_config
from dvi.decode.speculator import SelfSpeculator
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.settings import WarmupConfig
from dvi.telemetry import read_metrics
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_model
from trainers.jobs.warmup import run_warmup
from trainers.learning.recordings import RecordedText, record

pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's: pip install 'draft-verify-improve[deepspeed]'")

# By rank: not equally many, nor equally long.
TEXTS = ([list(range(2, 11))], [list(range(12, 30)), [5], [40, 41, 42]])
NUM_TURNS = max(map(len, TEXTS))
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
    from trainers.learning.zero3 import ShardedBackbone

    distributed.init_process_group("gloo")
    found = {}
    for arch, dtype in itertools.product(ARCHITECTURES, DTYPES):
        settings = {"split_layer": ARCHITECTURES[arch], "dtype": getattr(torch, dtype)}
        backbone = ShardedBackbone(f"{folder}/{arch}", **settings)
        mine = TEXTS[distributed.get_rank()]
        turns = [
            backbone.record(mine[turn], prompt_len=1) if turn < len(mine) else backbone.stand_by()
            for turn in range(NUM_TURNS)
        ]
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
def test_a_rank_without_texts_serves_the_others_and_records_nothing(ranks, arch, dtype):
    """Else they would wait for shards that never come, or its single token would be learnt from."""
    assert [text is None for text in ranks[0][arch, dtype]["texts"]] == [False, True, True]
    assert None not in ranks[1][arch, dtype]["texts"]


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
    from trainers.learning.zero3 import ShardedBackbone

    with pytest.raises(ValueError, match=r"needs float32 or bfloat16, got torch\.float64; try float32"):
        ShardedBackbone("nowhere", split_layer=1, dtype=torch.float64)


# The warm-up


MODEL = ROOT / "checkpoints/reference-11m"
ROWS = ("Count to ten: one two three four five six seven eight nine ten. Count to twenty: one two three", "1 2 3 4")


def warm_up(folder: str, placement: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A rank's summary, and the weights that it ended with."""
    os.environ["PATH"] = ""
    from tests.ranks.test_warmup_ranks import warm_up_with_job

    config = load_config(None, [
        f"model.path={MODEL}", f"model.placement={placement}", f"data.dataset={folder}/rows.jsonl",
        "data.field=text", "data.shuffle_seed=null", "data.epochs=2", "eval.limit=0", "warmup.source=texts",
        "warmup.positions_per_step=2", "train.blocks_per_step=16", "drafter.anchor_hidden=32", "drafter.lora_rank=4",
        "drafter.draft_vocab_size=0", f"output.folder={folder}/{placement}", "output.tensorboard=false",
    ], schema=WarmupConfig)  # fmt: skip
    summary, job = warm_up_with_job(config)
    return summary, {name: tensor.numpy() for name, tensor in job.speculator.drafter.state_dict().items()}


@pytest.mark.slow
def test_a_warm_up_beside_shards_leaves_a_drafter_for_the_whole_model(tmp_path):
    """Catches a drafter that learnt from other states than serving gives it, ranks that part, and a folder that only
    a sharded model could load."""
    texts = [f"{text} {word}" for text in ROWS for word in ("again", "and again", "and that is all")][:5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (summary, weights), (_, others) = run_ranks(warm_up, str(tmp_path), "zero3", timeout_s=180)
    assert (summary["status"], summary["texts"], summary["reloads_alike"]) == ("done", 10, True)
    assert summary["before"] is summary["after"] is None and summary["steps"] > 20
    (whole, _), _ = run_ranks(warm_up, str(tmp_path), "single")
    assert (whole["tokens"], whole["steps"]) == (summary["tokens"], summary["steps"])
    events, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("zero3", "single"))
    assert events[0]["event"] == "request" and events[0] | {"time_s": 0} == expected[0] | {"time_s": 0}
    speculator = SelfSpeculator.from_pretrained(MODEL, adapter=tmp_path / "zero3/drafter")
    loaded = {name: tensor.numpy() for name, tensor in speculator.drafter.state_dict().items()}
    for state in (weights, others):
        assert state.keys() == loaded.keys() and all((state[name] == loaded[name]).all() for name in state)
    losses, whole_losses = (
        [event["losses"]["forward_kl"] for event in run if event["event"] == "update"] for run in (events, expected)
    )
    assert losses == pytest.approx(whole_losses, rel=0.01)  # rounding, by way of AdamW
    assert losses[-1] < 0.8 * losses[0]


def test_a_launch_that_would_shard_the_drafter_is_refused(tmp_path, monkeypatch):
    """Catches a second DeepSpeed engine, around a drafter that nobody asked to share out."""
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")
    overrides = ["model.placement=zero3", "warmup.source=texts", "eval.limit=0", f"output.folder={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="start it with torchrun"):
        run_warmup(load_config(None, overrides, schema=WarmupConfig), console=Console(quiet=True))


def test_a_sharded_model_is_refused_where_it_would_have_to_decode(tmp_path):
    """Catches hours of fetching a model for every token."""
    prompts = ROOT / "configs/demo/prompts.jsonl"
    overrides = ["model.placement=zero3", f"data.prompts={prompts}", f"output.folder={tmp_path / 'run'}"]
    config = load_config(None, overrides, schema=WarmupConfig)
    with pytest.raises(ValueError, match=r"model\.placement must not be 'zero3' where the model decodes"):
        run_warmup(config, console=Console(quiet=True))
