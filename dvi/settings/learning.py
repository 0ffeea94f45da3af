"""What a drafter learns from, how, and what a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from dvi.settings.choices import (
    Count,
    LearnerRole,
    NonNegative,
    Positive,
    PositiveCount,
    Schedule,
    Seed,
    Share,
    Split,
    Strategy,
    SwitchBy,
    TextSource,
    TrafficTemplate,
)


@dataclass(frozen=True)
class DataSettings:
    """The traffic: files of prompts (see `dvi.traffic.read_prompts`), or a set known to `datasets`.

    prompts        one path or a list of them: .jsonl, .json, or .txt with one prompt a line, each also with .gz.
    dataset        a name for `datasets.load_dataset`, instead of `prompts`; its rows are read from dataset_split.
    field          what holds the prompt in a row of either; null takes turns, prompt, messages, conversations,
                   instruction or text, the first that is there.
    domains        keep only these domains of `prompts`; empty keeps all.
    split          keep only these rows of `prompts`; "eval" is held out: measure on it, never train.
    limit          requests of one epoch, from all files alike; 0 takes all.
    batch_size     requests that decode together.
    shuffle_seed   null keeps the order of the files.
    template       how a prompt is put to the model: "auto" by its own chat template, or as bare text where it has none;
                   "vicuna" as vicuna_v1.1.
    """

    prompts: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_split: str = "train"
    field: str | None = None
    domains: tuple[str, ...] = ()
    split: Split = "traffic"
    limit: Count = 0
    batch_size: PositiveCount = 1
    shuffle_seed: Seed | None = 0
    epochs: PositiveCount = 1
    template: TrafficTemplate = "auto"

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
    blocks_per_step     draft blocks in one optimizer step, of several ranks together.
    block_len           positions of a block.
    rounds_per_step     a step is due every so many rounds, of several ranks together ...
    budget              ... as long as training has taken at most this share of all time; 1 is no limit.
    steps_per_publish   the serving drafter takes over the learner's parameters every so many steps.
    steps_per_canary    the learner is held against its best so far every so many steps.
    learn_from_prompts  also distil on the prompts' own positions, not only on generated text.
    target_temperature  the verifier's distribution is sharpened (below 1) or flattened by it before it is distilled:
                        for greedy traffic only the argmax counts.
    tokens_before_trim  generated tokens to count before the head is trimmed to drafter.draft_vocab_size tokens.
    schedule            preset of the loss weights, see docs/training.md.
    warmup_steps        optimizer steps of pure KL before the ramp to the reward terms.
    ramp_steps          optimizer steps of that ramp; 0 jumps.
    switch_by           the warm-up ends by "steps", or by "acceptance" once it no longer rises.
    normalise_advantage the policy gradient's advantages are divided by their standard deviation in the batch.
    replay_positions    positions of experience that the replay buffer holds in memory.
    reservoir_fraction  share of them that samples all traffic, against forgetting.
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
    schedule: Schedule = "kl_only"
    warmup_steps: Count = 400
    ramp_steps: Count = 600
    switch_by: SwitchBy = "steps"
    normalise_advantage: bool = False
    replay_positions: PositiveCount = 16384
    reservoir_fraction: Share = 0.3
    canary_tolerance: Share = 0.1
    settle_rounds: Count = 2000
    drift_wakeup: bool = True
    blocks_per_slice: Count = 0
    max_tenant_share: Share = 0.2
    strategy: Strategy = "ddp"
    compress_gradient: bool = False
    peer_timeout_s: Positive = 300.0
    learner: LearnerRole = "shared"
    outbox_positions: Annotated[int, Ge(64)] = 4096
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.replay_positions < self.block_len:
            raise ValueError(
                f"replay_positions must be at least block_len = {self.block_len}, got {self.replay_positions}; "
                "try 16384"
            )


@dataclass(frozen=True)
class WarmupSettings:
    """What a drafter learns from before it serves.

    source              "answers": the model's own greedy answers to the prompts, which is what serving will meet,
                        decoded data.batch_size at a time; "texts": the texts that the data hold, without decoding.
    answer_field        for "texts": the column of data.dataset with the answer to data.field; null where that
                        column holds the answer too, as whole texts or as conversations.
    max_new_tokens      of a decoded answer.
    text_positions      the most positions of a text, its prompt included; a longer one loses its beginning.
    positions_per_step  answer positions for every optimizer step, in place of train.rounds_per_step.
    """

    source: TextSource = "answers"
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
    """What a run leaves behind.

    folder  for all of it.
    resume  continue from the newest checkpoint there.
    """

    folder: str = "runs/online"
    checkpoint_every_s: Positive = 300.0
    tensorboard: bool = True
    resume: bool = False
