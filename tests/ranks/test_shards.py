"""What the ranks of a run save, and how a resumed run of as many ranks, or others, on one disk or several, has it."""
# R ranks.

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from dvi.config import load_config
from dvi.records import SamplingParams
from dvi.telemetry import METRICS_FILE
from tests.support.random_traffic import serving, stretch
from tests.support.ranks import run_ranks, try_ranks
from trainers.jobs.job import Job
from trainers.learning.checkpoint import TENSORS_FILE, CheckpointStore, pack, whole_steps
from trainers.learning.replay import ReplayBuffer
from trainers.ranks.launch import Launch
from trainers.ranks.shards import CHECKPOINTS, load_saved, rank_folder

NUM_STRETCHES = 12  # of each of a rank's requests
SETTINGS = (
    "output.tensorboard=false", "train.rounds_per_step=1", "train.budget=1", "train.blocks_per_step=16",
    "train.replay_positions=8192", "train.steps_per_publish=2", "train.peer_timeout_s=20",
)  # fmt: skip


class Learning(Job):
    """A job that learns from random rounds: request i has rounds that no other has."""

    noun = "requests"

    def _work(self, metrics, signals):
        raise NotImplementedError

    def _facts(self):
        return {}

    def learn(self, indices: range) -> None:
        """Does those of the requests that are its own and not done, then waits until all ranks have."""
        for index in indices:
            if not self._is_mine(index) or self.cursor.is_done(index):
                continue
            for number in range(NUM_STRETCHES):
                transitions = stretch(1000 * index + number)
                transitions.request_id, transitions.start_position = index, 4 * number
                self.trainer.observe([transitions])
                self.trainer.step_if_due(is_idle=True)
            self.trainer.replay.end(index)
            self.cursor.finish(index)
            self.num_tokens += index
        self.trainer.notices.is_done, self.trainer.notices.num_done = 1, self.num_done_here
        agreed = None if self.peers.is_alone else self.trainer.agreed
        while not self.peers.is_alone and (agreed is None or agreed.is_done < self.peers.num_ranks):
            self.trainer.step_if_due(is_idle=True)
            agreed = self.trainer.agreed
        (self.folder / METRICS_FILE).write_text("x" * self.num_tokens, encoding="utf-8")
        self.save()

    def facts(self) -> dict:
        """What tests compare, in plain values."""
        state = self.trainer.state_dict()
        for record in state["versions"]["records"]:
            del record["created_s"]  # a resumed run has rank 0's clock
        return {
            "digest": hashlib.sha256(pack(state).numpy().tobytes()).hexdigest(),
            "weights": hashlib.sha256(pack(state["live"]).numpy().tobytes()).hexdigest(),
            "version": self.speculator.drafter.version, "steps": self.trainer.num_steps,
            "positions": positions(self.trainer.replay), "counted": state["counts"]["_tokens_counted"],
            "token_counts": self.trainer.token_counts_V.tolist(), "draws": state["generator"].tolist(),
            "done": [index for index in range(100) if self.cursor.is_done(index)], "tokens": self.num_tokens,
            "checkpoints": whole_steps(self.folder / CHECKPOINTS),
            "metrics": (self.folder / METRICS_FILE).stat().st_size if (self.folder / METRICS_FILE).exists() else None,
        }  # fmt: skip


def positions(replay: ReplayBuffer) -> list[str]:
    """Every stored position, by what the verifier's hidden state was there."""
    segments = replay._segments
    rows = [segments.rows(slot).start + i for slot, length in enumerate(segments.lengths) for i in range(length)]
    return [str(segments.fields["target_hidden"][row].tolist()) for row in rows]


def live(folders: list[str], learns: list[int] | None) -> dict:
    """A rank's life: it resumes what there is, does some requests of [first, end) `learns`, and saves."""
    import os

    folder = folders[int(os.environ["RANK"])]
    config = load_config(None, [*SETTINGS, f"output.folder={folder}", "output.resume=true"])
    with Launch(config, Console(quiet=True)) as launch:
        job = Learning(launch, serving(), params=SamplingParams(), traffic=[], held_out=[])
        saved = load_saved(launch.run_folder, launch.peers)
        if saved is not None:
            job.load(saved)
        is_own = saved is not None and saved.own is not None
        if learns is not None:
            job.learn(range(*learns))
        return job.facts() | {"is_own": is_own}


def run(folders: Path | list[Path], num_ranks: int, learns: list[int] | None = None) -> list[dict]:
    by_rank = folders if isinstance(folders, list) else [folders] * num_ranks
    return run_ranks(live, [str(folder) for folder in by_rank], learns, num_ranks=num_ranks, timeout_s=30)


def total(facts: list[dict], name: str) -> Counter | int | list:
    values = [fact[name] for fact in facts]
    if name == "positions":
        return sum((Counter(value) for value in values), Counter())
    return [sum(column) for column in zip(*values, strict=True)] if isinstance(values[0], list) else sum(values)


def tear(folder: Path) -> None:
    """Damages the newest checkpoint."""
    (sorted((folder / CHECKPOINTS).glob("step-*"))[-1] / TENSORS_FILE).write_bytes(b"torn")


def folders_of(tmp_path: Path, num_ranks: int, *, is_shared: bool) -> Path | list[Path]:
    return tmp_path / "run" if is_shared else [tmp_path / f"machine-{rank}" / "run" for rank in range(num_ranks)]


@pytest.mark.parametrize("is_shared", [True, False])
def test_as_many_ranks_go_on_bit_for_bit(tmp_path, is_shared):
    """Catches a rank that goes on with another's random draws, counts, acceptance or replay."""
    folders = folders_of(tmp_path, 2, is_shared=is_shared)
    before = run(folders, 2, [0, 5])
    after = run(folders, 2)
    assert before[0]["steps"] > 3 and before[0]["version"] > 1
    assert before[0]["draws"] != before[1]["draws"] and before[0]["token_counts"] != before[1]["token_counts"]
    for then, now in zip(before, after, strict=True):
        assert now == then | {"is_own": True, "done": list(range(5))}


@pytest.mark.parametrize(
    ("num_before", "num_after"), [(2, 1), (1, 2), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 4), (4, 2)))]
)
def test_other_ranks_share_out_all_there_was(tmp_path, num_before, num_after):
    """Catches experience, requests and counts that are lost or doubled, and ranks that part."""
    before = run(tmp_path, num_before, [0, 7])
    after = run(tmp_path, num_after)
    for now in after:
        assert not now["is_own"] and now["done"] == list(range(7))
        assert (now["version"], now["weights"]) == (before[0]["version"], before[0]["weights"])
    for name in ("positions", "counted", "token_counts", "tokens"):
        assert total(after, name) == total(before, name), name
    assert max(total(after, "positions").values()) == 1
    assert len({str(now["draws"]) for now in after}) == num_after
    assert all(now["positions"] for now in after)

    later = run(tmp_path, num_after, [0, 20])
    assert all(now["steps"] > before[0]["steps"] and now["version"] > before[0]["version"] for now in later)
    back = run(tmp_path, num_before)
    assert all(now["done"] == list(range(20)) for now in back) and total(back, "tokens") == sum(range(20))


@pytest.mark.parametrize(("num_before", "num_after"), [(1, 2), (4, 2)])
def test_parts_on_machines_that_see_only_their_own_are_shared_out_as_far_as_they_are_seen(
    tmp_path, num_before, num_after
):
    """Catches a rank that looks for a part on another machine, and one that nobody takes though its machine is there.

    Two machines with half of the ranks each; one rank alone was on the first.
    """
    machines = [tmp_path / name / "run" for name in "ab"]
    place = lambda num_ranks: [machines[rank * 2 // num_ranks] for rank in range(num_ranks)]  # noqa: E731
    before = run(place(num_before), num_before, [0, 7])
    after = run(place(num_after), num_after)
    assert all(now["done"] == list(range(7)) for now in after)
    for name in ("positions", "counted", "token_counts", "tokens"):
        assert total(after, name) == total(before, name), name
    assert len({now["weights"] for now in (*before, *after)}) == 1


def test_machines_that_change_places_go_on_with_what_is_newest(tmp_path):
    """Catches the first machine's old checkpoint taken for the run's when another has been rank 0 since.

    A launcher numbers the machines anew with each start.
    """
    machines = [tmp_path / name / "run" for name in "ab"]
    run(machines, 2, [0, 5])
    swapped = run(machines[::-1], 2, [0, 10])
    assert total(swapped, "tokens") == sum(range(10))
    found = run(machines, 2)
    assert all(now["done"] == list(range(10)) for now in found)
    assert all(now["weights"] == swapped[0]["weights"] for now in found)
    assert total(found, "positions") == total(swapped, "positions")
    assert total(found, "tokens") == sum(range(10))


def test_parts_of_ranks_that_are_no_more_are_not_taken_twice(tmp_path):
    """Catches an old part that is dealt out again with every resume, and one taken for new when its rank is back."""
    run(tmp_path, 4, [0, 8])
    run(tmp_path, 2, [0, 12])
    assert (rank_folder(tmp_path, 3) / CHECKPOINTS).exists()
    two = run(tmp_path, 2)
    assert all(now["is_own"] for now in two) and max(total(two, "positions").values()) == 1
    four = run(tmp_path, 4)
    assert max(total(four, "positions").values()) == 1 and total(four, "tokens") == sum(range(12))
    assert [now["checkpoints"] for now in four[2:]] == [[], []]  # theirs were another run's by now


def test_without_the_part_of_rank_0_a_run_is_refused(tmp_path):
    """Catches a drafter that starts afresh beside the replay of an earlier one."""
    run(tmp_path, 2, [0, 4])
    shutil.rmtree(tmp_path / CHECKPOINTS)
    for is_well, reason in try_ranks(live, [str(tmp_path)] * 2, None, timeout_s=30):
        assert not is_well and "no machine has that of rank 0; put it back" in reason


@pytest.mark.parametrize(("victim", "is_missing"), [(0, True), (1, False)])
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_what_only_one_rank_has_saved_is_void(tmp_path, victim, is_missing):
    """Catches a mix of two moments, and a later checkpoint that the resumed run cannot save past."""
    first = run(tmp_path, 2, [0, 6])
    run(tmp_path, 2, [0, 16])
    folder = rank_folder(tmp_path, victim)
    if is_missing:
        shutil.rmtree(sorted((folder / CHECKPOINTS).glob("step-*"))[-1])
    else:
        tear(folder)
    resumed = run(tmp_path, 2)
    for then, now in zip(first, resumed, strict=True):
        assert now["is_own"] and now["digest"] == then["digest"] and now["done"] == list(range(6))
        assert now["metrics"] == then["metrics"] and now["checkpoints"] == [6]
    later = run(tmp_path, 2, [0, 8])
    assert [now["checkpoints"] for now in later] == [[6, 8]] * 2
    assert all(now["done"] == list(range(8)) for now in run(tmp_path, 2))


def test_a_lost_machine_costs_what_it_had_done_and_no_more(tmp_path):
    """Catches a run that cannot go on, or cannot save any more, when the parts of a machine are gone."""
    machines = [tmp_path / name / "run" for name in "ab"]
    before = run(machines, 2, [0, 9])
    shutil.rmtree(machines[1])
    (here, there) = run(machines, 2)
    assert here["done"] == there["done"] == [0, 2, 4, 6, 8]
    assert total([here, there], "positions") == Counter(before[0]["positions"])
    assert here["weights"] == there["weights"] == before[0]["weights"]
    run(machines, 2, [0, 6])
    with CheckpointStore(rank_folder(machines[1], 1) / CHECKPOINTS) as store:
        assert store.next_step > 9
    assert all(now["done"] == [0, 1, 2, 3, 4, 5, 6, 8] for now in run(machines, 2))


def test_metrics_of_what_will_be_done_again_are_dropped_also_of_ranks_that_are_no_more(tmp_path):
    """Catches requests that stand twice in the files of a run that goes on with fewer ranks after a crash."""
    before = run(tmp_path, 4, [0, 8])
    paths = [rank_folder(tmp_path, rank) / METRICS_FILE for rank in range(4)]
    for path in paths:
        with path.open("a", encoding="utf-8") as file:
            file.write("after the checkpoint")
    run(tmp_path, 2)
    assert [path.stat().st_size for path in paths] == [then["metrics"] for then in before]
