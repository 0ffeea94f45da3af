"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dvi.settings.choices import (
    BenchMode,
    BenchTemplate,
    Count,
    Dtype,
    NonNegative,
    PolicyName,
    PositiveCount,
    Rival,
)
from dvi.settings.decoding import DraftSettings, ModelSettings, VerifySettings


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


@dataclass(frozen=True)
class SpecBenchSettings(BenchSection):
    """A run of Spec-Bench; a folder holds the run of one such choice.

    model             a folder, a hub name or a .gguf file.
    adapter           folder of a saved drafter; without one it is untrained.
    modes             how the drafter runs; online learns across questions. Plain decoding is always there.
    plain_padded      also plain decoding with every pass in one fixed shape.
    batch_size        questions that are decoded together.
    num_draft_tokens  the most tokens drafted in a round.
    policy            how our arms choose up to as many; fixed, so that arms can be compared.
    split_layer       without an adapter; default one layer in sixteen.
    draft_checkpoint  a draft model for hf_assistant, from dvi export --standalone.
    questions         another question.jsonl; default the bundled 480.
    dtype             auto: the adapter's; else bfloat16 on GPUs, and on CPUs what decodes faster, measured once.
    num_threads       CPU threads, 0 leaves torch's choice.
    warmups           times that each arm answers the first questions before a repetition, unrecorded.
    verify            the rule of our arms that draft; one that is lossy is stamped on their names.
    """

    model: str = ModelSettings.path
    adapter: Path | None = None
    modes: tuple[BenchMode, ...] = ("frozen",)
    plain_padded: bool = False
    batch_size: PositiveCount = 1
    num_draft_tokens: Count = DraftSettings.num_draft_tokens
    policy: PolicyName = "fixed"
    split_layer: Count | None = None
    draft_checkpoint: Path | None = None
    questions: Path | None = None
    dtype: Dtype = ModelSettings.dtype
    device: str = ModelSettings.device
    num_threads: Count = ModelSettings.num_threads
    warmups: Count = 3
    verify: VerifySettings = field(default_factory=VerifySettings)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
