"""All settings of a verb that takes a file: which sections it has, and where its defaults are others than theirs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dvi.settings.bench import BenchSection
from dvi.settings.decoding import (
    AUTO_ADAPTER,
    DrafterSettings,
    DraftSettings,
    ModelSettings,
    RequestSettings,
    SamplingSettings,
    VerifySettings,
)
from dvi.settings.learning import DataSettings, EvalSettings, LearningSettings, OutputSettings, WarmupSettings
from dvi.settings.serving import ServeOutputSettings, ServeSettings


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `dvi train`. Built by hand it checks only what its sections' `__post_init__` say.

    Here learning is what the time is for: its budget is half of it, where a server keeps to a twentieth.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    model: ModelSettings = field(default_factory=ModelSettings)
    drafter: DrafterSettings = field(default_factory=DrafterSettings)
    draft: DraftSettings = field(default_factory=DraftSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: LearningSettings = field(default_factory=lambda: LearningSettings(budget=0.5))
    eval: EvalSettings = field(default_factory=EvalSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


@dataclass(frozen=True)
class ServeConfig:
    """All settings of `dvi serve`; `sampling` is what a request gets where it does not say.

    Learning differs from `dvi train` by default: nobody may wait long for it, and a server runs for long.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    model: ModelSettings = field(default_factory=ModelSettings)
    drafter: DrafterSettings = field(
        default_factory=lambda: DrafterSettings(draft_vocab_size=1024, adapter=AUTO_ADAPTER)
    )
    draft: DraftSettings = field(default_factory=DraftSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    sampling: RequestSettings = field(default_factory=RequestSettings)
    train: LearningSettings = field(
        default_factory=lambda: LearningSettings(schedule="kl_only", steps_per_publish=32, blocks_per_slice=16)
    )
    serve: ServeSettings = field(default_factory=ServeSettings)
    output: ServeOutputSettings = field(default_factory=ServeOutputSettings)


@dataclass(frozen=True)
class WarmupConfig:
    """All settings of `dvi warmup`; `draft` is how held-out requests are measured before and after.

    Nobody waits for this learner, so it publishes seldom and has no budget of time.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    model: ModelSettings = field(default_factory=ModelSettings)
    drafter: DrafterSettings = field(default_factory=lambda: DrafterSettings(draft_vocab_size=1024))
    draft: DraftSettings = field(default_factory=DraftSettings)
    data: DataSettings = field(default_factory=lambda: DataSettings(batch_size=8))
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    train: LearningSettings = field(
        default_factory=lambda: LearningSettings(schedule="kl_only", budget=1.0, steps_per_publish=32)
    )
    eval: EvalSettings = field(default_factory=EvalSettings)
    output: OutputSettings = field(default_factory=lambda: OutputSettings(folder="runs/warmup"))


@dataclass(frozen=True)
class PaperConfig(TrainConfig):
    """All settings of `dvi bench paper`: those of `dvi train`, and of Spec-Bench afterwards."""

    bench: BenchSection = field(default_factory=BenchSection)

    @property
    def training(self) -> TrainConfig:
        """The settings of `dvi train` alone."""
        return TrainConfig(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(TrainConfig)})
