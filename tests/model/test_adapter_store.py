"""Drafters on disk: equal round trips, refusals that name the reason, crashes, and readers without this library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dvi.model import adapter_store
from dvi.model.adapter_store import (
    ADAPTER_FILE,
    EXTRA_FILE,
    MANIFEST_FILE,
    TOKEN_IDS,
    load_drafter,
    read_manifest,
    save_drafter,
)
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.split import SplitModel
from dvi.model.standalone_model import export_standalone
from tests.learning.test_checkpoint import DyingProcess, Killed
from tests.support.paths import STORIES
from tests.support.tiny_models import tiny_model

KINDS = ["anchored", "recurrent", "lora_head"]


def make_split(arch: str = "llama", *, split_layer: int = 2, **settings) -> SplitModel:
    return SplitModel(tiny_model(arch, dtype=torch.float32, **settings), split_layer=split_layer)


@pytest.fixture(scope="module")
def split() -> SplitModel:
    return make_split()


def trained(split: SplitModel, *, seed: int = 0, token_ids_V: torch.Tensor | None = None, **config) -> nn.Module:
    """A drafter whose every parameter has moved, published as version 7."""
    config = DrafterConfig(**{"lora_rank": 3, "lora_alpha": 6.0, "anchor_hidden": 5} | config)
    drafter = build_drafter(split, config, draft_token_ids_V=token_ids_V)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    drafter.publish(drafter, 7)
    return drafter


def draft_logits(drafter: nn.Module, split: SplitModel) -> torch.Tensor:
    """[2, V] of one published step from fixed states: what decoding would see."""
    generator = torch.Generator().manual_seed(1)
    anchor_BD, hidden_BD = torch.randn(2, 2, split.hidden_size, generator=generator)
    with torch.no_grad():
        return drafter.step(hidden_BD, drafter.begin(anchor_BD), 0)


def model_logits(drafter: nn.Module, split: SplitModel, token_ids_BQ: torch.Tensor) -> torch.Tensor:
    """[B, Q, V] of the drafter over the split model's own shallow states."""
    cache = split.make_cache(*token_ids_BQ.shape)
    with torch.no_grad():
        hidden_BQD = split.shallow(token_ids_BQ, cache, cache.place(offset=0, width=token_ids_BQ.shape[1]))
        return drafter(hidden_BQD, hidden_BQD[:, 0])


def assert_same_drafter(actual: nn.Module, expected: nn.Module) -> None:
    assert (actual.config, actual.version) == (expected.config, expected.version)
    assert save(actual.state_dict()) == save(expected.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_trimmed", [False, True])
def test_a_saved_drafter_comes_back_bit_for_bit_and_published(
    tmp_path: Path, split: SplitModel, kind: str, is_trimmed: bool
) -> None:
    """Would catch a tensor left out, a lost version or id map, and weights that are loaded but not in use."""
    token_ids_V = torch.tensor([3, 5, 8, 60, 2]) if is_trimmed else None
    drafter = trained(split, kind=kind, token_ids_V=token_ids_V, draft_vocab_size=5 if is_trimmed else 0)
    save_drafter(tmp_path / "drafter", drafter, split, base_model="some/base")
    loaded = load_drafter(tmp_path / "drafter", split)
    assert type(loaded) is type(drafter)
    assert_same_drafter(loaded, drafter)
    assert torch.equal(draft_logits(loaded, split), draft_logits(drafter, split))


def test_the_manifest_says_what_the_drafter_is_and_what_it_fits(tmp_path: Path, split: SplitModel) -> None:
    """Would catch provenance that is lost, or metrics that JSON bends."""
    drafter = trained(split, kind="anchored")
    save_drafter(tmp_path, drafter, split, base_model="some/base", metrics={"mat": 2.5}, config={"seed": 3})
    manifest = read_manifest(tmp_path)
    assert (manifest.drafter, manifest.drafter_version, manifest.base_model) == (drafter.config, 7, "some/base")
    assert (manifest.split_layer, manifest.num_layers, manifest.hidden_size, manifest.vocab_size) == (2, 4, 32, 64)
    assert (manifest.architecture, manifest.dtype) == ("LlamaForCausalLM", "float32")
    assert manifest.head_fingerprint == split.head_fingerprint()
    assert manifest.sha256[EXTRA_FILE] == hashlib.sha256((tmp_path / EXTRA_FILE).read_bytes()).hexdigest()
    assert (manifest.metrics, manifest.config) == ({"mat": 2.5}, {"seed": 3})
    assert manifest.software["torch"] == torch.__version__
    card = (tmp_path / "README.md").read_text()
    assert all(text in card for text in ("some/base", "split_layer=2", "| mat | 2.5 |"))


def test_saved_files_are_readable_as_the_umask_says_and_none_is_a_pickle(tmp_path: Path, split: SplitModel) -> None:
    """Would catch files that only their writer can read, and the frozen head written along."""
    umask = os.umask(0o027)
    try:
        save_drafter(tmp_path / "drafter", trained(split), split, base_model="base")
    finally:
        os.umask(umask)
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "drafter").iterdir()}
    assert files == dict.fromkeys([ADAPTER_FILE, EXTRA_FILE, MANIFEST_FILE, "adapter_config.json", "README.md"], 0o640)
    assert list(load_file(tmp_path / "drafter" / ADAPTER_FILE)) == [
        "base_model.model.draft_head.lora_A.weight",
        "base_model.model.draft_head.lora_B.weight",
    ]


def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new_drafter(tmp_path: Path, split: SplitModel) -> None:
    """Would catch new tensors under an old manifest, and a moment without any drafter."""
    old, new = trained(split, seed=1), trained(split, seed=2)
    outcomes = []
    for survives in range(1000):
        folder = tmp_path / str(survives)
        save_drafter(folder, old, split, base_model="base")
        with DyingProcess(survives) as process, suppress(Killed):
            save_drafter(folder, new, split, base_model="base")
        loaded = load_drafter(folder, split)
        is_new = torch.equal(loaded.draft_head.lora_A, new.draft_head.lora_A)
        outcomes.append(is_new)
        assert_same_drafter(loaded, new if is_new else old)
        save_drafter(folder, old, split, base_model="base")  # no leftover gets in the way
        if not process.is_dead:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 8 and outcomes.count(True) >= 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda path: flip(path), "is damaged: its SHA-256"),
        (lambda path: os.truncate(path, path.stat().st_size - 4), "is damaged: its SHA-256"),
    ],
)
def test_a_drafter_that_does_not_come_back_from_the_disk_is_not_kept(
    tmp_path: Path, split: SplitModel, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None], reason: str
) -> None:
    """Would catch an export that is found to be broken where it is to be used, and one that replaced a good one."""
    old = trained(split, seed=1)
    save_drafter(tmp_path / "old", old, split, base_model="base")
    card = adapter_store._model_card

    def break_then_write(*args: object, **options: object) -> str:  # comes last: all is hashed by then
        for extra in tmp_path.glob(f".*.staging/{EXTRA_FILE}"):
            fault(extra)
        return card(*args, **options)

    monkeypatch.setattr(adapter_store, "_model_card", break_then_write)
    for name in ("old", "new"):
        with pytest.raises(ValueError, match=f"written for {tmp_path / name} does not come back.*{reason}"):
            save_drafter(tmp_path / name, trained(split, seed=2), split, base_model="base")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert_same_drafter(load_drafter(tmp_path / "old", split), old)


def test_a_drafter_that_has_diverged_is_not_saved(tmp_path: Path, split: SplitModel) -> None:
    """Would catch an export that every reader refuses."""
    drafter = trained(split)
    with torch.no_grad():
        drafter.draft_head.lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"does not come back, so it is not kept: .*lora_B holds NaN or infinity"):
        save_drafter(tmp_path / "new", drafter, split, base_model="base")
    assert list(tmp_path.iterdir()) == []


def test_an_id_map_that_comes_back_otherwise_is_found(
    tmp_path: Path, split: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a round trip that leaves out the draft vocabulary: every token would then be drafted as another."""
    real = adapter_store.write_tensors

    def write_shifted(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        real(path, {name: t + 1 if name == TOKEN_IDS else t for name, t in tensors.items()})

    monkeypatch.setattr(adapter_store, "write_tensors", write_shifted)
    with pytest.raises(ValueError, match=f"does not come back, so it is not kept: {TOKEN_IDS} is not what it was"):
        save_drafter(tmp_path / "new", trained(split, token_ids_V=torch.tensor([3, 8])), split, base_model="base")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("kind", "is_trimmed"), [("anchored", True), ("lora_head", False)])
def test_the_snippets_of_the_card_run_and_say_what_loads_where(
    tmp_path: Path, split: SplitModel, monkeypatch: pytest.MonkeyPatch, kind: str, is_trimmed: bool
) -> None:
    """Would catch a card that promises what PEFT refuses, and code that nobody has ever run."""
    base = SplitModel(AutoModelForCausalLM.from_pretrained(STORIES), split_layer=2)
    drafter = trained(base, kind=kind, token_ids_V=torch.tensor([3, 8, 60]) if is_trimmed else None)
    save_drafter(tmp_path / "drafter", drafter, base, base_model=str(STORIES))
    card = (tmp_path / "drafter" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "drafter")
    with_dvi, with_peft = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(with_dvi, found)
    assert_same_drafter(found["speculator"].drafter, drafter)
    exec(with_peft, found)
    x = torch.randn(4, base.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        # float32 sums in another order
        torch.testing.assert_close(found["corrected"](x), drafter.draft_head(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"Target modules .*draft_head.* not found in the base model"):
        PeftModel.from_pretrained(found["base"], tmp_path / "drafter")
    assert "library_name: dvi" in card and ("dvi export --standalone" in card) == (kind == "lora_head")


def test_saving_over_other_files_is_refused_and_deletes_nothing(tmp_path: Path, split: SplitModel) -> None:
    """Would catch `save_drafter("checkpoints")` wiping everything that lives there."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex, which saving would delete; save to another folder"):
        save_drafter(tmp_path, trained(split), split, base_model="base")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: make_split(seed=1), r"head_fingerprint '\w+', this model has '\w+'"),
        (lambda: make_split(split_layer=1), "split_layer 2, this model has 1"),
        (lambda: make_split(vocab_size=48), "vocab_size 64, this model has 48"),
        (lambda: make_split("qwen2"), "architecture 'LlamaForCausalLM', this model has 'Qwen2ForCausalLM'"),
        (lambda: SplitModel(tiny_model("llama"), split_layer=2), "dtype 'float32', this model has 'float64'"),
    ],
)
def test_a_drafter_for_another_backbone_is_refused(
    tmp_path: Path, split: SplitModel, other: Callable[[], SplitModel], reason: str
) -> None:
    """Would catch a drafter that loads, drafts nonsense and only shows as a speed-down."""
    save_drafter(tmp_path, trained(split), split, base_model="some/base")
    with pytest.raises(ValueError, match=f"{reason}; load some/base with split_layer=2 in float32"):
        load_drafter(tmp_path, other())


def rewrite(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a file and makes the manifest's hash agree, as an attacker would."""
    tensors = load_file(folder / file)
    change(tensors)
    replace(folder, file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def replace(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    edit(folder, lambda fields: fields["sha256"].update({file: hashlib.sha256(content).hexdigest()}))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads((folder / MANIFEST_FILE).read_text())
    change(fields)
    (folder / MANIFEST_FILE).write_text(json.dumps(fields))


def set_first(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(0, value)


def number(name: str, value: float) -> Callable[[Path], object]:
    """Plants a number in the drafter's shape."""
    return lambda folder: edit(folder, lambda manifest: manifest["drafter"].update({name: value}))


LORA_A = "base_model.model.draft_head.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing folder": (lambda f: os.rename(f, f"{f}-gone"), "there is no adapter folder"),
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), f"{MANIFEST_FILE} is missing"),
    "no tensors": (lambda f: (f / EXTRA_FILE).unlink(), f"{EXTRA_FILE} is missing"),
    "a pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin may be a pickle"),
    "a manifest cut short": (lambda f: os.truncate(f / MANIFEST_FILE, 100), "is damaged"),
    "a manifest nested too deep": (lambda f: (f / MANIFEST_FILE).write_text("[" * 100_000), "is damaged"),
    "another format": (lambda f: edit(f, lambda m: m.update(format_version=2)), "has format 2, this dvi reads 1"),
    "a manifest of a list": (lambda f: (f / MANIFEST_FILE).write_text("[]"), "has format None"),
    "a field left out": (lambda f: edit(f, lambda m: m.pop("split_layer")), "is not valid: split_layer"),
    "a field of another type": (lambda f: edit(f, lambda m: m.update(hidden_size="32")), "is not valid: hidden_size"),
    "an unknown kind": (lambda f: edit(f, lambda m: m["drafter"].update(kind="x")), "drafter kind must be one of"),
    "a flipped bit": (lambda f: flip(f / EXTRA_FILE), "is damaged: its SHA-256 is"),
    "no hash": (lambda f: edit(f, lambda m: m["sha256"].clear()), "the manifest says None"),
    "not safetensors": (lambda f: replace(f, EXTRA_FILE, b"\x10" + bytes(99)), "is not a safetensors file"),
    "a huge header": (lambda f: replace(f, EXTRA_FILE, b"\xff" * 99), "must have a header of <= 1048576 bytes"),
    "an empty file": (lambda f: replace(f, EXTRA_FILE, b""), "is not a safetensors file"),
    "a missing tensor": (lambda f: rewrite(f, EXTRA_FILE, lambda t: t.pop("depth_bias")), r"missing \['depth_bias'\]"),
    "an extra tensor": (lambda f: rewrite(f, EXTRA_FILE, lambda t: t.update(x=torch.ones(1))), r"extra \['x'\]"),
    "no correction": (lambda f: rewrite(f, ADAPTER_FILE, lambda t: t.pop(LORA_A)), "got shape None"),
    "a wrong shape": (
        lambda f: rewrite(f, EXTRA_FILE, lambda t: t.update(depth_bias=torch.ones(16, 4))),
        r"depth_bias must be torch.float32 \[16, 5\], got torch.float32 \[16, 4\]",
    ),
    "a wrong dtype": (
        lambda f: rewrite(f, EXTRA_FILE, lambda t: t.update(depth_bias=t["depth_bias"].half())),
        r"depth_bias must be torch.float32 \[16, 5\], got torch.float16",
    ),
    "a NaN": (lambda f: rewrite(f, ADAPTER_FILE, set_first(LORA_A, float("nan"))), "lora_A holds NaN or infinity"),
    "an infinity": (lambda f: rewrite(f, EXTRA_FILE, set_first("norm.gain", float("inf"))), "gain holds NaN or inf"),
    "a rank that lies": (lambda f: edit(f, lambda m: m["drafter"].update(lora_rank=999)), "lora_rank=999 rows"),
    "a width that lies": (lambda f: edit(f, lambda m: m["drafter"].update(anchor_hidden=999)), "anchor_hidden=999 row"),
    "a rank beyond all": (number("lora_rank", 10**12), "lora_rank must be in 1..4096, got 1000000000000; try 32"),
    "a width beyond all": (number("anchor_hidden", 10**12), "anchor_hidden must be in 1..131072, got 10000"),
    "no rank": (number("lora_rank", 0), "lora_rank must be in 1..4096, got 0"),
    "a huge alpha": (number("lora_alpha", 1e308), r"lora_alpha must be in 0..1000000, got 1e\+308"),
    "alpha NaN": (number("lora_alpha", float("nan")), "drafter.lora_alpha: .*finite number, got nan"),
    "alpha infinite": (number("lora_alpha", float("inf")), "drafter.lora_alpha: .*finite number, got inf"),
    "a draft vocabulary beyond all": (number("draft_vocab_size", 2**63), "draft_vocab_size must be in 0..16777216"),
    "a version that overflows": (
        lambda f: edit(f, lambda m: m.update(drafter_version=2**63)),
        f"drafter_version: Input should be less than or equal to {2**53 - 1}, got {2**63}",
    ),
    "the first version too many": (
        lambda f: edit(f, lambda m: m.update(drafter_version=2**53)), "drafter_version: Input should be less than or"
    ),
    "a version below 0": (
        lambda f: edit(f, lambda m: m.update(drafter_version=-1)),
        "drafter_version: Input should be greater than or equal to 0, got -1",
    ),
    "a version that is a truth": (
        lambda f: edit(f, lambda m: m.update(drafter_version=True)), "drafter_version: Input should be a valid integer"
    ),
    "layers beyond all": (lambda f: edit(f, lambda m: m.update(num_layers=2**40)), "num_layers: Input should be less"),
    "a long manifest": (
        lambda f: (f / MANIFEST_FILE).write_text(" " * (2**20 + 1)), "must be <= 1048576 bytes, got 1048577"
    ),
    "a file that no such drafter needs": (lambda f: os.truncate(f / EXTRA_FILE, 2**23), "bytes for a drafter of this"),
    "an id out of range": (lambda f: rewrite(f, EXTRA_FILE, set_first(TOKEN_IDS, -1)), "must be ascending int64 ids"),
    "ids out of order": (lambda f: rewrite(f, EXTRA_FILE, set_first(TOKEN_IDS, 63)), "must be ascending int64 ids"),
}  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_hostile_folder_is_refused_with_the_reason(tmp_path: Path, split: SplitModel, fault: str) -> None:
    """Would catch a check that is missing, or a fault that surfaces as some other library's exception."""
    folder = tmp_path / "drafter"
    save_drafter(folder, trained(split, token_ids_V=torch.tensor([3, 8, 60])), split, base_model="base")
    load_drafter(folder, split)
    plant, reason = FAULTS[fault]
    plant(folder)
    with pytest.raises(ValueError, match=reason):
        load_drafter(folder, split)


# qwen3, smollm3: per-layer lists in the config. gemma2: soft-capped logits, a norm that stores gain - 1, a tied head.
# granite, cohere: scaled logits. opt, gpt_neox: a LayerNorm.
# Readers without this library: one process, whose findings several tests look at.

READER = """
import sys
from pathlib import Path

sys.modules["dvi"] = sys.modules["trainers"] = None  # importing them fails, whatever is installed
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root, bases = Path(sys.argv[1]), sys.argv[2:]
inputs, found = load_file(root / "inputs.safetensors"), {}

class Reader(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.draft_head = torch.nn.Linear(*weight.T.shape, bias=False)
        self.draft_head.weight.data = weight

    def forward(self, x):
        return self.draft_head(x)

with torch.no_grad():
    found["peft"] = PeftModel.from_pretrained(Reader(inputs["weight"]), root / "adapter")(inputs["x"])
    for name, base in (item.split("=") for item in bases):
        target, draft = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, root / f"{name}-draft"))
        ids = inputs["token_ids"]
        found[f"{name} logits"] = draft(input_ids=ids).logits
        settings = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        found[f"{name} greedy"] = target.generate(ids, **settings)
        found[f"{name} assisted"] = target.generate(ids, assistant_model=draft, **settings)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, split: SplitModel) -> dict[str, torch.Tensor]:
    """What a process without this library computes from our files, beside what the drafters give ("... expected")."""
    root = tmp_path_factory.mktemp("elsewhere")
    token_ids_BQ, x = torch.tensor([[1, 4, 9, 16, 25]]), torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    drafter = trained(split)
    save_drafter(root / "adapter", drafter, split, base_model="some/base")
    inputs = {"weight": split.head_weight_VD.data, "x": x, "token_ids": token_ids_BQ}
    save_file(inputs, root / "inputs.safetensors")
    expected = {"peft expected": drafter.draft_head(x).detach()}
    split.model.save_pretrained(root / "untied")
    tied = SplitModel(AutoModelForCausalLM.from_pretrained(STORIES), split_layer=2)
    for name, base in (("tied", tied), ("untied", split)):
        lora_head = trained(base, kind="lora_head")
        export_standalone(root / f"{name}-draft", lora_head, base)
        expected[f"{name} expected"] = model_logits(lora_head, base, token_ids_BQ)
    subprocess.run(
        [sys.executable, "-I", "-c", READER, root, f"tied={STORIES}", f"untied={root / 'untied'}"], check=True, cwd=root
    )
    return load_file(root / "found.safetensors") | expected


def test_peft_alone_loads_the_head_correction(elsewhere: dict[str, torch.Tensor]) -> None:
    """Would catch names, scaling or a target that only our own loader understands."""
    torch.testing.assert_close(elsewhere["peft"], elsewhere["peft expected"], rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_alone_loads_the_standalone_model_and_drafts_with_it(
    elsewhere: dict[str, torch.Tensor], name: str
) -> None:
    """Would catch a merged head dropped as a duplicate of tied embeddings (the reloaded head is then random)."""
    torch.testing.assert_close(elsewhere[f"{name} logits"], elsewhere[f"{name} expected"], rtol=1e-4, atol=1e-4)
    assert torch.equal(elsewhere[f"{name} assisted"], elsewhere[f"{name} greedy"])
