"""A learner on a rank of its own: what it is sent, what it sends back, and how a job with one comes to its end."""
# W positions of a stretch, V vocabulary.

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.distributed import PeerLostError
from dvi.records import SamplingParams, Transitions
from tests.support.dedicated_ranks import NUM_RANKS, run_ranks
from tests.support.drafter_doubles import small_config
from tests.support.random_traffic import HIDDEN, SETTINGS, VOCAB_SIZE, assert_same, serving, state_of, stretch
from tests.support.tiny_models import tiny_model
from trainers.learning.online import OnlineTrainer
from trainers.ranks.channel import Kind, Message
from trainers.ranks.dedicated import DedicatedLearner
from trainers.ranks.messages import (
    COLUMNS,
    FACTS,
    REQUESTS_PER_RANK,
    MessageError,
    pack_experience,
    pack_facts,
    unpack_experience,
)
from trainers.ranks.shipping import FRAME_POSITIONS, MAX_UNTAKEN, Ending, ShippingLearner

LIMIT_S = 60.0  # of a whole job: a bound on a hang, many times what it takes


# Doubles


class MemoryChannel:
    """A Channel within the process. `sent` keeps what passed."""

    def __init__(self) -> None:
        self.other: MemoryChannel
        self.sent: list[Message] = []
        self._incoming: deque[Message] = deque()
        self._is_lost = False

    def send(self, message: Message) -> None:
        if not self._is_lost:
            self.sent.append(message)
            self.other._incoming.append(message)

    def receive(self) -> Message | None:
        if self._incoming:
            return self._incoming.popleft()
        if self._is_lost:
            raise PeerLostError("rank 9 is lost")
        return None

    @property
    def has_arrived(self) -> bool:
        return bool(self._incoming) or self._is_lost

    def close(self) -> None:
        self.other._is_lost = True

    def count(self, kind: Kind) -> int:
        return sum(message.kind is kind for message in self.sent)


class MemoryJob:
    """A learner and two serving ranks in one process; nothing happens by itself."""

    def __init__(
        self, make: Callable[[], object] = serving, *, every_s: float = 1e9, outbox_positions: int = 256, **changes
    ) -> None:
        config = dataclasses.replace(SETTINGS, **changes)
        self.saves: dict[int, list[int]] = {rank: [] for rank in range(3)}
        self.speculators = {rank: make() for rank in range(3)}
        self.channels, self.ranks = {}, {}
        for rank in (1, 2):
            self.channels[rank], far = MemoryChannel(), MemoryChannel()
            self.channels[rank].other, far.other = far, self.channels[rank]
            self.ranks[rank] = ShippingLearner(
                self.speculators[rank], far, config, outbox_positions=outbox_positions, on_save=self.saves[rank].append
            )
        self.trainer = OnlineTrainer(self.speculators[0], config)
        self.learner = DedicatedLearner(
            self.trainer, self.speculators[0], self.channels, checkpoint_every_s=every_s, on_save=self.saves[0].append
        )

    def settle(self) -> None:
        """Everybody works until nothing is under way any more."""
        for _ in range(100):
            for rank in self.ranks.values():
                rank.step_if_due(is_idle=True)
            is_working = self.learner.turn()
            if not is_working and not any(rank.is_busy for rank in self.ranks.values()):
                return
        raise AssertionError("it never settles")

    def held(self, rank: int) -> int:
        return int(self.ranks[rank].stats()["outbox_positions"])

    @property
    def versions(self) -> list[int]:
        return [speculator.drafter.version for speculator in self.speculators.values()]


def prompt(index: int, *, width: int = 4, tenant: str = "") -> Transitions:
    return dataclasses.replace(
        stretch(index, width=width, tenant=tenant), num_drafted=0, num_accepted=0, is_prefill=True
    )


def unpacked(message: Message, *, rank: int = 0) -> tuple[list[list[Transitions]], list[int]]:
    return unpack_experience(
        message.body, rank=rank, hidden_size=HIDDEN, vocab_size=VOCAB_SIZE, device=torch.device("cpu")
    )


def begun(action: Callable[[], Ending]) -> Future[Ending]:
    """The action at work on a thread of its own, which does not outlive the tests should it hang."""
    future: Future[Ending] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# Messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experience_arrives_as_it_was_sent(dtype):
    """Catches a field lost or swapped, rounds run together, a dtype changed, two ranks' requests taken for one."""
    rounds = [[prompt(0, tenant="a")], [stretch(1, tenant="b"), stretch(2, num_accepted=1, width=2, tenant="a")]]
    rounds[1][0] = dataclasses.replace(rounds[1][0], num_waived=1, request_id=7, drafter_version=5)
    rounds = [[
        dataclasses.replace(s, hidden_WD=s.hidden_WD.to(dtype), target_hidden_WD=s.target_hidden_WD.to(dtype))
        for s in transitions
    ] for transitions in rounds]  # fmt: skip
    found, ended = unpacked(pack_experience(rounds, [3]), rank=2)
    assert ended == [2 * REQUESTS_PER_RANK + 3]
    assert [len(transitions) for transitions in found] == [1, 2]
    for got, sent in zip(*(itertools.chain(*some) for some in (found, rounds)), strict=True):
        assert got.request_id == 2 * REQUESTS_PER_RANK + sent.request_id
        for name in vars(sent).keys() - {"request_id"}:
            same = torch.equal if name in COLUMNS else lambda a, b: a == b
            assert same(getattr(got, name), getattr(sent, name)), name
    assert found[0][0].hidden_WD.dtype == dtype


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    """An experience message with its tensors changed."""
    tensors = safetensors.torch.load(pack_experience([[stretch(0)], [stretch(1)]], [3]).body)
    change(tensors)
    return safetensors.torch.save(tensors)


def with_fact(name: str, value: int) -> bytes:
    def change(tensors):
        tensors["stretches_SF"][1, FACTS.index(name)] = value

    return damaged(change)


def with_token(name: str, value: int) -> bytes:
    def change(tensors):
        tensors[name][3] = value

    return damaged(change)


BAD_EXPERIENCE = {
    "empty": b"",
    "noise": bytes(range(256)) * 9,
    "cut short": pack_experience([[stretch(0)]], []).body[:-1],
    "without a column": damaged(lambda t: t.pop("hidden_WD")),
    "with one more": damaged(lambda t: t.update(more=torch.zeros(1))),
    "of another width": damaged(lambda t: t.update(hidden_WD=torch.zeros(8, HIDDEN + 1))),
    "with a row too few": damaged(lambda t: t.update(target_hidden_WD=torch.zeros(7, HIDDEN))),
    "with whole numbers for states": damaged(lambda t: t.update(hidden_WD=torch.zeros(8, HIDDEN, dtype=torch.int64))),
    "with a float token": damaged(lambda t: t.update(token_ids_W=torch.zeros(8))),
    "of no stretch": damaged(lambda t: t.update(stretches_SF=torch.zeros(0, len(FACTS), dtype=torch.int64))),
    "with tenants that are no names": damaged(lambda t: t.update(tenants=torch.tensor([49], dtype=torch.uint8))),
    "with a negative request that ended": damaged(lambda t: t.update(ended=torch.tensor([-1]))),
    "a token beyond the vocabulary": with_token("token_ids_W", VOCAB_SIZE),
    "a negative token": with_token("token_ids_W", -1),
    "a draft beyond the vocabulary": with_token("draft_token_ids_W", VOCAB_SIZE),
} | {
    f"{name} {value}": with_fact(name, value)
    for name, value in (
        ("round", -1), ("request_id", -1), ("request_id", REQUESTS_PER_RANK), ("start_position", -1), ("width", 0),
        ("width", 9), ("num_drafted", -1), ("num_drafted", 99), ("num_accepted", 5), ("num_accepted", 1),
        ("drafter_version", -1), ("num_waived", -1), ("num_waived", 9), ("is_prefill", 1), ("tenant", 1),
        ("tenant", -1),
    )
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EXPERIENCE)
def test_a_message_that_does_not_parse_is_counted_and_dropped(case):
    """Catches what could reach the replay, an index of token counts or a split by widths and end the learner there."""
    body = BAD_EXPERIENCE[case]
    with pytest.raises(MessageError):
        unpacked(Message(Kind.EXPERIENCE, body))
    job = MemoryJob()
    job.channels[1].other.send(Message(Kind.EXPERIENCE, body))
    job.channels[1].other.send(pack_experience([[stretch(0)]], []))
    job.settle()
    assert (job.learner.num_bad_messages, job.learner.num_received, len(job.trainer.replay)) == (1, 4, 4)


@pytest.mark.parametrize("kind", [Kind.SAVE, Kind.END, Kind.FORGET, Kind.DRAFTER, Kind.EXPERIENCE])
@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"step": "x"}', b"\xff"])
def test_a_rank_outlives_what_no_learner_would_send(kind, body):
    """Catches an exception out of a message into the serving loop, and a value of a wrong type acted upon."""
    job = MemoryJob()
    job.channels[1].send(Message(kind, body))
    job.ranks[1].step_if_due()
    assert job.ranks[1].num_bad_messages == 1 and job.ranks[1].lost is None and job.ranks[1].ending is None
    assert job.saves[1] == []


@pytest.mark.parametrize("case", ["not finite", "other shape", "one less", "tokens beyond", "tokens twice"])
def test_a_drafter_that_does_not_fit_changes_nothing(case):
    """Catches weights checked one by one while they are copied, and a head trimmed before they are."""
    job = MemoryJob(draft_vocab_size_of, tokens_before_trim=1)
    job.ranks[1].observe([stretch(i) for i in range(40)])
    job.settle()
    (good, *_) = [m for m in reversed(job.channels[1].sent) if m.kind is Kind.DRAFTER]
    state = safetensors.torch.load(good.body)
    ids = "draft_head.draft_token_ids_V"
    changes = {
        "not finite": lambda: state["depth_bias"].fill_(torch.nan),
        "other shape": lambda: state.update(depth_bias=torch.zeros(3)),
        "one less": lambda: state.pop("depth_bias"),
        "tokens beyond": lambda: state[ids][-1:].fill_(VOCAB_SIZE),
        "tokens twice": lambda: state[ids].fill_(1),
    }
    changes[case]()
    fresh = MemoryJob(draft_vocab_size_of)
    before = state_of(fresh.speculators[1].drafter)
    fresh.channels[1].send(Message(Kind.DRAFTER, safetensors.torch.save(state)))
    fresh.ranks[1].step_if_due()
    assert fresh.ranks[1].num_bad_messages == 1
    assert_same(state_of(fresh.speculators[1].drafter), before)
    fresh.channels[1].send(good)
    fresh.ranks[1].step_if_due()
    assert fresh.speculators[1].drafter.version == job.versions[0] > 0


def draft_vocab_size_of():
    return serving(draft_vocab_size=12)


# Shipping


def test_a_learner_that_does_not_keep_up_costs_experience_and_no_wait():
    """Catches an outbox without a bound, the newest shed instead of the oldest, and positions that are not counted."""
    job = MemoryJob()
    rank = job.ranks[1]
    for index in range(200):
        rank.observe([stretch(index)])
        rank.step_if_due()
    stats = rank.stats()
    assert stats["sent_messages"] == MAX_UNTAKEN
    assert stats["sent_positions"] == MAX_UNTAKEN * FRAME_POSITIONS
    assert 256 - 4 < stats["outbox_positions"] <= 256
    assert stats["sent_positions"] + stats["outbox_positions"] + stats["shed_positions"] == 800
    job.settle()
    assert job.learner.num_received == rank.num_sent == 800 - stats["shed_positions"]
    newest = unpacked(job.channels[1].other.sent[-1])[0]
    kept = [s.start_position for m in job.channels[1].other.sent if m.kind is Kind.EXPERIENCE
            for r in unpacked(m)[0] for s in r]  # fmt: skip
    assert newest[-1][-1].start_position == 199 * 4
    assert kept == [*range(0, 128, 4), *range(800 - 256, 800, 4)]


def test_a_prompt_travels_as_its_last_position_unless_it_is_learnt_from():
    """Catches megabytes of prompt sent to be thrown away, and prompts longer than the outbox that never leave it."""
    for learns, expected in ((False, [1]), (True, [64])):
        job = MemoryJob(outbox_positions=64, learn_from_prompts=learns)
        job.ranks[1].observe([prompt(1, width=100)])
        job.settle()
        stretches = [s for m in job.channels[1].other.sent if m.kind is Kind.EXPERIENCE
                     for r in unpacked(m)[0] for s in r]  # fmt: skip
        assert [len(s) for s in stretches] == expected
        assert stretches[0].start_position + len(stretches[0]) == 200
        assert job.ranks[1].stats()["shed_positions"] == (36 if learns else 0)


def test_few_positions_are_sent_only_while_nobody_waits():
    """Catches a message for every round, and an idle rank that sits on what it has."""
    job = MemoryJob()
    job.ranks[1].observe([stretch(0)])
    job.ranks[1].step_if_due()
    assert job.held(1) == 4 and job.ranks[1].is_busy
    job.ranks[1].step_if_due(is_idle=True)
    assert job.held(1) == 0 and not job.ranks[1].is_busy


def test_what_a_rank_observes_is_copied():
    """Catches experience that changes under way because serving writes into the round's tensors again."""
    job, observed = MemoryJob(), stretch(0)
    job.ranks[1].observe([observed])
    observed.hidden_WD.zero_()
    job.ranks[1].step_if_due(is_idle=True)
    assert torch.equal(unpacked(job.channels[1].other.sent[0])[0][0][0].hidden_WD, stretch(0).hidden_WD)


def test_a_request_that_has_ended_is_not_continued():
    """Catches an id, given again after a restart, whose positions are joined to another request's."""
    job = MemoryJob()
    for index in range(2):
        job.ranks[1].observe([stretch(index)])
        job.ranks[1].end_request(0)
        job.settle()
    assert job.trainer.replay.state_dict()["lengths"].tolist()[:3] == [4, 4, 0]


# Learning


def test_rounds_of_all_ranks_together_owe_the_steps():
    """Catches a cadence counted in messages, or in the rounds of one rank."""
    job = MemoryJob(rounds_per_step=8, budget=0.5, blocks_per_step=4)
    for number in (1, 2):
        for index in range(20):
            job.ranks[number].observe([stretch(index)])
    job.settle()
    assert job.trainer.num_steps == 40 // 8


def test_a_rank_that_is_slow_gets_the_newest_drafter_and_not_all_of_them():
    """Catches drafters piled up for a rank, one that it gets too late, and a trim lost with a version left out."""
    job = MemoryJob(draft_vocab_size_of, tokens_before_trim=60, steps_per_publish=1, budget=0.5)
    for index in range(30):
        job.ranks[1].observe([stretch(index)])
        job.ranks[1].step_if_due()
        job.learner.turn()
    # Rank 2 has not looked yet: all this time one drafter has been on its way.
    assert job.channels[2].count(Kind.DRAFTER) == 1 and job.versions[0] > 3 and job.versions[2] == 0
    assert job.learner.stats()["versions_behind"] == job.versions[0]
    job.settle()
    assert job.channels[2].count(Kind.DRAFTER) < job.versions[0]
    assert len(set(job.versions)) == 1
    for number in (1, 2):
        assert_same(state_of(job.speculators[number].drafter), state_of(job.speculators[0].drafter))
        assert job.speculators[number].drafter.draft_head.vocab_size == 12
        assert job.ranks[number].versions() == job.trainer.versions()
        assert job.ranks[number].last_report == job.trainer.last_report
        assert job.ranks[number].num_steps == job.trainer.num_steps


def test_forgetting_leaves_no_row_of_the_tenant_anywhere():
    """Catches rows in another rank's outbox, or under way, that reach the replay after it was cleared."""
    job = MemoryJob()
    for number in (1, 2):
        for index in range(60):
            job.ranks[number].observe([stretch(index, tenant=("ada", "bob")[index % 2])])
        job.ranks[number].step_if_due()
    job.learner.turn()
    for number in (1, 2):
        job.ranks[number].step_if_due()  # under way
    held = job.held(1)
    assert job.ranks[1].forget("ada") == held / 2
    job.settle()
    assert job.trainer.replay.num_tenants == 1
    assert job.trainer.forget("ada") == 0 < job.learner.num_forgotten
    assert job.trainer.forget("bob") > 0


def test_a_rollback_asked_for_by_one_rank_comes_to_all():
    """Catches a rollback that only the rank sees that asked for it, and a request nobody can fulfil sent on."""
    job = MemoryJob(steps_per_publish=1, budget=0.5, rounds_per_step=4)
    job.ranks[1].observe([stretch(i) for i in range(12)])
    for index in range(12):
        job.ranks[1].observe([stretch(index)])
    job.settle()
    first, live = job.versions[0] - 1, job.versions[0]
    wanted = job.trainer._gate.history.snapshot(first).state
    with pytest.raises(ValueError, match="99"):
        job.ranks[2].rollback(99)
    with pytest.raises(ValueError, match="not live"):
        job.ranks[2].rollback(live)
    assert job.ranks[2].rollback(first).version == live
    job.settle()
    assert job.versions == [live + 1] * 3
    assert job.ranks[1].versions()[-1].source == "rollback"
    for name, tensor in job.speculators[1].drafter.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    # What has become impossible on the way is refused there, and ends nothing.
    job.channels[1].other.send(pack_facts(Kind.ROLLBACK, version=99))
    job.settle()
    assert job.versions == [live + 1] * 3


def test_real_serving_feeds_a_learner_elsewhere():
    """Catches transitions of the decoder that the messages refuse: their dtypes, widths at a stop, prompts, drafts."""

    def make() -> SelfSpeculator:
        model = tiny_model("llama", dtype=torch.float32, vocab_size=64)
        torch.manual_seed(0)  # the same drafter everywhere
        return SelfSpeculator(model, None, split_layer=1, drafter=small_config())

    job = MemoryJob(make, budget=0.5)
    prompts = [[1, 5, 9], [7, 3, 8, 2], [4, 4]]
    for number in (1, 2):
        for result in job.speculators[number].generate(
            prompts, SamplingParams(max_new_tokens=30, temperature=0.8), batch_size=2, learner=job.ranks[number]
        ):
            job.ranks[number].end_request(result.request_id)
    job.settle()
    assert job.learner.num_bad_messages == 0
    assert job.learner.num_received == job.ranks[1].num_sent + job.ranks[2].num_sent > 0
    assert job.trainer.num_steps > 0 and len(set(job.versions)) == 1


# The end of a job


def run_to_end(job: MemoryJob, interrupted: int | None) -> dict[int, Ending]:
    """All ranks' endings; the others learn of an interruption between rounds, as their job would."""

    def serve(number: int) -> Ending:
        rank = job.ranks[number]
        for index in range(40):
            rank.observe([stretch(index)])
            rank.step_if_due()
        while interrupted is not None and number != interrupted and rank.ending is None:
            rank.step_if_due()
        ending = rank.finish(lambda: interrupted is not None)
        rank.leave()
        return ending

    futures = {0: begun(job.learner.run), 1: begun(lambda: serve(1)), 2: begun(lambda: serve(2))}
    return {number: future.result(LIMIT_S) for number, future in futures.items()}


@pytest.mark.parametrize("interrupted", [None, 1])
def test_all_ranks_end_together_on_the_last_version(interrupted):
    """Catches a rank left waiting, an end that overtakes the last drafter, experience lost though nobody hurried."""
    job = MemoryJob(every_s=0.01, outbox_positions=4096)
    endings = run_to_end(job, interrupted)
    assert set(endings.values()) == {Ending(interrupted is not None, len(job.saves[0]) + 1)}
    assert len(set(job.versions)) == 1
    assert job.saves[1] == job.saves[2] == job.saves[0] == list(range(1, len(job.saves[0]) + 1))
    if interrupted is None:
        assert job.learner.num_received == 2 * 160
        assert all(rank.stats()["shed_positions"] == 0 for rank in job.ranks.values())


def test_the_last_drafter_is_sent_even_while_an_older_one_is_on_its_way():
    """Catches a rank that ends on the version before the last because it had not answered yet."""
    job = MemoryJob(steps_per_publish=1, budget=0.5)
    for index in range(20):
        job.ranks[1].observe([stretch(index)])
        job.ranks[1].step_if_due(is_idle=True)
        job.learner.turn()
    job.ranks[1].close()
    job.channels[2].other.send(pack_facts(Kind.DONE, is_interrupted=False))
    assert job.channels[2].count(Kind.DRAFTER) == 1 < job.versions[0]
    begun(job.learner.run).result(LIMIT_S)
    job.ranks[2].step_if_due()
    assert job.versions[2] == job.versions[0] and job.ranks[2].ending is not None


def test_an_error_in_saving_is_not_taken_for_a_bad_message():
    """Catches a checkpoint that failed and that nobody hears of."""
    job = MemoryJob(every_s=0.0)

    def refuse(_step: int) -> None:
        raise ValueError("the folder holds a later step")

    job.ranks[1].on_save = refuse
    job.learner.turn()
    with pytest.raises(ValueError, match="later step"):
        job.ranks[1].step_if_due()


def test_serving_goes_on_without_a_learner_and_ends_with_the_error():
    """Catches a lost learner that breaks requests off, that fills the memory, or that nobody hears of at the end."""
    job = MemoryJob()
    rank = job.ranks[1]
    rank.observe([stretch(0)])
    job.channels[1].close()
    assert rank.is_busy
    for index in range(200):
        rank.observe([stretch(index)])
        assert rank.step_if_due() is None
    stats = rank.stats()
    assert (stats["learner_lost"], stats["outbox_positions"], stats["shed_positions"]) == (1, 0, 804)
    assert not rank.is_busy
    for last_words in (rank.rollback, rank.finish):
        with pytest.raises(PeerLostError, match="rank 9"):
            last_words()


def test_a_lost_rank_ends_the_learner_and_the_others_hear_which_it_was():
    """Catches ranks that wait for a learner that is gone, or that blame it for another's death."""
    job = MemoryJob()
    job.channels[2].other.close()
    with pytest.raises(PeerLostError, match="rank 9"):
        begun(job.learner.run).result(LIMIT_S)
    with pytest.raises(PeerLostError, match="rank 9"):
        begun(job.ranks[1].finish).result(LIMIT_S)


def test_a_server_that_stops_leaves_the_others_learning():
    """Catches one replica's restart that ends the learning of all, or that waits for the others to stop."""
    job = MemoryJob(budget=0.5)
    job.ranks[1].close()
    for index in range(20):
        job.ranks[2].observe([stretch(index)])
    job.settle()
    assert job.learner.stats()["ranks_serving"] == 1
    assert job.versions[2] == job.versions[0] > 0
    job.ranks[2].close()
    assert begun(job.learner.run).result(LIMIT_S) == Ending(is_interrupted=False, save_step=1)


def test_an_outbox_too_small_for_a_message_is_refused():
    with pytest.raises(ValueError, match=f"outbox_positions must be >= {FRAME_POSITIONS}, .* got 63; try 4096"):
        MemoryJob(outbox_positions=63)


# Processes


def test_versions_are_the_same_on_all_ranks_of_a_real_job(tmp_path: Path):
    """Catches weights that change on their way, messages out of order between processes, positions lost on the wire."""
    codes, (learner, *ranks) = run_ranks(tmp_path, {}, limit_s=LIMIT_S)
    assert codes == [0] * NUM_RANKS
    assert [r["error"] for r in (learner, *ranks)] == [None] * NUM_RANKS
    for rank in ranks:
        assert rank["hashes"].items() <= learner["hashes"].items() and len(rank["hashes"]) > 2
        assert rank["version"] == learner["version"]
        assert rank["last_hash"] == learner["hashes"][str(learner["version"])]
        assert (rank["ending"], rank["saves"]) == (learner["ending"], learner["saves"])
    assert learner["stats"]["received_positions"] == sum(rank["stats"]["sent_positions"] for rank in ranks)
    assert all(r["stats"]["bad_messages"] == 0 for r in (learner, *ranks))


@pytest.mark.parametrize(
    ("lost", "fate"), [(2, "dies"), (0, "dies"), pytest.param(1, "hangs", marks=pytest.mark.slow)]
)
def test_a_lost_process_is_named_by_all_others(lost, fate, tmp_path: Path):
    """Catches a hang: a receive that outlives its sender, a rank cut off that nobody misses, a leave never answered."""
    codes, reports = run_ranks(tmp_path, {lost: fate}, limit_s=LIMIT_S)
    for rank, (code, report) in enumerate(zip(codes, reports, strict=True)):
        if rank != lost:
            assert code == 0 and f"lost rank {lost}" in report["error"]
            assert fate == "hangs" or report["num_threads"] == 1
