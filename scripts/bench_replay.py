"""Times ReplayBuffer.add and .sample at several fills: neither should depend on how much is stored.

    python scripts/bench_replay.py [--rows 1000 10000 100000 1000000]

Every size is timed in turn, again and again, so that the machine's moods fall on all alike. Prints a table, then one
JSON line with the median times and the ratio of the largest fill's to the smallest's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from dvi.records import Transitions
from trainers.learning.replay import ReplayBuffer

HIDDEN_SIZE = 64  # a million rows take 0.6 GB
ROUND_LEN = 4
NUM_BLOCKS = 64
NUM_REPETITIONS = 300
NUM_WARMUP = 30


def make_round(index: int) -> Transitions:
    """A fully drafted round of request 0, continuing the previous one."""
    return Transitions(
        request_id=0,
        start_position=index * ROUND_LEN,
        token_ids_W=torch.arange(ROUND_LEN),
        hidden_WD=torch.ones(ROUND_LEN, HIDDEN_SIZE),
        target_hidden_WD=torch.ones(ROUND_LEN, HIDDEN_SIZE),
        num_drafted=ROUND_LEN,
        num_accepted=ROUND_LEN - 1,
        draft_token_ids_W=torch.arange(ROUND_LEN),
        draft_log_probs_W=torch.zeros(ROUND_LEN),
        drafter_version=0,
    )


def filled_buffer(num_rows: int) -> tuple[ReplayBuffer, int]:
    """A buffer whose capacity is num_rows, ring and reservoir full, and the index of the next round."""
    buffer = ReplayBuffer(capacity_positions=num_rows, hidden_size=HIDDEN_SIZE, max_block=ROUND_LEN)
    index = 0
    # Capacity is rounded down to whole segments, and the segment being written is not full.
    while len(buffer) < num_rows - 2 * buffer.segment_len:
        buffer.add(make_round(index))
        index += 1
    return buffer, index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    sizes = sorted(parser.parse_args().rows)
    generator = torch.Generator().manual_seed(0)
    buffers = {size: filled_buffer(size) for size in sizes}
    seconds: dict[int, dict[str, list[float]]] = {size: {"add": [], "sample": []} for size in sizes}
    for repetition in range(NUM_WARMUP + NUM_REPETITIONS):
        for size, (buffer, first_index) in buffers.items():
            stretch = make_round(first_index + repetition)
            start = time.perf_counter()
            buffer.add(stretch)
            added = time.perf_counter()
            buffer.sample(NUM_BLOCKS, ROUND_LEN, current_version=0, generator=generator)
            sampled = time.perf_counter()
            if repetition >= NUM_WARMUP:
                seconds[size]["add"].append(added - start)
                seconds[size]["sample"].append(sampled - added)
    micros = {
        size: {verb: 1e6 * statistics.median(times) for verb, times in by_verb.items()}
        for size, by_verb in seconds.items()
    }
    both = {size: by_verb["add"] + by_verb["sample"] for size, by_verb in micros.items()}

    table = Table(title=f"ReplayBuffer: add {ROUND_LEN} rows, sample {NUM_BLOCKS} blocks of {ROUND_LEN}; median us")
    for heading in ("rows", "add", "sample", "both", f"x of {sizes[0]} rows"):
        table.add_column(heading, justify="right")
    for size in sizes:
        times = (micros[size]["add"], micros[size]["sample"], both[size])
        table.add_row(f"{size:,}", *(f"{time_us:.0f}" for time_us in times), f"{both[size] / both[sizes[0]]:.2f}")
    Console().print(table)
    print(
        json.dumps(
            {
                "benchmark": "replay",
                "micros": {str(size): by_verb for size, by_verb in micros.items()},
                "ratio": both[sizes[-1]] / both[sizes[0]],
                "hidden_size": HIDDEN_SIZE,
                "dtype": "float32",
                "device": "cpu",
                "repetitions": NUM_REPETITIONS,
                "warmup": NUM_WARMUP,
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
