"""A Spec-Bench session as the command line asks for it: model, arms, run and report, in this order.

Knows which piece does what; all work is theirs. Sees training only as a function that makes a learner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dvi.bench.arms import ArmOptions, MakeLearner, plans_of_ours
from dvi.bench.harness import load_speed
from dvi.bench.questions import Conversation, load_questions
from dvi.bench.report import make_report
from dvi.bench.rivals import rival_plans
from dvi.bench.spec_bench import RUN_FILE, BenchSettings, run_spec_bench
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import make_rule
from dvi.model.pretrained import read_tokenizer
from dvi.settings import PaperConfig, VerifySettings

ARM_OF_MODE = {"frozen": "speculative", "online": "online", "online_untrained": "online_untrained"}


@dataclass(frozen=True)
class SpecBenchRequest:
    """What the user asked for.

    modes      keys of ARM_OF_MODE: how the drafter runs. Plain decoding is always there, unpadded; plain_padded adds
               the same with every pass in one fixed shape.
    rivals     names of `dvi.bench.rivals.RIVAL_ARMS`.
    questions  a question file; None is the bundled one.
    verify     the rule of our arms that draft; one that is lossy is stamped on their names.
    The rest is as in `BenchSettings`, `Conversation` and `SelfSpeculator.from_pretrained`.
    """

    model: str
    adapter: Path | None = None
    modes: tuple[str, ...] = ("frozen",)
    rivals: tuple[str, ...] = ()
    plain_padded: bool = False
    template: str = "auto"
    limit: int = 0
    repetitions: int = 3
    max_new_tokens: int = 1024
    temperature: float = 0.0
    batch_size: int = 1
    num_draft_tokens: int = 4
    policy: str = "fixed"
    split_layer: int | None = None
    draft_checkpoint: Path | None = None
    questions: Path | None = None
    verify: VerifySettings = field(default_factory=VerifySettings)
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int = 0


def run_session(
    request: SpecBenchRequest, folder: Path, *, make_learner: MakeLearner, console: Console,
    spec_bench_dir: Path | None = None, training_length: int | None = None,
) -> dict[str, Any]:
    """Runs what was asked into `folder`, going on with what is there, and returns the report's dict.

    Raises ValueError for what does not fit together, before anything is decoded.
    """
    if spec_bench_dir is not None:
        load_speed(spec_bench_dir)  # a folder that is no checkout should not come out after hours of decoding
    if request.num_threads:
        torch.set_num_threads(request.num_threads)
    speculator = SelfSpeculator.from_pretrained(
        request.model, adapter=request.adapter, split_layer=request.split_layer, dtype=request.dtype,
        device=request.device, num_draft_tokens=request.num_draft_tokens, policy=request.policy,
    )
    options = ArmOptions(
        max_new_tokens=request.max_new_tokens, temperature=request.temperature, batch_size=request.batch_size,
        num_draft_tokens=request.num_draft_tokens, policy=request.policy, rule=make_rule(request.verify),
    )
    names = ["plain", *(["plain_padded"] if request.plain_padded else []), *(ARM_OF_MODE[m] for m in request.modes)]
    plans = plans_of_ours(
        speculator, options, adapter=request.adapter, make_learner=make_learner, names=names
    ) + rival_plans(
        speculator.model, speculator.tokenizer, options, split_layer=speculator.split.split_layer,
        draft_checkpoint=request.draft_checkpoint, names=request.rivals,
    )
    run_spec_bench(
        plans, load_questions(request.questions), Conversation(speculator.tokenizer, request.template),
        speculator=speculator, folder=folder, console=console,
        settings=BenchSettings(
            model=request.model, adapter=request.adapter and str(request.adapter),
            num_draft_tokens=request.num_draft_tokens, policy=request.policy, limit_per_task=request.limit,
            max_new_tokens=request.max_new_tokens, temperature=request.temperature, batch_size=request.batch_size,
            repetitions=request.repetitions,
        ),
    )
    return make_report(
        folder, tokenizer=speculator.tokenizer, spec_bench_dir=spec_bench_dir, training_length=training_length,
        console=console,
    )


def report_session(
    folder: Path, *, console: Console, spec_bench_dir: Path | None = None, training_length: int | None = None
) -> dict[str, Any]:
    """The report of what lies in `folder`, made anew. Raises ValueError when no run does."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{folder} must be the --output of dvi bench spec-bench, got a folder without {RUN_FILE}")
    model = json.loads(path.read_text(encoding="utf-8"))["settings"]["model"]
    return make_report(
        folder, tokenizer=read_tokenizer(model), spec_bench_dir=spec_bench_dir,
        training_length=training_length, console=console,
    )


def bench_paper(
    config: PaperConfig, adapter: Path, *, make_learner: MakeLearner, console: Console
) -> dict[str, Any]:
    """Spec-Bench at the end of `dvi bench paper`, with the drafter in `adapter`, in output.folder/spec_bench."""
    bench = config.bench
    request = SpecBenchRequest(
        model=config.model.path, adapter=adapter, rivals=bench.rivals, template=bench.template, limit=bench.limit,
        repetitions=bench.repetitions, max_new_tokens=bench.max_new_tokens, temperature=bench.temperature,
        num_draft_tokens=config.draft.num_draft_tokens, policy=config.draft.policy, dtype=config.model.dtype,
        device=config.model.device, num_threads=config.model.num_threads,
    )
    return run_session(
        request, Path(config.output.folder) / "spec_bench", make_learner=make_learner, console=console
    )
