"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dvi.settings.choices import BenchTemplate, Count, NonNegative, PositiveCount, Rival


@dataclass(frozen=True)
class BenchSection:
    """Spec-Bench at the end of `dvi bench paper`, with what was learnt.

    limit        questions of each task, 0 takes all 80.
    template     "vicuna" prompts every model as the harness does, "chat" by its own chat template; "auto" by its own
                 if it has one.
    rivals       other decoders of the same weights beside ours.
    temperature  0 is greedy, and then outputs are compared.
    """

    max_new_tokens: PositiveCount = 1024
    limit: Count = 0
    repetitions: PositiveCount = 3
    template: BenchTemplate = "auto"
    rivals: tuple[Rival, ...] = ()
    temperature: NonNegative = 0.0
