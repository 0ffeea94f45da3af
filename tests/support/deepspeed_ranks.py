"""What one rank of learning/test_deepspeed.py does: python -m tests.support.deepspeed_ranks FOLDER, launched or alone.

The same `lesson` is given to the plain `Student` of one process, which has all the data, and to a `ZeroStudent` on each
rank, which has its share. Each writes what came of it to FOLDER: rank0.safetensors and rank0.json, and so on.
"""
# N blocks, T positions.

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvi.distributed import Peers, join, wait
from dvi.records import LossWeights, ReplayBatch
from tests.support.random_traffic import HIDDEN, SETTINGS, VOCAB_SIZE, serving
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.student import Student
from trainers.learning.zero_student import ZeroStudent, build_student, is_launched_with_deepspeed

CONFIG = dataclasses.replace(SETTINGS, clip_norm=0.5)  # below the norm of the first steps' gradients
WEIGHTS = LossWeights(forward_kl=1.0, policy_gradient=0.5, accepted_ce=0.3)
NUM_PARTS = 4
TIMEOUT_S = 30.0
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# Adam's eps. A usual 1e-8 makes its first steps the gradient's sign: where a gradient is nearly zero, rounding that
# depends on the processor's kernels would decide which way a weight moves. With this much, of the size of a gradient's
# entries, an error in a gradient moves a weight by at most lr / EPS times as much.
EPS = 0.01


def parts_of_step(seed: int) -> list[ReplayBatch]:
    """The same batch on every rank, in parts of random blocks."""
    return [_random_batch(NUM_PARTS * seed + i) for i in range(NUM_PARTS)]


def _random_batch(seed: int, *, num_blocks: int = 6, width: int = 4) -> ReplayBatch:
    generator = torch.Generator().manual_seed(seed)
    hidden_NTD = torch.randn(num_blocks, width, HIDDEN, generator=generator)
    has_reward_NT = torch.rand(num_blocks, width, generator=generator) < 0.7
    action_NT = torch.randint(VOCAB_SIZE // 3, (num_blocks, width), generator=generator)
    return ReplayBatch(
        anchor_ND=torch.randn(num_blocks, HIDDEN, generator=generator), hidden_NTD=hidden_NTD,
        target_hidden_NTD=hidden_NTD.flip(-1), token_ids_NT=torch.zeros_like(action_NT),
        mask_NT=torch.rand(num_blocks, width, generator=generator) < 0.9,
        action_NT=action_NT.where(has_reward_NT, 0), reward_NT=(action_NT % 2).float(), has_reward_NT=has_reward_NT,
        behaviour_log_probs_NT=torch.full((num_blocks, width), -2.0),
        staleness_N=torch.zeros(num_blocks, dtype=torch.int64),
    )  # fmt: skip


def take_step(
    student: Student, parts: list[ReplayBatch], *, share: Callable[[list], list], refuses: bool = False
) -> float:
    """One step on this rank's share of the parts; the gradient's norm before clipping."""
    damp(student)
    totals = BatchTotals(sum(BatchTotals.of(part).values_K for part in parts))
    student.clear_gradient()
    mine = share(parts)
    for i, part in enumerate(mine):
        student.map_actions(part)
        student.add_gradient(
            part, totals=totals, weights=WEIGHTS, baseline=RewardBaseline(8), is_last=i == len(mine) - 1
        )
    wait(student.sum_gradient())
    norm = student.clip_gradient()
    if not refuses:
        student.update()
    return norm


def lesson(student: Student, peers: Peers, folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors by "event/name", and facts. folder: holds plain.safetensors, a state to go on from, if anything."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, object] = {}

    def share(parts: list) -> list:
        return parts[peers.rank :: peers.num_ranks]

    def write(event: str) -> None:
        tensors.update({f"{event}/{name}": tensor for name, tensor in student.copy_state().items()})

    facts["norms"] = [take_step(student, parts_of_step(i), share=share) for i in range(3)]
    write("three steps")
    state = copy.deepcopy(student.state_dict())  # a plain student's moments go on to change
    tensors.update({f"state/{name}": tensor for name, tensor in flatten(state).items()})

    take_step(student, parts_of_step(3), share=lambda parts: parts if peers.is_first else [])
    write("one rank without data")

    spoilt = parts_of_step(4)
    spoilt[-1].hidden_NTD[0, 0] = torch.nan  # on the last rank's share
    norm = take_step(student, spoilt, share=share, refuses=True)
    facts["is_spoilt_norm_finite"] = math.isfinite(norm)
    student.restart_from(state["drafter"])
    take_step(student, parts_of_step(5), share=share)
    write("a refused step, a restart and a step")

    if peers.rank == peers.num_ranks - 1:
        next(iter(student.optimizer.state.values()))["exp_avg"].view(-1)[0] = torch.inf
    facts["is_finite_with_infinite_moment"] = student.is_finite()
    student.load_state_dict(state)
    facts["is_finite_after_load"] = student.is_finite()
    take_step(student, parts_of_step(6), share=share)
    write("its own state and a step")

    if (folder / "plain.safetensors").exists():
        student.load_state_dict(unflatten(load_file(folder / "plain.safetensors"), student))
        take_step(student, parts_of_step(6), share=share)
        write("another's state and a step")

    student.trim(torch.arange(0, VOCAB_SIZE, 2))
    student.restart_from(student.copy_state())
    take_step(student, parts_of_step(7), share=share)
    write("a trim and a step")
    moments = [m for state in student.optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
    facts["num_moments"] = sum(m.numel() for m in moments)
    return tensors, facts


def damp(student: Student) -> None:
    """Sets EPS in the optimizer, of which a student gets a new one now and then."""
    for group in student.optimizer.param_groups:
        group["eps"] = EPS


def flatten(state: dict) -> dict[str, Tensor]:
    """Copies of a student's state as tensors by name: weights, and the moments by parameter."""
    entries = state["optimizer"]["state"].items()
    moments = {f"moment/{i}/{name}": entry[name].clone() for i, entry in entries for name in MOMENTS}
    return {f"drafter/{name}": tensor for name, tensor in state["drafter"].items()} | moments


def unflatten(tensors: dict[str, Tensor], student: Student) -> dict:
    """A student's state from `flatten`'s tensors; the optimizer's settings are those of this student."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, rest = key.split("/", 1)
        if kind == "moment":
            index, name = rest.split("/")
            moments.setdefault(int(index), {})[name] = tensor
    drafter = {key.removeprefix("drafter/"): tensor for key, tensor in tensors.items() if key.startswith("drafter/")}
    groups = student.state_dict()["optimizer"]["param_groups"]
    return {"drafter": drafter, "optimizer": {"state": moments, "param_groups": groups}}


def main(folder: Path) -> None:
    peers = join(timeout_s=TIMEOUT_S)
    speculator = serving()
    if is_launched_with_deepspeed():
        student = build_student(speculator.split, speculator.drafter, CONFIG, peers=peers)
    else:
        student = ZeroStudent(speculator.split, speculator.drafter, CONFIG, peers=peers, stage=1)
    engine = student._engine
    tensors, facts = lesson(student, peers, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank{peers.rank}.safetensors")
    facts |= {
        "engine": f"{type(engine).__module__}.{type(engine).__name__}",
        "stage": int(engine.zero_optimization_stage()),
        "num_engine_steps": engine.global_steps,
        "num_ranks": peers.num_ranks,
    }
    (folder / f"rank{peers.rank}.json").write_text(json.dumps(facts))
    peers.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
