"""Measures on this machine what the fleet simulator wants to know: rounds, steps, the gradient's noise, an all-reduce.

One thread, float32. Knows the public interfaces of decoding and learning; writes nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from dvi.config import load_config
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.draft.measure_costs import measure_costs
from dvi.records import SamplingParams
from dvi.traffic import read_prompts
from trainers import OnlineTrainer
from trainers.learning.losses import forward_kl, log_probs

ROWS = (1, 4, 16)
NUM_DRAFT_TOKENS, PREFILL_WIDTH = 4, 64
NUM_PROMPTS, NUM_BATCHES = 32, 48  # of traffic learnt from, and of batches whose gradients are compared
REDUCED_FLOATS = (1, 500_000, 2_000_000)
NUM_REPEATS, PATIENCE_S = 20, 60.0
LOADING = "import sys; from dvi import SelfSpeculator; SelfSpeculator.from_pretrained(sys.argv[1], dtype='float32')"


def measure(model: str, adapter: str | None, prompts: str) -> dict[str, object]:
    """Measured fields of `fleet_model.Costs`, and `link`, those of its first link. A minute for the bundled model.

    The all-reduce runs between two processes of this machine over gloo. The step and the gradient's noise are those of
    a learner that has begun from the adapter and learnt from NUM_PROMPTS answers.
    """
    torch.set_num_threads(1)
    speculator = SelfSpeculator.from_pretrained(model, dtype="float32", adapter=adapter)
    table = measure_costs(
        speculator.split, speculator.drafter, buckets=(NUM_DRAFT_TOKENS, PREFILL_WIDTH - 1), rows=ROWS, budget_s=15.0
    )
    trainer = _trained(speculator, prompts)
    step_s = trainer.train_s / trainer.num_steps
    update_bytes = sum(p.numel() * p.element_size() for p in trainer.drafter.parameters() if p.requires_grad)
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOADING, model], check=True, capture_output=True)
    rejoin_s = time.perf_counter() - start_s
    latency_s, bytes_per_s = measure_all_reduce()
    return {
        "rows": max(ROWS), "draft_step_s": dict(table.draft_step_s), "verify_s": dict(sorted(table.verify_s.items())),
        "prefill_token_s": table.verify_s[PREFILL_WIDTH] / PREFILL_WIDTH, "num_draft_tokens": NUM_DRAFT_TOKENS,
        "step_s": step_s, "critical_blocks": critical_blocks(speculator.split, trainer),
        "update_bytes": update_bytes, "rejoin_s": rejoin_s,
        "link": {"latency_s": latency_s, "bytes_per_s": bytes_per_s},
    }  # fmt: skip


def _trained(speculator: SelfSpeculator, prompts: str) -> OnlineTrainer:
    trainer = OnlineTrainer(speculator, load_config(None, ["train.schedule=kl_only", "train.budget=1.0"]).train)
    traffic = list(read_prompts([prompts], split="traffic", limit=NUM_PROMPTS))
    for _ in speculator.generate(
        traffic, SamplingParams(max_new_tokens=64), batch_size=4, learner=trainer,
        policy=FixedLength(NUM_DRAFT_TOKENS), keep_transitions=False,
    ):  # fmt: skip
        pass
    return trainer


def critical_blocks(split: object, trainer: OnlineTrainer) -> float:
    """The gradient noise scale in draft blocks: the variance of one block's gradient over the squared mean gradient.

    The simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162), of the forward KL, from the spread of the
    gradients of equal batches. Steps with fewer blocks than this trade blocks for steps one for one; with many more,
    blocks are wasted.
    """
    config, generator = trainer.config, torch.Generator().manual_seed(0)
    weights = [p for p in trainer.drafter.parameters() if p.requires_grad]
    gradients = []
    for _ in range(NUM_BATCHES):
        batch = trainer.replay.sample(config.blocks_per_step, config.block_len, current_version=0, generator=generator)
        draft = log_probs(trainer.drafter(batch.hidden_NTD, batch.anchor_ND)[batch.mask_NT])
        target = log_probs(trainer.drafter.draft_head.frozen_logits(batch.target_hidden_NTD)[batch.mask_NT])
        loss = forward_kl(draft, target.detach()).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    stacked = torch.stack(gradients)
    variance = float(stacked.var(0).sum())
    # The mean's own noise is in its square.
    squared_mean = float(stacked.mean(0).square().sum()) - variance / NUM_BATCHES
    return config.blocks_per_step * variance / squared_mean


def measure_all_reduce() -> tuple[float, float]:
    """(latency of one message in seconds, bytes per second) of gloo between two processes of one thread each.

    A ring of two sends one message to scatter and one to gather, of half the bytes each: seconds = 2 latency + bytes /
    speed. Raises RuntimeError when the processes do not end in PATIENCE_S.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(_reduce, args=(folder,), nprocs=2, join=False)
        deadline_s = time.monotonic() + PATIENCE_S
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline_s:
                for process in context.processes:
                    process.kill()
                raise RuntimeError(f"the all-reduce of two processes did not end in {PATIENCE_S:.0f} s")
        seconds = [float(line) for line in (Path(folder) / "seconds").read_text().split()]
    return seconds[0] / 2, 4 * (REDUCED_FLOATS[-1] - REDUCED_FLOATS[0]) / (seconds[-1] - seconds[0])


def _reduce(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    medians = []
    for size in REDUCED_FLOATS:
        tensor, times = torch.ones(size), []
        for _ in range(NUM_REPEATS):
            torch.distributed.barrier()
            start_s = time.perf_counter()
            torch.distributed.all_reduce(tensor.fill_(1))
            times.append(time.perf_counter() - start_s)
        medians.append(statistics.median(times[2:]))
    if rank == 0:
        (Path(folder) / "seconds").write_text("\n".join(map(str, medians)))
    torch.distributed.destroy_process_group()
