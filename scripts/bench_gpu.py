"""The figures of the core on one CUDA device: a 7B-shaped random Llama in bf16, no download.

Plain decoding against the memory bandwidth measured in the same run, the cost v(n) of verifying n rows, the cost of a
draft step, whole rounds at scripted acceptance against the speed law, and Hugging Face's own decoders beside them.
Acceptance is scripted because weights are random: the verdict's shape is what costs, not its content. Prints a table
and one JSON line last; without a CUDA device it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dvi.cuda_graph import RoundGraphs
from dvi.decoding import RowState, draft_and_verify
from dvi.draft_length import FixedLength
from dvi.drafter import DrafterConfig, build_drafter
from dvi.records import SamplingParams
from dvi.sampling import SamplingBatch
from dvi.split import SplitModel
from dvi.verification import StrictRule

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
}
CONTEXT = 256


def median_s(action: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds by CUDA events after three runs to warm up."""
    times = []
    for repeat in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, reads and writes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source))


class Rounds:
    """Graphed rounds of B rows at a fixed context, whatever the verdicts."""

    def __init__(self, split: SplitModel, drafter, num_rows: int) -> None:
        self.split, self.drafter, self.num_rows = split, drafter, num_rows
        self.cache = split.make_cache(num_rows, CONTEXT + 256)
        self.cache.set_lengths([CONTEXT] * num_rows)
        device = split.device
        self.state = RowState(
            slice(0, num_rows), torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, split.hidden_size, dtype=split.dtype, device=device),
            SamplingBatch([SamplingParams()] * num_rows, vocab_size=split.vocab_size, device=device), None,
        )
        self.graphs = RoundGraphs()

    def __call__(self, num_draft_tokens: int) -> Callable[[], object]:
        policy, rule = FixedLength(num_draft_tokens), StrictRule()

        def run() -> object:
            with torch.no_grad():
                return self.graphs.run(num_draft_tokens, lambda: draft_and_verify(
                    self.split, self.drafter, self.cache, self.state, policy, num_draft_tokens, rule,
                    wants_log_probs=False,
                ))

        return run


def scripted(rounds: Rounds, num_draft_tokens: int, acceptance: float, num_rounds: int = 64) -> float:
    """Tokens per second and row of whole rounds, host read and commit included, accepting each draft with this odds."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(num_rounds, rounds.num_rows, max(num_draft_tokens, 1), generator=generator)
    accepted = (draws[..., :num_draft_tokens] < acceptance).long().cumprod(-1).sum(-1)
    run = rounds(num_draft_tokens)
    run()
    torch.cuda.synchronize()
    start_s, num_tokens = time.perf_counter(), 0
    for counts in accepted.tolist():
        verified = run()
        rounds.state.anchor_BD.copy_(verified.anchor_BD)
        rounds.state.last_token_B.copy_(verified.verdict.next_token_B)
        verified.for_host_BH.tolist()
        # The length stays at CONTEXT so that every round costs the same; committing is the same host work.
        rounds.cache.set_lengths([CONTEXT] * rounds.num_rows)
        num_tokens += sum(counts) / rounds.num_rows + 1
    return num_tokens / (time.perf_counter() - start_s)


def hf_tokens_per_s(model, num_rows: int, new_tokens: int = 64, **options: object) -> float:
    ids = torch.randint(model.config.vocab_size, (num_rows, CONTEXT), device="cuda")

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
                       max_new_tokens=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start_s

    run(new_tokens)
    return (new_tokens - 1) / (run(new_tokens) - run(1))


def layer_ratio(model, run: Callable[[], object]) -> float:
    """Calls of the last layer over calls of the first: 1 means that nothing exited early."""
    counts = {0: 0, -1: 0}

    def counter(index: int) -> Callable:
        def hook(*_: object) -> None:
            counts[index] += 1

        return hook

    handles = [model.model.layers[i].register_forward_hook(counter(i)) for i in counts]
    run()
    for handle in handles:
        handle.remove()
    return counts[-1] / counts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--split-layer", type=int, default=2)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--skip-hf", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu needs a CUDA device; none found", file=sys.stderr)
        print(json.dumps({"skipped": "no CUDA device"}))
        return
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=4096)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    report: dict = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "context": CONTEXT,
        "shape": args.shape, "split_layer": args.split_layer, "copy_bandwidth_gb_s": copy_bandwidth() / 1e9, "rows": {},
    }
    rivals: dict = {}
    if not args.skip_hf:  # before the split, which fuses weights in place
        for num_rows in args.rows:
            rivals[num_rows] = {"hf_eager": hf_tokens_per_s(model, num_rows),
                                "hf_static_compile": hf_tokens_per_s(model, num_rows, cache_implementation="static")}
        exit_options = {"assistant_early_exit": args.split_layer}
        early = layer_ratio(model, lambda: hf_tokens_per_s(model, 1, 16, **exit_options))
        if 1 in rivals and early < 1:
            rivals[1]["hf_early_exit"] = hf_tokens_per_s(model, 1, **exit_options)
    split = SplitModel(model, split_layer=args.split_layer)
    drafter = build_drafter(split, DrafterConfig())
    drafter.publish(drafter, version=0)
    embedding = model.get_input_embeddings().weight
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) - embedding.numel() * 2
    table = Table(title=f"{report['device']}, bf16, {args.shape}, split layer {args.split_layer}")
    for column in ("rows", "what", "value"):
        table.add_column(column)
    for num_rows in args.rows:
        rounds, t = Rounds(split, drafter, num_rows), args.num_draft_tokens
        seconds = {n: median_s(rounds(n)) for n in (0, 1, 2, 4, 8, 15)}
        plain_s = seconds[0]
        cache, rows = rounds.cache, slice(0, num_rows)

        def verify(width: int, num_rows: int = num_rows, cache=cache, rows=rows) -> float:
            hidden = torch.zeros(num_rows, width, split.hidden_size, dtype=split.dtype, device="cuda")
            ids = torch.zeros(num_rows, width, dtype=torch.int64, device="cuda")
            graphs = RoundGraphs()

            def run() -> torch.Tensor:
                with torch.no_grad():
                    split.shallow(ids[:, :1], cache, cache.place(offset=0, width=1, rows=rows))
                    final = split.deep(hidden, ids, cache, cache.place(offset=0, width=width, rows=rows))
                    return split.head(final)

            return median_s(lambda: graphs.run(width, run))

        verify_s = {n: verify(n) for n in (1, 2, 4, 5, 8, 16)}
        draft_step_s = (seconds[4] - verify_s[5]) / 4
        found = {
            "plain_tokens_per_s": 1 / plain_s, "v": {n: s / verify_s[1] for n, s in verify_s.items()},
            "draft_step_c": draft_step_s / plain_s,
            "plain_bytes_over_bandwidth": weight_bytes / plain_s / (report["copy_bandwidth_gb_s"] * 1e9),
            "scripted": {},
        }
        plain_rate = scripted(rounds, 0, 0.0)
        for acceptance in (0.6, 0.75, 0.9):
            expected = (1 - acceptance ** (t + 1)) / (1 - acceptance)
            predicted = expected * verify_s[1] / (t * draft_step_s + verify_s.get(t + 1, seconds[t] - t * draft_step_s))
            measured = scripted(rounds, t, acceptance) / plain_rate
            found["scripted"][acceptance] = {"speed_up": measured, "measured_over_predicted": measured / predicted}
        found["rivals_tokens_per_s"] = rivals.get(num_rows, {})
        report["rows"][num_rows] = found
        for key, value in found.items():
            table.add_row(str(num_rows), key, json.dumps(value) if isinstance(value, dict) else f"{value:.3f}")
    Console(stderr=True).print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
