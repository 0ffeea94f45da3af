"""`dvi serve` on several ranks, each a process of its own with a log, and a front door: for tests."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx2

from tests.support.paths import STORIES
from tests.support.ranks import CONTEXT, free_port, rank_environment

PATIENCE_S = 60.0  # a deadline, not a wait
# Steps are made while nobody waits; lengths are fixed, so that nothing depends on how fast this machine is.
SETTINGS = (
    f"model.path={STORIES}", "model.split_layer=2", "drafter.anchor_hidden=16", "drafter.draft_vocab_size=0",
    "draft.policy=fixed", "train.budget=0.5", "train.rounds_per_step=1", "train.blocks_per_slice=0",
    "train.blocks_per_step=16", "train.steps_per_publish=4", "train.steps_per_canary=1000", "train.settle_rounds=0",
    "train.peer_timeout_s=60", "serve.port=0", "serve.drain_s=5",
)  # fmt: skip


def wait_until(is_so: Callable[[], object], *, what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"waited in vain until {what}"
        time.sleep(0.02)


class Job:
    """A running job. client: of the door; processes: by rank."""

    def __init__(self, folder: Path, processes: list[BaseProcess], logs: list[Path]) -> None:
        self.folder, self.processes, self._logs = folder, processes, logs
        wait_until(lambda: self._url or not processes[0].is_alive(), what="the door is open")
        assert self._url, self.log(0)
        self.client = httpx2.Client(base_url=self._url, timeout=PATIENCE_S)

    @property
    def _url(self) -> str | None:
        found = re.search(r"serving .* at (http\S+), figures", self.log(0))
        return found and found[1]

    def log(self, rank: int) -> str:
        return self._logs[rank].read_text()

    def health(self) -> dict:
        return self.client.get("/health").json()

    def versions(self) -> list[int]:
        """The live version by rank, as the replicas themselves say."""
        return [httpx2.get(f"{url}/health").json()["drafter_version"] for url in self.replica_urls()]

    def replica_urls(self) -> list[str]:
        return [f"http://{replica['name']}" for replica in self.health()["replicas"]]

    def complete(self, prompt: str, **options: object) -> httpx2.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 16, **options})

    def ask(self, action: str, **body: object) -> list[dict]:
        """What the replicas that were asked have answered."""
        answer = self.client.post(f"/admin/{action}", json=body)
        assert answer.status_code == 200, answer.text
        return [one["answer"] for one in answer.json()["replicas"]]

    def end(self) -> list[int | None]:
        """Exit codes by rank, once all have ended."""
        for process in self.processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in self.processes]


@contextlib.contextmanager
def serving_job(folder: Path, *settings: str, num_ranks: int = 2) -> Iterator[Job]:
    port, logs = free_port(), [folder.parent / f"{folder.name}-{rank}.log" for rank in range(num_ranks)]
    arguments = ["serve", str(STORIES.parents[1] / "configs/online/serve.yaml"), *SETTINGS, *settings]
    arguments += [f"output.folder={folder}", f"serve.adapters_folder={folder}/adapters"]
    processes = []
    for rank, log in enumerate(logs):
        log.touch()
        environment = rank_environment(rank, num_ranks, port)
        processes.append(CONTEXT.Process(target=_serve, args=(environment, log, arguments)))
        processes[-1].start()
    try:
        job = Job(folder, processes, logs)
        with job.client:
            wait_until(lambda: job.health()["status"] == "ok", what="all replicas are healthy")
            yield job
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(environment: dict[str, str], log: Path, arguments: list[str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    import torch

    from dvi.cli.main import app
    from dvi.serving import engine

    torch.set_num_threads(1)
    engine.MEASURING_S = 0.0  # lengths are fixed
    sys.exit(app(arguments, prog_name="dvi"))
