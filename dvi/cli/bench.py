"""The `dvi bench` verbs: spec-bench, report, step, lengths, margin, ablation, drift, sweep, paper.

Knows arguments; every verb imports what it needs when it runs. Training comes in here, as functions that are passed
down: nothing else under `dvi.bench` knows of it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dvi.cli.section_options import listed, options_of, read_options
from dvi.config import checked, load_config
from dvi.settings import (
    LengthSettings,
    MarginSettings,
    PaperConfig,
    RuleName,
    SpecBenchSettings,
    StepSettings,
    TrainConfig,
)
from dvi.signals import SIGNAL_BASE
from dvi.terminal import finish, make_console, quieten_transformers

if TYPE_CHECKING:
    from collections.abc import Callable

    from dvi.decode.speculator import SelfSpeculator
    from dvi.learner import Learner



def _written(numbers: tuple[float, ...]) -> str:
    """As an option has them."""
    return ",".join(map(str, numbers))


app = typer.Typer(
    no_args_is_help=True, help="Measure how fast it is, against whom, and if learning helps.",
    rich_markup_mode=None, pretty_exceptions_enable=False,
)

OutputOption = Annotated[Path, typer.Option(help="Folder of the results; a second start in it goes on.")]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="YAML", help="A file of the run's settings, such as those of configs/bench.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as train.lr=1e-4 or model.num_threads=1.")
]
SpecBenchDirOption = Annotated[
    Path | None, typer.Option(help="A Spec-Bench checkout, whose own speed.py is then run too.")
]
TrainingLengthOption = Annotated[
    int | None, typer.Option(help="Tokens of the model's training texts, shown beside the prompts' lengths.")
]


@app.command("spec-bench")
@options_of(SpecBenchSettings, but=("warmups",))
def spec_bench(
    output: OutputOption,
    model: Annotated[str, typer.Option(help="A folder, a hub name or a .gguf file.")],
    overrides: OverridesArgument = None,
    verify_rule: Annotated[
        RuleName | None,
        typer.Option(help="What our arms that draft verify by; all but strict, the default, are lossy: stamped so."),
    ] = None,
    spec_bench_dir: SpecBenchDirOption = None,
    training_length: TrainingLengthOption = None,
    **options: Any,
) -> None:
    """Spec-Bench, beside plain decoding and rivals. In its own format, all in one process.

    KEY=VALUE: settings of the learner of the online modes, such as train.schedule=kl_only or train.budget=0.2, and of
    a lossy rule, such as verify.margin_theta=0.84.
    """
    quieten_transformers()
    config = load_config(None, [*(overrides or ()), *([f"verify.rule={verify_rule}"] if verify_rule else ())])
    asked = {"model": model, "verify": asdict(config.verify)} | read_options(SpecBenchSettings, options)
    settings = checked(asked, SpecBenchSettings)
    from dvi.bench.session import run_session

    report = run_session(
        settings, output, make_learner=_learner_maker(config.train), console=make_console(),
        spec_bench_dir=spec_bench_dir, training_length=training_length,
    )
    finish("bench spec-bench", **report)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --output of dvi bench spec-bench.")],
    spec_bench_dir: SpecBenchDirOption = None,
    training_length: TrainingLengthOption = None,
) -> None:
    """Compute a run's tables and pictures anew. Of a finished run of spec-bench, or an unfinished one."""
    quieten_transformers()
    from dvi.bench.session import report_session

    found = report_session(
        folder, console=make_console(), spec_bench_dir=spec_bench_dir, training_length=training_length
    )
    finish("bench report", **found)


@app.command()
@options_of(StepSettings)
def step(
    model: Annotated[str, typer.Option(help="A folder, a hub name or a .gguf file.")],
    **options: Any,
) -> None:
    """Where a step's time goes. Plain, exact and scripted decoding, transformers, and a round's cost by part."""
    quieten_transformers()
    from dvi.bench.step import bench_step
    from dvi.settings import LearningSettings

    settings = StepSettings(model=model, **read_options(StepSettings, options))
    learning = LearningSettings(rounds_per_step=10**9)  # all of a learner but its steps
    finish("bench step", **bench_step(settings, make_learner=_learner_maker(learning), console=make_console()))


@app.command()
@options_of(LengthSettings, but=("batch_sizes",))
def lengths(
    output: OutputOption,
    model: Annotated[str, typer.Option(help="A folder, a hub name or a .gguf file.")],
    batches: Annotated[str, typer.Option(help="A list of batch sizes.")] = _written(LengthSettings.batch_sizes),
    **options: Any,
) -> None:
    """How many tokens to draft. None, a fixed number and the rules that choose, at several batch sizes."""
    quieten_transformers()
    from dvi.bench.length_policies import bench_lengths

    settings = LengthSettings(
        model=model, batch_sizes=tuple(_numbers(batches, "--batches")), **read_options(LengthSettings, options)
    )
    finish("bench lengths", **bench_lengths(settings, output, console=make_console()))


@app.command()
@options_of(MarginSettings)
def margin(
    output: Annotated[Path, typer.Option(help="Folder of the results, without any yet.")],
    model: Annotated[str, typer.Option(help="A folder, a hub name or a .gguf file.")],
    thetas: Annotated[str, typer.Option(help="A list of margins, an arm each.")] = _written(MarginSettings.thetas),
    **options: Any,
) -> None:
    """What lossy verify rules gain and cost. Speed, agreement with strict output, perplexity, task score."""
    quieten_transformers()
    from dvi.bench.margin import bench_margin

    margins = tuple(_numbers(thetas, "--thetas", kind=float)) if thetas else ()
    settings = MarginSettings(model=model, thetas=margins, **read_options(MarginSettings, options))
    finish("bench margin", **bench_margin(settings, output, console=make_console()))


@app.command()
def ablation(
    config: ConfigArgument,
    output: OutputOption,
    overrides: OverridesArgument = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="NAME, or NAME:key=value,... with learning settings; may be given again. Default: all."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="A list of seeds.")] = "0,1,2",
) -> None:
    """Whether learning helps. Loss schedules against each other and against learning offline from the same data."""
    quieten_transformers()
    from trainers.experiments.ablation import DEFAULT_ARMS, run_ablation

    found = run_ablation(
        _strict_config(config, overrides), arms=list(arm or DEFAULT_ARMS), seeds=_numbers(seeds, "--seeds"),
        folder=output, console=make_console(),
    )
    finish("bench ablation", **found)


@app.command()
def drift(
    config: ConfigArgument,
    output: OutputOption,
    overrides: OverridesArgument = None,
    stream: Annotated[
        list[str] | None, typer.Option(help="Domains in turn, such as math,medical,math, or mixed; may be given again.")
    ] = None,
    variants: Annotated[str, typer.Option(help="A list of full, no_reservoir, no_wakeup, full_auto.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of DOMAIN.jsonl files besides the bundled ones.")] = None,
) -> None:
    """When the traffic changes. How soon the drafter follows, and what it forgets."""
    quieten_transformers()
    from trainers.experiments.domain_shift import DEFAULT_STREAMS, VARIANTS, run_drift

    found = run_drift(
        _strict_config(config, overrides), streams=list(stream or DEFAULT_STREAMS),
        variants=list(listed(variants, VARIANTS, "--variants") or VARIANTS), folder=output, data=data,
        console=make_console(),
    )
    finish("bench drift", **found)


@app.command()
def sweep(
    config: ConfigArgument,
    output: OutputOption,
    overrides: OverridesArgument = None,
    split_layers: str = "0,1,2",
    draft_lengths: str = "2,4,6",
    ranks: str = "8,32",
    draft_vocabs: Annotated[str, typer.Option(help="Sizes of the draft vocabulary, 0 is the whole.")] = "0,1024",
) -> None:
    """Which drafter pays. Split layer, draft length, rank and draft vocabulary: acceptance, cost and speed by each."""
    quieten_transformers()
    from trainers.experiments.sweep import run_sweep

    found = run_sweep(
        _strict_config(config, overrides), split_layers=_numbers(split_layers, "--split-layers"),
        draft_lengths=_numbers(draft_lengths, "--draft-lengths"), ranks=_numbers(ranks, "--ranks"),
        draft_vocab_sizes=_numbers(draft_vocabs, "--draft-vocabs"), folder=output, console=make_console(),
    )
    finish("bench sweep", **found)


@app.command()
def paper(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """The paper's experiment. Train online from a stream of prompts, export the drafter and run Spec-Bench with it."""
    quieten_transformers()
    from dvi.bench.session import bench_paper
    from trainers.jobs.paper_run import run_paper

    console = make_console()

    def run_bench(settings: PaperConfig, adapter: Path) -> dict[str, object]:
        return bench_paper(settings, adapter, make_learner=_learner_maker(settings.train), console=console)

    summary = run_paper(
        _strict_config(config, overrides, schema=PaperConfig), run_bench=run_bench, console=console
    )
    finish("bench paper", **summary)
    if summary["status"] == "interrupted":
        raise typer.Exit(SIGNAL_BASE + summary["training"]["signal"])


def _learner_maker(learning: Any) -> Callable[[SelfSpeculator], Learner]:
    def make_learner(speculator: SelfSpeculator) -> Learner:
        from trainers.learning.online import OnlineTrainer

        return OnlineTrainer(speculator, learning)

    return make_learner


def _strict_config(config: Path, overrides: list[str] | None, *, schema: type[TrainConfig] = TrainConfig) -> Any:
    """Settings of an experiment. Raises ValueError for a lossy rule: its acceptances are no merit of a drafter's."""
    settings = load_config(config, overrides or (), schema=schema)
    if settings.verify.rule != "strict":
        raise ValueError(
            f"verify.rule must be 'strict' where drafters are compared, got {settings.verify.rule!r}; dvi bench margin "
            "measures what a lossy rule does"
        )
    return settings


def _numbers(text: str, option: str, *, kind: type[int] | type[float] = int) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}; try 0,1,2") from None
