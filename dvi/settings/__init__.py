"""The settings of every verb, section by section: names, types, bounds, defaults, and what each key means.

Each default and each list of choices stands here and nowhere else; a section's docstring is what `--print-config` says
of its keys. Knows nothing of files, models or training, and imports nothing heavy. `dvi.config` reads and checks them.
"""

from dvi.settings.bench import BenchSection, LengthSettings, MarginSettings, SpecBenchSettings, StepSettings
from dvi.settings.choices import (
    BENCH_MODES,
    COMPANIONS,
    MODES,
    POLICIES,
    RIVALS,
    SOURCES,
    SWITCHES,
    BenchTemplate,
    CompanionName,
    DrafterKind,
    Dtype,
    Mode,
    PolicyName,
    Port,
    Rival,
    RuleName,
    SourceName,
)
from dvi.settings.decoding import (
    AUTO_ADAPTER,
    MACHINE_KEYS,
    RESUMED_KEYS,
    DrafterSettings,
    DraftSettings,
    ModelSettings,
    RequestSettings,
    SamplingSettings,
    VerifySettings,
    check_companion,
)
from dvi.settings.learning import DataSettings, EvalSettings, LearningSettings, OutputSettings, WarmupSettings
from dvi.settings.serving import RouteSettings, ServeOutputSettings, ServeSettings
from dvi.settings.verbs import PaperConfig, ServeConfig, TrainConfig, WarmupConfig

__all__ = [
    "AUTO_ADAPTER",
    "BENCH_MODES",
    "COMPANIONS",
    "MACHINE_KEYS",
    "MODES",
    "POLICIES",
    "RESUMED_KEYS",
    "RIVALS",
    "SOURCES",
    "SWITCHES",
    "BenchSection",
    "BenchTemplate",
    "CompanionName",
    "DataSettings",
    "DraftSettings",
    "DrafterKind",
    "DrafterSettings",
    "Dtype",
    "EvalSettings",
    "LearningSettings",
    "LengthSettings",
    "MarginSettings",
    "Mode",
    "ModelSettings",
    "OutputSettings",
    "PaperConfig",
    "PolicyName",
    "Port",
    "RequestSettings",
    "Rival",
    "RouteSettings",
    "RuleName",
    "SamplingSettings",
    "ServeConfig",
    "ServeOutputSettings",
    "ServeSettings",
    "SourceName",
    "SpecBenchSettings",
    "StepSettings",
    "TrainConfig",
    "VerifySettings",
    "WarmupConfig",
    "WarmupSettings",
    "check_companion",
]
