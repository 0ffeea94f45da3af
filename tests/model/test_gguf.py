"""GGUF files: read like the folder of the same model, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dvi import SelfSpeculator
from dvi.cli.main import app
from dvi.model.adapter_store import read_manifest
from dvi.model.gguf import find_gguf, read_config, read_model, read_tokenizer
from tests.support.gguf_files import write_gguf


def test_the_model_read_from_a_file_computes_what_the_one_written_into_it_does(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    read = read_model(tmp_path / "tiny.gguf", dtype=torch.float32)
    ids = torch.arange(12)[None] * 7 % written.config.vocab_size
    torch.testing.assert_close(read(ids).logits, written(ids).logits)  # the same weights, another order of sums


def test_the_model_read_from_a_file_is_an_ordinary_one_by_the_file_s_name(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    model = read_model(path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.name_or_path == read_config(path).name_or_path == str(path)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("splitter", "tokens"), [("smollm", ["ĠĠ", "1", "2", "Ġa"]), ("gpt-2", ["Ġ", "Ġ", "1", "2", "Ġa"])]
)
def test_digits_are_split_as_the_file_says(tmp_path, splitter, tokens):
    write_gguf(tmp_path / "tiny.gguf", splitter=splitter)
    assert read_tokenizer(tmp_path / "tiny.gguf").tokenize("  12 a") == tokens


def test_the_tokenizer_is_the_file_s_whatever_lies_beside_it(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tokenizer = read_tokenizer(tmp_path / "tiny.gguf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert tokenizer(text)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 1


def test_a_folder_stands_for_its_one_file_unless_it_has_other_weights(tmp_path):
    assert find_gguf(tmp_path) is None and find_gguf("org/name") is None
    path = tmp_path / "a.gguf"
    path.write_bytes(b"")
    assert find_gguf(tmp_path) == find_gguf(path) == path
    (tmp_path / "b.GGUF").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 GGUF files, a\.gguf, b\.GGUF; give the path of one"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None
    with pytest.raises(ValueError, match="there is no file"):
        find_gguf(tmp_path / "c.gguf")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture="rwkv9")
    with pytest.raises(ValueError, match=r"architecture 'rwkv9', one of .*llama.*"):
        read_config(tmp_path / "tiny.gguf")


def test_a_part_of_a_model_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", num_parts=3)
    with pytest.raises(ValueError, match="one of 3 parts"):
        read_config(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("left", [0, 3, 30, 4000, 0.5, 0.95])
def test_a_cut_file_is_refused(tmp_path, left):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    with pytest.raises(ValueError, match=r"tiny\.gguf.* cannot be read by transformers"):
        read_model(path, dtype=torch.float32)


def test_a_file_without_one_of_its_weights_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match=r"lacks 1 weights of its model, such as model\.layers\.1\.mlp\.up_proj"):
        read_model(tmp_path / "tiny.gguf", dtype=torch.float32)


def test_every_verb_takes_a_file(tmp_path, monkeypatch):
    """Catches a place that asks transformers for the model by itself."""
    monkeypatch.chdir(tmp_path)
    written = write_gguf(Path("tiny.gguf"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a 1"}\n{"prompt": "1 a"}\n{"prompt": "2", "split": "eval"}\n')
    written.save_pretrained("folder")
    run = ["model.path=tiny.gguf", "data.prompts=prompts.jsonl", "output.folder=run", "output.tensorboard=false",
           "sampling.max_new_tokens=8", "eval.max_new_tokens=4", "drafter.anchor_hidden=8"]  # fmt: skip
    (tmp_path / "run.yaml").write_text("train: {budget: 1.0}")
    fast = ("--policy", "fixed", "--max-new-tokens", "8")
    plain = _dvi("generate", "tiny.gguf", "a 1", *fast, "--num-draft-tokens", "0")
    for arguments in (
        ("generate", "tiny.gguf", "a 1", *fast),
        ("generate", ".", "a 1", *fast),
        ("generate", "tiny.gguf", "a 1", "--max-new-tokens", "8", "--policy", "companion", "--companion", "model",
         "--companion-model", "tiny.gguf"),
    ):  # fmt: skip
        assert _dvi(*arguments)[0] == plain[0], arguments
    assert _dvi("inspect", "tiny.gguf", "--check")[1]["has_chat_template"]
    assert _dvi("audit", "tiny.gguf", "--max-new-tokens", "8", "--limit", "1")[1]["num_unexplained"] == 0
    assert _dvi("train", "run.yaml", *run)[1]["status"] == "done"
    assert read_manifest("run/drafter").base_model == "tiny.gguf"
    _dvi("generate", "tiny.gguf", "a 1", *fast, "--adapter", "run/drafter")
    _dvi("export", "out", "--run", "run")
    _dvi("export", "again", "--adapter", "run/drafter")
    _dvi("bench", "spec-bench", "--model", "tiny.gguf", "--output", "bench", "--limit", "1", "--repetitions", "1",
         "--max-new-tokens", "4")  # fmt: skip


def test_several_devices_are_refused_with_the_way_round(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"onto a single device; .* dvi model get --file .*tiny\.gguf"):
        SelfSpeculator.from_pretrained(tmp_path / "tiny.gguf", placement="device_map")


def _dvi(*arguments):
    """(stdout before the last line, the last line's JSON) of a verb that succeeds."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, (arguments, result.stderr)
    *before, last = result.stdout.splitlines()
    return before, json.loads(last)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("dvi.model.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        read_config(tmp_path / "tiny.gguf")
