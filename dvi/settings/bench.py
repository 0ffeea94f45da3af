"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dvi.settings.choices import (
    MEASURED_POLICIES,
    BenchMode,
    BenchTemplate,
    Count,
    Dtype,
    FrozenCompanion,
    MeasuredPolicy,
    NonNegative,
    PolicyName,
    PositiveCount,
    Rival,
    RivalDtype,
    Share,
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


@dataclass(frozen=True)
class LengthSettings:
    """What `dvi bench lengths` is asked for; a folder holds the run of one such choice.

    adapter           folder of a saved drafter.
    batch_sizes       a list of them.
    policies          plain and fixed are always there.
    companions        each is a policy of its own, if companion is among the policies.
    companion_model   the small model of the companion model, with the same tokenizer.
    num_draft_tokens  the most tokens drafted in a round.
    temperature       0 is greedy, and then outputs are compared.
    prompts           rows or text, those marked eval if any are; default Spec-Bench's questions.
    limit             prompts to take, 0 takes all; they come again and again, in one shuffled order.
    repetitions       slices of each policy at each batch size: 8 answers, or one for each row if more.
    warmups           slices before these, in which policies learn; not counted.
    split_layer       without an adapter; default one layer in sixteen.
    dtype             auto: the adapter's; else bfloat16 on GPUs, and on CPUs what decodes faster, measured once.
    num_threads       CPU threads, 0 leaves torch's choice.
    """

    model: str = ModelSettings.path
    adapter: Path | None = None
    prompts: Path | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    policies: tuple[MeasuredPolicy, ...] = MEASURED_POLICIES
    companions: tuple[FrozenCompanion, ...] = ("self", "exit")
    companion_model: str | None = None
    num_draft_tokens: Count = DraftSettings.num_draft_tokens
    temperature: NonNegative = 0.0
    limit: Count = 0
    max_new_tokens: PositiveCount = 64
    repetitions: PositiveCount = 12
    warmups: Count = 4
    split_layer: Count | None = None
    dtype: Dtype = ModelSettings.dtype
    device: str = ModelSettings.device
    num_threads: Count = ModelSettings.num_threads

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class MarginSettings:
    """What `dvi bench margin` is asked for. Of every question the first turn is asked.

    adapter           folder of a saved drafter; without one it is untrained.
    questions         another question.jsonl; default the bundled 480.
    thetas            a list of margins, an arm each.
    typical           also the typical rule, with its defaults.
    temperature       0 is greedy.
    limit             questions of each task, 0 takes all 80.
    num_draft_tokens  tokens drafted in a round.
    num_threads       CPU threads, 0 leaves torch's choice.
    """

    model: str = ModelSettings.path
    adapter: Path | None = None
    questions: Path | None = None
    thetas: tuple[float, ...] = (0.98, 0.95, 0.9, 0.84, 0.75)
    typical: bool = False
    temperature: NonNegative = 0.0
    limit: Count = 0
    max_new_tokens: PositiveCount = 128
    num_draft_tokens: Count = DraftSettings.num_draft_tokens
    repetitions: PositiveCount = 3
    num_threads: Count = ModelSettings.num_threads


@dataclass(frozen=True)
class StepSettings:
    """What `dvi bench step` is asked for.

    adapter           folder of a saved drafter; without one it is untrained.
    prompt            what is asked, as a chat message where the model has a chat template. Answers go on past any end.
    num_draft_tokens  tokens drafted in every round of scripted drafts.
    acceptance        how likely a scripted draft is right, at every depth.
    draft_vocab_size  without an adapter: tokens that the drafter can draft, 0 is the whole vocabulary.
    hf_dtypes         dtypes in which transformers' generate decodes beside ours, each from weights of its own.
    repetitions       times that everything is measured, every arm in each.
    split_layer       without an adapter; default one layer in sixteen.
    num_threads       CPU threads, 0 leaves torch's choice.
    """

    model: str = ModelSettings.path
    adapter: Path | None = None
    prompt: str = "Explain to a child how a lighthouse works, and why ships need one."
    max_new_tokens: PositiveCount = 64
    num_draft_tokens: PositiveCount = DraftSettings.num_draft_tokens
    acceptance: Share = 0.6
    draft_vocab_size: Count = 8192
    hf_dtypes: tuple[RivalDtype, ...] = ("bfloat16", "float32")
    repetitions: PositiveCount = 5
    split_layer: Count | None = None
    dtype: Dtype = ModelSettings.dtype
    device: str = ModelSettings.device
    num_threads: Count = ModelSettings.num_threads
