"""A fleet of replicas on paper: speed, steps, synchronisation, shipping, adapters, failures. Pure functions.

Knows the costs of one replica and of the links between replicas; measures nothing, prints nothing. Seconds, bytes and
token counts throughout. What is drawn at random is drawn from a given generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from dvi.draft.costs import CostTable

SECONDS_A_DAY = 86_400.0
NUM_DRAWS, FEWEST_MEETINGS = 400_000, 100  # replicas drawn to find a mean longest round, and meetings at the least


class Link(BaseModel):
    """One level of the hierarchy, from the inside out: `members` groups of the level below share this link.

    latency_s    one message's, without its bytes.
    bytes_per_s  of one member, in each direction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    members: PositiveInt
    latency_s: NonNegativeFloat
    bytes_per_s: PositiveFloat


class Costs(BaseModel):
    """What one replica costs and is connected by; configs/fleet has one file measured and one derived.

    source              how the numbers came about.
    rows                requests that a replica decodes together.
    draft_step_s, verify_s  as in `dvi.draft.costs.CostTable`: by rows, and by verified positions.
    prefill_token_s     a prompt token's share of a prefill pass.
    num_draft_tokens    T, where drafting pays.
    mat_by_steps        mean accepted tokens at this T after so many optimizer steps of one replica; 0 is untrained.
    round_sigma         spread of the lengths of rounds: the standard deviation of their logarithm.
    step_s              one optimizer step, with storing what it learns from and its share of publishing and canary.
    budget              share of the time that learning takes.
    blocks_per_step, block_len  draft blocks of one step, and positions of a block.
    critical_blocks     gradient noise scale: a step of many more blocks wastes them.
    steps_per_publish   steps from one drafter version to the next.
    update_bytes        gradient, or adapter, as it travels.
    transition_bytes    one position of experience as it travels to a dedicated learner.
    rejoin_s            from the start of a process to its first answer.
    checkpoint_every_s  what a resumed learner loses at most.
    mtbf_h              hours from one failure of a replica to the next.
    store_requests_per_s, store_bytes_per_s  an object store: answers in all, and bytes to one reader.
    links               from the inside out; the last level takes as many members as there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    rows: PositiveInt
    draft_step_s: dict[PositiveInt, PositiveFloat]
    verify_s: dict[PositiveInt, PositiveFloat]
    prefill_token_s: PositiveFloat
    num_draft_tokens: PositiveInt
    mat_by_steps: dict[int, float]
    round_sigma: NonNegativeFloat
    step_s: PositiveFloat
    budget: PositiveFloat
    blocks_per_step: PositiveInt
    block_len: PositiveInt
    critical_blocks: PositiveFloat
    steps_per_publish: PositiveInt
    update_bytes: PositiveInt
    transition_bytes: PositiveInt
    rejoin_s: PositiveFloat
    checkpoint_every_s: PositiveFloat
    mtbf_h: PositiveFloat
    store_requests_per_s: PositiveFloat
    store_bytes_per_s: PositiveFloat
    links: tuple[Link, ...]

    def round_s(self, num_draft_tokens: int) -> float:
        """Seconds of a round of a full batch."""
        return CostTable(self.draft_step_s, self.verify_s).round_s(self.rows, num_draft_tokens)

    @property
    def step_every_s(self) -> float:
        """From one step of a replica to the next when learning takes its whole budget."""
        return self.step_s / self.budget


def read_costs(path: str | Path) -> Costs:
    """Raises ValueError naming what is missing, unknown or out of bounds."""
    return Costs.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


# Serving


@dataclass(frozen=True)
class Replica:
    """One replica under full load.

    slot_s        a request's time in its row, while all rows are taken.
    tokens_per_s  answer tokens of all rows.
    round_s       one round of all rows.
    speed_up      of drafting over plain decoding, 1 where the length rule drafts nothing.
    """

    slot_s: float
    tokens_per_s: float
    round_s: float
    speed_up: float


def replica(costs: Costs, *, prompt_tokens: float, answer_tokens: float, mat: float) -> Replica:
    """What requests of this mean size get from a replica whose drafter has this many mean accepted tokens.

    A full batch is the worst case: a request that decodes with fewer others is faster. The other rows' prefills, and
    learning within its budget, stop all rows.
    """
    plain_s, drafted_s = costs.round_s(0), costs.round_s(costs.num_draft_tokens)
    speed_up = max(1.0, mat * plain_s / drafted_s)
    engine_s = (prompt_tokens * costs.prefill_token_s + answer_tokens * plain_s / speed_up / costs.rows) / (
        1 - costs.budget
    )
    return Replica(
        slot_s=costs.rows * engine_s, tokens_per_s=answer_tokens / engine_s,
        round_s=drafted_s if speed_up > 1 else plain_s, speed_up=speed_up,
    )  # fmt: skip


# Learning


def mat_after(costs: Costs, steps: float) -> float:
    """Mean accepted tokens after so many steps of one replica: the measured points, between them linear in log(steps).

    Constant beyond the last point: what was not measured is not promised.
    """
    points = sorted(costs.mat_by_steps.items())
    return float(np.interp(math.log1p(steps), [math.log1p(s) for s, _ in points], [mat for _, mat in points]))


def batch_gain(costs: Costs, num_batches: float) -> float:
    """Steps of one replica that a step over num_batches replicas' batches is worth.

    (1 + C / b) / (1 + C / (n b)) with C critical blocks and b blocks of one replica (McCandlish et al. 2018, arXiv
    1812.06162): n while n b is small beside C, never more than 1 + C / b. A model: C was measured, the gain was not.
    """
    ratio = costs.critical_blocks / costs.blocks_per_step
    return (1 + ratio) / (1 + ratio / num_batches)


def ring_bytes(members: int, update_bytes: float) -> float:
    """Bytes that each member of a ring all-reduce sends."""
    return 2 * (members - 1) / members * update_bytes


def all_reduce_s(link: Link, *, members: int, update_bytes: float) -> float:
    """Seconds of an all-reduce: of a ring, or of a tree up and down where its fewer messages make it faster."""
    if members == 1:
        return 0.0
    ring_s = 2 * (members - 1) * link.latency_s + ring_bytes(members, update_bytes) / link.bytes_per_s
    tree_s = 2 * math.ceil(math.log2(members)) * (link.latency_s + update_bytes / link.bytes_per_s)
    return min(ring_s, tree_s)


def overshoots(rng: np.random.Generator, ends_s: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How long after a tick replicas end the round they were in: ticks fall anywhere on a line of rounds.

    ends_s: when each round of a long line ends. Long rounds are met more often than they occur.
    """
    places_s = rng.uniform(0, ends_s[-1], shape)
    return ends_s[np.searchsorted(ends_s, places_s)] - places_s


@dataclass(frozen=True)
class Level:
    """One level of aggregation, as planned.

    members, replicas  groups that meet here, and replicas below them in all.
    every              steps from one meeting to the next; gradients at 1, parameters averaged beyond.
    wait_s             mean wait of a replica for the slowest one, while it serves on.
    reduce_s           the all-reduce.
    share              of a replica's time that the all-reduce takes, as if nothing else ran meanwhile.
    bytes_per_day      that each member sends over this link.
    """

    name: str
    members: int
    replicas: int
    every: int
    wait_s: float
    reduce_s: float
    share: float
    bytes_per_day: float


def group_sizes(costs: Costs, num_replicas: int) -> list[tuple[Link, int, int]]:
    """(link, members, replicas) of each level that num_replicas fill, from the inside out."""
    levels, replicas = [], 1
    for index, link in enumerate(costs.links):
        left = math.ceil(num_replicas / replicas)
        members = left if index == len(costs.links) - 1 else min(link.members, left)
        replicas = min(replicas * members, num_replicas)
        if members > 1:
            levels.append((link, members, replicas))
    return levels


def plan_levels(costs: Costs, ends_s: np.ndarray, *, num_replicas: int, share: float, seed: int) -> list[Level]:
    """Each level as often as `share` of the time, divided among the levels, allows; `every` is a power of two.

    Steps fall due by the clock, every step_every_s. A replica comes to a meeting at the end of its round and serves on
    until the last has come. Step, wait and all-reduce must be over before the level's next meeting.
    """
    groups, rng, levels, every = group_sizes(costs, num_replicas), np.random.default_rng(seed), [], 1
    for link, members, replicas in groups:
        late_s = overshoots(rng, ends_s, (max(NUM_DRAWS // replicas, FEWEST_MEETINGS), replicas))
        wait_s = float((late_s.max(1) - late_s.mean(1)).mean())
        reduce_s = all_reduce_s(link, members=members, update_bytes=costs.update_bytes)
        wanted = max(reduce_s / (share / len(groups)), costs.step_s + wait_s + reduce_s) / costs.step_every_s
        every = max(every, 2 ** math.ceil(math.log2(max(wanted, 1))))
        level = Level(
            name=link.name, members=members, replicas=replicas, every=every, wait_s=wait_s, reduce_s=reduce_s,
            share=reduce_s / costs.step_every_s / every,
            bytes_per_day=ring_bytes(members, costs.update_bytes) * SECONDS_A_DAY / costs.step_every_s / every,
        )  # fmt: skip
        levels.append(level)
    return levels


@dataclass(frozen=True)
class Meetings:
    """A simulated stretch of synchronised steps, in replica-seconds: all of it, waiting, all-reduces."""

    elapsed_s: float
    wait_s: float
    reduce_s: float

    @property
    def reduce_share(self) -> float:
        return self.reduce_s / self.elapsed_s

    @property
    def standing_share(self) -> float:
        """What would be lost if replicas stood still until the last has come, as a blocking all-reduce has it."""
        return (self.wait_s + self.reduce_s) / self.elapsed_s


def simulate_meetings(
    costs: Costs, levels: list[Level], ends_s: np.ndarray, *, num_replicas: int, num_outer: int, seed: int
) -> Meetings:
    """Replica by replica over num_outer meetings of the outermost level and the inner ones between them.

    Steps fall due by the clock, so that nobody carries a delay from one meeting to the next. Where levels meet at the
    same step, the outer one waits for the slowest inner group, its all-reduce included.
    """
    rng, wait_s, reduce_s, inner = np.random.default_rng(seed), 0.0, 0.0, levels[0].every
    num_meetings = num_outer * (levels[-1].every // inner)
    for meeting in range(1, num_meetings + 1):
        ready_s = overshoots(rng, ends_s, (num_replicas,))
        for level in (level for level in levels if meeting * inner % level.every == 0):
            starts = np.arange(0, num_replicas, level.replicas)
            sizes = np.diff([*starts, num_replicas])
            slowest_s = np.repeat(np.maximum.reduceat(ready_s, starts), sizes)
            wait_s += float((slowest_s - ready_s).sum())
            reduce_s += level.reduce_s * num_replicas
            ready_s = slowest_s + level.reduce_s
    elapsed_s = num_replicas * num_meetings * inner * costs.step_every_s
    return Meetings(elapsed_s=elapsed_s, wait_s=wait_s, reduce_s=reduce_s)


# A dedicated learner, adapters, failures


@dataclass(frozen=True)
class Shipping:
    """Experience on its way to one dedicated learner, in positions a second; what it has no use for is shed.

    offered    what the others generate.
    used       what is shipped and stored.
    reuse      times that each used position is trained on.
    """

    offered: float
    used: float
    shed_share: float
    bytes_per_s: float
    steps_per_s: float
    reuse: float


def ship(costs: Costs, *, num_replicas: int, tokens_per_s: float) -> Shipping:
    """All replicas but one serve. The learner steps without pause and takes no more than it can train on once.

    Raises ValueError for less than two replicas: somebody must serve.
    """
    if num_replicas < 2:
        raise ValueError(f"a dedicated learner needs at least 2 replicas, got {num_replicas}; let one replica do both")
    offered = (num_replicas - 1) * tokens_per_s
    trained = costs.blocks_per_step * costs.block_len / costs.step_s
    used = min(offered, trained, costs.links[-1].bytes_per_s / costs.transition_bytes)
    return Shipping(
        offered=offered, used=used, shed_share=1 - used / offered, bytes_per_s=used * costs.transition_bytes,
        steps_per_s=1 / costs.step_s, reuse=trained / used,
    )  # fmt: skip


def tree_depth(num_replicas: int, fan_out: int) -> int:
    """Levels below the root until a tree in which everybody passes on to fan_out others holds num_replicas."""
    depth, width, reached = 0, 1, 1
    while reached < num_replicas:
        depth, width = depth + 1, width * fan_out
        reached += width
    return depth


def tree_s(link: Link, *, num_replicas: int, fan_out: int, num_bytes: float) -> float:
    """Seconds until the last replica has it; everybody receives all of it, then sends fan_out copies in turn."""
    return tree_depth(num_replicas, fan_out) * (link.latency_s + fan_out * num_bytes / link.bytes_per_s)


def store_s(costs: Costs, *, num_replicas: int, num_bytes: float) -> float:
    """Seconds until every replica has fetched it from an object store."""
    return num_replicas / costs.store_requests_per_s + num_bytes / costs.store_bytes_per_s


@dataclass(frozen=True)
class Failures:
    """What failures cost one job of synchronised replicas, which ends and starts again as a whole.

    per_day         failures of one of its replicas.
    serving_share   of the time in which the job does not serve.
    learning_share  of the time lost to restarts and to the steps since the last checkpoint.
    """

    per_day: float
    serving_share: float
    learning_share: float


def failures(costs: Costs, *, job_replicas: int) -> Failures:
    """Failures come independently; on average half the time between two checkpoints is learnt again."""
    up_s = costs.mtbf_h * 3600 / job_replicas
    cycle_s = up_s + costs.rejoin_s
    return Failures(
        per_day=SECONDS_A_DAY / cycle_s, serving_share=costs.rejoin_s / cycle_s,
        learning_share=(costs.rejoin_s + min(costs.checkpoint_every_s / 2, up_s)) / cycle_s,
    )  # fmt: skip
