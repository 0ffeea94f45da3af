"""Experience: what serving has shown, on its way into the replay, and the batches that are drawn from it.

Knows transitions, counts of tokens and drafts, and the trend of acceptance; knows nothing of losses, steps or versions.
"""
# N blocks, T positions of a block, V vocabulary.

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

from dvi.records import ReplayBatch, Transitions
from dvi.settings import LearningSettings
from trainers.learning.acceptance_trend import AcceptanceTrend
from trainers.learning.replay import ReplayBuffer

MIN_POSITIONS_PER_BLOCK = 2  # replay positions per sampled block before the first step: below it, batches repeat
STORED_AT_ONCE = 64  # positions: a call of ReplayBuffer.add costs about as much as a hundred of them
COLUMNS = ("token_ids_W", "hidden_WD", "target_hidden_WD", "draft_token_ids_W", "draft_log_probs_W")  # of Transitions


def last_positions(stretch: Transitions, count: int) -> Transitions:
    """The last `count` positions of a stretch without drafts, or all of it where it is shorter."""
    columns = {name: getattr(stretch, name)[-count:] for name in COLUMNS}
    num_cut = max(len(stretch) - count, 0)
    return dataclasses.replace(stretch, start_position=stretch.start_position + num_cut, **columns)


class Experience:
    """A replay, and counts of what went into it.

    token_counts_V  int64: how often each token was generated; num_tokens: all of them.
    num_drafted, num_accepted   since the last step, for whoever makes it to subtract; accepted by the honest test.
    trend           of acceptance; has_woken: it has drifted, until somebody has acted on that.
    """

    COUNTS: ClassVar = {  # names in saved states and here
        "_drafted_since_step": "num_drafted", "_accepted_since_step": "num_accepted", "_tokens_counted": "num_tokens",
        "_has_woken": "has_woken",
    }  # fmt: skip

    def __init__(self, split: object, config: LearningSettings, *, rank: int, num_blocks: int) -> None:
        """num_blocks: of a batch here."""
        self._split, self._config, self._seed, self._num_blocks = split, config, config.seed + rank, num_blocks
        self._replay = ReplayBuffer(
            capacity_positions=config.replay_positions, hidden_size=split.hidden_size, max_block=config.block_len,
            dtype=split.dtype, device=split.device, reservoir_fraction=config.reservoir_fraction,
            seed=self._seed,
        )
        self.trend = AcceptanceTrend(patience=config.settle_rounds, wakes=config.drift_wakeup)
        self.token_counts_V = torch.zeros(split.vocab_size, dtype=torch.int64, device=split.device)
        self.generator = torch.Generator().manual_seed(self._seed)
        self.num_tokens = self.num_drafted = self.num_accepted = 0
        self.has_woken = False
        self._unstored: list[Transitions] = []  # observed, and not in the replay yet
        self._num_unstored = 0

    def __len__(self) -> int:
        """Positions in the replay and on their way there, some of which may be refused."""
        return len(self._replay) + self._num_unstored

    @property
    def is_enough(self) -> bool:
        """So much of it that a batch does not repeat itself."""
        return len(self) >= MIN_POSITIONS_PER_BLOCK * self._num_blocks

    def observe(self, transitions: list[Transitions]) -> None:
        """Keeps the experience of one round (or prefill), and follows the acceptance."""
        self._unstored += transitions
        self._num_unstored += sum(len(s) for s in transitions)
        if self._num_unstored >= STORED_AT_ONCE:
            self.store()
        num_drafted = sum(s.num_drafted for s in transitions)
        # What a lossy rule lets pass is no merit of the drafter's, and no sign of drift.
        num_accepted = sum(s.num_accepted - s.num_waived for s in transitions)
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.has_woken |= self.trend.observe(num_drafted, num_accepted)

    @property
    def replay(self) -> ReplayBuffer:
        """All experience observed so far."""
        self.store()
        return self._replay

    def store(self) -> None:
        """Stores what was observed since the last time: its cost is mostly that of the calls, not of the positions."""
        stretches, self._unstored, self._num_unstored = self._unstored, [], 0
        generated = [s.token_ids_W for s in stretches if not s.is_prefill]
        if generated:
            token_ids_N = torch.cat(generated)
            # Not bincount: on a GPU it waits for the device.
            self.token_counts_V.index_add_(0, token_ids_N, torch.ones_like(token_ids_N))
            self.num_tokens += len(token_ids_N)
        if not self._config.learn_from_prompts:
            # The last prompt position stays: it is the anchor of the first round's drafts.
            stretches = [last_positions(s, 1) if s.is_prefill else s for s in stretches]
        self._replay.add(*stretches)

    def stats(self) -> dict[str, float]:
        """Counts, bytes and positions, for metrics."""
        replay, trend = self.replay, self.trend
        return {
            "replay_positions": float(len(replay)),
            "replay_capacity": float(replay.capacity),
            "replay_bytes": float(replay.num_bytes),
            "replay_tenants": float(replay.num_tenants),
            "refused_positions": float(replay.num_refused),
            "acceptance_trend": trend.fast,
            "drifts": float(trend.num_drifts),
            "is_settled": float(trend.is_settled),
        }

    # Batches

    def sample(self, num_blocks: int, *, version: int, generator: torch.Generator | None = None) -> ReplayBatch:
        """Blocks as `ReplayBuffer.sample` gives them, copies; drawn by its own generator where none is given."""
        return self.replay.sample(
            num_blocks, self._config.block_len, current_version=version, generator=generator or self.generator,
            max_tenant_share=self._config.max_tenant_share,
        )

    def empty_batch(self) -> ReplayBatch:
        """A block of nothing, for the part that a rank without experience has in a step."""
        split, shape = self._split, (1, self._config.block_len)
        hidden_NTD = torch.zeros(*shape, split.hidden_size, dtype=split.dtype, device=split.device)
        count_NT = torch.zeros(shape, dtype=torch.int64, device=split.device)
        no_NT, real_NT = count_NT.bool(), count_NT.float()
        return ReplayBatch(
            anchor_ND=hidden_NTD[:, 0], hidden_NTD=hidden_NTD, target_hidden_NTD=hidden_NTD, token_ids_NT=count_NT,
            mask_NT=no_NT, action_NT=count_NT, reward_NT=real_NT, has_reward_NT=no_NT, behaviour_log_probs_NT=real_NT,
            staleness_N=count_NT[:, 0],
        )  # fmt: skip

    def slices(self, batch: ReplayBatch) -> Iterator[ReplayBatch]:
        """The batch in parts of blocks_per_slice blocks, or the whole of it."""
        num_blocks = len(batch.mask_NT)
        size = self._config.blocks_per_slice or num_blocks
        for first in range(0, num_blocks, size):
            yield ReplayBatch(**{name: tensor[first : first + size] for name, tensor in vars(batch).items()})

    # Saving

    def state_dict(self) -> dict[str, object]:
        """All but COUNTS, in a trainer's saved state."""
        return {
            "replay": self.replay.state_dict(), "trend": self.trend.state_dict(), "token_counts": self.token_counts_V,
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes what `state_dict` gave, and drops what was observed here; other keys are ignored."""
        self._unstored, self._num_unstored = [], 0
        self.token_counts_V.copy_(state["token_counts"])
        self._replay.load_state_dict(state["replay"])
        self.trend.load_state_dict(state["trend"])
        self.generator.set_state(state["generator"])

    def take_over(self, states: list[dict[str, object]]) -> None:
        """See `OnlineTrainer.take_over`."""
        self.token_counts_V.zero_()
        for state in states:
            self.token_counts_V += state["token_counts"].to(self.token_counts_V.device)
        for saved, name in self.COUNTS.items():
            if name != "has_woken":  # all ranks act on it alike
                setattr(self, name, sum(state["counts"][saved] for state in states))
        self.generator.manual_seed(self._seed)
