"""DVI: Draft, Verify, & Improve - self-speculative decoding whose drafter learns while it serves.

    from dvi import SamplingParams, SelfSpeculator
    from trainers import OnlineTrainer

    speculator = SelfSpeculator.from_pretrained("path/of/a/model")
    trainer = OnlineTrainer(speculator)
    for result in speculator.generate(prompts, SamplingParams(max_new_tokens=128), learner=trainer):
        print(result.text, result.stats)

SelfSpeculator decodes, and gives for every prompt a GenerationResult, whose `stats` are RoundStats; SamplingParams say
how a request's tokens are chosen, a DrafterConfig what the drafter is. `trainers.OnlineTrainer` is the Learner that
teaches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvi.software import VERSION as __version__

if TYPE_CHECKING:
    from dvi.decode.speculator import SelfSpeculator
    from dvi.learner import Learner
    from dvi.model.drafter import DrafterConfig
    from dvi.records import GenerationResult, RoundStats, SamplingParams

__all__ = [
    "DrafterConfig", "GenerationResult", "Learner", "RoundStats", "SamplingParams", "SelfSpeculator", "__version__",
]  # fmt: skip

_HOMES = dict.fromkeys(("GenerationResult", "RoundStats", "SamplingParams"), "dvi.records") | {
    "DrafterConfig": "dvi.model.drafter", "Learner": "dvi.learner", "SelfSpeculator": "dvi.decode.speculator",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # Lazily: `dvi --help` and `import dvi.config` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'dvi' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # help(dvi) and completion then know the lazy names
