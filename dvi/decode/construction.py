"""The speculator of a run's settings.

Knows settings and what they are called in a speculator; loads and decodes nothing itself.
"""

from __future__ import annotations

import dataclasses

import torch

from dvi.decode.precision import Config, settle_dtype
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import make_rule
from dvi.model.chat_templates import VICUNA_TEMPLATE
from dvi.model.devices import check_settings
from dvi.model.drafter import DrafterConfig
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig


def as_built(config: Config, speculator: SelfSpeculator) -> Config:
    """The settings with the mode that "auto" turned out to be."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mode=speculator.mode))


def build_speculator(
    config: TrainConfig | ServeConfig | WarmupConfig, *, kind: type[SelfSpeculator] = SelfSpeculator
) -> SelfSpeculator:
    """The speculator of a run's settings, its drafter untrained or as drafter.adapter has it."""
    check_settings(config)
    config = settle_dtype(config)
    model, drafter, draft = config.model, config.drafter, config.draft
    if model.num_threads:
        torch.set_num_threads(model.num_threads)
    shape = {field.name: getattr(drafter, field.name) for field in dataclasses.fields(DrafterConfig)}
    speculator = kind.from_pretrained(
        model.path, split_layer=model.split_layer, drafter=DrafterConfig(**shape), dtype=model.dtype,
        weights=model.weights, device=model.device, placement=model.placement, adapter=drafter.adapter,
        mode=model.mode, path=model.path_kind,
        source=draft.source, max_nodes=draft.max_nodes, policy=draft.policy, num_draft_tokens=draft.num_draft_tokens,
        confidence_threshold=draft.confidence_threshold,
        companion=draft.companion, companion_model=draft.companion_model,
        seed=config.train.seed, rule=None if isinstance(config, WarmupConfig) else make_rule(config.verify),
        trust_remote_code=isinstance(config, ServeConfig) and config.serve.trust_remote_code,
    )
    if not isinstance(config, ServeConfig) and config.data.template == "vicuna":
        speculator.tokenizer.chat_template = VICUNA_TEMPLATE
    return speculator
