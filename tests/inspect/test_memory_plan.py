"""The memory plan: against models of full shape on the meta device, and against tiny ones that are really built."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvi.config import load_config
from dvi.decode.speculator import SelfSpeculator
from dvi.inspect import memory_plan
from dvi.inspect.memory_plan import MemoryPlan, SplitShape
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.records import LossWeights, ReplayBatch, SamplingParams
from dvi.settings import DrafterSettings, LearningSettings, ServeConfig, TrainConfig
from tests.cli.test_main import dvi_command
from tests.support.model_shapes import SHAPES
from tests.support.paths import ROOT, STORIES
from tests.support.tiny_models import ARCHITECTURES, tiny_model
from trainers.learning import losses, publish_gate
from trainers.learning.memory import learner_memory
from trainers.learning.replay import ReplayBuffer
from trainers.learning.versions import KEPT_VERSIONS

CONFIGS = ROOT / "configs/online"
TINY_VOCAB, TRIMMED_VOCAB = 64, 48
MB, GB = 10**6, 10**9
SMALL_TENSORS = 0.1  # of the logits' size: all else that is alive beside them


@pytest.fixture(scope="module")
def full_shape():
    """The model of SHAPES by name, cut where its configuration says; each made once."""
    made: dict[str, SplitShape] = {}

    def shape_of(name: str) -> SplitShape:
        if name not in made:
            split_layer = load_config(CONFIGS / f"{name}.yaml").model.split_layer
            made[name] = SplitShape(SHAPES[name].config, dtype=torch.bfloat16, split_layer=split_layer)
        return made[name]

    return shape_of


def drafter_of(settings: DrafterSettings, **changes) -> DrafterConfig:
    names = [field.name for field in dataclasses.fields(DrafterConfig)]
    return DrafterConfig(**{name: getattr(settings, name) for name in names} | changes)


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tiny_shape(dtype: torch.dtype = torch.float32) -> SplitShape:
    return SplitShape(tiny_model("llama").config, dtype=dtype, split_layer=1)


def tiny_plan(shape: SplitShape, **settings) -> MemoryPlan:
    """For a small drafter and replay, 3 rows of 20 positions."""
    usual = {
        "drafter": DrafterConfig(anchor_hidden=8), "learning": LearningSettings(replay_positions=100), "rows": 3,
        "positions": 20, "num_draft_tokens": 4, "learner_memory": learner_memory,
    }  # fmt: skip
    return shape.plan_memory(**usual | settings)


# Full shapes


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_full_shape_is_split_and_counted_as_its_configuration_says(full_shape, name):
    """Catches a shape that is not the model's, a tied head counted twice, and layers on the wrong side of the cut."""
    settings, known, shape = load_config(CONFIGS / f"{name}.yaml"), SHAPES[name], full_shape(name)
    counts, split, heads = shape.count_parameters(drafter_of(settings.drafter)), shape.split, known.settings
    assert settings.model.path == known.path and split.path == "direct"
    assert counts.all == known.num_parameters
    assert counts.shallow * (split.num_layers - split.split_layer) == counts.deep * split.split_layer
    embeddings = counts.head * (1 if heads["tie_word_embeddings"] else 2)
    assert counts.shallow + counts.deep + embeddings + split.hidden_size == counts.all  # and the final norm
    head_dim = heads.get("head_dim", split.hidden_size // heads["num_attention_heads"])
    of_position = 2 * split.num_layers * heads["num_key_value_heads"] * head_dim * torch.bfloat16.itemsize
    assert shape.cache_bytes_per_position == of_position


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_configuration_says_of_memory_and_updates_is_what_its_plan_says(full_shape, name):
    """Catches numbers in the comments that a change of settings or of the plan has left behind."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    settings, shape = load_config(CONFIGS / f"{name}.yaml"), full_shape(name)
    command = re.search(r"serve\.yaml (model.*?)\n#(?!  )", text, re.DOTALL).group(1)
    server = load_config(CONFIGS / "serve.yaml", re.findall(r"[a-z]+\.\S+=\S+", command), schema=ServeConfig)
    shape_of_server = dataclasses.replace(server.drafter, adapter=None)  # what it starts from is its own
    assert (shape_of_server, server.model) == (settings.drafter, settings.model)
    assert server.train.tokens_before_trim == settings.train.tokens_before_trim

    drafter, draft = drafter_of(settings.drafter), {"num_draft_tokens": settings.draft.num_draft_tokens}
    trained = shape.plan_memory(
        drafter=drafter, learning=settings.train, rows=settings.data.batch_size, positions=4096,
        learner_memory=learner_memory, **draft,
    )
    served = shape.plan_memory(
        drafter=drafter, learning=server.train, rows=server.serve.max_rows, positions=2048,
        prefix_positions=server.serve.prefix_cache_positions, learner_memory=learner_memory, **draft,
    )  # fmt: skip
    said = re.findall(r" ([\d.]+) GB[^;]*?for cards of (\d+) GB", text)
    assert said == [(f"{plan.total / GB:.1f}", str(smallest_card(plan))) for plan in (trained, served)]

    def update_bytes(**changes) -> int:
        return 4 * shape.count_parameters(drafter_of(settings.drafter, **changes)).drafter_trimmed

    whole, half, width, lora = re.search(
        r"update +([\d.]+) MB .*? ([\d.]+) MB .*?anchor_hidden=(\d+) .*? ([\d.]+) MB uncompressed", text, re.DOTALL
    ).groups()
    assert (whole, half) == (f"{update_bytes() / MB:.1f}", f"{update_bytes() / 2 / MB:.1f}")
    assert lora == f"{update_bytes(kind='lora_head') / MB:.1f}"
    widest, too_wide = (update_bytes(anchor_hidden=int(width) + more) / 2 for more in (0, 1))
    assert widest <= 2.5 * MB < too_wide


def smallest_card(plan: MemoryPlan) -> int:
    return min(size for size in memory_plan.DEVICE_GB if plan.total <= size * GB)


def test_an_update_of_a_rank_16_head_takes_at_most_two_and_a_half_megabytes(full_shape):
    """Catches a drafter that trains more than it should: D = 4,096, V = 32,000, float32."""
    trained = full_shape("vicuna_7b").count_parameters(DrafterConfig(kind="lora_head", lora_rank=16)).drafter
    assert trained == 16 * (4096 + 32000) + 4096 and trained * 4 <= 2.5 * MB


# Against what is really allocated


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_shape_of_an_architecture_weighs_what_the_model_weighs(arch):
    """Catches meta models that are taken apart otherwise than real ones, and numbers read on the way."""
    model = tiny_model(arch, dtype=torch.float32)
    shape, split = SplitShape(model.config, dtype=torch.float32, split_layer=1), SplitModel(model, split_layer=1)
    drafter = DrafterConfig(anchor_hidden=8)
    counts = shape.count_parameters(drafter)
    assert shape.split.path == split.path and counts.all == sum(p.numel() for p in model.parameters())
    assert counts.drafter == sum(p.numel() for p in build_drafter(split, drafter).parameters())
    cache, ids_11 = split.make_cache(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    placement = cache.place(offset=0, width=1)
    split.deep(split.shallow(ids_11, cache, placement), ids_11, cache, placement)
    assert shape.cache_bytes_per_position == cache.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_of_the_plan_is_what_the_real_part_takes(dtype):
    """Catches a part that is forgotten, doubled or counted in another dtype."""
    model, drafter = tiny_model("llama", dtype=dtype), DrafterConfig(anchor_hidden=8)
    plan = tiny_plan(tiny_shape(dtype), prefix_positions=7)
    weights = num_bytes([*model.parameters(), *model.buffers()])
    split = SplitModel(model, split_layer=1)

    assert plan.layers + plan.other_weights == weights
    assert plan.layers == num_bytes(model.model.layers.parameters())
    cache = split.make_cache(3, 20)
    ids_BQ = torch.zeros(3, 20, dtype=torch.int64)
    placement = cache.place(offset=0, width=20)
    split.deep(split.shallow(ids_BQ, cache, placement), ids_BQ, cache, placement)
    assert plan.cache == cache.num_bytes and plan.prefix_cache * 3 * 20 == cache.num_bytes * 7

    replay = ReplayBuffer(capacity_positions=100, hidden_size=32, max_block=4, dtype=dtype)
    assert plan.replay == replay.num_bytes

    student = build_drafter(split, drafter)
    student.publish(student, version=0)
    assert plan.draft_heads == num_bytes([student.draft_head.published_buffer])
    assert plan.drafter == num_bytes(student.parameters())
    optimizer = torch.optim.AdamW(student.parameters())
    sum(parameter.sum() for parameter in student.parameters()).backward()
    optimizer.step()
    moments = [m for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in student.parameters()]
    assert plan.learner == num_bytes([*student.parameters(), *gradients, *moments])


def test_a_drafter_that_will_be_trimmed_is_planned_at_its_larger_stage():
    """Catches the cut copies of the head left out, or both stages added up."""
    shape, whole = tiny_shape(), DrafterConfig(anchor_hidden=8, lora_rank=1)
    little, much = (dataclasses.replace(whole, draft_vocab_size=size) for size in (2, TRIMMED_VOCAB))
    learning = LearningSettings(replay_positions=100, blocks_per_slice=1)
    before, plan, same = (tiny_plan(shape, drafter=one, learning=learning) for one in (whole, much, little))
    assert same == before

    real = build_drafter(SplitModel(tiny_model("llama", dtype=torch.float32), split_layer=1), much)
    real.draft_head.trim(torch.arange(TRIMMED_VOCAB))
    real.draft_head.publish()
    assert plan.draft_heads == num_bytes([real.draft_head.published_buffer] + 2 * [real.draft_head._frozen[0]])
    assert plan.drafter == num_bytes(real.state_dict().values())
    counts = shape.count_parameters(much)
    assert counts.drafter - counts.drafter_trimmed == (TINY_VOCAB - TRIMMED_VOCAB) * much.lora_rank
    frozen = LearningSettings(enabled=False)
    assert tiny_plan(shape, drafter=much, learning=frozen).draft_heads == before.draft_heads


def test_without_learning_nothing_of_the_learner_is_planned():
    """Catches a server with train.enabled=false that is told to make room for a learner."""
    shape = tiny_shape()
    plan = tiny_plan(shape, learning=LearningSettings(enabled=False))
    assert plan.learner == plan.versions == plan.replay == 0 < plan.logits < tiny_plan(shape).logits
    assert plan.total == plan.layers + plan.other_weights + plan.cache + plan.draft_heads + plan.drafter + plan.logits


def test_a_plan_keeps_room_for_every_version_that_the_learner_keeps():
    """Catches a plan that forgets the best version, or the one being published."""
    kept = learner_memory(LearningSettings(), tiny_shape().split)
    assert (kept.states, kept.canary_blocks) == (KEPT_VERSIONS + 2, publish_gate.CANARY_BLOCKS)


class LiveBytes(TorchDispatchMode):
    """While entered, `peak` is the most bytes that were alive at once of the tensors made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = storages_of((args, kwargs))
        for key, storage in storages_of(result).items():
            if key not in given:  # a view of a weight is no new memory
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def storages_of(tree: object) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_moment_has_more_logits_alive_than_are_planned(dtype):
    """Catches a loss, a canary or a round that began to keep more copies of the logits than the plan knows of."""
    vocab, blocks, depth, rows, width = 20000, 8, 4, 4, 32
    model = tiny_model("llama", vocab_size=vocab, dtype=dtype, num_layers=2)
    speculator = SelfSpeculator(
        model, None, split_layer=1, drafter=DrafterConfig(anchor_hidden=8, lora_rank=2), policy="fixed",
        num_draft_tokens=depth,
    )  # fmt: skip
    params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, max_new_tokens=6)
    with LiveBytes() as live:
        list(speculator.generate([[1, 2, 3]] * rows, params, batch_size=rows))
    unit = vocab * torch.float32.itemsize
    found = live.peak / (rows * (depth + 1) * unit)
    assert memory_plan.ROUND_LOGITS - 1.5 < found < memory_plan.ROUND_LOGITS + SMALL_TENSORS

    drafter = speculator.drafter.requires_grad_(True)
    hidden, flags = torch.zeros(blocks, depth, width, dtype=dtype), torch.ones(blocks, depth, dtype=torch.bool)
    batch = ReplayBatch(
        anchor_ND=hidden[:, 0], hidden_NTD=hidden, target_hidden_NTD=hidden, token_ids_NT=flags.long(), mask_NT=flags,
        action_NT=flags.long(), reward_NT=flags.float(), has_reward_NT=flags, behaviour_log_probs_NT=flags.float(),
        staleness_N=flags[:, 0].long(),
    )  # fmt: skip
    # The preset with the most terms, kl_rl.
    weights = LossWeights(forward_kl=0.3, reverse_kl=0.5, accepted_ce=0.2, policy_gradient=0.1)
    with LiveBytes() as live:
        with torch.no_grad():
            target_logits = drafter.draft_head.frozen_logits(hidden)
        logits = drafter(hidden, hidden[:, 0])
        losses.compute(logits, target_logits, batch, weights=weights, baseline_T=torch.zeros(16))[0].backward()
    found = live.peak / (blocks * depth * unit)
    assert memory_plan.STEP_LOGITS - 1.5 < found < memory_plan.STEP_LOGITS + SMALL_TENSORS
    with torch.no_grad(), LiveBytes() as live:
        target_NT = drafter.draft_head.frozen_logits(hidden).argmax(-1)
        drafts = (drafter(hidden, hidden[:, 0]), drafter(hidden, hidden[:, 0]))
        [logits.argmax(-1) == target_NT for logits in drafts]
    found = live.peak / (blocks * depth * unit)
    assert memory_plan.CANARY_LOGITS - 1.5 < found < memory_plan.CANARY_LOGITS + SMALL_TENSORS


# Devices


def test_tensor_parallel_devices_share_layers_and_cache_in_divisors_of_the_heads(full_shape):
    """Catches three devices for eight heads, and weights taken as shared that every device holds."""
    empty = dict.fromkeys((field.name for field in dataclasses.fields(MemoryPlan)), 0)
    plan = MemoryPlan(**empty | {"layers": 50 * GB, "cache": 10 * GB, "other_weights": 4 * GB})
    needed = [full_shape("qwen3_8b").devices_needed(plan, device_gb=size) for size in (64, 63, 24, 11)]
    assert needed == [1, 2, 4, None]


# dvi inspect


def test_inspect_plans_a_model_of_which_only_the_config_is_there(tmp_path):
    """Catches weights that are wanted for a plan, settings of the file that are not used, and a table without units."""
    SHAPES["qwen3_0.6b"].config.save_pretrained(tmp_path)
    code, facts, _, stderr = dvi_command("inspect", CONFIGS / "qwen3_0.6b.yaml", f"model.path={tmp_path}")
    memory, demand = facts["memory"], facts["demand"]
    assert code == 0 and facts["is_splittable"] and not facts["is_checked"] and facts["dtype"] == "bfloat16"
    assert (facts["split_layer"], demand) == (1, {"rows": 8, "positions": 4096}) and facts["is_tied"]
    assert memory["total"] * 2 == sum(memory.values())
    assert facts["devices"] == {"24 GB": 1, "48 GB": 1, "80 GB": 1, "141 GB": 1}
    assert f"{memory['total'] / GB:.2f}" in stderr and "GB" in stderr and "8 rows of 4,096" in stderr

    code, facts, _, stderr = dvi_command(
        "inspect", CONFIGS / "serve.yaml", f"model.path={tmp_path}", "--dtype", "auto", "--positions", 40000,
        "--split-layer", 3, "serve.max_rows=512", "model.dtype=float32",
    )
    assert code == 0 and facts["memory"]["prefix_cache"] and facts["split_layer"] == 3 and facts["dtype"] == "float32"
    assert facts["devices"]["141 GB"] is None and "too small" in stderr
    code, facts, _, stderr = dvi_command("inspect", tmp_path, "--check")
    assert code == 2


def test_inspect_checks_a_small_model_unless_told_not_to(tmp_path):
    """Catches a small model of which only the shape was looked at, and weights loaded against one's will."""
    folder = STORIES
    for option, is_checked in ((), True), (("--no-check",), False):
        code, facts, _, _ = dvi_command("inspect", folder, *option)
        assert code == 0 and facts["is_checked"] == is_checked
        assert facts["demand"]["rows"] == TrainConfig().data.batch_size
