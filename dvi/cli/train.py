"""The verbs of a drafter's life: init writes its settings, warmup and train teach it, export hands it on.

Knows arguments and exit codes; every verb imports what it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dvi.cli.arguments import load_arguments
from dvi.cli.options import AdapterOption, PrintConfigOption, ResumeOption, SourceArgument
from dvi.explained_yaml import explained_yaml
from dvi.settings import TrainConfig, WarmupConfig
from dvi.signals import SIGNAL_BASE
from dvi.terminal import finish, finish_job, make_console, quieten_transformers, say


def init(
    place: Annotated[Path, typer.Argument(metavar="[FILE|FOLDER]", help="A new .yaml file, or its folder.")] = Path(),
    verb: Annotated[Literal["serve", "train"], typer.Option("--for", help="The verb that it is for.")] = "serve",
    model: Annotated[str | None, typer.Option(help="Its model: a folder, a hub name or a .gguf file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented file of settings to start from."""
    from dvi.cli.starter import write_starter

    path = write_starter(place, verb=verb, model=model, overwrite=force)
    say(f"wrote {path}: dvi {verb} {path}")
    finish("init", file=str(path), verb=verb)


def train(
    source: SourceArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS|KEY=VALUE", help="Files of prompts, and settings such as train.lr=1e-4."),
    ] = None,
    print_config: PrintConfigOption = False,
    resume: ResumeOption = False,
) -> None:
    """Serve a stream of prompts with a drafter that learns from them."""
    settings = load_arguments(
        source, arguments or (), schema=TrainConfig, verb="train", options={"output.resume": resume or None}
    )
    if print_config:
        print(explained_yaml(settings), end="")  # and no JSON after it: what is printed is a configuration file
        return
    quieten_transformers()
    from trainers.jobs.train import run_training

    summary = run_training(settings, console=make_console())
    finish_job("train", summary)
    if summary["signal"] is not None:
        raise typer.Exit(SIGNAL_BASE + summary["signal"])


def warmup(
    source: SourceArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS|KEY=VALUE", help="Files of prompts, and settings such as warmup.source=texts."),
    ] = None,
    print_config: PrintConfigOption = False,
    resume: ResumeOption = False,
) -> None:
    """Train a drafter on a corpus before it serves."""
    settings = load_arguments(
        source, arguments or (), schema=WarmupConfig, verb="warmup", options={"output.resume": resume or None}
    )
    if print_config:
        print(explained_yaml(settings), end="")
        return
    quieten_transformers()
    from trainers.jobs.warmup import run_warmup

    summary = run_warmup(settings, console=make_console())
    finish_job("warmup", summary)
    if summary["signal"] is not None:
        raise typer.Exit(SIGNAL_BASE + summary["signal"])


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; with --server a name for it there.")],
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run, or of a server: its drafter, or its newest checkpoint's.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Of a running server; its key comes from DVI_ADMIN_KEY.", metavar="URL")
    ] = None,
    adapter: AdapterOption = None,
    model: Annotated[str | None, typer.Option(help="The base model; default: the one it was trained on.")] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="As a draft model that transformers loads by itself; lora_head only.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that is there, or with --server an adapter of that name.")
    ] = False,
) -> None:
    """Write a drafter as an adapter, or as a model of its own."""
    num_sources = sum(source is not None for source in (run, server, adapter))
    if num_sources != 1:
        raise ValueError(f"one of --run, --server and --adapter must be given, got {num_sources or 'none'}")
    if server is not None:
        if standalone or model is not None:
            raise ValueError("--standalone and --model go with --run and --adapter; a server saves an adapter as it is")
        from dvi.serving.client import ask_to_save

        saved = ask_to_save(server, str(folder), overwrite=force)
        say(f"{server} saved version {saved['version']} in its folder {saved['folder']}")
        finish("export", **saved)
        return
    if folder.exists() and not (force or (folder.is_dir() and not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} is there already; --force replaces an export, another name keeps both")
    quieten_transformers()
    if run is not None:
        from trainers.jobs.run_folder import load_run

        speculator, metrics, config = load_run(run, model=model)
    else:
        from dvi.decode.speculator import SelfSpeculator
        from dvi.model.adapter_store import read_manifest

        manifest = read_manifest(adapter)
        metrics, config = manifest.metrics, manifest.config
        speculator = SelfSpeculator.from_pretrained(
            model or manifest.base_model, revision=manifest.base_revision, dtype=manifest.dtype, adapter=adapter
        )
    if standalone:
        from dvi.model.standalone_model import export_standalone

        export_standalone(
            folder, speculator.drafter, speculator.split, tokenizer=speculator.tokenizer, overwrite=force
        )
    else:
        speculator.save_drafter(folder, metrics=metrics, config=config)
    say(f"wrote {folder}: {speculator.drafter.config.kind}, version {speculator.drafter.version}")
    finish(
        "export", folder=str(folder), standalone=standalone, kind=speculator.drafter.config.kind,
        drafter_version=speculator.drafter.version, base_model=speculator.model.config.name_or_path,
    )
