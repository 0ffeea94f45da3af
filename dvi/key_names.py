"""What a mistyped key of the settings was meant to be: other tools' names for it, and the likest of ours.

Knows names; knows nothing of values or files.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import get_type_hints

from dvi.settings import ServeConfig, TrainConfig, WarmupConfig

# What other tools, or a first guess, call our keys; of several the first that the verb's settings have. A section's own
# name stands for the key that a bare value of it must mean: model=FOLDER.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "model": ("model.path",),
    "data": ("data.prompts",),
    "drafter": ("drafter.kind",),
    "draft": ("draft.policy",),
    "verify": ("verify.rule",),
    "output": ("output.folder",),
    "serve": ("serve.port",),
    "data.path": ("data.prompts",),
    "data.file": ("data.prompts",),
    "model.name": ("model.path",),
    "learning_rate": ("train.lr",),
    "wd": ("train.weight_decay",),
    "max_grad_norm": ("train.clip_norm",),
    "grad_clip": ("train.clip_norm",),
    "loss": ("train.schedule",),
    "buffer_size": ("train.replay_positions",),
    "learn": ("train.enabled",),
    "train_share": ("train.budget",),
    "batch_size": ("data.batch_size", "serve.max_rows"),
    "per_device_train_batch_size": ("data.batch_size",),
    "max_batch_size": ("serve.max_rows", "data.batch_size"),
    "max_num_seqs": ("serve.max_rows", "data.batch_size"),
    "num_train_epochs": ("data.epochs",),
    "num_epochs": ("data.epochs",),
    "max_samples": ("data.limit",),
    "prompts_file": ("data.prompts",),
    "train_file": ("data.prompts",),
    "data_path": ("data.prompts",),
    "dataset_name": ("data.dataset",),
    "text_field": ("data.field",),
    "max_tokens": ("sampling.max_new_tokens", "warmup.max_new_tokens"),
    "max_length": ("sampling.max_new_tokens", "warmup.text_positions"),
    "stop": ("sampling.stop_strings",),
    "max_model_len": ("serve.max_positions",),
    "max_seq_len": ("serve.max_positions", "warmup.text_positions"),
    "api_key": ("serve.keys_file",),
    "api_keys": ("serve.keys_file",),
    "timeout": ("serve.total_timeout_s",),
    "model_path": ("model.path",),
    "model_id": ("model.path",),
    "model_name_or_path": ("model.path",),
    "base_model": ("model.path",),
    "torch_dtype": ("model.dtype",),
    "precision": ("model.dtype",),
    "threads": ("model.num_threads",),
    "exit_layer": ("model.split_layer",),
    "early_exit": ("model.split_layer",),
    "num_speculative_tokens": ("draft.num_draft_tokens",),
    "draft_length": ("draft.num_draft_tokens",),
    "draft_tokens": ("draft.num_draft_tokens",),
    "gamma": ("draft.num_draft_tokens",),
    "rank": ("drafter.lora_rank",),
    "lora_r": ("drafter.lora_rank",),
    "r": ("drafter.lora_rank",),
    "alpha": ("drafter.lora_alpha",),
    "adapter_path": ("drafter.adapter",),
    "output_dir": ("output.folder",),
    "out": ("output.folder",),
    "save_dir": ("output.folder",),
    "resume_from_checkpoint": ("output.resume",),
    "verify_rule": ("verify.rule",),
    "eval_samples": ("eval.limit",),
}
SECTIONS = {entry.name for schema in (TrainConfig, ServeConfig, WarmupConfig) for entry in dataclasses.fields(schema)}
LIKE_ENOUGH = 0.6  # of difflib's ratio: below it a suggestion is noise


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every section and dotted key of a dataclass of dataclasses, in the order of its fields."""
    hints = get_type_hints(section)
    for entry in dataclasses.fields(section):
        yield f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from all_keys(hints[entry.name], f"{prefix}{entry.name}.")


def meant_by(name: str, schema: type) -> str | None:
    """The key of the schema that a synonym stands for, if it is one."""
    known = set(all_keys(schema))
    return next((key for key in SYNONYMS.get(_plain(name), ()) if key in known), None)


def hint_for(unknown: str, schema: type) -> str:
    """What an error about an unknown key ends with: the keys that it may have meant, or where all are shown."""
    section, own = unknown.partition(".")[0], [entry.name for entry in dataclasses.fields(schema)]
    is_of_another_verb = section in SECTIONS and section not in own
    nearest = [] if is_of_another_verb else nearest_keys(unknown, schema)
    if nearest:
        return f"did you mean {' or '.join(map(repr, nearest))}?"
    return "--print-config shows all keys" if section in own else f"the sections here are {', '.join(own)}"


def nearest_keys(unknown: str, schema: type) -> list[str]:
    """The keys that were meant: a synonym's, those of this name in other sections, or the one spelt most alike."""
    unknown = _plain(unknown)
    section, _, name = unknown.rpartition(".")
    keys = [key for key in all_keys(schema) if "." in key or not section]
    meant = meant_by(unknown, schema)
    if meant is not None:
        return [meant]
    same_name = [key for key in keys if key.rpartition(".")[2] == name and "." in key]
    if same_name:  # with a section it is the likest one's that was mistaken; without, all may be meant
        return [max(same_name, key=lambda key: _likeness(unknown, key))] if section else same_name
    meant = meant_by(name, schema)
    if meant is not None:
        return [meant]
    best = max(keys, key=lambda key: _nearness(unknown, key))
    return [best] if _nearness(unknown, best) >= LIKE_ENOUGH else []


def _nearness(unknown: str, key: str) -> float:
    """Of the names alone where the sections are the same, or one has none: lrr is as near to train.lr as train.lrr."""
    (section, _, name), (known_section, _, known) = unknown.rpartition("."), key.rpartition(".")
    if section == known_section:
        return _likeness(name, known)
    return max(_likeness(unknown, key), _likeness(name, known) if known_section else 0.0)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
