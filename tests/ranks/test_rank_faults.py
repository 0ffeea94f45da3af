"""Jobs of several ranks of which one is killed, or no longer answers: no hang, no damage, no request lost."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from dvi.config import load_config
from dvi.distributed import Peers
from tests.support.rank_jobs import job_settings, saved, served
from tests.support.ranks import Ranks, run_ranks, try_ranks
from trainers.jobs.job import Job
from trainers.jobs.train import run_training
from trainers.learning import online
from trainers.ranks.shards import CHECKPOINTS

PATIENCE_S = 60  # a rank that takes longer to end hung; peer_timeout_s of these jobs is far less
POLL_S = 0.01
LONGEST_REST_S = 1.0  # between a checkpoint and the kill: as long as it takes to the next one, or two
EARLY_PART = 0.2  # of the kills that come while the job still starts, or soon after
NUM_REQUESTS = 40


def serve(settings: list[str]) -> dict:
    return run_training(load_config(None, [*settings, "output.resume=true"]), console=Console(quiet=True))


def newest_step(folder: Path) -> int:
    """Of rank 0's checkpoints."""
    steps = [int(path.name.removeprefix("step-")) for path in (folder / CHECKPOINTS).glob("step-*")]
    return max(steps, default=0)


def wait_for_save(folder: Path, ranks: Ranks) -> None:
    """Until rank 0 has saved a checkpoint that it had not, or a rank has ended."""
    before = newest_step(folder)
    while newest_step(folder) == before and all(process.is_alive() for process in ranks.processes):
        time.sleep(POLL_S)


def is_named_loss(reason: object) -> bool:
    return "PeerLostError" in str(reason) and any(
        words in str(reason) for words in ("lost another rank", "did not find the others")
    )


def check_folder(folder: Path, num_ranks: int) -> int:
    """The step that a resumed run will take. Every checkpoint is whole, and no rank is two ahead of that step."""
    states = [saved(folder, rank) for rank in range(num_ranks)]
    steps = [{state["step"] for state in of_rank} for of_rank in states]
    if not any(steps):
        return 0
    common = max(set.intersection(*steps), default=0)
    assert all(len([step for step in of_rank if step > common]) <= 1 for of_rank in steps), steps
    for rank, of_rank in enumerate(states):
        for state in of_rank:
            done = set(range(state["first_open"])) | set(state["done_ahead"])
            missing = done - {index for other in range(num_ranks) for index in served(folder, other)}
            assert not missing, f"rank {rank} calls {missing} done at step {state['step']}, and nobody served them"
    return common


@pytest.mark.parametrize(
    ("num_kills", "num_ranks"), [(3, 2), *(pytest.param(25, ranks, marks=pytest.mark.slow) for ranks in (2, 3))]
)
def test_a_job_survives_the_death_of_any_rank_at_any_moment(tmp_path, num_kills, num_ranks):
    """Catches a rank that waits for a dead one, checkpoints torn or of different moments, a resume that goes back by
    more than one interval, and requests lost or served twice."""
    rng = random.Random(num_ranks)
    num_killed = 0
    for number in itertools.count():  # a job may end before it is hit often enough
        folder = tmp_path / f"run-{number}"
        settings = job_settings(tmp_path, num_requests=NUM_REQUESTS, num_tokens=24, folder=folder.name)
        is_done, promised = False, 0
        while not is_done and num_killed < num_kills:
            is_done = not kill_one(rng, settings, folder, num_ranks)
            num_killed += not is_done
            step = check_folder(folder, num_ranks)
            assert step >= promised
            promised = step
        if not is_done:
            summary, *_ = run_ranks(serve, settings, num_ranks=num_ranks, timeout_s=300)
            assert summary["status"] == "done" and summary["requests"] == NUM_REQUESTS and summary["reloads_alike"]
        indices = [index for rank in range(num_ranks) for index in served(folder, rank)]
        assert sorted(indices) == list(range(NUM_REQUESTS))
        if num_killed == num_kills:
            break


def kill_one(rng: random.Random, settings: list[str], folder: Path, num_ranks: int) -> bool:
    """Lets the job live for a while and kills one of its ranks; False when that had ended well before."""
    victim, rest_s, is_early = rng.randrange(num_ranks), rng.uniform(0, LONGEST_REST_S), rng.random() < EARLY_PART
    with Ranks(serve, settings, num_ranks=num_ranks) as ranks:
        if not is_early:
            wait_for_save(folder, ranks)
        time.sleep(rest_s)
        ranks.processes[victim].kill()
        outcomes = ranks.outcomes(timeout_s=PATIENCE_S)
    for rank, (is_well, outcome) in enumerate(outcomes):
        if is_well:  # the traffic had ended
            assert outcome["status"] == "done" and saved(folder, rank)[-1]["step"] == NUM_REQUESTS
        else:
            assert outcome == "died" if rank == victim else is_named_loss(outcome), (rank, outcome)
    return not outcomes[victim][0]


def test_a_rank_that_no_longer_answers_is_given_up(tmp_path):
    """Catches ranks that wait for ever for a host that hangs, which closes no connection."""
    settings = job_settings(tmp_path, num_requests=200, num_tokens=24, peer_timeout_s=3)
    with Ranks(serve, settings, num_ranks=2) as ranks:
        wait_for_save(tmp_path / "run", ranks)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        is_well, reason = ranks.outcome(0, timeout_s=PATIENCE_S)
    assert not is_well and is_named_loss(reason), reason
    check_folder(tmp_path / "run", 2)


def lose_one_at_the_start(settings: list[str]) -> None:
    """Rank 1 dies when it is to build its learner, which all ranks do together inside a library."""
    build = online.build_student

    def build_or_die(*args: object, peers: Peers) -> object:
        if not peers.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        return build(*args, peers=peers)

    online.build_student = build_or_die
    serve(settings)


def test_a_rank_lost_inside_a_library_is_the_named_error_too(tmp_path):
    """Catches a stranger's exception, and exit code, where the ranks wait for each other outside of our own sums."""
    settings = job_settings(tmp_path, num_requests=2, num_tokens=8)
    (is_well, reason), _ = try_ranks(lose_one_at_the_start, settings, timeout_s=PATIENCE_S)
    assert not is_well and is_named_loss(reason), reason


def watch_a_loss(settings: list[str]) -> dict:
    """Rank 1 dies once it has served two requests. What rank 0 had admitted by the time it knew, and after."""
    admitted, seen = [], {}
    request, lost = Job._request, Peers.lost

    def admit(self: Job, index: int, messages: list) -> object:
        if self.peers.rank == 1 and len(admitted) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        admitted.append(index)
        return request(self, index, messages)

    def note_loss(self: Peers, error: RuntimeError) -> Exception:
        seen.setdefault("admitted", list(admitted))
        seen.setdefault("served", served(Path(load_config(None, settings).output.folder), 0))
        return lost(self, error)

    Job._request, Peers.lost = admit, note_loss
    Job.check_traffic = lambda self: None  # asks for every request before any is admitted
    with pytest.raises(ConnectionError, match="lost another rank"):
        serve(settings)
    return seen | {"later": admitted[len(seen["admitted"]) :]}


def test_when_a_rank_dies_the_others_finish_what_is_running_and_begin_nothing(tmp_path):
    """Catches answers dropped half-way because somebody else died, and a rank that serves on without its job."""
    settings = job_settings(tmp_path, num_requests=60, num_tokens=120)
    (is_well, seen), (_, reason) = try_ranks(watch_a_loss, [*settings, "data.batch_size=3"], timeout_s=PATIENCE_S)
    assert is_well and reason == "died", seen
    assert len(seen["admitted"]) > len(seen["served"])  # some were running
    assert seen["later"] == []
    assert sorted(served(tmp_path / "run", 0)) == seen["admitted"]
