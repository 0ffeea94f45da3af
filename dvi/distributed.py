"""The processes of one job: who they are, and sums over them that nobody waits for.

Knows ranks, tensors and a process group; knows nothing of training or serving. A collective is begun, polled between
rounds and read when it is complete, so that a rank that is late holds up the others' learning and never their serving.
Every rank must begin the same collectives in the same order. Counts and facts go through the CPU (gloo), gradients
through whatever their device has (NCCL on CUDA). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
POLL_S = 0.002  # between two looks at a collective that somebody has nothing else to do than to wait for


class Progress(Enum):
    """What a piece of learning that has not come to its end says of itself."""

    WORKED = "worked"
    WAITS = "waits for other ranks"


Pieces = Generator[Progress, None, T]


class PeerLostError(ConnectionError):
    """Another process of the job died, or did not answer in time."""


class Peers:
    """The ranks of a job, this one among them. `SOLO`, a job of one process, needs no process group.

    rank, num_ranks     0 .. num_ranks - 1 over all machines.
    local_rank          of the processes on this machine; its CUDA device.
    num_bytes, busy_s   of the collectives so far: what this rank put in, and its time in the calls, waits left out.
    """

    def __init__(self, *, rank: int = 0, num_ranks: int = 1, local_rank: int = 0) -> None:
        self.rank, self.num_ranks, self.local_rank = rank, num_ranks, local_rank
        self.num_bytes, self.busy_s = 0, 0.0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.num_ranks == 1

    def device(self, name: str) -> str:
        """The device that this rank takes where the settings say `name`: of "auto" and "cuda" its own."""
        if name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local_rank}"

    # Sums

    def total(self, values: Tensor) -> Pieces[Tensor]:
        """The sum over all ranks, in place; says WAITS until all have begun it. Raises PeerLostError."""
        if not self.is_alone:
            yield from self.arrival(self.begin_total(values))
        return values

    def begin_total(self, values: Tensor) -> dist.Work:
        """Begins to sum `values` over all ranks, in place; not to be touched until `arrival` has come to its end."""
        return self._begin(lambda: dist.all_reduce(values, async_op=True), values)

    def arrival(self, work: dist.Work) -> Pieces[None]:
        """Says WAITS until the collective is complete."""
        while True:
            start_s = time.perf_counter()
            is_complete = work.is_completed()
            self.busy_s += time.perf_counter() - start_s
            if is_complete:
                break
            yield Progress.WAITS
        try:
            work.wait()
        except RuntimeError as error:
            raise self.lost(error) from error

    # Facts

    def exchange(self, fact: object) -> list:
        """Every rank's fact, by rank: plain values, as JSON has them. Waits for all ranks."""
        message = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        return [json.loads(other.numpy().tobytes()) for other in self.exchange_bytes(message)]

    def exchange_bytes(self, message: Tensor) -> list[Tensor]:
        """Every rank's bytes, uint8 [n] of any lengths, by rank. Waits for all ranks."""
        if self.is_alone:
            return [message]
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        sizes[self.rank] = len(message)
        sizes = wait(self.total(sizes)).tolist()
        parts = []
        for rank, size in enumerate(sizes):
            part = message if rank == self.rank else torch.zeros(size, dtype=torch.uint8)
            if size:
                work = self._begin(lambda part=part, rank=rank: dist.broadcast(part, src=rank, async_op=True), part)
                wait(self.arrival(work))
            parts.append(part)
        return parts

    def _begin(self, collective: Callable[[], dist.Work], message: Tensor) -> dist.Work:
        start_s = time.perf_counter()
        try:
            return collective()
        except RuntimeError as error:
            raise self.lost(error) from error
        finally:
            self.busy_s += time.perf_counter() - start_s
            self.num_bytes += message.numel() * message.element_size()

    @contextmanager
    def in_library(self) -> Iterator[None]:
        """Around calls in which a library waits for all ranks. Raises PeerLostError when one was lost meanwhile."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.is_alone:
                raise
            raise self.lost(error) from error

    def check_alike(self, what: str, fact: object) -> None:
        """Raises ValueError, on every rank, when the ranks do not have the same fact. Waits for all ranks."""
        facts = self.exchange(fact)
        for rank, other in enumerate(facts):
            if other != facts[0]:
                raise ValueError(
                    f"{what} must be the same on all ranks, got {facts[0]!r} on rank 0 and {other!r} on rank {rank}; "
                    "start all of them with the same files and settings"
                )

    def leave(self) -> None:
        """Takes down the process group, where there is one."""
        if not self.is_alone and dist.is_initialized():
            dist.destroy_process_group()

    def lost(self, error: RuntimeError) -> PeerLostError:
        """What a collective's failure means."""
        # gloo puts its source line before the reason and advice behind it.
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        return PeerLostError(
            f"rank {self.rank} of {self.num_ranks} lost another rank: {reason}; "
            "its own log says why; started again (dvi train with output.resume=true) the job goes on from its last "
            "checkpoint"
        )


SOLO = Peers()


def join(*, timeout_s: float) -> Peers:
    """The job that torchrun or accelerate started this process in, as RANK, WORLD_SIZE and their like say; else SOLO.

    Waits for the other processes. timeout_s: a collective that takes longer has lost a rank.
    Raises ValueError when the variables do not fit together, PeerLostError when the others do not come.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        return SOLO
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE={num_ranks} needs {', '.join(missing)} too; start the job with torchrun")
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"a machine with {torch.cuda.device_count()} CUDA devices takes as many processes, "
                f"got local rank {local_rank}; start fewer with --nproc_per_node, or hide the devices with "
                "CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
    try:
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=timedelta(seconds=timeout_s),
                store=_meeting_point(rank, num_ranks, timeout_s), rank=rank, world_size=num_ranks,
            )
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(
            f"rank {rank} of {num_ranks} did not find the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error
    return Peers(rank=rank, num_ranks=num_ranks, local_rank=local_rank)


def _meeting_point(rank: int, num_ranks: int, timeout_s: float) -> dist.Store:
    """Where the processes find each other."""
    store, _, _ = next(rendezvous("env://", rank, num_ranks, timeout=timedelta(seconds=timeout_s)))
    if os.environ.get("LOCAL_WORLD_SIZE") != str(num_ranks):
        return store  # several machines count their restarts apart, and have a new store after each
    # On one machine torchrun keeps the store, with the addresses of processes that have died since.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def wait(pieces: Pieces[T]) -> T:
    """Works the pieces off, sleeping while they wait; what they come to."""
    while True:
        try:
            if next(pieces) is Progress.WAITS:
                time.sleep(POLL_S)
        except StopIteration as end:
            return end.value
