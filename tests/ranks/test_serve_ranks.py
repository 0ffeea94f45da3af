"""Several servers as one: they learn one drafter, save, rest, roll back, forget and end together, behind one door."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from dvi.config import load_config
from dvi.distributed import PeerLostError, join
from dvi.records import DrafterVersion, SamplingParams
from dvi.serving.front_door import OF_THE_DRAFTER
from dvi.serving.launch import ServerLaunch
from dvi.settings import ServeConfig
from tests.serving.test_engine import engine_of
from tests.serving.test_loop import Client, Scripted, running, some_requests
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks, try_ranks
from tests.support.replica_doubles import FakeReplica, door_before, in_loop
from tests.support.serve_ranks import PATIENCE_S, SETTINGS, Job, serving_job, wait_until
from trainers.jobs.replica_learner import ReplicaLearner
from trainers.jobs.serve import build_serving
from trainers.learning.checkpoint import read_checkpoint, whole_steps
from trainers.ranks.shards import CHECKPOINTS, rank_folder

TEXTS = ("Once upon a time", "The sun was", "A little dog", "She had a red ball")


def config_of(folder: Path, *overrides: str) -> ServeConfig:
    return load_config(None, [*SETTINGS, f"output.folder={folder}", *overrides], schema=ServeConfig)


def digest(module: object) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()


class Rank:
    """A rank's learner and the rounds that it learns from, without HTTP."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.peers = join(timeout_s=2 * PATIENCE_S)
        self.speculator, self.learner = build_serving(config_of(folder, *overrides), self.peers)
        self.trainer = self.learner.trainer
        self.digests: dict[int, str] = {}
        self.num_ticks = 0

    def serve(self, *texts: str) -> None:
        for _ in self.speculator.generate(list(texts), SamplingParams(max_new_tokens=24), learner=self):
            pass

    def tick_until(self, is_so: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline_s
            self.step_if_due(is_idle=True)

    # What decoding sees of a learner

    def observe(self, transitions: list) -> None:
        self.learner.observe(transitions)

    def step_if_due(self, *, is_idle: bool = False) -> None:
        agreed = self.trainer.agreed
        self.learner.step_if_due(is_idle=is_idle)
        self.num_ticks += self.trainer.agreed is not agreed
        self.digests.setdefault(self.version, digest(self.speculator.drafter))

    @property
    def version(self) -> int:
        return self.speculator.drafter.version

    def end(self) -> None:
        self.learner.close()
        self.peers.leave()


# Saving and going on


def learn_and_save(folder: Path, overrides: tuple[str, ...], num_steps: int) -> dict:
    """Only rank 0 has traffic and asks for a checkpoint; rank 1 ends first."""
    rank = Rank(folder, *overrides)
    begun = (rank.version, digest(rank.speculator.drafter), len(rank.trainer.replay), rank.trainer.num_steps)
    if rank.peers.is_first:
        rank.serve(*TEXTS)
    rank.tick_until(lambda: rank.trainer.num_steps >= num_steps)
    if rank.peers.is_first:
        asked = rank.learner.checkpoint()
        rank.tick_until(asked.done)
        assert asked.result().is_dir()
    rank.tick_until(lambda: rank.learner.num_checkpoints)
    num_positions = len(rank.trainer.replay)
    rank.end()
    return {
        "begun": begun, "ended": (rank.version, digest(rank.speculator.drafter), num_positions, rank.trainer.num_steps),
        "steps": whole_steps(rank_folder(folder, rank.peers.rank) / CHECKPOINTS),
    }  # fmt: skip


@pytest.mark.parametrize("save_replay", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_what_two_ranks_save_goes_on_alone_and_on_two_again(tmp_path, save_replay):
    """Catches numbers of checkpoints that part, a drafter that is not found again, and users' text left behind."""
    folder, overrides = tmp_path / "state", (f"output.save_replay={save_replay}",)
    first = run_ranks(learn_and_save, folder, overrides, 5)
    assert first[0]["ended"][:2] == first[1]["ended"][:2] and first[0]["ended"][3] == first[1]["ended"][3] >= 5
    assert [rank["steps"] for rank in first] == [[1, 2]] * 2
    for rank in range(2):
        state = read_checkpoint(rank_folder(folder, rank) / CHECKPOINTS, 2)
        assert ("replay" in state["trainer"]) == (save_replay == "true")
        assert ("drafter" in state["trainer"]) == (rank == 0)

    speculator, alone = build_serving(config_of(folder, *overrides))
    num_saved = sum(rank["ended"][2] for rank in first) if save_replay == "true" else 0
    assert (speculator.drafter.version, digest(speculator.drafter)) == first[0]["ended"][:2]
    assert len(alone.trainer.replay) == num_saved and alone.trainer.num_steps == first[0]["ended"][3]
    assert alone.checkpoint().result(PATIENCE_S).name == "step-00000003"
    alone.close()
    assert not rank_folder(folder, 1).exists()

    again = run_ranks(learn_and_save, folder, overrides, first[0]["ended"][3] + 3)
    assert [rank["begun"][:2] for rank in again] == [first[0]["ended"][:2]] * 2
    assert sum(rank["begun"][2] for rank in again) == num_saved
    assert [rank["steps"] for rank in again] == [[4, 5]] * 2


def save_by_the_clock(folder: Path) -> tuple[int, list[int], bool]:
    """Rank 1 alone has a clock that says it is time, and rank 0 ends both."""
    rank = Rank(folder)
    ended = []
    rank.learner.on_end = lambda: ended.append(True)
    rank.serve(TEXTS[0])
    if not rank.peers.is_first:
        rank.learner._checkpoint_every_s = 0.05
    rank.tick_until(lambda: rank.learner.num_checkpoints)
    rank.learner._checkpoint_every_s = 60.0
    if rank.peers.is_first:
        rank.learner.begin_end()
    else:
        rank.tick_until(lambda: ended)
    rank.end()
    return rank.learner.num_checkpoints, whole_steps(rank_folder(folder, rank.peers.rank) / CHECKPOINTS), bool(ended)


@pytest.mark.slow
def test_one_rank_whose_time_has_come_has_all_save_and_one_that_ends_ends_all(tmp_path):
    """Catches a checkpoint that one rank has and the other has not, and a server that stays behind alone."""
    (first, first_steps, _), (second, second_steps, has_heard) = run_ranks(save_by_the_clock, tmp_path / "state")
    assert first == second >= 2 and first_steps == second_steps and has_heard


# Resting and rolling back


def rest_and_roll_back(folder: Path) -> dict:
    rank = Rank(folder)
    rank.serve(*TEXTS[:3])
    rank.tick_until(lambda: rank.version >= 3)
    found: dict = {}
    if rank.peers.is_first:
        rank.learner.rest(True)
        before, ticks = (rank.version, rank.trainer.num_steps), rank.num_ticks
        rank.serve(TEXTS[3])  # experience is gathered, and steps are owed
        rank.tick_until(lambda: rank.num_ticks >= ticks + 3)
        found["stands_still"] = before == (rank.version, rank.trainer.num_steps)
        found["rolled_back"] = rank.learner.rollback(1)
        found["next"] = rank.version == before[0] + 1
        # Whatever a step makes of it is published four steps later.
        rank.digests[rank.version] = digest(rank.speculator.drafter)
        rank.tick_until(lambda: rank.num_ticks >= ticks + 6)
        found["pinned"] = rank.version == before[0] + 1
        rank.learner.rest(False)
    else:
        with pytest.raises(ValueError, match="rank 0's to ask for"):
            rank.learner.rollback(1)
        rank.tick_until(lambda: any(version.source == "rollback" for version in rank.learner.versions()))
    version = rank.version
    rank.tick_until(lambda: rank.version > version)
    rank.end()
    return found | {"digests": rank.digests, "sources": [(v.version, v.source) for v in rank.learner.versions()]}


def test_a_rest_and_a_rollback_hold_for_all_ranks(tmp_path):
    """Catches a pin that another rank's steps override, ranks that stop ticking, and a rollback on one rank alone."""
    first, second = run_ranks(rest_and_roll_back, tmp_path / "state")
    assert first["stands_still"] and first["next"] and first["pinned"]
    rolled_back: DrafterVersion = first["rolled_back"]
    assert rolled_back.source == "rollback" and rolled_back.is_live
    assert first["digests"][rolled_back.version] == first["digests"][1] == second["digests"][rolled_back.version]
    assert first["sources"] == second["sources"]
    common = first["digests"].keys() & second["digests"].keys()
    assert len(common) > 3 and all(first["digests"][v] == second["digests"][v] for v in common)


class Resting(Scripted):
    """A learner that others wait for, as the loop sees it."""

    has_peers = True

    def __init__(self, engine: object) -> None:
        super().__init__(engine)
        self.rests: list[bool] = []

    def rest(self, is_resting: bool) -> None:
        self.rests.append(is_resting)


def test_a_loop_calls_a_learner_that_others_wait_for_while_it_is_pinned():
    """Catches a pinned replica that all others wait for, and a pin that is refused and holds all the same."""
    engine, client = engine_of(max_waiting=200), Client()
    learner = Resting(engine)
    with running(engine, learner) as loop:
        with pytest.raises(ValueError, match="not kept"):
            loop.admin.pin(3).result(PATIENCE_S)
        assert learner.rests == [True, False] and not loop.is_pinned
        loop.admin.pin(None).result(PATIENCE_S)
        num_steps = learner.num_steps
        requests = some_requests(loop, 2, seed=6)
        loop.submit(requests, client)
        client.wait_for_all(requests)
        assert learner.num_steps > num_steps and loop.is_pinned
        loop.admin.unpin().result(PATIENCE_S)
        assert learner.rests == [True, False, True, False]


# A rank that is lost


def lose_the_other(folder: Path, fault: str) -> tuple:
    rank = Rank(folder, "output.save_replay=true")
    if not rank.peers.is_first:
        rank.serve(TEXTS[0])
        rank.tick_until(lambda: rank.trainer.num_steps >= 3)
        if fault == "dies":
            os._exit(9)
        rank.trainer.step_if_due = fail
        with pytest.raises(ZeroDivisionError):
            rank.learner.step_if_due()
        rank.learner.close()
        return (whole_steps(rank_folder(folder, 1) / CHECKPOINTS),)
    with pytest.raises(PeerLostError, match="rank 0 of 2 lost another rank"):
        rank.serve(TEXTS[0])
        rank.tick_until(lambda: False)  # for less than the ranks' patience with each other
    for action in (rank.learner.checkpoint, rank.learner.rollback):
        with pytest.raises(PeerLostError):
            action()
    num_positions = len(rank.trainer.replay)
    with pytest.raises(PeerLostError):  # it cannot be forgotten in files that may only be replaced together
        rank.learner.forget("")
    has_forgotten = num_positions > 0 == len(rank.trainer.replay)
    with pytest.raises(PeerLostError):
        rank.end()
    return has_forgotten, whole_steps(folder / CHECKPOINTS)


def fail(**_: object) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("fault", ["dies", pytest.param("fails", marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_ends_learning_and_nothing_is_saved_without_it(tmp_path, fault):
    """Catches a half of a checkpoint, a wait of minutes, experience that stays because nobody else answers."""
    (is_well, found), other = try_ranks(lose_the_other, tmp_path / "state", fault)
    assert is_well, found
    has_forgotten, steps = found
    assert has_forgotten and steps == []
    assert other == ((False, "died") if fault == "dies" else (True, ([],)))


# The door


@in_loop
async def test_a_door_asks_the_first_for_all_that_learn_together():
    """Catches a rollback made twice, and experience that is forgotten on one replica only."""

    async def answer(exchange):
        await exchange.answer({"done": exchange.path})

    assert {"rollback", "pin", "unpin", "save"} == OF_THE_DRAFTER
    for learn_together in (True, False):
        replicas = [FakeReplica(answer) for _ in range(3)]
        async with door_before(*replicas, learn_together=learn_together) as (_, client):
            for action in OF_THE_DRAFTER | {"forget", "checkpoint"}:
                assert (await client.post(f"/admin/{action}", json={})).status_code == 200
            for replica in replicas:
                asked = {exchange.path.removeprefix("/admin/") for exchange in replica.exchanges}
                is_asked_all = replica is replicas[0] or not learn_together
                assert asked == {"forget", "checkpoint"} | (OF_THE_DRAFTER if is_asked_all else set())


def test_a_door_ends_with_the_process_that_opened_it():
    """Catches a door that stays behind when its server was killed, and holds the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "dvi", "route", "http://127.0.0.1:9", "--socket", str(listener.fileno())]
        door = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[listener.fileno()], text=True,
        )  # fmt: skip
    try:
        assert httpx2.get(f"{url}/health", timeout=PATIENCE_S).status_code == 503
        output, errors = door.communicate(timeout=PATIENCE_S)  # closes its stdin
        assert door.returncode == 0 and json.loads(output)["command"] == "route" and "replicas at" not in errors
    finally:
        door.kill()
        door.wait()


@pytest.mark.parametrize(("override", "message"), [
    ("serve.port=65535", "must leave a port above it .* local rank 1"),
    ("train.learner=dedicated", "must be 'shared' in a server"),
    ("serve.max_token_latency_ms=20", "must be kept by one process, got 2 ranks"),
])  # fmt: skip
def test_a_place_that_cannot_be_is_refused(monkeypatch, tmp_path, override, message):
    """Catches an error that only the socket, or the first pin, would have raised."""
    monkeypatch.setattr("dvi.serving.launch.join", lambda **_: _rank_1_of_2())
    with pytest.raises(ValueError, match=message):
        ServerLaunch(config_of(tmp_path / "state", override))


def _rank_1_of_2() -> object:
    from dvi.distributed import Peers

    peers = Peers(rank=1, num_ranks=2, local_rank=1)
    peers.exchange = lambda fact: [fact, fact]
    return peers


# The whole job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    with serving_job(tmp_path_factory.mktemp("job") / "state") as job:
        yield job


def weights_by_rank(job: Job) -> list[bytes]:
    """The drafter that each replica saves."""
    weights = []
    for rank, url in enumerate(job.replica_urls()):
        answer = httpx2.post(f"{url}/admin/save", json={"name": f"of-{rank}-{time.monotonic_ns()}"}, timeout=PATIENCE_S)
        folder = Path(answer.json()["folder"])
        weights.append(b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))
    return weights


def test_clients_see_one_server_and_all_ranks_one_drafter(job):
    """Catches answers that depend on the rank, a rank that gets no traffic, and versions that part."""
    with openai.OpenAI(base_url=f"{job.client.base_url}/v1", api_key="unused", max_retries=0) as client:
        texts = set()
        for index in range(8):
            options = {"model": "stories260k", "prompt": TEXTS[0], "max_tokens": 24}
            if index % 2:
                texts.add(client.completions.create(**options).choices[0].text)
            else:
                texts.add("".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)))
    assert len(texts) == 1
    assert {job.complete(text).headers["x-dvi-replica"] for text in TEXTS} == {"0", "1"}
    wait_until(lambda: min(job.versions()) >= 3, what="both have learnt")
    (pinned,) = job.ask("pin")
    wait_until(lambda: job.versions() == [pinned["version"]] * 2, what="both have come to the pinned version")
    for text in TEXTS:
        assert job.complete(text).json()["metrics"]["speculative_decoding"]["drafter_version"] == pinned["version"]
    first, second = weights_by_rank(job)
    assert first and first == second
    assert job.versions() == [pinned["version"]] * 2
    job.ask("unpin")
    wait_until(lambda: (job.complete(TEXTS[1]), min(job.versions()))[1] > pinned["version"], what="learning goes on")


def test_a_rollback_at_the_door_reaches_all_and_a_replica_refuses_it(job):
    """Catches one rank that drafts on with what the others have left."""
    (published,) = job.ask("rollback")
    assert published["source"] == "rollback"

    def has_rolled_back(url: str) -> bool:
        versions = httpx2.get(f"{url}/admin/versions").json()["versions"]
        return (published["version"], "rollback") in {(one["version"], one["source"]) for one in versions}

    wait_until(lambda: all(map(has_rolled_back, job.replica_urls())), what="all have rolled back")
    refusal = httpx2.post(f"{job.replica_urls()[1]}/admin/rollback", json={"version": 0})
    assert refusal.status_code == 409 and "rank 0's to ask for" in refusal.json()["error"]["message"]


def test_forget_and_checkpoint_reach_all(job):
    """Catches a replica whose memory, or whose folder, the door leaves out."""
    for text in TEXTS * 2:
        job.complete(text)
    assert all(answer["positions"] > 0 for answer in job.ask("forget", key=""))
    answers = job.ask("checkpoint")
    assert len(answers) == 2 and len({Path(answer["folder"]).name for answer in answers}) == 1
    assert {Path(answer["folder"]).parents[1] for answer in answers} == {rank_folder(job.folder, r) for r in range(2)}


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_that_one_process_goes_on_from(job):
    """Catches answers that are cut off, ranks that stay behind, a door that does, and parts of different moments."""
    answers: list[str] = []
    stream = {"prompt": TEXTS[0], "max_tokens": 300, "ignore_eos": True, "stream": True}

    def listen() -> None:
        with job.client.stream("POST", "/v1/completions", json=stream) as answer:
            answers.extend(answer.iter_lines())

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(answers) > 2, what="an answer is under way")
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.end() == [0, 0], job.log(0) + job.log(1)
    listener.join(PATIENCE_S)
    assert "data: [DONE]" in answers
    with pytest.raises(httpx2.ConnectError):
        job.health()
    assert json.loads(job.log(0).splitlines()[-1])["command"] == "serve" and "{" not in job.log(1)
    assert job.log(0).count("serving ") == 1
    steps = [whole_steps(rank_folder(job.folder, rank) / CHECKPOINTS)[-1] for rank in range(2)]
    assert steps[0] == steps[1]
    speculator, learner = build_serving(config_of(job.folder))
    assert speculator.drafter.version == json.loads(job.log(0).splitlines()[-1])["drafter_version"]
    assert not isinstance(learner, ReplicaLearner)
    learner._is_changed = False
    learner.close()


def test_the_door_answers_from_who_is_left_until_the_job_ends_with_the_reason(tmp_path):
    """Catches a lost rank that takes serving with it, an end without its name, and a checkpoint of one rank alone."""
    with serving_job(tmp_path / "state") as job:
        for text in TEXTS:
            job.complete(text)
        job.processes[1].kill()
        for text in TEXTS * 2:
            assert job.complete(text).status_code == 200
        first = job.replica_urls()[0]
        wait_until(lambda: httpx2.get(f"{first}/health").json()["learner"] == "dead", what="the loss is noticed")
        assert httpx2.get(f"{first}/health").json()["status"] == "degraded"
        refusal = job.client.post("/admin/rollback", json={})
        assert refusal.status_code == 503 and "lost another rank" in str(refusal.json()["replicas"])
        os.kill(job.processes[0].pid, signal.SIGTERM)
        assert job.end()[0] == 3
        assert "error: rank 0 of 2 lost another rank" in job.log(0)
        assert whole_steps(job.folder / CHECKPOINTS) == []


@pytest.mark.slow
def test_without_learning_replicas_are_independent(tmp_path):
    """Catches ticks and folders that nobody needs, and an end that waits for the others."""
    with serving_job(tmp_path / "state", "train.enabled=false") as job:
        assert {job.complete(text).headers["x-dvi-replica"] for text in TEXTS} == {"0", "1"}
        for process in job.processes:
            os.kill(process.pid, signal.SIGTERM)
        assert job.end() == [0, 0]
    assert not job.folder.exists()


@pytest.mark.slow
def test_torchrun_starts_a_server_and_ends_it_when_a_replica_is_killed(tmp_path):
    """Catches a server that only the tests' own launcher can start, or whose end torchrun does not understand."""
    log, folder = tmp_path / "log", tmp_path / "state"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dvi"]
    command += ["serve", str(ROOT / "configs/online/serve.yaml"), *SETTINGS]
    with log.open("wb") as file:
        launcher = subprocess.Popen(
            [*command, f"output.folder={folder}"], stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until(lambda: "figures at" in log.read_text() or launcher.poll() is not None, what="the door is open")
        ranks = {int(process.environ()["RANK"]): process for process in psutil.Process(launcher.pid).children()}
        url = re.search(r"at (http\S+), figures", log.read_text())[1]
        answer = httpx2.post(f"{url}/v1/completions", json={"prompt": TEXTS[0], "max_tokens": 8}, timeout=PATIENCE_S)
        assert answer.status_code == 200
        ranks[1].kill()
        assert launcher.wait(PATIENCE_S) != 0
        assert "rank 0 of 2 lost another rank" in log.read_text() and "exitcode  : 3" in log.read_text()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
    finally:
        launcher.terminate()
        launcher.wait(PATIENCE_S)
