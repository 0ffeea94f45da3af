"""A Spec-Bench session as the command line asks for it: model, arms, run and report, in this order.

Knows which piece does what; all work is theirs. Sees training only as a function that makes a learner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dvi.bench.arms import ArmOptions, MakeLearner, plans_of_ours
from dvi.bench.harness import load_speed
from dvi.bench.questions import Conversation, load_questions
from dvi.bench.report import make_report
from dvi.bench.rivals import rival_plans
from dvi.bench.spec_bench import RUN_FILE, run_spec_bench
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import make_rule
from dvi.model.pretrained import read_tokenizer
from dvi.settings import PaperConfig, SpecBenchSettings

ARM_OF_MODE = {"frozen": "speculative", "online": "online", "online_untrained": "online_untrained"}


def run_session(
    settings: SpecBenchSettings, folder: Path, *, make_learner: MakeLearner, console: Console,
    spec_bench_dir: Path | None = None, training_length: int | None = None,
) -> dict[str, Any]:
    """Runs what was asked into `folder`, going on with what is there, and returns the report's dict.

    Raises ValueError for what does not fit together, before anything is decoded.
    """
    if spec_bench_dir is not None:
        load_speed(spec_bench_dir)  # a folder that is no checkout should not come out after hours of decoding
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    speculator = SelfSpeculator.from_pretrained(
        settings.model, adapter=settings.adapter, split_layer=settings.split_layer, dtype=settings.dtype,
        device=settings.device, num_draft_tokens=settings.num_draft_tokens, policy=settings.policy,
    )
    options = ArmOptions(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, batch_size=settings.batch_size,
        num_draft_tokens=settings.num_draft_tokens, policy=settings.policy, rule=make_rule(settings.verify),
    )
    names = ["plain", *(["plain_padded"] if settings.plain_padded else []), *(ARM_OF_MODE[m] for m in settings.modes)]
    plans = plans_of_ours(
        speculator, options, adapter=settings.adapter, make_learner=make_learner, names=names
    ) + rival_plans(
        speculator.model, speculator.tokenizer, options, split_layer=speculator.split.split_layer,
        draft_checkpoint=settings.draft_checkpoint, names=settings.rivals,
    )
    run_spec_bench(
        plans, load_questions(settings.questions), Conversation(speculator.tokenizer, settings.template),
        speculator=speculator, folder=folder, settings=settings, console=console,
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
    settings = SpecBenchSettings(
        **vars(config.bench), model=config.model.path, adapter=adapter, num_draft_tokens=config.draft.num_draft_tokens,
        policy=config.draft.policy, dtype=config.model.dtype, device=config.model.device,
        num_threads=config.model.num_threads,
    )
    return run_session(
        settings, Path(config.output.folder) / "spec_bench", make_learner=make_learner, console=console
    )
