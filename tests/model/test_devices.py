"""A model spread over devices or processes answers as on one device, and what cannot be spread is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dvi.decode.speculator import SelfSpeculator
from dvi.learner import Learner
from dvi.model.devices import (
    check_ranks_agree,
    check_settings,
    check_tensor_parallel,
    execution_device,
    gather_module,
    is_spread,
    load_model,
)
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.records import GenerationResult, SamplingParams
from dvi.settings import (
    DraftSettings,
    EvalSettings,
    LearningSettings,
    ModelSettings,
    ServeConfig,
    TrainConfig,
    WarmupConfig,
    WarmupSettings,
)
from tests.support.exact_doubles import self_check_left_out
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_model

PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14], [15, 16]]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
DRAFTER = DrafterConfig(kind="anchored", lora_rank=4, lora_alpha=4.0, anchor_hidden=16)
ARCHITECTURES = ("llama", "qwen3")


def save_tiny_model(folder: Path, arch: str, **settings: object) -> Path:
    tiny_model(arch, num_layers=3, **settings).save_pretrained(folder / arch)
    return folder / arch


def speculator_of(model: PreTrainedModel, *, mode: str = "fast", policy: str = "fixed") -> SelfSpeculator:
    with self_check_left_out():
        return SelfSpeculator(model, None, split_layer=1, drafter=DRAFTER, mode=mode, policy=policy)


def answers(results: list[GenerationResult]) -> list[list[int]]:
    return [result.token_ids for result in sorted(results, key=lambda result: result.index)]


def generate(speculator: SelfSpeculator, params: SamplingParams, **options: object) -> list[list[int]]:
    return answers(speculator.generate(PROMPTS, params, batch_size=2, **options))


# Layers on other devices


def offloaded(folder: Path, device_map: dict[str, str]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, device_map=device_map)


LAYERS_ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"} | dict.fromkeys(
    ("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "disk"
)
ALL_ON_DISK = dict.fromkeys(LAYERS_ON_DISK, "disk")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("device_map", [LAYERS_ON_DISK, ALL_ON_DISK], ids=["deep layers", "all"])
def test_a_model_kept_elsewhere_answers_as_one_that_is_here(tmp_path, arch, device_map):
    """Catches weights taken from modules without their hooks: on the meta device they hold nothing."""
    folder = save_tiny_model(tmp_path, arch)
    model = offloaded(folder, device_map)
    assert any(parameter.is_meta for parameter in model.parameters())
    spread, whole = speculator_of(model), speculator_of(tiny_model(arch, num_layers=3))
    assert (spread.split.path, whole.split.path) == ("views", "direct")
    for params in (GREEDY, SAMPLED):
        assert generate(spread, params) == generate(whole, params)


def test_exact_mode_holds_on_a_spread_model(tmp_path):
    model = offloaded(save_tiny_model(tmp_path, "llama"), LAYERS_ON_DISK)
    whole = tiny_model("llama", num_layers=3)
    assert generate(speculator_of(model, mode="exact"), GREEDY) == generate(speculator_of(whole), GREEDY)


def test_a_drafter_of_a_spread_model_learns_and_fits_the_whole_one(tmp_path):
    """Catches a drafter that holds the hooks of the norm it was copied from, or a head without weights."""
    spread = SplitModel(offloaded(save_tiny_model(tmp_path, "qwen3"), LAYERS_ON_DISK), split_layer=1)
    whole = SplitModel(tiny_model("qwen3", num_layers=3), split_layer=1)
    torch.manual_seed(0)
    drafter = build_drafter(spread, DRAFTER)
    twin = build_drafter(whole, DRAFTER)
    twin.load_state_dict(drafter.state_dict())
    inputs = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    drafter(*inputs).sum().backward()
    twin(*inputs).sum().backward()
    gradients = zip(drafter.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in gradients if one.grad is not None)
    assert spread.head_fingerprint() == whole.head_fingerprint()


def test_a_tied_head_is_gathered_with_its_embedding(tmp_path):
    """gpt2's head is its embedding, which accelerate keeps under one of the two names."""
    folder = save_tiny_model(tmp_path, "gpt2")
    names = ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f")
    device_map = dict.fromkeys(names, "cpu") | {"transformer.h.1": "disk", "transformer.h.2": "disk", "lm_head": "cpu"}
    spread = speculator_of(offloaded(folder, device_map))
    assert generate(spread, GREEDY) == generate(speculator_of(tiny_model("gpt2", num_layers=3)), GREEDY)


def test_gathering_a_module_leaves_its_original_as_it_was(tmp_path):
    model = offloaded(save_tiny_model(tmp_path, "llama"), LAYERS_ON_DISK)
    original = tiny_model("llama", num_layers=3)
    gathered = gather_module(model.lm_head, torch.device("cpu"))
    assert torch.equal(gathered.weight, original.lm_head.weight)
    assert not hasattr(gathered, "_hf_hook")
    assert model.lm_head.weight.is_meta
    assert execution_device(model.lm_head) == torch.device("cpu")
    copy.deepcopy(gathered)  # a hook's weights map would come along, the whole model with it


def test_the_direct_path_is_refused_on_a_spread_model_with_the_reason(tmp_path):
    """It multiplies with the weights themselves: on the meta device it would give nothing, on another one an error."""
    model = offloaded(save_tiny_model(tmp_path, "llama"), ALL_ON_DISK)
    with pytest.raises(ValueError, match=r"needs the whole model on one device.*use 'views'"):
        SplitModel(model, split_layer=1, path="direct")


def test_a_model_that_fits_one_device_is_not_spread(tmp_path):
    """device_map=auto must cost nothing where it is not needed: the direct path stays."""
    model = tiny_model("llama", num_layers=3)
    folder = save_tiny_model(tmp_path, "llama")
    loaded = load_model(str(folder), model.config, placement="device_map", device="auto", dtype=torch.float64)
    assert not is_spread(loaded)
    assert SplitModel(loaded, split_layer=1).path == "direct"


# Tensor parallelism


class EveryRoundLearner(Learner):
    """Steps along the KL to the verifier after every round and publishes at once."""

    def __init__(self, speculator: SelfSpeculator) -> None:
        self._live = speculator.drafter
        self._drafter = build_drafter(speculator.split, DRAFTER)
        self._drafter.load_state_dict(self._live.state_dict())
        self._optimizer = torch.optim.AdamW(self._drafter.parameters(), lr=1e-2)

    def observe(self, transitions: list) -> None:
        self._stretches = [stretch for stretch in transitions if len(stretch) > 1]

    def step_if_due(self) -> None:
        for stretch in self._stretches:
            final_WD = stretch.target_hidden_WD
            logits_1TV = self._drafter(stretch.hidden_WD[None, 1:], final_WD[:1])
            target_TV = self._drafter.draft_head.frozen_logits(final_WD[1:]).float().softmax(-1)
            self._optimizer.zero_grad()
            F.kl_div(logits_1TV[0].log_softmax(-1), target_TV, reduction="batchmean").backward()
            self._optimizer.step()
        self._live.publish(self._drafter, self._live.version + 1)


def decode_tensor_parallel(folder: str) -> dict:
    """What a rank finds: the answers of both architectures, and what the ranks say of each other."""
    found = {}
    for arch in ARCHITECTURES:
        config = tiny_model(arch, num_layers=3).config
        model = load_model(f"{folder}/{arch}", config, placement="tensor", device="auto", dtype=torch.float64)
        speculator = speculator_of(model, policy="auto")
        greedy = list(speculator.generate(PROMPTS, GREEDY, batch_size=2))
        found[arch] = {
            "greedy": answers(greedy), "sampled": generate(speculator, SAMPLED), "path": speculator.split.path,
            "accepted": sum(r.stats.num_accepted for r in greedy), "cache_bytes": cache_bytes(speculator.split),
            "rejected": sum(r.stats.num_drafted - r.stats.num_accepted for r in greedy),
        }  # fmt: skip
    before = speculator.drafter.draft_head.lora_B.clone()
    found["learning"] = generate(speculator, GREEDY, learner=EveryRoundLearner(speculator))
    speculator.check_lock_step()
    found["has_learnt"] = not torch.equal(before, speculator.drafter.draft_head.lora_B)
    found["weights"] = {name: tensor.tolist() for name, tensor in speculator.drafter.state_dict().items()}
    found["disagreement"] = refusal(RuntimeError, check_odd_ranks)
    found["goodput"] = refusal(ValueError, lambda: speculator_of(model, policy="goodput"))
    found["exact"] = generate(speculator_of(model, mode="exact"), SAMPLED)
    return found


def cache_bytes(split: SplitModel) -> int:
    cache = split.make_cache(1, 4)
    ids_1Q, placement = torch.zeros(1, 4, dtype=torch.int64), cache.place(offset=0, width=4)
    with torch.no_grad():
        split.deep(split.shallow(ids_1Q, cache, placement), ids_1Q, cache, placement)
    return cache.num_bytes


def check_odd_ranks() -> None:
    odd = torch.ones(3, dtype=torch.float64)
    odd[1] += torch.finfo(torch.float64).eps * distributed.get_rank()
    check_ranks_agree({"even": torch.ones(2), "odd": odd})


def refusal(kind: type[Exception], call: object) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    if torch.cuda.is_available():
        pytest.skip("ranks would take a GPU each; this compares two on the CPU")
    folder = tmp_path_factory.mktemp("models")
    for arch in ARCHITECTURES:
        save_tiny_model(folder, arch)
    return run_ranks(decode_tensor_parallel, str(folder), timeout_s=120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_ranks_that_share_a_model_answer_as_one_process(ranks, arch):
    """Catches heads, cache or drafter taken for the whole model's where a rank has a part; and ranks that part ways."""
    alone = speculator_of(tiny_model(arch, num_layers=3))
    for found in ranks:
        assert found[arch]["greedy"] == generate(alone, GREEDY)
        assert found[arch]["sampled"] == generate(alone, SAMPLED)
        assert found[arch]["accepted"] > 0
        assert found[arch]["rejected"] > 0


def test_exact_mode_holds_on_ranks_that_share_a_model(ranks):
    alone = speculator_of(tiny_model("qwen3", num_layers=3))
    assert [found["exact"] for found in ranks] == 2 * [generate(alone, SAMPLED)]


def test_each_rank_caches_the_keys_of_its_own_heads_alone(ranks):
    """Else tensor parallelism would save no cache."""
    for arch in ARCHITECTURES:
        whole = cache_bytes(SplitModel(tiny_model(arch, num_layers=3), split_layer=1))
        assert [found[arch]["cache_bytes"] for found in ranks] == 2 * [whole // 2]


def test_ranks_that_learn_from_the_same_rounds_hold_the_same_drafter(ranks):
    """Catches any decision of a rank's own: the next draft would differ, and ranks would wait for each other."""
    first, second = ranks
    assert first["has_learnt"]
    assert first["weights"] == second["weights"]
    assert first["learning"] == second["learning"] == first["qwen3"]["greedy"]


def test_ranks_of_which_one_differs_in_a_bit_are_told_so_on_every_rank(ranks):
    """Silence would end in ranks that wait for each other for ever."""
    for found in ranks:
        assert "differ in odd;" in found["disagreement"]


def test_ranks_in_lock_step_never_draft_by_the_clock(ranks):
    """auto must not mean goodput here, and goodput is refused."""
    assert all("measured time" in found["goodput"] and found["llama"]["path"] == "views" for found in ranks)


# Refusals


@pytest.mark.parametrize(
    ("arch", "num_processes", "reason"),
    [
        ("llama", 1, "at least 2 processes, got 1; start it with torchrun"),
        ("llama", 4, "must divide the model's 2 key/value heads.*got 4; try 2"),
        ("llama", 3, "must divide the model's 2 key/value heads.*got 3; try 2"),
        ("bloom", 2, "tensor-parallel plan for, not bloom; use placement 'device_map'"),
    ],
)
def test_a_model_that_so_many_processes_cannot_share_is_refused(arch, num_processes, reason):
    with pytest.raises(ValueError, match=reason):
        check_tensor_parallel(tiny_model(arch).config, num_processes=num_processes)


def test_a_single_process_is_told_how_to_start_more(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        SelfSpeculator.from_pretrained(folder, placement="tensor")


TENSOR = ModelSettings(placement="tensor")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ServeConfig(model=TENSOR), "not be 'tensor' for a server.*vLLM"),
        (TrainConfig(model=TENSOR, draft=DraftSettings(policy="goodput")), "measured time.*draft.policy=fixed"),
        (TrainConfig(model=TENSOR), "train.budget must be 1 .*got 0.5"),
    ],
    ids=["server", "goodput", "budget"],
)
def test_whatever_goes_by_a_clock_is_refused_in_lock_step(config, reason):
    with pytest.raises(ValueError, match=reason):
        check_settings(config)


@pytest.mark.parametrize("train", [LearningSettings(budget=1.0), LearningSettings(enabled=False)])
def test_rounds_and_frozen_drafters_pass_in_lock_step(train):
    check_settings(TrainConfig(model=TENSOR, train=train))
    check_settings(ServeConfig(model=ModelSettings(placement="device_map")))


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"path_kind": "direct"}])
def test_settings_that_a_placement_would_ignore_are_refused(settings):
    with pytest.raises(ValueError, match="placement 'device_map'"):
        ModelSettings(placement="device_map", **settings)


def test_zero_3_is_refused_where_the_model_decodes_and_nowhere_else():
    """Catches a run that would fetch the whole model for every token, and settings that would be ignored."""
    zero3, texts, unmeasured = ModelSettings(placement="zero3"), WarmupSettings(source="texts"), EvalSettings(limit=0)
    warmup = WarmupConfig(model=zero3, warmup=texts, eval=unmeasured)
    check_settings(warmup)
    for config in (
        TrainConfig(model=zero3, eval=unmeasured), ServeConfig(model=zero3), WarmupConfig(model=zero3, warmup=texts),
        WarmupConfig(model=zero3, eval=unmeasured),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"for every token.*warmup\.source=texts and eval\.limit=0"):
            check_settings(config)
    with pytest.raises(ValueError, match=r"model\.mode must be 'auto' or 'fast'"):
        check_settings(replace(warmup, model=replace(zero3, mode="exact")))
    with pytest.raises(ValueError, match=r"train\.strategy must be ddp .*, got 'zero2'"):
        check_settings(replace(warmup, train=replace(warmup.train, strategy="zero2")))
