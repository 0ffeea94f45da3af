"""Ranks for tests: a function run by several gloo processes at once, which never outlive the test."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

# One server has all that is slow to import; every rank is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "accelerate", "trainers.learning.online", "trainers.jobs.train"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def run_ranks(function: Callable, *arguments: object, num_ranks: int = 2, timeout_s: float = 120) -> list:
    """What function(*arguments) returns on each rank, by rank. An exception, a death and a hang fail the test."""
    outcomes = try_ranks(function, *arguments, num_ranks=num_ranks, timeout_s=timeout_s)
    failed = [f"rank {rank}: {value}" for rank, (is_well, value) in enumerate(outcomes) if not is_well]
    assert not failed, "\n".join(failed)
    return [value for _, value in outcomes]


def try_ranks(
    function: Callable, *arguments: object, num_ranks: int = 2, timeout_s: float = 120
) -> list[tuple[bool, object]]:
    """(True, result) or (False, reason) of each rank; a rank still running at the end of the time is killed."""
    with Ranks(function, *arguments, num_ranks=num_ranks) as ranks:
        return ranks.outcomes(timeout_s=timeout_s)


class Ranks:
    """The processes of one job, each at function(*arguments). A context manager; none outlives it."""

    def __init__(self, function: Callable, *arguments: object, num_ranks: int) -> None:
        port = free_port()
        self._pipes: list[Connection] = []
        self.processes: list[multiprocessing.Process] = []
        for rank in range(num_ranks):
            mine, theirs = CONTEXT.Pipe(duplex=False)
            environment = rank_environment(rank, num_ranks, port)
            process = CONTEXT.Process(target=_run, args=(theirs, environment, function, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def outcomes(self, *, timeout_s: float) -> list[tuple[bool, object]]:
        """(True, result) or (False, reason) of each rank; a rank that is still running by then hung."""
        deadline_s = time.monotonic() + timeout_s
        return [_outcome(pipe, deadline_s) for pipe in self._pipes]

    def outcome(self, rank: int, *, timeout_s: float) -> tuple[bool, object]:
        return _outcome(self._pipes[rank], time.monotonic() + timeout_s)


def _outcome(pipe: Connection, deadline_s: float) -> tuple[bool, object]:
    if not wait([pipe], max(deadline_s - time.monotonic(), 0)):
        return False, "hung"
    try:
        return pipe.recv()
    except EOFError:
        return False, "died"


def _run(pipe: Connection, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (True, function(*arguments))
    except Exception:
        outcome = (False, traceback.format_exc())
    pipe.send(outcome)
