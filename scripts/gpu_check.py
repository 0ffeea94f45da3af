"""All that a GPU is asked in one go of at most eight minutes: is it right there, and what does it give.

Parts, the most wanted first: the gpu-marked tests; rounds as CUDA graphs against eager ones, bit for bit; plain
decoding of a 7B-shaped model against the memory bandwidth measured beside it; the cost v(n) of verifying n rows; whole
rounds at scripted acceptance, and answers with drafts that are accepted; a learner beside serving; Hugging Face's
decoders. Weights are random and made on the device, nothing is downloaded. Each part has a process, a share of the time
and a guard of its own. Its results go to a file of JSON lines as they come: cut off anywhere, it holds what was found.
Prints a table and one JSON line last; exit code 1 where a part failed. `--device cpu --tiny` tries everything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

import dvi.decode.batch
from dvi.bench.arms import ArmOptions, plans_of_ours
from dvi.bench.guarded import Box, Journal, Part, Skipped, guard, journal_table, run_parts
from dvi.bench.random_rounds import (
    Rounds,
    Shape,
    copy_bandwidth,
    make_model,
    make_speculator,
    median_s,
    prompts_of,
)
from dvi.bench.records import Arm, ArmPlan
from dvi.bench.rivals import rival_plans
from dvi.bench.timed_arm import timed
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.draft.measure_costs import measure_costs
from dvi.hardware import describe_machine
from dvi.learner import Learner
from dvi.model.cuda_graph import RoundGraphs
from dvi.records import SamplingParams, Transitions
from dvi.settings import LearningSettings
from trainers.learning.online import OnlineTrainer

ROOT = Path(__file__).parents[1]
TOTAL_S = 480.0
LLAMA_7B = Shape(4096, 11008, 32, 32, 32000, context=256, new_tokens=128, repeats=20)
TINY = Shape(64, 176, 4, 4, 512, context=32, new_tokens=12, repeats=2, rows=(1, 2))
# Where bits are compared a small model serves as well, and its deep layers change some tokens: drafts are rejected too.
GRAPHS = Shape(1024, 2816, 8, 8, 8192, context=64, new_tokens=96, repeats=1, deep_gain=0.05)
TINY_GRAPHS = dataclasses.replace(TINY, deep_gain=0.2)
ACCEPTANCES, DRAFT_TOKENS, MAX_ROWS = (0.6, 0.75, 0.9), (4, 8), 33


# Parts. Each takes what was asked and its box; nothing outlives its process.


@dataclasses.dataclass(frozen=True)
class Asked:
    device: torch.device
    dtype: torch.dtype
    is_tiny: bool

    @property
    def shape(self) -> Shape:
        return TINY if self.is_tiny else LLAMA_7B

    def need_cuda(self, what: str) -> None:
        if self.device.type != "cuda":
            raise Skipped(f"{what} need a CUDA device, asked for {self.device.type}")


def check_machine(asked: Asked, box: Box) -> None:
    facts = describe_machine(asked.device)
    if asked.device.type == "cuda":
        properties = torch.cuda.get_device_properties(asked.device)
        facts |= {"memory_gib": properties.total_memory / 2**30, "sms": properties.multi_processor_count}
        facts |= {"cuda": torch.version.cuda, "free_gib": torch.cuda.mem_get_info()[0] / 2**30}
    box.result("machine", **facts, dtype=str(asked.dtype))
    box.result("copy", gb_per_s=copy_bandwidth(asked.device) / 1e9)


def marked_tests() -> list[str]:
    """Files of tests that need a GPU: to collect all the others takes a part of the time."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def check_tests(asked: Asked, box: Box) -> None:
    asked.need_cuda("the tests marked gpu")
    marked = marked_tests()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    ended = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(box.left_s, 1)
    )
    box.result("pytest", exit_code=ended.returncode, files=marked, tail=ended.stdout.splitlines()[-30:])
    if ended.returncode != 0:
        raise RuntimeError(f"pytest -m gpu ended with {ended.returncode}")


class Restless(Learner):
    """A learner that changes the serving drafter after every round: graphs have to see weights that change in place."""

    def __init__(self, speculator: SelfSpeculator) -> None:
        self._drafter = speculator.drafter
        self._generator = torch.Generator(speculator.split.device).manual_seed(0)
        self.states: list[Tensor] = []

    def observe(self, transitions: list[Transitions]) -> None:
        self.states += [state.clone() for seen in transitions for state in (seen.hidden_WD, seen.target_hidden_WD)]

    @torch.no_grad()
    def step_if_due(self, *, is_idle: bool = False) -> None:
        for parameter in self._drafter.parameters():
            noise = torch.randn(parameter.shape, generator=self._generator, device=parameter.device)
            parameter.add_(1e-3 * noise.to(parameter.dtype))
        self._drafter.publish(self._drafter, self._drafter.version + 1)


def check_graphs(asked: Asked, box: Box) -> None:
    """Tokens and both hidden states of every position, in rows that come and go while the drafter changes."""
    shape, is_cuda = TINY_GRAPHS if asked.is_tiny else GRAPHS, asked.device.type == "cuda"
    num_wrong = 0
    for dtype in (asked.dtype, torch.float32) if is_cuda else (asked.dtype,):
        for num_draft_tokens in (0, 1, *DRAFT_TOKENS):
            if not box.has_time():
                return
            eager = decode_restlessly(asked, shape, dtype, num_draft_tokens, may_capture=False)
            found = decode_restlessly(asked, shape, dtype, num_draft_tokens, may_capture=True)
            # Where a token differs the rounds after it do, and there may be more of them.
            pairs = zip_longest(eager.tensors, found.tensors, fillvalue=torch.empty(0))
            num_different = sum(not torch.equal(a, b) for a, b in pairs)
            num_wrong += num_different
            box.result(
                f"{dtype}, T = {num_draft_tokens}", num_graphs=found.num_graphs, num_tensors=len(eager.tensors),
                num_different=num_different, acceptance=eager.acceptance,
            )
            if is_cuda and found.num_graphs == 0:
                raise RuntimeError("no round was captured as a graph")
    if num_wrong:
        raise RuntimeError(f"{num_wrong} tensors of graphed rounds differ from those of eager ones")
    asked.need_cuda("CUDA graphs")


class Restlessly(NamedTuple):
    """Every tensor that a run leaves, how many graphs it captured, and the share of drafts that was accepted."""

    tensors: list[Tensor]
    num_graphs: int
    acceptance: float


def decode_restlessly(
    asked: Asked, shape: Shape, dtype: torch.dtype, num_draft_tokens: int, *, may_capture: bool
) -> Restlessly:
    speculator = make_speculator(shape, asked.device, dtype)
    learner, num_graphs, capture = Restless(speculator), 0, RoundGraphs._capture

    def counted(graphs: RoundGraphs, function: Callable[[], object]) -> object:
        nonlocal num_graphs
        num_graphs += 1
        return capture(graphs, function)

    params = [SamplingParams(max_new_tokens=shape.new_tokens - 5 * i) for i in range(3)]
    no_graphs = mock.patch.object(dvi.decode.batch, "can_capture", lambda split: False)
    with mock.patch.object(RoundGraphs, "_capture", counted), no_graphs if not may_capture else mock.MagicMock():
        results = list(speculator.generate(
            prompts_of(shape, 3), params, batch_size=2, learner=learner, policy=FixedLength(num_draft_tokens)
        ))  # fmt: skip
    results.sort(key=lambda result: result.index)
    accepted = sum(result.stats.num_accepted for result in results) / max(sum(r.stats.num_drafted for r in results), 1)
    return Restlessly([*(torch.tensor(r.token_ids) for r in results), *learner.states], num_graphs, accepted)


def check_plain(asked: Asked, box: Box) -> None:
    speculator = make_speculator(asked.shape, asked.device, asked.dtype)
    bytes_per_s, model = copy_bandwidth(asked.device), speculator.model
    # Of the embedding a round reads a row per token; the head is a matrix of its own.
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    weight_bytes -= model.get_input_embeddings().weight.numel() * model.get_input_embeddings().weight.element_size()
    for num_rows in asked.shape.rows:
        if not box.has_time():
            return
        rounds = Rounds(speculator, num_rows, asked.shape)
        seconds = median_s(rounds.round(0), asked.device, repeats=asked.shape.repeats)
        box.result(
            f"{num_rows} rows", tokens_per_s=num_rows / seconds, round_ms=1e3 * seconds,
            weight_gb=weight_bytes / 1e9, copy_gb_per_s=bytes_per_s / 1e9,
            share_of_bandwidth=weight_bytes / seconds / bytes_per_s,
        )


def check_verify(asked: Asked, box: Box) -> None:
    """v(n), the n-row pass over the one-row pass: as graphs, and call by call with the round's own measurement."""
    speculator, shape = make_speculator(asked.shape, asked.device, asked.dtype), asked.shape
    rounds, first_s = Rounds(speculator, 1, shape), math.nan
    for width in range(1, MAX_ROWS + 1):
        if not box.has_time():
            return
        seconds = median_s(rounds.verify(width), asked.device, repeats=shape.repeats)
        first_s = seconds if width == 1 else first_s
        box.result(f"v({width})", ms=1e3 * seconds, ratio=seconds / first_s)
    costs = measure_costs(
        speculator.split, speculator.drafter, buckets=(1, *DRAFT_TOKENS), rows=shape.rows, budget_s=min(box.left_s, 3)
    )
    draft_ms, verify_ms = ({n: 1e3 * s for n, s in found.items()} for found in (costs.draft_step_s, costs.verify_s))
    box.result("call by call", draft_step_ms=draft_ms, verify_ms=verify_ms)


def check_rounds(asked: Asked, box: Box) -> None:
    """Whole rounds: at scripted acceptance against the speed law, then answers through the public interface."""
    speculator, shape = make_speculator(asked.shape, asked.device, asked.dtype), asked.shape
    num_rounds = 3 if asked.is_tiny else 48
    for num_rows in shape.rows:
        rounds = Rounds(speculator, num_rows, shape)
        plain_s = median_s(rounds.round(0), asked.device, repeats=shape.repeats)
        plain_rate = rounds.scripted(0, 0.0, num_rounds=num_rounds)
        for num_draft_tokens in DRAFT_TOKENS:
            round_s = median_s(rounds.round(num_draft_tokens), asked.device, repeats=shape.repeats)
            for acceptance in ACCEPTANCES:
                if not box.has_time():
                    return
                expected = (1 - acceptance ** (num_draft_tokens + 1)) / (1 - acceptance)
                measured = rounds.scripted(num_draft_tokens, acceptance, num_rounds=num_rounds) / plain_rate
                box.result(
                    f"{num_rows} rows, T = {num_draft_tokens}, acceptance {acceptance}", round_ms=1e3 * round_s,
                    plain_ms=1e3 * plain_s, ratio=measured, of_law=measured / (expected * plain_s / round_s),
                )  # fmt: skip
    for num_rows in shape.rows:
        plain = None
        for num_draft_tokens in DRAFT_TOKENS:
            options = ArmOptions(shape.new_tokens, num_draft_tokens=num_draft_tokens, batch_size=num_rows)
            names = ("plain", "speculative") if plain is None else ("speculative",)
            for arm_plan in plans_of_ours(speculator, options, names=names):
                if not box.has_time():
                    return
                facts = time_arm(arm_plan, shape, num_rows, asked.device)
                plain = plain or facts["tokens_per_s"]
                box.result(
                    f"{arm_plan.name}, {num_rows} rows, T = {num_draft_tokens}", **facts,
                    ratio=facts["tokens_per_s"] / plain,
                )  # fmt: skip


def time_arm(arm_plan: ArmPlan, shape: Shape, num_rows: int, device: torch.device) -> dict[str, float]:
    arm, prompts = arm_plan.build(), prompts_of(shape, num_rows)
    arm.answer(prompts, seed=0)  # captures its graphs, allocates
    return timed_answers(arm, prompts, device)


def timed_answers(arm: Arm, prompts: list[list[int]], device: torch.device) -> dict[str, float]:
    """Prompts are read in that time too, as whoever asks sees it."""
    answers, seconds = timed(arm, prompts, seed=0, device=device)
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    num_rounds = sum(len(answer.accept_lengths) for answer in answers)
    return {"tokens_per_s": num_tokens / seconds, "mean_accepted": num_tokens / num_rounds}


def check_learner(asked: Asked, box: Box) -> None:
    """The same answers with a learner beside: at its usual share of the time, and as often as rounds allow."""
    shape = dataclasses.replace(asked.shape, deep_gain=0.05 if not asked.is_tiny else 0.2)  # something to learn
    speculator, learners = make_speculator(shape, asked.device, asked.dtype), []

    def make_learner(settings: LearningSettings, twin: SelfSpeculator) -> OnlineTrainer:
        learners.append(OnlineTrainer(twin, settings))
        return learners[-1]

    num_answers = 2 if asked.is_tiny else 6
    for budget in (0.0, 0.05, 1.0):
        few = {"blocks_per_step": 2, "rounds_per_step": 1} if asked.is_tiny else {}
        settings = LearningSettings(budget=budget, tokens_before_trim=10**9, **few)
        [arm_plan] = plans_of_ours(
            speculator, ArmOptions(shape.new_tokens, batch_size=shape.rows[-1]),
            make_learner=partial(make_learner, settings), names=["online" if budget else "speculative"],
        )
        arm, prompts = arm_plan.build(), prompts_of(shape, shape.rows[-1])
        for index in range(num_answers):
            if not box.has_time():
                return
            facts: dict[str, float] = timed_answers(arm, prompts, asked.device)
            if budget:
                learner = learners[-1]
                steps = {"num_steps": learner.num_steps, "version": arm.speculator.drafter.version}
                facts |= steps | {"step_ms": 1e3 * learner.train_s / max(learner.num_steps, 1)}
            box.result(f"budget {budget}, answer {index}", **facts)


def check_rivals(asked: Asked, box: Box) -> None:
    """Hugging Face's generate, with assistance and without, over the same model."""
    speculator, shape = make_speculator(asked.shape, asked.device, asked.dtype), asked.shape
    names = ("hf_generate", "hf_early_exit", "hf_prompt_lookup")
    for num_rows in shape.rows:
        options = ArmOptions(shape.new_tokens, batch_size=num_rows)
        plans = [*plans_of_ours(speculator, options, names=["plain", "speculative"]), *rival_plans(
            speculator.model, None, options, split_layer=shape.split_layer, names=names
        )]  # fmt: skip
        for arm_plan in plans:
            if num_rows > 1 and arm_plan.batch_one:
                continue
            if not box.has_time():
                return
            if arm_plan.build is None:
                box.result(f"{arm_plan.name}, {num_rows} rows", na_reason=arm_plan.na_reason)
            else:
                box.result(f"{arm_plan.name}, {num_rows} rows", **time_arm(arm_plan, shape, num_rows, asked.device))


def check_compiled(asked: Asked, box: Box) -> None:
    """generate with a static cache, which Hugging Face compiles: that may take longer than there is time."""
    asked.need_cuda("compiled decoders")
    shape = asked.shape
    model = make_model(shape, asked.device, asked.dtype)
    ids_BS = torch.tensor(prompts_of(shape, 1), device=asked.device)
    generate = partial(
        model.generate, ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False,
        max_new_tokens=shape.new_tokens, cache_implementation="static", pad_token_id=0,
    )
    start_s = time.perf_counter()
    generate()
    compile_s = time.perf_counter() - start_s
    seconds = median_s(generate, asked.device, repeats=1)
    box.result("hf_generate_static, 1 rows", tokens_per_s=shape.new_tokens / seconds, first_call_s=compile_s)


PARTS = (
    ("machine", 2, check_machine), ("tests", 8, check_tests), ("graphs", 12, check_graphs), ("plain", 8, check_plain),
    ("verify", 14, check_verify), ("rounds", 20, check_rounds), ("learner", 16, check_learner),
    ("rivals", 12, check_rivals), ("compiled", 10, check_compiled),
)  # fmt: skip


def run_part(check: Callable[[Asked, Box], None], asked: Asked, again: list[str], box: Box) -> None:
    """The check; in a fresh interpreter, by the arguments `again`, where a forked process could not use the device."""
    if asked.device.type == "cuda" and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, __file__, *again, "--total-s", str(max(box.left_s, 1.0))])
    check(asked, box)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for all parts together (%(default)s)")
    parser.add_argument("--parts", help=f"some of {','.join(name for name, _, _ in PARTS)}; default all")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.jsonl"), help="appended to (%(default)s)")
    args = parser.parse_args()
    wanted = args.parts.split(",") if args.parts else [name for name, _, _ in PARTS]
    unknown = [name for name in wanted if name not in [known for known, _, _ in PARTS]]
    if unknown or not args.total_s > 0:
        parser.error(f"unknown part {unknown[0]!r}" if unknown else f"--total-s must be > 0, got {args.total_s}")
    # Asks the driver alone: a process that has touched the device cannot fork one that uses it, see `run_part`.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device; none found. --device cpu --tiny tries what it can", file=sys.stderr)
        print(json.dumps({"command": "gpu_check", "skipped": "no CUDA device"}))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    asked = Asked(torch.device(args.device), dtype, args.tiny)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.output)
    num_before = len(journal.read()) if args.output.exists() else 0
    if args.only:
        [check] = [check for name, _, check in PARTS if name == args.only]
        guard(Part(args.only, 1, partial(check, asked)), journal, args.total_s)
    again = ["--device", args.device, "--output", str(args.output), *(["--tiny"] if args.tiny else [])]
    parts = [
        Part(name, share, partial(run_part, check, asked, [*again, "--only", name])) for name, share, check in PARTS
        if name in wanted
    ]  # fmt: skip
    try:
        run_parts(parts, journal, total_s=args.total_s, say=lambda text: print(text, file=sys.stderr, flush=True))
    finally:  # also of a run that is ended from outside
        lines = journal.read()[num_before:]
        title = f"{args.device}, {dtype}, {'tiny' if args.tiny else '7B shape'}"
        Console(stderr=True).print(journal_table(lines, title=title))
        outcomes = {line["part"]: line["outcome"] for line in lines if line["event"] == "end"}
        print(json.dumps({"command": "gpu_check", "device": args.device, "is_tiny": args.tiny, "parts": outcomes,
                          "results": sum(line["event"] == "result" for line in lines), "file": str(args.output)}))
    return int(any(outcome in ("error", "stopped") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
