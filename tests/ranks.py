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
CONTEXT.set_forkserver_preload(["torch", "transformers", "accelerate", "trainers.online", "trainers.job"])


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
    port, deadline_s = free_port(), time.monotonic() + timeout_s
    pipes, processes = [], []
    for rank in range(num_ranks):
        mine, theirs = CONTEXT.Pipe(duplex=False)
        environment = rank_environment(rank, num_ranks, port)
        process = CONTEXT.Process(target=_run, args=(theirs, environment, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [_outcome(pipe, deadline_s) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


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
