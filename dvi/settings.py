"""The settings of the verbs that take a file, section by section: names, types, bounds, defaults.

Each default stands here and nowhere else. Knows nothing of files, models or training, and imports neither torch nor
transformers. `dvi.config` reads and checks them.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

Count = Annotated[int, Ge(0)]
PositiveCount = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**62)]
Port = Annotated[int, Ge(0), Le(65535)]
AUTO_ADAPTER = "auto"  # drafter.adapter: the drafter that lies beside the model
MACHINE_KEYS = frozenset({"device", "num_threads", "placement"})  # of ModelSettings: where a run goes on may differ
Rival = Literal["hf_generate", "hf_early_exit", "hf_prompt_lookup", "hf_assistant", "medusa", "eagle"]


@dataclass(frozen=True)
class ModelSettings:
    """The frozen language model and how it runs.

    path         a folder, a GGUF file or a hub name.
    split_layer  layers 1..split_layer draft, the rest verify; 0 drafts from the embedding; null is one in sixteen.
    dtype        "auto" is the adapter's, or that of the run that is resumed; else bfloat16 on GPUs, and on CPUs
                 what decodes plainly faster of float32 and bfloat16, measured once. A run's config.yaml says which.
    mode         "fast", or "exact": token ids equal plain decoding's, in float32 and float64 only.
    placement    "single" device; "device_map" spreads the layers over this machine's GPUs, and its memory and disk
                 where they are full; "tensor" every layer over the processes of torchrun; "zero3" too, but only to
                 record texts for a warm-up. See docs/multi_gpu.md.
    path_kind    how the layers are called: "views" (any model), "direct" (lean, Llama-shaped models), "auto" chooses.
    num_threads  CPU threads of torch; 0 leaves its own choice, and to a server all cores but one.
    """

    path: str = "checkpoints/reference-11m"
    split_layer: Count | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    device: str = "auto"
    placement: Literal["single", "device_map", "tensor", "zero3"] = "single"
    mode: Literal["fast", "exact"] = "fast"
    path_kind: Literal["auto", "direct", "views"] = "auto"
    num_threads: Count = 0

    def __post_init__(self) -> None:
        if self.mode == "exact" and self.dtype == "bfloat16":
            raise ValueError("mode 'exact' needs dtype float32 or float64, got 'bfloat16'; try mode 'fast'")
        if self.placement != "single" and self.device != "auto":
            raise ValueError(
                f"device must be 'auto' with placement {self.placement!r}, which finds its devices itself, got "
                f"{self.device!r}; CUDA_VISIBLE_DEVICES limits them"
            )
        if self.placement != "single" and self.path_kind == "direct":
            raise ValueError(
                f"path_kind 'direct' needs the whole model on one device, got placement {self.placement!r}; try 'auto'"
            )


@dataclass(frozen=True)
class DrafterSettings:
    """The trainable part.

    anchor_hidden     width of the anchored and recurrent drafters' MLP.
    draft_vocab_size  the head is trimmed to this many tokens in time: the traffic's most frequent, filled up with the
                      tokenizer's first; 0 keeps all, and so does as many as the model has, or more.
    adapter           folder of a saved drafter to start from; null starts untrained; "auto" takes the folder beside
                      the model's, MODEL-drafter, where there is one that fits it and what else is set.
    """

    kind: Literal["anchored", "lora_head", "recurrent"] = "anchored"
    lora_rank: PositiveCount = 32
    lora_alpha: Positive = 32.0
    anchor_hidden: PositiveCount = 1024
    draft_vocab_size: Count = 0
    adapter: str | None = None


@dataclass(frozen=True)
class DraftSettings:
    """How many tokens are drafted in a round.

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

    policy: Literal["auto", "fixed", "confidence", "goodput", "companion"] = "auto"
    num_draft_tokens: Count = 4
    confidence_threshold: Share = 0.6
    companion: Literal["self", "exit", "older", "ema", "model"] = "self"
    companion_model: str | None = None

    def __post_init__(self) -> None:
        check_companion(self.companion, self.companion_model)


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

    rule: Literal["strict", "margin", "typical"] = "strict"
    margin_theta: Annotated[float, Gt(0), Lt(1)] = 0.9
    typical_threshold: Annotated[float, Gt(0), Le(1)] = 0.3
    typical_alpha: Annotated[float, Gt(0), Le(1)] = 0.09


@dataclass(frozen=True)
class RequestSettings:
    """How a request's tokens are chosen and when it stops: keys of `dvi.records.SamplingParams`, its bounds."""

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


@dataclass(frozen=True)
class DataSettings:
    """The traffic: files of prompts (see `dvi.traffic.read_prompts`), or a set known to `datasets`.

    prompts        one path or a list of them: .jsonl, .json, or .txt with one prompt a line, each also with .gz.
    dataset        a name for `datasets.load_dataset`, instead of `prompts`; its rows are read from dataset_split.
    field          what holds the prompt in a row of either; null takes turns, prompt, messages, conversations,
                   instruction or text, the first that is there.
    domains        keep only these domains of `prompts`; empty keeps all.
    split          keep only these rows of `prompts`.
    limit          requests of one epoch, 0 takes all.
    shuffle_seed   null keeps the order of the files.
    template       how a prompt is put to the model: "auto" by its own chat template, or as bare text where it has none;
                   "vicuna" as vicuna_v1.1.
    """

    prompts: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_split: str = "train"
    field: str | None = None
    domains: tuple[str, ...] = ()
    split: Literal["traffic", "eval"] = "traffic"
    limit: Count = 0
    batch_size: PositiveCount = 1
    shuffle_seed: Seed | None = 0
    epochs: PositiveCount = 1
    template: Literal["auto", "vicuna"] = "auto"

    def __post_init__(self) -> None:
        if self.prompts and self.dataset is not None:
            raise ValueError(
                f"prompts and dataset must not both be given, got {list(self.prompts)} and {self.dataset!r}; "
                "try data.prompts=[] or data.dataset=null"
            )


@dataclass(frozen=True)
class LearningSettings:
    """The learning beside serving.

    enabled             false serves with the drafter as it is.
    blocks_per_step     draft blocks in one optimizer step, each of block_len positions; of several ranks together.
    rounds_per_step     a step is due every so many rounds, of several ranks together ...
    budget              ... as long as training has taken at most this share of all time; 1 is no limit.
    steps_per_publish   the serving drafter takes over the learner's parameters every so many steps.
    steps_per_canary    the learner is held against its best so far every so many steps.
    learn_from_prompts  also distil on the prompts' own positions, not only on generated text.
    target_temperature  the verifier's distribution is sharpened (below 1) or flattened by it before it is distilled.
    tokens_before_trim  generated tokens to count before the head is trimmed to drafter.draft_vocab_size tokens.
    schedule            preset of the loss weights, see docs/training.md.
    warmup_steps        optimizer steps of pure KL before the ramp of ramp_steps to the reward terms.
    switch_by           the warm-up ends by "steps", or by "acceptance" once it no longer rises.
    normalise_advantage the policy gradient's advantages are divided by their standard deviation in the batch.
    replay_positions    positions the replay buffer holds, of which reservoir_fraction are a sample of all traffic.
    canary_tolerance    the best drafter comes back when acceptance falls below its own by more than this.
    settle_rounds       rounds without a rise in acceptance after which only a tenth of the steps is made; 0: never.
    drift_wakeup        a learner that has settled wakes when acceptance falls, or rises; false: it stays settled.
    blocks_per_slice    a step is worked on in pieces of so many blocks, one between two rounds, so that nobody waits
                        for a whole step; 0 makes it in one piece.
    max_tenant_share    of a step's blocks that one API key's experience may fill, while others have some too.
    strategy            how several ranks make a step: "ddp", or DeepSpeed's "zero1" or "zero2", which share out the
                        optimizer's state; a launch by accelerate with a DeepSpeed file decides for itself.
    compress_gradient   between ranks gradients travel as bfloat16: half the bytes, and a rounding of each sum.
    peer_timeout_s      a rank that has not answered the others for so long is lost, and the job ends.
    learner             of several ranks: "shared", all serve and learn together; "dedicated", rank 0 learns from what
                        the others serve.
    outbox_positions    where the learner is dedicated: what a serving rank holds of what is not sent yet; of more it
                        sheds the oldest.
    """

    enabled: bool = True
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    clip_norm: Positive = 1.0
    blocks_per_step: PositiveCount = 32
    block_len: PositiveCount = 4
    rounds_per_step: PositiveCount = 4
    budget: Share = 0.05
    steps_per_publish: PositiveCount = 4
    steps_per_canary: PositiveCount = 32
    learn_from_prompts: bool = False
    target_temperature: Positive = 1.0
    tokens_before_trim: PositiveCount = 16384
    schedule: Literal["kl_only", "kl_pg", "pg_only", "ce_only", "kl_ce", "kl_rl", "lk"] = "kl_only"
    warmup_steps: Count = 400
    ramp_steps: Count = 600
    switch_by: Literal["steps", "acceptance"] = "steps"
    normalise_advantage: bool = False
    replay_positions: PositiveCount = 16384
    reservoir_fraction: Share = 0.3
    canary_tolerance: Share = 0.1
    settle_rounds: Count = 2000
    drift_wakeup: bool = True
    blocks_per_slice: Count = 0
    max_tenant_share: Share = 0.2
    strategy: Literal["ddp", "zero1", "zero2"] = "ddp"
    compress_gradient: bool = False
    peer_timeout_s: Positive = 300.0
    learner: Literal["shared", "dedicated"] = "shared"
    outbox_positions: Annotated[int, Ge(64)] = 4096
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.replay_positions < self.block_len:
            raise ValueError(
                f"replay_positions must be at least block_len = {self.block_len}, got {self.replay_positions}; "
                "try 16384"
            )


@dataclass(frozen=True)
class EvalSettings:
    """What is measured before and after, with a frozen drafter, on rows that are never trained on.

    limit           held-out requests: the rows of data.prompts whose split is eval, or a tenth of them where none is,
                    or the first of data.dataset; 0 measures nothing and holds nothing out.
    max_new_tokens  of each of them.
    """

    limit: Count = 24
    max_new_tokens: PositiveCount = 64


@dataclass(frozen=True)
class OutputSettings:
    """What a run leaves behind, all of it in `folder`. `resume` continues from the newest checkpoint there."""

    folder: str = "runs/online"
    checkpoint_every_s: Positive = 300.0
    tensorboard: bool = True
    resume: bool = False


@dataclass(frozen=True)
class ServeSettings:
    """The server: where it listens, who may use it, and how much of it.

    port                      0 takes a free one.
    model_name                what clients call the model; null is the last part of model.path, which they may also give
                              in full.
    keys_file                 API keys, see `dvi.serving.access`; null takes DVI_API_KEY and DVI_ADMIN_KEY from the
                              environment. Without any key only a loopback host is served.
    adapters_folder           saved drafters that admin routes load and save, by name.
    max_rows                  requests that decode together.
    max_positions             cached positions of all running requests together.
    max_waiting               requests that may wait while all rows are taken; more are told to come back later. Half of
                              max_rows: nobody then takes more than about half as long again as in a full server.
    prefill_tokens_per_step   prompt tokens read between two rounds, so that a long prompt holds nobody up.
    rounds_per_prefill        prompts are read before every so many-th round, as long as anybody decodes.
    max_token_latency_ms      per token after the first, for 99 requests of 100; null asks nothing.
    max_first_token_ms        from the end of the wait in the queue to the first token, likewise. With either of the two
                              the server measures this machine at its start, and then chooses how it runs by its own
                              traffic: max_rows, prefill_tokens_per_step and draft.num_draft_tokens are then the most
                              that it may choose. See docs/planning.md.
    prefix_cache_positions    cached positions kept of prompts and answers gone by, 0 keeps none.
    max_connections           at once; beyond them only /health is answered, and those that say nothing make way.
    max_prompt_tokens         null: as many as the model's context holds; max_new_tokens the same.
    max_stop, max_stop_chars  stop strings of a request (and stop token ids), and the length of each.
    max_prompts, max_n        prompts in a request, and answers to each.
    *_timeout_s               since arrival: still queued, without a first token, not ended.
    drain_s                   after SIGTERM, running requests may take so long to end.
    learn_sample_rate         share of the requests that the learner sees.
    trust_remote_code         run Python code that comes with the model.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    model_name: Annotated[str, MinLen(1)] | None = None
    keys_file: str | None = None
    adapters_folder: str = "runs/serve/adapters"
    max_rows: PositiveCount = 16
    max_positions: PositiveCount = 32768
    max_waiting: PositiveCount = 8
    prefill_tokens_per_step: PositiveCount = 256
    rounds_per_prefill: PositiveCount = 1
    max_token_latency_ms: Positive | None = None
    max_first_token_ms: Positive | None = None
    prefix_cache_positions: Count = 16384
    max_connections: PositiveCount = 1024
    max_body_bytes: PositiveCount = 2_000_000
    max_prompt_tokens: PositiveCount | None = None
    max_new_tokens: PositiveCount | None = None
    max_prompts: PositiveCount = 64
    max_n: PositiveCount = 8
    max_stop: Count = 16
    max_stop_chars: PositiveCount = 256
    max_logprobs: Count = 20
    queue_timeout_s: Positive = 60.0
    first_token_timeout_s: Positive = 120.0
    total_timeout_s: Positive = 600.0
    drain_s: NonNegative = 30.0
    learn_sample_rate: Share = 1.0
    trust_remote_code: bool = False

    @property
    def has_bound(self) -> bool:
        """Whether a plan, and not these numbers, says how the server runs."""
        return self.max_token_latency_ms is not None or self.max_first_token_ms is not None


@dataclass(frozen=True)
class ServeOutputSettings:
    """What a server leaves behind in `folder`; one started on the same folder goes on where the last one stopped.

    save_replay  also store the experience, which is users' text; without it a restarted learner gathers afresh.
    """

    folder: str = "runs/serve"
    checkpoint_every_s: Positive = 60.0
    save_replay: bool = False


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
class WarmupSettings:
    """What a drafter learns from before it serves.

    source              "answers": the model's own greedy answers to the prompts, which is what serving will meet,
                        decoded data.batch_size at a time; "texts": the texts that the data hold, without decoding.
    answer_field        for "texts": the column of data.dataset with the answer to data.field; null where that
                        column holds the answer too, as whole texts or as conversations.
    max_new_tokens      of a decoded answer.
    text_positions      the most positions of a text, its prompt included; a longer one loses its beginning.
    positions_per_step  answer positions for every optimizer step.
    """

    source: Literal["answers", "texts"] = "answers"
    answer_field: str | None = None
    max_new_tokens: PositiveCount = 128
    text_positions: Annotated[int, Ge(2)] = 1024
    positions_per_step: PositiveCount = 8

    def __post_init__(self) -> None:
        if self.source == "answers" and self.text_positions <= self.max_new_tokens:
            raise ValueError(
                f"text_positions must be above max_new_tokens = {self.max_new_tokens}, got {self.text_positions}; "
                "try 1024"
            )


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
    template: Literal["auto", "vicuna", "chat"] = "auto"
    rivals: tuple[Rival, ...] = ()
    temperature: NonNegative = 0.0


@dataclass(frozen=True)
class PaperConfig(TrainConfig):
    """All settings of `dvi bench paper`: those of `dvi train`, and of Spec-Bench afterwards."""

    bench: BenchSection = field(default_factory=BenchSection)

    @property
    def training(self) -> TrainConfig:
        """The settings of `dvi train` alone."""
        return TrainConfig(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(TrainConfig)})


@dataclass(frozen=True)
class RouteSettings:
    """The front door: one address for several servers, its replicas.

    replicas           their URLs, such as http://127.0.0.1:8001.
    port               0 takes a free one.
    keys_file          API keys, as for `dvi serve`, and best the replicas' own file: a request's key is checked here
                       and there.
    learn_together     the replicas learn one drafter, as ranks of one job: what is asked of the drafter is asked of the
                       first, for all.
    health_every_s     pause between two looks at a replica, and how long it may take to answer one.
    connect_timeout_s  for a connection to a replica, after which it counts as down.
    answer_timeout_s   silence of a replica after which a request fails; longer than its serve.total_timeout_s.
    drain_s            after SIGTERM, running requests may take so long to end.
    """

    replicas: tuple[str, ...]
    host: str = "127.0.0.1"
    port: Port = 8000
    keys_file: str | None = None
    learn_together: bool = False
    max_connections: PositiveCount = 1024
    max_body_bytes: PositiveCount = 2_000_000
    health_every_s: Positive = 2.0
    connect_timeout_s: Positive = 2.0
    answer_timeout_s: Positive = 660.0
    drain_s: NonNegative = 30.0

    def __post_init__(self) -> None:
        if not self.replicas or len(set(self.replicas)) < len(self.replicas):
            raise ValueError(
                f"replicas must be one URL or more, all different, got {list(self.replicas)}; "
                "try http://127.0.0.1:8001"
            )
        for url in self.replicas:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
                raise ValueError(f"a replica must be a URL without user or query, got {url!r}; try http://127.0.0.1:8001")
