"""How a model decodes: itself, its drafter, what is drafted and verified, how a request's tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from dvi.settings.choices import (
    CompanionName,
    Count,
    DrafterKind,
    Dtype,
    Mode,
    NonNegative,
    PathKind,
    Placement,
    PolicyName,
    Positive,
    PositiveCount,
    RuleName,
    Seed,
    Share,
    SourceName,
    Weights,
)

AUTO_ADAPTER = "auto"  # drafter.adapter: the drafter that lies beside the model
MACHINE_KEYS = frozenset({"device", "num_threads", "placement"})  # of ModelSettings: where a run goes on may differ
RESUMED_KEYS = MACHINE_KEYS | {"mode", "weights"}  # and in what is promised of its tokens, and how weights are held


@dataclass(frozen=True)
class ModelSettings:
    """The frozen language model and how it runs.

    path         a folder, a GGUF file or a hub name.
    split_layer  layers 1..split_layer draft, the rest verify; 0 drafts from the embedding; null is one in sixteen.
    dtype        "auto" is the adapter's, or that of the run that is resumed; else bfloat16 on GPUs, and on CPUs
                 what decodes plainly faster of float32 and bfloat16, measured once. A run's config.yaml says which.
    weights      of a GGUF file: "blocks" decodes its Q4_0, Q4_1 and Q8_0 weights as they are, in bfloat16 on the native
                 path; "dense" dequantises them; "auto" is that of the run that is resumed, else blocks where they can
                 be. A run's config.yaml says which.
    mode         "exact": token ids equal plain decoding's to the bit, or it is refused with the reason; "fast": up to
                 rounding; "auto" is exact where that costs nothing, which is found out at load: on the native path.
                 A run's config.yaml says which.
    placement    "single" device; "device_map" spreads the layers over this machine's GPUs, and its memory and disk
                 where they are full; "tensor" every layer over the processes of torchrun; "zero3" too, but only to
                 record texts for a warm-up. See docs/multi_gpu.md.
    path_kind    how the layers are called: "views" (any model), "direct" (lean, Llama-shaped models), "native" (the
                 same in kernels compiled on this machine, CPUs), "auto" takes the fastest that there is.
    device       auto, cpu, cuda, cuda:1 ...
    num_threads  CPU threads of torch; 0 leaves its own choice, and to a server all cores but one.
    """

    path: str = "checkpoints/reference-11m"
    split_layer: Count | None = None
    dtype: Dtype = "auto"
    weights: Weights = "auto"
    device: str = "auto"
    placement: Placement = "single"
    mode: Mode = "auto"
    path_kind: PathKind = "auto"
    num_threads: Count = 0

    def __post_init__(self) -> None:
        if self.placement != "single" and self.device != "auto":
            raise ValueError(
                f"device must be 'auto' with placement {self.placement!r}, which finds its devices itself, got "
                f"{self.device!r}; CUDA_VISIBLE_DEVICES limits them"
            )
        if self.placement != "single" and self.path_kind in ("native", "direct"):
            raise ValueError(
                f"path_kind {self.path_kind!r} needs the whole model on one device, got placement {self.placement!r}; "
                "try 'auto'"
            )


@dataclass(frozen=True)
class DrafterSettings:
    """The trainable part.

    kind              "lora_head" is the paper's.
    lora_alpha        the head's low-rank correction is scaled by alpha / rank.
    anchor_hidden     width of the anchored and recurrent drafters' MLP.
    draft_vocab_size  the head is trimmed to this many tokens in time: the traffic's most frequent, filled up with the
                      tokenizer's first; 0 keeps all, and so does as many as the model has, or more.
    adapter           folder of a saved drafter to start from; null starts untrained; "auto" takes the folder beside
                      the model's, MODEL-drafter, where there is one that fits it and what else is set.
    """

    kind: DrafterKind = "anchored"
    lora_rank: PositiveCount = 32
    lora_alpha: Positive = 32.0
    anchor_hidden: PositiveCount = 1024
    draft_vocab_size: Count = 0
    adapter: str | None = None


@dataclass(frozen=True)
class DraftSettings:
    """How many tokens are drafted in a round.

    source                "drafter", the shallow layers and the trained head; or "lookup": what followed the same tokens
                          before in the request's own text, as a tree of nodes that needs no drafter and no training.
    max_nodes             "lookup": the most nodes verified in a round; measured costs choose how many.
    policy                "fixed"; "confidence" stops where the drafter is unsure; "goodput" weighs measured costs and
                          never loses to plain decoding; "companion" is goodput that also leaves out, token by token,
                          what a companion makes look too unlikely for its time; "auto" is goodput where the output
                          cannot depend on the lengths it picks, else fixed.
    num_draft_tokens      the most tokens drafted in a round, 0 decodes plainly.
    confidence_threshold  "confidence" drafts on while the largest draft probability is at least this.
    companion             "companion"'s second opinion: "self", the drafter's own confidence; "exit", the model's head
                          on the shallow state; "older", the drafter's version before; "ema", an average of its
                          versions; "model", another model.
    companion_model       of "model": the folder or hub name of a small one with the same tokenizer.
    """

    source: SourceName = "drafter"
    max_nodes: Annotated[int, Ge(1), Le(32)] = 16
    policy: PolicyName = "auto"
    num_draft_tokens: Count = 4
    confidence_threshold: Share = 0.6
    companion: CompanionName = "self"
    companion_model: str | None = None

    def __post_init__(self) -> None:
        check_source(self.source, self.policy)
        check_companion(self.companion, self.companion_model)


def check_source(source: str, policy: str) -> None:
    """Raises ValueError for a policy that asks a drafter where lookups propose."""
    if source == "lookup" and policy in ("confidence", "companion"):
        raise ValueError(f"policy {policy!r} asks the drafter, but source 'lookup' has none draft; try policy 'auto'")


def check_companion(companion: str, companion_model: object | None) -> None:
    """Raises ValueError when one of the two is given without the other."""
    if companion == "model" and companion_model is None:
        raise ValueError("companion 'model' needs companion_model, the folder or hub name of one, got none; try 'self'")
    if companion != "model" and companion_model is not None:
        raise ValueError(f"companion_model goes with companion 'model', got {companion!r}; leave it out")


@dataclass(frozen=True)
class VerifySettings:
    """What the verifier lets pass.

    rule               "strict": the output is the verifier's own. The others are lossy, and all they touch is stamped
                       so: "margin" also keeps a drafted runner-up that comes close to the verifier's choice, "typical"
                       whatever the verifier finds likely enough.
    margin_theta       "margin": how close, as the share of the highest logit that the second must exceed.
    typical_threshold  "typical": a token this likely is always kept, ...
    typical_alpha      ... and one likelier than this times exp(-entropy).
    """

    rule: RuleName = "strict"
    margin_theta: Annotated[float, Gt(0), Lt(1)] = 0.9
    typical_threshold: Annotated[float, Gt(0), Le(1)] = 0.3
    typical_alpha: Annotated[float, Gt(0), Le(1)] = 0.09


@dataclass(frozen=True)
class RequestSettings:
    """How a request's tokens are chosen and when it stops: keys of `dvi.records.SamplingParams`, its bounds.

    temperature         0 is greedy.
    top_k               0 keeps every token.
    top_p               1 keeps every token.
    min_p               the least share of the likeliest token's probability that stays; 0 keeps every token.
    repetition_penalty  of tokens in prompt or answer; 1 is off.
    presence_penalty    of the answer's own tokens; 0 is off.
    frequency_penalty   the same, as often as each occurs; 0 is off.
    """

    temperature: NonNegative = 0.0
    top_k: Count = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: PositiveCount = 128
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.stop_strings):
            raise ValueError(f"stop_strings must be non-empty strings, got {list(self.stop_strings)}; leave out ''")


@dataclass(frozen=True)
class SamplingSettings(RequestSettings):
    """The same for every request of a run, which also fixes the draws."""

    seed: Seed = 0
