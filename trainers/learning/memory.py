"""What a learner keeps beside its parameters, for a memory plan: on the meta device, before anything is loaded.

Knows settings and shapes; holds nothing.
"""

from __future__ import annotations

from dvi.model.split import SplitModel
from dvi.records import LearnerMemory
from dvi.settings import LearningSettings
from trainers.learning.publish_gate import CANARY_BLOCKS
from trainers.learning.replay import ReplayBuffer
from trainers.learning.versions import KEPT_VERSIONS


def learner_memory(learning: LearningSettings, split: SplitModel) -> LearnerMemory:
    """Of a learner with these settings beside this model; the buffer that will run is asked for its size."""
    replay = ReplayBuffer(
        capacity_positions=learning.replay_positions, hidden_size=split.hidden_size, max_block=learning.block_len,
        dtype=split.dtype, device="meta", reservoir_fraction=learning.reservoir_fraction,
    )  # fmt: skip
    return LearnerMemory(replay_bytes=replay.num_bytes, states=KEPT_VERSIONS + 2, canary_blocks=CANARY_BLOCKS)
